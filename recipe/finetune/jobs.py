"""The grid as jobs, shared among processes by files alone: no process ever waits for another's message.

A process claims the longest job that no other process has locked, runs it, and adds a line to results.jsonl. A job with
a line is never run again. The lock of a process that dies is free, for the others or for the next start.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from recipe.base.errors import raising_damaged_file
from recipe.base.files import write_atomically

POLL_SECONDS = 2.0  # between two looks for a job, while other processes run all that are left


@dataclass(frozen=True, order=True)
class Job:
    """One fine-tuning run."""

    task: str
    init: str  # `pretrained`, or `mnli` for the best model of that task
    learning_rate: float
    batch_size: int
    seed: int

    def num_updates(self, rows: int, epochs: int) -> int:
        """Count the updates of so many epochs over so many rows."""
        return epochs * math.ceil(rows / self.batch_size)

    def __str__(self) -> str:
        start = " from mnli" if self.init == "mnli" else ""
        return f"{self.task}{start}, lr {self.learning_rate:g}, batch {self.batch_size}, seed {self.seed}"

    @property
    def file_name(self) -> str:
        """Name the job's lock."""
        return f"{self.task}-{self.init}-{self.learning_rate!r}-{self.batch_size}-{self.seed}"


class Results:
    """results.jsonl of a run, with a line for each job that has ended, and the locks beside it.

    A line holds the job, its `state` (done or failed), for a done job `metrics`, `best_epoch`, `epochs`, `seconds` and
    `processes`, and for a failed one the `reason`. The file is replaced as a whole, so that no line is ever torn.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "results.jsonl"
        self.locks = folder / "locks"

    def read(self) -> dict[Job, dict[str, Any]]:
        """Read all lines; a damaged file is a `UserError`."""
        if not self.file.exists():
            return {}
        with raising_damaged_file(self.file, "remove the lines that are wrong; their jobs are run again"):
            records = [json.loads(line) for line in self.file.read_text("utf-8").splitlines()]
            return {Job(**record["job"]): record for record in records}

    def write(self, records: list[dict[str, Any]]) -> None:
        """Replace all lines."""
        write_atomically(self.file, "".join(json.dumps(record) + "\n" for record in records))

    def add(self, job: Job, **values: Any) -> None:
        """Add the line of a job that has ended."""
        with self.lock("results"):
            records = self.read() | {job: {"job": asdict(job)} | values}
            self.write(list(records.values()))

    def forget_failures(self) -> None:
        """Remove the lines of failed jobs, so that they are run again."""
        with self.lock("results"):
            records = self.read()
            if records:
                self.write([record for record in records.values() if record["state"] == "done"])

    def lock(self, name: str, timeout: float = -1) -> FileLock:
        """Make a lock for one process at a time; by default, entering it waits for as long as it takes."""
        self.locks.mkdir(parents=True, exist_ok=True)
        return FileLock(self.locks / name, timeout=timeout)

    def claim(
        self, jobs: list[Job], may_start: Callable[[Job], bool], look: Callable[[], None] = lambda: None
    ) -> Iterator[Job]:
        """Claim jobs without a line for this process, one at a time in their order, until all have a line.

        A job for which `may_start` is false waits for what it needs; `look` is called now and then while all jobs wait
        or run elsewhere.
        """
        while missing := [job for job in jobs if job not in self.read()]:
            for job in missing:
                with contextlib.suppress(Timeout), self.lock(job.file_name, timeout=0):
                    if job not in self.read() and may_start(job):
                        yield job
                        break
            else:
                look()
                time.sleep(POLL_SECONDS)
