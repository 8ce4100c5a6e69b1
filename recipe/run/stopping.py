"""When to save and end a run early: a signal, the clock, a launcher that is gone."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Variables that accelerate's launcher and torchrun give to the processes that they start.
LAUNCHED = {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"}
# Scripts import this module first: a launcher may be gone by the time that all else is imported.
STARTED, PARENT = time.monotonic(), os.getppid()
EXIT_MARGIN_SECONDS = 30  # seconds for all that comes after the last checkpoint, trackers and the processes' own end


def stop_with_launcher() -> None:
    """Have this process get a SIGTERM once the launcher that started it is gone and cannot pass on any.

    A process that was not launched goes on without its parent, as one started by `nohup` should.
    """
    if LAUNCHED & os.environ.keys():
        threading.Thread(target=watch_launcher, daemon=True).start()


def watch_launcher() -> None:
    while os.getppid() == PARENT:
        time.sleep(1)
    print(f"the launcher (process {PARENT}) is gone", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


class StopRequest:
    """Whether to save and stop, set by a signal or by the clock and looked at once an update. A second SIGINT ends the
    process at once.

    Args:
        max_hours: since the process was started; None: no limit.

    Attributes:
        reason: the signal's name or the limit; None until there is one.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self.reason: str | None = None
        self.max_hours = max_hours
        self.updated = time.monotonic()
        self.longest = self.seconds_to_save = 0.0

    def is_set(self) -> bool:
        # Twice the longest so far: neither updates nor disks keep to a time.
        end = time.monotonic() - STARTED + 2 * (self.longest + self.seconds_to_save) + EXIT_MARGIN_SECONDS
        if self.reason is None and self.max_hours is not None and end > self.max_hours * 3600:
            self.reason = f"`max_train_hours` ({self.max_hours})"
        return self.reason is not None

    def update_done(self, seconds_to_save: float) -> None:
        """Note how long an update took, with all that came after it, and what a checkpoint takes to write: before the
        limit there has to be time for either.
        """
        now = time.monotonic()
        self.longest = max(self.longest, now - self.updated)
        self.updated, self.seconds_to_save = now, seconds_to_save

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.reason = signal.Signals(number).name

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
