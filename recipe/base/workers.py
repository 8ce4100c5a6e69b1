"""Worker processes and threads: how they start, share work through files, wait and end."""

import atexit
import contextlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

STOP_WAITING = threading.Event()  # set in a process that is to end: it does not wait for a source any more


def start_worker(_: int = 0) -> None:
    """In a worker process: one thread, since the processes are the parallelism; and no end by the SIGTERM that
    launchers send to whole groups of processes, which is for the process that trains, but only by that process's own.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if sys.platform == "linux":  # others cannot tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()


def exit_with_parent(parent: int) -> None:
    """End with the parent, which may have been killed, or when it says so."""
    while os.getppid() == parent:
        sent = signal.sigtimedwait({signal.SIGTERM}, 5)
        if sent and sent.si_pid == parent:
            break
        if sent:
            STOP_WAITING.set()
    os._exit(0)


def identity_collate(item: Any) -> Any:
    return item


def build_together(folder: Path, num_shards: int, process_index: int, is_done: Callable, make: Callable) -> None:
    """Have `make(shard)` done for every shard for which `is_done(shard)` is false, together with whoever else is at it.

    Args:
        folder: where the locks lie.
        process_index: where to begin, so that processes do not all begin with the same shard.
    """
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    busy = []
    for number in range(num_shards):
        shard = (number + process_index) % num_shards
        lock = FileLock(folder / "locks" / f"{shard:05d}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            busy.append(shard)
            continue
        try:
            if not is_done(shard):
                make(shard)
        finally:
            lock.release()
    for shard in busy:
        with FileLock(folder / "locks" / f"{shard:05d}"):
            if not is_done(shard):  # its maker has died
                make(shard)


LAST_ITEM_SECONDS = 10  # that the end of the process waits for an item which is being made


class InterruptedWaitError(Exception):
    """The process was asked to stop while it waited for data."""


def one_ahead(items: Iterator[Any], is_stopping: Callable[[], bool]) -> Generator[Any]:
    """The same items, the next of which is made in a thread while one is in use.

    When no more is asked for the thread is left to end by itself, since it may be waiting for a source. Before the
    process ends it is waited for a little: Python stops threads wherever they are, which in torch aborts the process.

    Args:
        is_stopping: looked at every half second while there is no item yet.

    Raises:
        InterruptedWaitError: it was true.
    """
    made: queue.Queue = queue.Queue(maxsize=1)
    closed = threading.Event()

    def make() -> None:
        try:
            for item in items:
                if not closed.is_set():
                    made.put((item, None))
                if closed.is_set():
                    return
            made.put((None, StopIteration()))
        except Exception as error:  # of whatever kind, it is raised where the item is asked for
            made.put((None, error))

    def close(seconds: float) -> None:
        closed.set()
        with contextlib.suppress(queue.Empty):
            made.get_nowait()  # which the thread may be waiting to put another behind
        thread.join(seconds)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    atexit.register(close, LAST_ITEM_SECONDS)
    try:
        while True:
            try:
                item, error = made.get(timeout=0.5)
            except queue.Empty:
                if is_stopping():
                    raise InterruptedWaitError from None
                continue
            if isinstance(error, StopIteration):
                return
            if error:
                raise error
            yield item
    finally:
        close(0)
