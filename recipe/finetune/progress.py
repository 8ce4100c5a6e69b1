"""What is seen of a grid while it runs; the main process speaks, and for all processes."""

import time
from collections.abc import Callable
from typing import Any

import torch

from recipe.base.formatting import format_duration
from recipe.base.progress import print_line, progress_bar
from recipe.finetune.jobs import Job, Results

REFRESH_SECONDS = 1.0  # between two looks at the loss, for which a GPU is waited for, and at the results
LOG_SECONDS = 60.0  # between two lines about a job, where there is no terminal for a bar


def describe_result(job: Job, record: dict[str, Any]) -> str:
    """Describe a line of results.jsonl."""
    if record["state"] == "failed":
        return f"{job}: failed: {record['reason']}"
    scores = ", ".join(f"{name} {100 * value:.1f}" for name, value in record["metrics"].items())
    return f"{job}: {scores} (epoch {record['best_epoch']} of {len(record['epochs'])}), {record['seconds']:,.0f} s"


class Progress:
    """A bar of the grid's updates, or a line a minute, and a line for each result as it comes.

    Args:
        updates: of each job of the grid.
        heartbeat: called with the number of results, every second or so while this process trains or waits.
    """

    def __init__(
        self, updates: dict[Job, int], results: Results, heartbeat: Callable[[int], None], is_main: bool
    ) -> None:
        self.updates, self.results, self.heartbeat, self.is_main = updates, results, heartbeat, is_main
        self.records = results.read()  # that have been shown, or were there before
        self.before = self.done = self.count()
        self.bar = progress_bar("fine-tuning", sum(updates.values()), "updates", is_main, self.done)
        self.bar.smoothing = 0  # since jobs of other processes count when they end
        self.started = self.refreshed = self.logged = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def count(self) -> int:
        """Count the updates of all jobs that have a result."""
        return sum(number for job, number in self.updates.items() if job in self.records)

    def show_results(self, running: int = 0) -> None:
        """Show results that are new, of all processes, and count the updates of the job that is `running` here."""
        if not self.is_main:
            return
        before, self.records = self.records, self.results.read()
        for job, record in self.records.items():
            if record != before.get(job):
                print_line(describe_result(job, record))
        self.done = self.count() + running
        self.bar.update(self.done - self.bar.n)
        self.heartbeat(len(self.records))

    def step(self, job: Job, update: int, epoch: str, loss_sum: torch.Tensor, rows: float) -> None:
        """Show how far a job of this process is, not more often than is of use.

        Args:
            update: how many it has done.
            epoch: such as `2 of 10`.
            loss_sum, rows: of the epoch so far, about as many as this process has had.
        """
        now = time.monotonic()
        if not self.is_main or now - self.refreshed < REFRESH_SECONDS:
            return
        self.refreshed = now
        self.show_results(update)
        where = f"epoch {epoch}, loss {float(loss_sum) / rows:.3f}"
        self.bar.set_postfix_str(f"{job.task}, {where}")
        if self.bar.disable and now - self.logged >= LOG_SECONDS:
            self.logged, total = now, sum(self.updates.values())
            left = (now - self.started) * (total - self.done) / max(1, self.done - self.before)
            print_line(f"{job}: {where}; {self.done:,} of {total:,} updates, left {format_duration(left)}")
