"""What lies where in the folder of a run, and what it leaves there beside checkpoints and model.

This loads no torch: a process that pushes checkpoints takes its seconds from training.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from recipe.arguments import PretrainArguments
from recipe.base.errors import UserError, raising_damaged_file
from recipe.base.files import check_output_dir, read_yaml, to_yaml, write_atomically
from recipe.base.progress import print_line

MANIFEST = "manifest.json"
STATE_FILES = ("optimizer.pt", "state.json", MANIFEST)  # of a checkpoint, beside the model
PREFIX = "step-"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"{PREFIX}{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by update, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def read_records(file: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl, none if it is not there; a last line torn by a crash is left out.

    Raises:
        UserError: a line that is no record of an update.
    """
    if not file.exists():
        return []
    with raising_damaged_file(file, "take out what is no record; a run can go on without"):
        # What stands behind the last line break was not written to its end.
        records = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
        for number, record in enumerate(records, start=1):
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError(f"line {number} is no JSON object with a whole number as `step`")
    return records


def read_step(run: Path) -> int:
    """Updates done, as status.json has it.

    Raises:
        UserError: it does not say so.
    """
    with raising_damaged_file(run / "status.json", 'put {"step": N} into it, with the updates that are done'):
        step = json.loads((run / "status.json").read_text())["step"]
        if type(step) is not int or step < 0:
            raise ValueError(f"`step` is {step!r}")
    return step


def read_config(run: Path) -> dict[str, Any]:
    """config.yaml of a run; what it lacks, since the code was older, has its default."""
    defaults = {option.name: option.default for option in fields(PretrainArguments) if option.default is not MISSING}
    return defaults | read_yaml(run / "config.yaml")


class RunDirectory:
    """The folder of one run; only the main process writes to it.

    Args:
        path: the folder.
        is_main: whether this is the main process.
        pids: of all training processes, for whoever has to signal them.
    """

    def __init__(self, path: str | Path, is_main: bool, pids: list[int]) -> None:
        self.path = Path(path)
        self.is_main = is_main
        self.pids = pids
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.loss_plot = self.path / "loss.png"
        self.unwritten = b""  # of metrics.jsonl

    def check(self, resume_from_checkpoint: str | None) -> None:
        """
        Raises:
            UserError: the folder cannot be written, or holds a run other than the one to resume.
        """
        check_output_dir(self.path)
        holds_run = any(
            (self.path / name).exists() for name in ("status.json", "metrics.jsonl", "checkpoints", "model")
        )
        goes_on = resume_from_checkpoint == "latest" or (
            resume_from_checkpoint is not None
            and Path(resume_from_checkpoint).resolve().parent == self.checkpoints.resolve()
        )
        if holds_run and not goes_on:
            raise UserError(
                f"`output_dir` {self.path} already holds a run; go on with it by --resume_from_checkpoint latest, "
                "or choose another folder"
            )

    def log(self, lines: list[str]) -> None:
        """Print lines at once, on the main process."""
        for line in lines if self.is_main else []:
            print_line(line)

    def describe(self) -> list[str]:
        """Where everything of a finished run is, and what to type next."""
        return [
            f"model: {self.model}",
            f"loss plot: {self.loss_plot}",
            f"checkpoints, metrics and config: {self.path}",
            f"next: accelerate launch finetune_glue.py --config recipe/configs/glue/quick.yaml "
            f"--model_name_or_path {self.model} --output_dir {self.path / 'glue'}",
        ]

    def write_config(self, arguments: dict[str, Any], environment: dict[str, Any]) -> None:
        """config.yaml: the resolved arguments, and under `environment` what they ran on. `--config` reads it back."""
        if self.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config_file, to_yaml(arguments | {"environment": environment}))

    def write_status(self, state: str, step: int, reason: str | None = None) -> None:
        """status.json: `state` is running, complete, preempted or failed; `pids` are the training processes'."""
        if self.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            status = {"state": state, "step": step, "reason": reason, "pids": self.pids}
            try:
                write_atomically(self.path / "status.json", json.dumps(status) + "\n")
            except OSError as error:
                print(f"warning: status.json does not say {state} after update {step:,}: {error}", file=sys.stderr)

    @contextmanager
    def noting_failure(self, step: Callable[[], int]) -> Iterator[None]:
        """Have status.json say what ended the run, and after which update, if anything does."""
        try:
            yield
        except BaseException as error:
            self.write_status("failed", step(), f"{type(error).__name__}: {error}")
            raise

    def append_metrics(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl; on a full disk it waits for the next one."""
        if self.is_main:
            self.unwritten += (json.dumps(record) + "\n").encode()
            try:
                with self.metrics_file.open("ab", buffering=0) as file:
                    self.unwritten = self.unwritten[file.write(self.unwritten) :]
            except OSError as error:
                print(f"warning: metrics.jsonl waits for room: {error}", file=sys.stderr)

    def read_metrics(self) -> list[dict[str, Any]]:
        return read_records(self.metrics_file)

    def cut_metrics(self, step: int) -> None:
        """Forget the lines of later updates, which a resume from `step` writes again."""
        if self.is_main and self.metrics_file.exists():
            self.unwritten = b""
            kept = [record for record in self.read_metrics() if record["step"] <= step]
            write_atomically(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))
