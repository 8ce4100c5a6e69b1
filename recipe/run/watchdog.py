"""A watchdog that says which process the others wait for, once training stands still."""

import itertools
import json
import os
import platform
import sys
import threading
from collections import Counter
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
    store = main or TCPStore(host, port, is_master=False)
    accelerator.wait_for_everyone()  # the main process may have nothing to train, and end before others have connected
    return store


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
        self.found: list[Report] = []  # the last report of each rank
        self.silence: Counter[int] = Counter()  # seconds since a rank's last answer

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

    def watch(self) -> None:
        """Watch all processes on the main one, and that one on another.

        Seconds for which this process was stopped do not count.
        """
        before: list[int] = []
        stalled, limit = 0.0, STALL_SECONDS
        while not self.over.wait(POLL_SECONDS):
            progress = self.read_places() if self.rank == 0 else [self.answers]
            if progress != before:
                before, stalled, limit = progress, 0.0, STALL_SECONDS
            stalled += POLL_SECONDS
            if stalled > limit:
                silent = [report for rank, report in enumerate(self.found) if self.silence[rank] > stalled / 2]
                text = stragglers(self.found, silent) if self.rank == 0 else "rank 0 does not answer"
                print(f"warning: training has not moved for {stalled:.0f} seconds: {text}", file=sys.stderr, flush=True)
                limit *= 2

    def read_places(self) -> list[int]:
        """Read how many places each process has reached, and for how long it has been silent."""
        keys = [str(rank) for rank in range(self.num_processes) if self.store.check([str(rank)])]
        before, self.found = self.found, [Report(*json.loads(value)) for value in self.store.multi_get(keys)]
        for rank, report in enumerate(self.found):
            self.silence[rank] = self.silence[rank] + POLL_SECONDS if report in before else 0
        return [report.places for report in self.found]

    def __enter__(self) -> "Watchdog":
        for task in [self.report, self.watch] if self.rank < 2 else [self.report]:
            threading.Thread(target=task, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()


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
