"""Files that hold what was written: their sizes and checksums, compared when they are opened and while training runs.

1. Whoever writes a file notes its size and SHA-256 (`note_file`) in a JSON file, which has a checksum of its own.
2. Whoever opens it compares the size (`StoredFile.of_note`), which takes no time, and reads nothing outside of it.
3. `Verification` compares the checksums in a thread, once a start: at 1 to 2 GB/s no run has to wait for that.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from recipe.base.errors import UserError, raising_damaged_file
from recipe.base.files import write_atomically
from recipe.base.formatting import count_of, format_bytes
from recipe.base.hashing import digest, file_checksum
from recipe.base.progress import print_line
from recipe.base.workers import InterruptedWaitError

LOWEST_PRIORITY = 19
STOP_SECONDS = 1  # for which the end of a run waits for a disk that does not answer


def raising_damaged_store(path: Path) -> AbstractContextManager[None]:
    """Turn what a damaged file of a store makes of the code that reads it into an error that names the file."""
    remedy = f"copy it again, or remove the folder {path.parent} to have it made again"
    return raising_damaged_file(f"the token store's {path}", remedy)


def damaged_store(path: Path, problem: str) -> UserError:
    """Word the error about a file of a store that is not what was written."""
    try:
        with raising_damaged_store(path):
            raise ValueError(problem)
    except UserError as error:
        return error


def to_json(values: dict[str, Any]) -> str:
    """Return values as JSON, with a checksum of them as the last one."""
    return json.dumps(values | {"checksum": digest(json.dumps(values))}, indent=1)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values to a file that is complete or absent."""
    write_atomically(path, to_json(values))


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that `write_json` has written; raise a `UserError` if a byte of it has changed."""
    with raising_damaged_store(path):
        values = json.loads(text := path.read_text("utf-8"))
        if not isinstance(values, dict) or values.pop("checksum", None) is None:
            raise ValueError("it has no checksum, as those of earlier versions have none")
        if to_json(values) != text:
            raise ValueError("it does not match its checksum")
        return values


def note_file(path: Path) -> dict[str, Any]:
    """Return what a JSON file notes of a file that has just been written."""
    return {"bytes": path.stat().st_size, "sha256": file_checksum(path)}


class StoredFile(NamedTuple):
    """A file, and what it was when it was written."""

    path: Path
    size: int
    sha256: str

    @classmethod
    def of_note(cls, path: Path, note: dict[str, Any]) -> "StoredFile":
        """Open a file of which `note_file` has returned the note; raise a `UserError` if it has another size."""
        file = cls(path, note["bytes"], note["sha256"])
        file.check_size()
        return file

    def check_size(self) -> None:
        """Raise a `UserError` if the file has another size: what is mapped into memory could not be read then."""
        try:  # rather than `raising_damaged_store`, since this is asked at each block
            size = os.stat(self.path).st_size
        except OSError as error:
            raise damaged_store(self.path, str(error)) from error
        if size != self.size:
            raise damaged_store(self.path, f"it has {size:,} bytes, and had {self.size:,} when it was written")


class Verification:
    """The comparison of files with their checksums. It can be pickled, between its runs and during one."""

    def __init__(self, files: list[StoredFile]) -> None:
        self.files = files
        self.verified = self.bytes = 0  # how many of the files, and bytes of these
        self.seconds = 0.0
        self.fault: str | None = None  # what is wrong with a file
        self.is_reported = not files

    def run(self, stopping: threading.Event) -> None:
        """Compare the files that are left, until one does not match or `stopping` is set."""

        def continue_reading() -> None:
            if stopping.is_set():
                raise InterruptedWaitError

        started, before = time.monotonic(), self.seconds
        for file in self.files[self.verified :]:
            try:
                with raising_damaged_store(file.path):
                    if file_checksum(file.path, continue_reading) != file.sha256:
                        raise ValueError("its contents do not match the SHA-256 of what was written")
            except UserError as error:
                if not stopping.is_set():
                    self.fault = str(error)
                return
            self.seconds = before + time.monotonic() - started
            self.bytes += file.size
            self.verified += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Compare the files in a thread while the block runs, at whose end nothing waits; say how much was compared."""
        stopping = threading.Event()

        def run() -> None:
            if sys.platform == "linux":  # where a thread has a priority of its own: training gets the core if needed
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
            self.run(stopping)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join(STOP_SECONDS)
            if not self.is_reported:
                print_line(f"warning: {self.fault}" if self.fault else self.describe())

    def report(self) -> None:
        """Say once that all files match; raise a `UserError` if one does not.

        It is asked by the thread that trains: a process that is forked while another prints could not print any more.
        """
        if self.fault:
            self.is_reported = True
            raise UserError(self.fault)
        if not self.is_reported and self.verified == len(self.files):
            self.is_reported = True
            print_line(self.describe())

    def describe(self) -> str:
        """Say how much of the files was compared."""
        total = sum(file.size for file in self.files)
        if self.verified == len(self.files):
            size = f"{count_of(len(self.files), 'file')}, {format_bytes(total)}"
            return f"token stores: {size}, match their checksums ({self.seconds:.1f} s)"
        return (
            f"token stores: {format_bytes(self.bytes)} of {format_bytes(total)} were compared with their checksums, "
            "and match; the rest was left when the run ended"
        )
