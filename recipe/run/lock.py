"""Whose run is it: a folder belongs to one main process at a time.

1. `.lock` is locked by `flock` for as long as the process lives; the system frees it when the process ends.
2. `.owner.json` names the holder. A process whose name no longer stands there has lost the folder and stops: because it
   stood still until the lock of its node ran out, say, or because the file system has no locks between nodes.

So the lock keeps a second start out and, where it cannot, the later start wins. docs/running.md says what is relied on.
"""

import json
import os
import platform
import shutil
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from recipe.base.errors import UserError
from recipe.base.files import write_atomically
from recipe.base.progress import print_line

WAIT_SECONDS = 30  # for a holder that is about to end: one that saves after a signal, say
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")  # of Slurm, PBS, LSF and Grid Engine


def job_name() -> str | None:
    """Return the id that a batch system has given this process's job, the pod's name under Kubernetes, or None."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return platform.node()
    return next(filter(None, map(os.environ.get, JOB_VARIABLES)), None)


class RunLock:
    """The right to write to a folder; `release` gives it back, and so does the end of the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / ".lock"
        self.owner_file = folder / ".owner.json"
        self.lock = FileLock(self.file)
        self.is_new = False
        self.written: tuple[int, ...] | None = None  # which file `.owner.json` is, while this process holds the folder

    def acquire(self) -> None:
        """Take the folder, which is made if need be, and name this process as its holder.

        Raises:
            UserError: another process holds it, and still does after `WAIT_SECONDS`.
        """
        self.is_new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            print_line(f"waiting {WAIT_SECONDS} s for {self.holder()} to leave {self.folder}")
            self.wait()
        except OSError as error:  # such as `No locks available`, of a network file system whose locks are not served
            print_line(f"warning: {self.folder} cannot be locked ({error}): of two starts there, the later one goes on")
        since = datetime.now(UTC).isoformat(timespec="seconds")
        owner = {"host": platform.node(), "pid": os.getpid(), "job": job_name(), "since": since, "id": uuid4().hex}
        write_atomically(self.owner_file, json.dumps(owner) + "\n")
        self.written = self.stamp()

    def check_free(self) -> None:
        """Raise a `UserError` if another process holds the folder; nothing is written."""
        if self.file.is_file():
            try:
                FileLock(self.file).acquire(timeout=0).lock.release()
            except Timeout:
                raise self.refusal() from None
            except OSError:  # it cannot be locked, which `acquire` says
                return

    def wait(self) -> None:
        """Wait until the folder is free, or raise a `UserError` that names its holder."""
        try:
            self.lock.acquire(timeout=WAIT_SECONDS)
        except Timeout:
            raise self.refusal() from None

    def refusal(self) -> UserError:
        """Word the error about a folder that another process holds."""
        return UserError(
            f"`output_dir` {self.folder} is in use by {self.holder()}; stop that process first, or choose another "
            f"folder. If it is surely gone, with its machine perhaps, remove {self.file}"
        )

    def release(self) -> None:
        """Give the folder back, and remove it if this process has made it and nothing was written to it."""
        self.written = None
        own = {self.file.name, self.owner_file.name}
        if self.is_new and self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= own:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.release()

    def stamp(self) -> tuple[int, ...]:
        """Return what tells one `.owner.json` from another."""
        with self.owner_file.open("rb") as file:  # a network file system asks its server again when a file is opened
            status = os.fstat(file.fileno())
        return status.st_ino, status.st_mtime_ns, status.st_size

    def loss(self) -> str | None:
        """Say how this process has lost the folder; None while it has it, or never took it.

        It costs one question to the file system, so that it can be asked often.
        """
        if self.written is None:
            return None
        try:
            if self.stamp() == self.written:
                return None
            return f"{self.folder} is now in use by {self.holder()}"
        except FileNotFoundError:
            return f"{self.folder} is gone, or {self.owner_file.name} in it: removed, moved or unmounted"
        except OSError:  # a network file system that does not answer just now
            return None

    def holder(self) -> str:
        """Describe the process that holds the folder."""
        try:
            owner = json.loads(self.owner_file.read_text("utf-8"))
            job = f" (job {owner['job']})" if owner["job"] else ""
            return f"process {owner['pid']} on {owner['host']}{job}, since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
