"""A watchdog that says which process the others wait for, once training stands still."""

import itertools
import json
import os
import platform
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed import HashStore, Store, TCPStore

STALL_SECONDS = 300
POLL_SECONDS = 5


def open_store(accelerator: Accelerator) -> Store:
    """Open a store on the main process that all processes reach without a collective."""
    if accelerator.num_processes == 1:
        return HashStore()
    host = os.environ["MASTER_ADDR"]
    main = TCPStore(host, 0, is_master=True, wait_for_workers=False) if accelerator.is_main_process else None
    [port] = broadcast_object_list([main.port if main else 0])
    return main or TCPStore(host, port, is_master=False)


class Watchdog:
    """A context that warns on stderr when training has stood still for `STALL_SECONDS`.

    The warning names the process that the others wait for in a collective: one that does not answer, or the one that
    is the least advanced. A watchdog only warns; a collective that waits for longer than its timeout ends the run. All
    processes have to make theirs together.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank, self.num_processes = accelerator.process_index, accelerator.num_processes
        self.name = f"rank {self.rank} (process {os.getpid()} on {platform.node()})"
        self.places, self.place = 0, "the start"
        self.over = threading.Event()
        self.store = open_store(accelerator)
        self.answers = 0
        tasks = {0: [self.report, self.watch], 1: [self.report, self.watch_main]}.get(self.rank, [self.report])
        self.threads = [threading.Thread(target=task, daemon=True) for task in tasks]

    def at(self, place: str) -> None:
        """Record that this process has reached the next place in the course of training."""
        self.places, self.place = self.places + 1, place

    def report(self) -> None:
        """Report to the store, on every process, how far this one is."""
        for number in itertools.count():
            try:
                self.store.set(str(self.rank), json.dumps([number, self.places, f"{self.name} at {self.place}"]))
                self.store.check(["0"])  # waits for an answer
            except RuntimeError:  # the main process is gone, which ends training too
                break
            self.answers += 1
            if self.over.wait(POLL_SECONDS):
                break

    def ticks(self) -> Iterator[float]:
        """Yield `POLL_SECONDS` each time they are over; time for which this process was stopped does not count."""
        while not self.over.wait(POLL_SECONDS):
            yield POLL_SECONDS

    def watch(self) -> None:
        """Watch all processes, on the main process."""
        before: list[Report] = []
        stalled, limit = 0.0, STALL_SECONDS  # seconds
        silent: Counter[int] = Counter()  # seconds for which a rank has not answered
        for seconds in self.ticks():
            keys = [str(rank) for rank in range(self.num_processes) if self.store.check([str(rank)])]
            found = [Report(*json.loads(value)) for value in self.store.multi_get(keys)]
            if [report.places for report in found] != [report.places for report in before]:
                stalled, silent, limit = 0.0, Counter(), STALL_SECONDS
            stalled += seconds
            silent.update({rank: seconds for rank, report in enumerate(found) if report in before})
            before = found
            if stalled > limit:
                self.warn(stalled, stragglers(found, [found[rank] for rank in silent if silent[rank] > stalled / 2]))
                limit *= 2

    def watch_main(self) -> None:
        """Watch the main process, on another one."""
        answered, stalled, limit = 0, 0.0, STALL_SECONDS
        for seconds in self.ticks():
            if self.answers != answered:
                answered, stalled, limit = self.answers, 0.0, STALL_SECONDS
            stalled += seconds
            if stalled > limit:
                self.warn(stalled, "rank 0 does not answer")
                limit *= 2

    @staticmethod
    def warn(seconds: float, message: str) -> None:
        """Print a warning about training that stands still."""
        print(f"warning: training has not moved for {seconds:.0f} seconds: {message}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Watchdog":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        for thread in self.threads:  # a process that ends while one of them waits for the store is aborted
            thread.join(1)


class Report(NamedTuple):
    """What a process reports: a number that grows while it lives, how many places it has reached, and the last one."""

    number: int
    places: int
    text: str


def stragglers(found: list[Report], silent: list[Report]) -> str:
    """Say which of the processes the others wait for."""
    if silent:
        return f"no answer from {'; '.join(report.text for report in silent)}"
    least = min(report.places for report in found)
    last = [report.text for report in found if report.places == least]
    if len(last) == len(found) > 1:
        return f"all ranks are at the same place (such as {last[0]}): it takes long, or the network is down"
    return f"{'the others wait for ' if len(found) > 1 else ''}{'; '.join(last)}"
