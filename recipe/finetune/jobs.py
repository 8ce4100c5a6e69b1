"""The grid as jobs, shared among processes by files alone: no process ever waits for another's message.

A process takes the longest job that nobody works on (a lock tells), runs it, and adds a line to results.jsonl. What has
a line is never run again; a process that dies leaves its lock behind and its job to the others, or to the next start.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from recipe.base.errors import raising_damaged_file

POLL_SECONDS = 2.0  # between two looks for a job, where all that are left are being worked on


@dataclass(frozen=True, order=True)
class Job:
    """One fine-tuning run.

    Attributes:
        init: `pretrained`, or `mnli` for the best model of that task.
    """

    task: str
    init: str
    learning_rate: float
    batch_size: int
    seed: int

    def __str__(self) -> str:
        start = " from mnli" if self.init == "mnli" else ""
        return f"{self.task}{start}, lr {self.learning_rate:g}, batch {self.batch_size}, seed {self.seed}"

    @property
    def file_name(self) -> str:
        return f"{self.task}-{self.init}-{self.learning_rate!r}-{self.batch_size}-{self.seed}"


class Results:
    """results.jsonl, a line for each job that has ended, and the locks beside it.

    A line holds the job, its `state` (done or failed), for a done job `metrics`, `best_epoch`, `epochs`, `seconds` and
    `processes`, and for a failed one the `reason`. The file is replaced as a whole, so that no line is ever torn.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "results.jsonl"
        self.locks = folder / "locks"

    def read(self) -> dict[Job, dict[str, Any]]:
        if not self.file.exists():
            return {}
        with raising_damaged_file(self.file, "take out the lines that are wrong; their jobs are run again"):
            records = [json.loads(line) for line in self.file.read_text().splitlines()]
            return {Job(**record["job"]): record for record in records}

    def write(self, records: list[dict[str, Any]]) -> None:
        temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
        os.replace(temporary, self.file)

    def add(self, job: Job, **values: Any) -> None:
        with self.lock("results"):
            records = self.read() | {job: {"job": asdict(job)} | values}
            self.write(list(records.values()))

    def forget_failures(self) -> None:
        """Failed jobs are tried again by the next start."""
        with self.lock("results"):
            records = self.read()
            if kept := [record for record in records.values() if record["state"] == "done"]:
                self.write(kept)
            elif records:
                self.file.unlink()

    def lock(self, name: str, timeout: float = -1) -> FileLock:
        self.locks.mkdir(parents=True, exist_ok=True)
        return FileLock(self.locks / name, timeout=timeout)

    def gather_positions(self, jobs: list[Job], may_start: Callable[[Job], bool]) -> Iterator[Job]:
        """Jobs without a line that this process is to run, one at a time, until all have a line.

        Args:
            jobs: in the order to try them.
            may_start: whether what a job needs is there.
        """
        while missing := [job for job in jobs if job not in self.read()]:
            for job in missing:
                with contextlib.suppress(Timeout), self.lock(job.file_name, timeout=0):
                    if job not in self.read() and may_start(job):
                        yield job
                        break
            else:
                time.sleep(POLL_SECONDS)
