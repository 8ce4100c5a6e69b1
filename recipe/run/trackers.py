"""Trackers, to which accelerate sends the figures of metrics.jsonl."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from recipe.base.errors import UserError, describe_error, did_you_mean
from recipe.base.hashing import digest
from recipe.base.progress import print_line
from recipe.run.directory import RunDirectory
from recipe.run.metrics import COUNTERS

CHARTED = {"loss", "perplexity", "learning_rate", "grad_norm", "tokens_per_second"}
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


@contextmanager
def tracking(accelerator: Accelerator, run: RunDirectory, arguments: dict[str, Any]) -> Iterator[None]:
    """Start the trackers on the main process, or raise a `UserError`, and close them at the end."""
    start_trackers(accelerator, run, arguments)
    try:
        yield
    finally:
        finish_trackers(accelerator)


def finish_trackers(accelerator: Accelerator) -> None:
    """Close the trackers."""
    call_trackers(accelerator, "finish")
    accelerator.trackers.clear()


def restart_trackers(accelerator: Accelerator, run: RunDirectory, arguments: dict[str, Any]) -> None:
    """Have the trackers go back with a run; what fails is a warning."""
    finish_trackers(accelerator)
    try:
        start_trackers(accelerator, run, arguments)
    except UserError as error:
        run.log([f"warning: {error}"])


def start_trackers(accelerator: Accelerator, run: RunDirectory, arguments: dict[str, Any]) -> None:
    """Start the trackers where training stands, so that no line is in one of their runs twice.

    TensorBoard hides what it has of later updates. Trackio cannot cut a run back: its earlier copy of this one is
    replaced by what metrics.jsonl holds. Others, as Weights & Biases, begin a run of their own at each start.

    Raises:
        UserError: a tracker cannot be started.
    """
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in arguments.items()}
    path = run.path.resolve()
    name = f"{path.name}-{digest(str(path))[:8]}"  # folders of one name are different runs
    settings = {
        "trackio": {"name": name},
        "tensorboard": {"purge_step": run.step + 1 if run.step else 0},
        "wandb": {"name": name, "group": name},
    }
    try:
        accelerator.init_trackers(PROJECT_NAME, plain, settings)
        for tracker in accelerator.trackers:
            if tracker.name == "trackio" and run.is_main and run.metrics_file.exists():
                replace_in_trackio(tracker, run, name)
    except Exception as error:  # each tracker raises its own
        raise UserError(f"`report_to`: a tracker cannot be started: {describe_error(error)}") from error


def replace_in_trackio(tracker: GeneralTracker, run: RunDirectory, name: str) -> None:
    """Delete the newest run of this name, which is the one that goes on, and send what metrics.jsonl keeps of it."""
    import trackio  # which is optional

    with contextlib.suppress(ValueError):  # there is no such project on this machine
        earlier = [one for one in trackio.Api().runs(PROJECT_NAME) if one.name == name]
        if earlier:
            earlier[-1].delete()
    for record in run.read_metrics():
        tracker.log(name_values(record), step=record["step"])


def name_values(record: dict[str, Any]) -> dict[str, float]:
    """Name what of a line of metrics.jsonl has a chart, as `eval/loss` or `train/learning_rate`.

    Counters of what goes wrong have one once they are not 0. The rest, such as what has been seen of each corpus, would
    come before the loss on the page of a tracker, in dozens of charts.
    """
    kind = "eval" if "eval_loss" in record else "train"
    named = {name.removeprefix("eval_"): value for name, value in record.items()}

    def has_chart(name: str, value: Any) -> bool:
        is_of_pairs = name.endswith(("_accuracy", "_loss")) and name != "unigram_loss"
        return value is not None and (name in CHARTED or is_of_pairs or (name in COUNTERS and value > 0))

    return {f"{kind}/{name}": value for name, value in named.items() if has_chart(name, value)}


def log_metrics(accelerator: Accelerator, record: dict[str, Any]) -> None:
    """Send a line of metrics.jsonl to all trackers."""
    if accelerator.is_main_process:
        call_trackers(accelerator, "log", name_values(record), step=record["step"])


def call_trackers(accelerator: Accelerator, method: str, *args: Any, **kwargs: Any) -> None:
    """Call a method of all trackers; one that fails is dropped, with a warning."""
    for tracker in list(accelerator.trackers):
        try:
            getattr(tracker, method)(*args, **kwargs)
        except (Exception, SystemExit) as error:  # each tracker raises its own, and none is worth a run
            accelerator.trackers.remove(tracker)
            print_line(f"warning: {tracker.name} has failed and receives no more lines: {describe_error(error)}")
