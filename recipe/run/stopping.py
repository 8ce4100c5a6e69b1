"""Early stops: a run is saved and ends at a signal, at a time limit, or when its launcher is gone."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# Batch systems announce the end of a job's time by each of them.
STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which is how `nohup` starts a process
    STOP_SIGNALS.append(signal.SIGHUP)
LAUNCHED_BY_ACCELERATE = "ACCELERATE_DYNAMO_BACKEND"  # set by its launcher
LAUNCHER_VARIABLES = {LAUNCHED_BY_ACCELERATE, "TORCHELASTIC_RUN_ID"}  # the other is torchrun's
# Scripts import this module first: a launcher may be gone by the time that all else is imported.
START_SECONDS, PARENT_PID = time.monotonic(), os.getppid()
EXIT_MARGIN_SECONDS = 30  # for what comes after the last checkpoint: trackers, and the end of the processes


def stop_with_launcher() -> None:
    """Have this process receive a SIGTERM once the launcher that started it is gone and cannot pass on any.

    A process that was not launched outlives its parent, as one started by `nohup` should.
    """
    if LAUNCHER_VARIABLES & os.environ.keys():
        threading.Thread(target=watch_launcher, daemon=True).start()


def watch_launcher() -> None:
    """Wait until the launcher is gone, and signal this process then."""
    while os.getppid() == PARENT_PID:
        time.sleep(1)
    print(f"the launcher (process {PARENT_PID}) is gone, and the run saves and stops", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def handling_stop_signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have the stop signals call `handle` inside the context."""
    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a stop signal where there is nothing to save: raise a KeyboardInterrupt with its name."""
    for other in STOP_SIGNALS:  # a terminal and a launcher send one each
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)


class TrainingClock:
    """Tells how long a run has trained, over all its processes: goes on from the milliseconds before this one."""

    def __init__(self, before: int) -> None:
        self.started = time.monotonic() - before / 1000

    def milliseconds(self) -> int:
        """Return the milliseconds that the run has trained."""
        return int(1000 * (time.monotonic() - self.started))


class StopRequest:
    """A request to save and stop, made by a signal or the time limit, and looked at once an update."""

    def __init__(self, max_hours: float | None = None, speaks: bool = False) -> None:
        self.speaks, self.pid = speaks, os.getpid()  # whether it says that a signal has been received
        self.reason: str | None = None  # the signal's name or the limit, once there is a request
        self.max_hours = max_hours  # from the start of the process
        self.updated = time.monotonic()
        self.longest_update = self.seconds_to_save = 0.0

    def is_set(self) -> bool:
        """Tell whether to save and stop; the limit requests it while one more update and checkpoint still fit."""
        # Twice the longest so far, since the time of updates and of disks varies.
        end = time.monotonic() - START_SECONDS + 2 * (self.longest_update + self.seconds_to_save) + EXIT_MARGIN_SECONDS
        if self.reason is None and self.max_hours is not None and end > self.max_hours * 3600:
            self.reason = f"`max_train_hours` ({self.max_hours})"
        return self.reason is not None

    def update_done(self, seconds_to_save: float) -> None:
        """Record how long an update took, with all that came after it, and how long a checkpoint takes to write."""
        now = time.monotonic()
        self.longest_update = max(self.longest_update, now - self.updated)
        self.updated, self.seconds_to_save = now, seconds_to_save

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take a signal as the request; a second SIGINT raises KeyboardInterrupt, which ends the process at once."""
        if self.reason and number == signal.SIGINT:
            interrupt(number, frame)
        if self.reason is None:  # a launcher sends signals of its own after the user's
            self.reason = signal.Signals(number).name
            if self.speaks and os.getpid() == self.pid:  # worker processes have this handler too
                line = f"{self.reason}: stopping after this update, saving …\n"
                with suppress(OSError):  # not by print, which a signal may have interrupted
                    os.write(2, ("\n" if os.isatty(2) else "").encode() + line.encode())
