"""Worker processes and threads: how they start, share work through files, wait and end."""

import contextlib
import errno
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from recipe.base.errors import UserError
from recipe.base.formatting import format_duration
from recipe.base.progress import print_line

FIRST_WORD_SECONDS, NEXT_WORD_SECONDS = 60, 600  # of a wait for another process, until it is said and said again
HOLDER = ".holder"  # suffix of the file beside a lock that names the process that has it
STOP_WAITING = threading.Event()  # set in a process that is to end: it no longer waits for a source


class InterruptedWaitError(Exception):
    """The process was asked to stop while it waited for data."""


@contextlib.contextmanager
def starting_workers(option: str) -> Iterator[None]:
    """Start worker processes, as many as an option says, inside the context; SIGCHLD keeps its handler.

    PyTorch's handler would raise wherever the main thread is when a worker is killed, in the middle of an update too.

    Raises:
        UserError: shared memory has no room for their locks.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"/dev/shm is full, through which worker processes talk to their parent; free some of it, give the "
            f"container more (docker: --shm-size), or do without `{option}`"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():  # no other one may, nor does PyTorch there
            signal.signal(signal.SIGCHLD, handler)


def start_worker(_: int = 0) -> None:
    """Prepare a worker process: one thread, since the processes are the parallelism, and its end in its parent's hands.

    Launchers send SIGTERM to whole groups of processes. That is for the process that trains, so a worker ends only by
    a SIGTERM from its own parent, or when its parent is gone.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if sys.platform == "linux":  # other systems do not say who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()


def exit_with_parent(parent: int) -> None:
    """End this process when its parent has ended, perhaps killed, or sends it SIGTERM."""
    while os.getppid() == parent:
        sent = signal.sigtimedwait({signal.SIGTERM}, 5)
        if sent and sent.si_pid == parent:
            break
        if sent:
            STOP_WAITING.set()
    os._exit(0)


def identity_collate(item: Any) -> Any:
    """Return the item itself: a `collate_fn` that can be sent to workers."""
    return item


def build_together(
    folder: Path,
    num_shards: int,
    process_index: int,
    is_done: Callable[[int], bool],
    make: Callable[[int], None],
    is_stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Call `make(shard)` for each shard that is not done yet, together with all other processes that do the same.

    Args:
        folder: where the locks lie.
        num_shards: how many shards there are.
        process_index: where to begin, so that processes do not all begin with the same shard; 0 says what it waits for.
        is_done: whether a shard is there.
        make: makes a shard.
        is_stopping: asked every second of a wait for another process, which raises an `InterruptedWaitError` then.
    """
    locks = folder / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    shards = [(number + process_index) % num_shards for number in range(num_shards)]
    for waits in (False, True):  # first what nobody works on; then, once its maker is ready or dead, all the rest
        busy = []
        for shard in shards:
            path = locks / f"{shard:05d}"
            try:
                lock = take_lock(path, process_index == 0, is_stopping) if waits else FileLock(path).acquire(timeout=0)
            except Timeout:
                busy.append(shard)
                continue
            with lock:
                if not is_done(shard):
                    path.with_suffix(HOLDER).write_text(process_name(), "utf-8")
                    make(shard)
        shards = busy


def take_lock(path: Path, is_main: bool, is_stopping: Callable[[], bool]) -> AcquireReturnProxy:
    """Wait for the lock of a shard; the main process says whom it waits for, after a minute and every ten minutes."""
    started, next_word = time.monotonic(), float(FIRST_WORD_SECONDS)
    while True:
        with contextlib.suppress(Timeout):
            return FileLock(path).acquire(timeout=1)
        if is_main and (waited := time.monotonic() - started) > next_word:
            next_word = waited + NEXT_WORD_SECONDS
            holder = path.with_suffix(HOLDER)
            name = holder.read_text("utf-8") if holder.exists() else "another process"
            if name != process_name():  # another thread of this one
                print_line(
                    f"waiting since {format_duration(waited)} for {name}, which makes shard {int(path.name)} of "
                    f"{path.parents[1]} and holds {path}; if it hangs, end it: what it leaves is made here"
                )
        if is_stopping():
            raise InterruptedWaitError


def process_name() -> str:
    """Name this process for those on other machines."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def one_ahead(items: Iterator[Any], is_stopping: Callable[[], bool]) -> Generator[Any]:
    """Yield the same items, the next of which is made in a thread while one is in use.

    While there is no item yet, `is_stopping` is asked every half second; if it is true, that raises an
    `InterruptedWaitError`. When no more items are asked for, the thread is left to end by itself, since it may be
    waiting for a source.
    """
    made: queue.Queue = queue.Queue(maxsize=1)
    closed = threading.Event()

    def make() -> None:
        error = None
        while error is None and not closed.is_set():
            item = None
            try:
                item = next(items)
            except Exception as raised:  # of whatever kind, it is raised where the item is asked for
                error = raised
            made.put((item, error))

    threading.Thread(target=make, daemon=True).start()
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
        closed.set()
        with contextlib.suppress(queue.Empty):
            made.get_nowait()  # makes room for the item that the thread may be waiting to put
