"""Trackers: accelerate sends the figures of metrics.jsonl to what the user watches runs with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from tqdm import tqdm

from recipe.base.errors import UserError, did_you_mean

PROJECT = "pretraining"  # that the runs stand side by side in


def check_trackers(report_to: str | list[str]) -> list[str]:
    """The trackers' names; none of `none`.

    Raises:
        UserError: a name that accelerate does not know, or a tracker that is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else report_to
    if names == ["none"]:
        return []
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            hint = did_you_mean(name, LOGGER_TYPE_TO_CLASS) or f"; known are {', '.join(LOGGER_TYPE_TO_CLASS)}"
            raise UserError(f"`report_to` names {name!r}: trackers, or none alone{hint}")
        if name not in installed:
            raise UserError(f"`report_to` names {name}, which is not installed; run: pip install {name}")
    return names


def flatten(record: dict[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of a record and of the records in it, named by their path."""
    flat = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}/{name}")
        elif isinstance(value, int | float):
            flat[f"{prefix}/{name.removeprefix('eval_')}"] = value
    return flat


@contextmanager
def tracking(accelerator: Accelerator, run: Path, arguments: dict[str, Any]) -> Iterator[None]:
    """Start the accelerator's trackers, on the main process, and close them in the end.

    Args:
        run: the run's folder, whose name the trackers show.
        arguments: of the run, shown beside its curves.

    Raises:
        UserError: a tracker cannot be started; for want of a login, say.
    """
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in arguments.items()}
    name = {"name": run.resolve().name}
    try:
        accelerator.init_trackers(PROJECT, plain, {"trackio": name | {"resume": "allow"}, "wandb": name})
    except Exception as error:  # each has its own
        raise UserError(f"`report_to`: a tracker cannot be started: {type(error).__name__}: {error}") from error
    try:
        yield
    finally:
        call_trackers(accelerator, "finish")


def log_metrics(accelerator: Accelerator, record: dict[str, Any]) -> None:
    """A line of metrics.jsonl to all trackers: `train/loss` or `eval/loss`, as `Trainer` names them, and of the corpora
    `corpora/books/tokens`."""
    if accelerator.is_main_process:
        values = {name: value for name, value in record.items() if name not in ("step", "corpora")}
        values = flatten(values, "eval" if "eval_loss" in record else "train")
        call_trackers(accelerator, "log", values | flatten(record.get("corpora", {}), "corpora"), step=record["step"])


def call_trackers(accelerator: Accelerator, method: str, *args: Any, **kwargs: Any) -> None:
    """Call a method of all trackers; one that fails is left out from then on, with a warning."""
    for tracker in list(accelerator.trackers):
        try:
            getattr(tracker, method)(*args, **kwargs)
        except Exception as error:  # each has its own, and none is worth a run
            accelerator.trackers.remove(tracker)
            tqdm.write(f"warning: {tracker.name} has failed and gets no more: {type(error).__name__}: {error}")
