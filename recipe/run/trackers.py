"""Trackers, to which accelerate sends the figures of metrics.jsonl."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from tqdm import tqdm

from recipe.base.errors import UserError, describe_error, did_you_mean

PROJECT_NAME = "pretraining"  # the project in which trackers show the runs side by side


def check_trackers(report_to: str | list[str]) -> list[str]:
    """List the trackers' names, none for `none`; refuse those that accelerate does not know or are not installed."""
    names = [report_to] if isinstance(report_to, str) else report_to
    if names == ["none"]:
        return []
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            hint = did_you_mean(name, LOGGER_TYPE_TO_CLASS) or f"; known are {', '.join(LOGGER_TYPE_TO_CLASS)}"
            raise UserError(f"`report_to` names {name!r}; give trackers, or none alone{hint}")
        if name not in installed:
            raise UserError(f"`report_to` names {name}, which is not installed; run: pip install {name}")
    return names


def name_numbers(record: dict[str, Any], path: str = "") -> dict[str, float]:
    """Name the numbers of a record and of the records in it by their path."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            numbers |= name_numbers(value, f"{path}{name}/")
        elif isinstance(value, int | float):
            numbers[path + name.removeprefix("eval_")] = value
    return numbers


@contextmanager
def tracking(accelerator: Accelerator, run: Path, arguments: dict[str, Any]) -> Iterator[None]:
    """Start the trackers on the main process, or raise a `UserError`, and close them at the end."""
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in arguments.items()}
    name = {"name": run.resolve().name}
    try:
        accelerator.init_trackers(PROJECT_NAME, plain, {"trackio": name | {"resume": "allow"}, "wandb": name})
    except Exception as error:  # each tracker raises its own
        raise UserError(f"`report_to`: a tracker cannot be started: {describe_error(error)}") from error
    try:
        yield
    finally:
        call_trackers(accelerator, "finish")


def log_metrics(accelerator: Accelerator, record: dict[str, Any]) -> None:
    """Send a line of metrics.jsonl to all trackers, as `train/loss`, `eval/loss` or `corpora/books/tokens`."""
    if accelerator.is_main_process:
        kind = "eval" if "eval_loss" in record else "train"
        values = {name: value for name, value in record.items() if name not in ("step", "corpora")}
        values = name_numbers({kind: values, "corpora": record.get("corpora", {})})
        call_trackers(accelerator, "log", values, step=record["step"])


def call_trackers(accelerator: Accelerator, method: str, *args: Any, **kwargs: Any) -> None:
    """Call a method of all trackers; one that fails is dropped, with a warning."""
    for tracker in list(accelerator.trackers):
        try:
            getattr(tracker, method)(*args, **kwargs)
        except Exception as error:  # each tracker raises its own, and none is worth a run
            accelerator.trackers.remove(tracker)
            tqdm.write(f"warning: {tracker.name} has failed and receives no more lines: {describe_error(error)}")
