"""Says which process the others wait for, once training stands still."""

import itertools
import json
import os
import platform
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed import HashStore, Store, TCPStore

STALL_SECONDS = 300  # seconds
POLL_SECONDS = 5  # seconds


def open_store(accelerator: Accelerator) -> Store:
    """A store that all processes reach without a collective; the main process keeps it."""
    if accelerator.num_processes == 1:
        return HashStore()
    host, store = os.environ["MASTER_ADDR"], None
    if accelerator.is_main_process:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    port = [store and store.port]
    broadcast_object_list(port)
    return store or TCPStore(host, port[0], is_master=False)


class Watchdog:
    """Says on stderr, while it is entered as a context, when training has stood still for `STALL_SECONDS`, and which
    process the others wait for in a collective: one that does not answer, or the one that has come least far. All
    processes have to make theirs together.

    It only speaks: a collective that waits for longer than its timeout ends the run.
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
        """Note that this process has come to a place, which comes after all places before it."""
        self.places, self.place = self.places + 1, place

    def report(self) -> None:
        """Every process tells the store how far it is."""
        for number in itertools.count():
            try:
                self.store.set(str(self.rank), json.dumps([number, self.places, f"{self.name} at {self.place}"]))
                self.store.check(["0"])  # waits for an answer
            except RuntimeError:  # the main process has gone: training will notice
                break
            self.answers += 1
            if self.over.wait(POLL_SECONDS):
                break

    def ticks(self) -> Iterator[float]:
        """`POLL_SECONDS` so often, until it is over. Time for which this process itself was stopped does not count."""
        while not self.over.wait(POLL_SECONDS):
            yield POLL_SECONDS

    def watch(self) -> None:
        """The main process looks at all."""
        before: list[Report] = []
        still, patience = 0.0, STALL_SECONDS  # seconds
        silent: Counter[int] = Counter()  # seconds for which a rank has not answered
        for seconds in self.ticks():
            keys = [str(rank) for rank in range(self.num_processes) if self.store.check([str(rank)])]
            found = [Report(*json.loads(value)) for value in self.store.multi_get(keys)]
            if [report.places for report in found] != [report.places for report in before]:
                still, silent, patience = 0.0, Counter(), STALL_SECONDS
            still += seconds
            silent.update({rank: seconds for rank, report in enumerate(found) if report in before})
            before = found
            if still > patience:
                self.warn(still, stragglers(found, [found[rank] for rank in silent if silent[rank] > still / 2]))
                patience *= 2

    def watch_main(self) -> None:
        """Another one looks at the main process."""
        answered, still, patience = 0, 0.0, STALL_SECONDS
        for seconds in self.ticks():
            if self.answers != answered:
                answered, still, patience = self.answers, 0.0, STALL_SECONDS
            still += seconds
            if still > patience:
                self.warn(still, "rank 0 does not answer")
                patience *= 2

    @staticmethod
    def warn(seconds: float, message: str) -> None:
        print(f"warning: training has not moved for {seconds:.0f} seconds: {message}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Watchdog":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        for thread in self.threads:  # a process that ends while one of them asks the store is aborted
            thread.join(1)


class Report(NamedTuple):
    """Of one process: a number that grows as long as it lives, how many places it has come to, and the last of them."""

    number: int
    places: int
    text: str


def stragglers(found: list[Report], silent: list[Report]) -> str:
    """Which of the processes the others wait for."""
    if silent:
        return f"no answer from {'; '.join(report.text for report in silent)}"
    least = min(report.places for report in found)
    last = [report.text for report in found if report.places == least]
    if len(last) == len(found) > 1:
        return f"all ranks are at the same place ({last[0]}, and so on): it takes long, or the network is down"
    return f"{'the others wait for ' if len(found) > 1 else ''}{'; '.join(last)}"
