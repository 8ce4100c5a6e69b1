"""The folder of a run: where everything lies in it, and the files beside checkpoints and model.

This loads no torch, since the seconds of a process that pushes checkpoints are taken from training.
"""

import json
import platform
import re
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recipe.arguments import PretrainArguments
from recipe.base.errors import UserError, raising_damaged_file
from recipe.base.files import check_output_dir, read_yaml, to_yaml, write_atomically
from recipe.base.progress import print_line
from recipe.run.lock import RunLock, job_name
from recipe.run.stopping import handling_stop_signals, interrupt

HUB_SCHEME = "hub://"  # of a checkpoint on the hub
MANIFEST = "manifest.json"
STATE_FILES = ("optimizer.pt", "state.json", MANIFEST)  # of a checkpoint, beside the model
AVERAGE_FILE = "average.json"  # beside averaged weights: the `steps` of the mean, and evaluations of it and the last
DOWNLOAD_FOLDER = ".from-hub"  # among the checkpoints, of a download that has not ended
HEARTBEAT_SECONDS = 60  # between two writings of status.json while a run makes progress


def checkpoint_path(folder: Path, step: int) -> Path:
    """Name the folder of the checkpoint of an update."""
    return folder / f"step-{step:08d}"


def average_path(run: Path, steps: list[int]) -> Path:
    """Name the folder of the mean of the weights after some updates."""
    return run / "averages" / f"step-{steps[-1]:08d}-mean-of-{len(steps)}"


def checkpoint_step(path: Path) -> int | None:
    """Return the update that a checkpoint's folder is named by; None for a folder of any other name."""
    name = re.fullmatch(r"step-([0-9]+)", path.name)
    return int(name[1]) if name else None


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder by their updates, the oldest first; other folders, copies too, are none."""
    found = [(step, path) for path in folder.glob("step-*") if (step := checkpoint_step(path)) is not None]
    return [path for _, path in sorted(found) if path.is_dir()]


def read_records(file: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, none if it is not there, without a last line torn by a crash."""
    if not file.exists():
        return []
    with raising_damaged_file(file, "remove the lines that are no records; a run can resume without them"):
        # What follows the last line break was not written to its end.
        records = [json.loads(line) for line in file.read_text("utf-8").split("\n")[:-1]]
        for number, record in enumerate(records, start=1):
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError(f"line {number} is no JSON object with a whole number as `step`")
    return records


def read_step(run: Path) -> int:
    """Read from status.json the update of the newest checkpoint, or else how many are done; without, a `UserError`."""
    with raising_damaged_file(run / "status.json", 'write {"step": N} into it, with the number of updates done'):
        status = json.loads((run / "status.json").read_text("utf-8"))
        step = status["step"] if status.get("saved_step") is None else status["saved_step"]
        if type(step) is not int or step < 0:
            raise ValueError(f"`step` is {step!r}")
    return step


def read_config(run: Path) -> dict[str, Any]:
    """Read config.yaml of a run; a field that it lacks, since the code was older, has its default."""
    defaults = {option.name: option.default for option in fields(PretrainArguments) if option.default is not MISSING}
    config = {"corpora": [], "eval_corpora": []} | defaults | read_yaml(run / "config.yaml")
    return config | {"environment": {"hub_sources": [], "changes": []} | (config.get("environment") or {})}


class LostFolderError(UserError):
    """Another process holds the folder of the run now, or it is gone: nothing can be saved there any more."""


class RunDirectory:
    """The folder of one run, to which only the main process writes.

    Once the process has lost the folder, see `RunLock`, nothing more is written to it.

    Attributes:
        pids: of all training processes.
        step: updates that are done; None before the run has begun.
        saved_step: update of the newest complete checkpoint.
        loss: of the last line of metrics.jsonl that has one.
        notice: of the last evaluation there, about what stands in the way of the run; None if nothing does.
    """

    def __init__(self, path: str | Path, is_main: bool, pids: list[int]) -> None:
        self.path = Path(path)
        self.lock = RunLock(self.path)
        self.step: int | None = None
        self.saved_step: int | None = None
        self.loss: float | None = None
        self.notice: str | None = None
        self.status_written = 0.0
        self.status_lock = threading.Lock()  # training and the thread that writes checkpoints share the file
        self.is_main = is_main
        self.pids = pids
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.config_file = self.path / "config.yaml"
        self.status_file = self.path / "status.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.loss_plot = self.path / "loss.png"
        self.unwritten_metrics = b""

    def check(self, resume_from_checkpoint: str | None) -> None:
        """Refuse a folder that cannot be written, or in which `resume_from_checkpoint` cannot be meant.

        Raises:
            UserError: it holds a run other than the one to resume; or `latest` would begin anew over what is left of a
                run whose checkpoints are gone.
        """
        check_output_dir(self.path)
        wanted, has_checkpoints = resume_from_checkpoint, bool(list_checkpoints(self.checkpoints))
        unfinished = self.checkpoints / DOWNLOAD_FOLDER
        is_unfinished = unfinished.is_dir() and not has_checkpoints
        if wanted == "latest":
            if is_unfinished:
                raise UserError(
                    f"`resume_from_checkpoint` is latest, and {unfinished} is a download that has not ended; give the "
                    f"same hub:// address again to go on with it, or remove {self.path} to start anew"
                )
            if not has_checkpoints and (evidence := self.evidence_of_checkpoints()):
                raise UserError(
                    f"`resume_from_checkpoint` is latest, and {self.checkpoints} holds no checkpoint, though "
                    f"{evidence}; bring the checkpoints back (is a disk not mounted?), or choose another `output_dir` "
                    "to start anew"
                )
            return
        if wanted and Path(wanted).resolve().parent == self.checkpoints.resolve():
            return
        if is_unfinished and wanted and wanted.startswith(HUB_SCHEME) and not self.status_file.exists():
            return
        if any((self.path / name).exists() for name in ("status.json", "metrics.jsonl", "checkpoints", "model")):
            remedy = "resume it with --resume_from_checkpoint latest, or choose another folder"
            raise UserError(f"`output_dir` {self.path} already holds a run; {remedy}")

    def evidence_of_checkpoints(self) -> str | None:
        """Say by what a run must have had checkpoints in this folder; None if nothing tells of any."""
        if self.checkpoints.is_symlink() and not self.checkpoints.exists():
            return f"{self.checkpoints} is a link to {self.checkpoints.readlink()}, which is not there"
        if self.model.is_dir():
            return f"{self.model} is the model of a complete run"
        if self.status_file.exists():
            with raising_damaged_file(self.status_file, "remove it if no checkpoint was written yet"):
                status = json.loads(self.status_file.read_text("utf-8"))
                if status.get("saved_step") is not None:
                    return f"{self.status_file.name} says that update {status['saved_step']:,} was saved"
                return None
        steps = [record["step"] for record in self.read_metrics()]
        save_steps = read_config(self.path)["save_steps"] if self.config_file.exists() else 0
        if steps and max(steps) >= save_steps:
            return f"{self.metrics_file.name} tells of {max(steps):,} updates"
        return None

    def check_held(self) -> None:
        """Raise a `LostFolderError` if this process has lost the folder."""
        if loss := self.lock.loss():
            raise LostFolderError(f"{loss}; this process stops without saving, and its last checkpoint stays as it is")

    def log(self, lines: list[str]) -> None:
        """Print lines at once, on the main process."""
        for line in lines if self.is_main else []:
            print_line(line)

    def describe(self) -> list[str]:
        """Say where everything of a finished run lies, and what to type next."""
        return [
            f"model: {self.model}",
            *([f"loss plot: {self.loss_plot}"] if self.loss_plot.exists() else []),
            f"checkpoints, metrics and config: {self.path}",
            "next: accelerate launch finetune_glue.py --config recipe/configs/glue/quick.yaml "
            + shlex.join(["--model_name_or_path", str(self.model), "--output_dir", str(self.path / "glue")]),
        ]

    def write_config(self, arguments: dict[str, Any], environment: dict[str, Any]) -> None:
        """Write config.yaml: the resolved arguments, which `--config` reads back, and the `environment` they ran in.

        Raises:
            UserError: it cannot be written.
        """
        if self.is_main:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                write_atomically(self.config_file, to_yaml(arguments | {"environment": environment}))
            except OSError as error:
                problem = f"{self.config_file} cannot be written: {error}"
                raise UserError(f"{problem}; put that right or name another `output_dir`") from error

    def write_status(self, state: str, step: int, reason: str | None = None) -> None:
        """Write status.json; `state` is running, complete, preempted or failed."""
        self.step = step
        if not self.is_main or self.lock.loss():
            return
        status = {"state": state, "step": step, "saved_step": self.saved_step, "loss": self.loss, "reason": reason}
        status["notice"] = self.notice
        status |= {"time": datetime.now(UTC).isoformat(timespec="seconds"), "host": platform.node(), "job": job_name()}
        text = json.dumps(status | {"pids": self.pids}) + "\n"
        with self.status_lock:
            self.status_written = time.monotonic()
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                try:
                    write_atomically(self.status_file, text)
                except OSError:
                    if not self.status_file.exists():
                        raise
                    # A full disk has no room for a new file, and has it for the contents of an old one.
                    with self.status_file.open("r+", encoding="utf-8") as file:
                        file.write(text)
                        file.truncate()
            except OSError as error:
                print(f"warning: status.json could not be set to {state} ({step:,} updates): {error}", file=sys.stderr)

    def heartbeat(self, step: int) -> None:
        """Record how many updates are done; status.json says so at least every `HEARTBEAT_SECONDS`."""
        self.step = step
        if time.monotonic() - self.status_written > HEARTBEAT_SECONDS:
            self.write_status("running", step)

    @contextmanager
    def noting_failure(self) -> Iterator[None]:
        """Record in status.json what ended a run that had begun, and after which update, if an exception did.

        A stop signal raises a KeyboardInterrupt here, and the run is preempted.
        """
        try:
            with handling_stop_signals(interrupt):
                yield
        except KeyboardInterrupt as error:
            if self.step is not None:
                self.write_status("preempted", self.step, str(error))
            raise
        except BaseException as error:
            if self.step is not None:
                self.write_status("failed", self.step, f"{type(error).__name__}: {error}")
            raise

    def note(self, record: dict[str, Any]) -> None:
        """Take from a line of metrics.jsonl what status.json says of it."""
        self.loss = record.get("loss", self.loss)
        if "eval_loss" in record:
            self.notice = record.get("notice")

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; one that a full disk does not take is written with the next one."""
        self.note(record)
        if self.is_main and not self.lock.loss():
            self.unwritten_metrics += (json.dumps(record) + "\n").encode()
            try:
                with self.metrics_file.open("ab", buffering=0) as file:
                    self.unwritten_metrics = self.unwritten_metrics[file.write(self.unwritten_metrics) :]
            except OSError as error:
                print(f"warning: metrics.jsonl could not be written, and is tried again: {error}", file=sys.stderr)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read all lines of metrics.jsonl."""
        return read_records(self.metrics_file)

    def cut_metrics(self, step: int) -> None:
        """Remove the lines that a run writes again which goes on from `step`, or begins if that is 0."""
        if self.is_main and self.metrics_file.exists():
            self.unwritten_metrics = b""
            kept = [record for record in self.read_metrics() if record["step"] <= step and step]
            self.loss = self.notice = None
            for record in kept:
                self.note(record)
            write_atomically(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))
