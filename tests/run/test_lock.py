import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from recipe.base.errors import UserError
from recipe.run import lock
from recipe.run.directory import LostFolderError, RunDirectory
from recipe.run.lock import RunLock
from testing.helpers import PYTHONPATH

HOLD = """
import sys
from pathlib import Path
from recipe.run.lock import RunLock
held = RunLock(Path(sys.argv[1]))
held.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen]:
    """Have another process hold a folder."""
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "SLURM_JOB_ID": "77"}
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_second_process_is_refused_and_told_of_the_first(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.1)
    with holder(tmp_path / "run") as process:
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on .* \(job 77\)"):
            RunLock(tmp_path / "run").check_free()
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on .* \(job 77\), since 2") as refused:
            RunLock(tmp_path / "run").acquire()
        assert f"remove {tmp_path / 'run' / '.lock'}" in str(refused.value)


def test_folder_of_a_killed_process_is_free(tmp_path: Path):
    with holder(tmp_path / "run") as process:
        process.kill()
        process.wait()
        held = RunLock(tmp_path / "run")
        held.check_free()
        held.acquire()
        assert json.loads(held.owner_file.read_text())["pid"] == os.getpid()
        held.release()


def test_holder_that_is_about_to_end_is_waited_for(tmp_path: Path, capsys):
    with holder(tmp_path) as process:
        assert process.stdin
        process.stdin.close()  # and it ends
        held = RunLock(tmp_path)
        held.acquire()
        held.release()


def test_process_whose_lock_did_not_hold_stops_writing(tmp_path: Path):
    """A lock that ran out, or that another node does not see, is one that is no longer there."""
    run = RunDirectory(tmp_path, True, [])
    run.lock.acquire()
    run.check_held()
    run.write_status("running", 3)
    run.lock.file.unlink()
    with holder(tmp_path) as process:
        with pytest.raises(LostFolderError, match=f"now in use by process {process.pid} .* stops without saving"):
            run.check_held()
        run.write_status("failed", 4)
        run.append_metrics({"step": 4})
    run.lock.release()
    assert json.loads(run.status_file.read_text())["step"] == 3
    assert not run.metrics_file.exists()


def test_process_whose_folder_was_removed_does_not_make_it_again(tmp_path: Path):
    run = RunDirectory(tmp_path / "run", True, [])
    run.lock.acquire()
    shutil.rmtree(run.path)
    with pytest.raises(LostFolderError, match=r"is gone, .* removed, moved or unmounted"):
        run.check_held()
    run.write_status("failed", 4)
    run.lock.release()
    assert not run.path.exists()


def test_folder_to_which_nothing_was_written_is_gone_again(tmp_path: Path):
    for name, is_kept in (("refused", False), ("begun", True)):
        run = RunDirectory(tmp_path / name, True, [])
        run.lock.acquire()
        if is_kept:
            run.write_status("running", 0)
        run.lock.release()
        assert run.path.exists() == is_kept


def test_forked_process_does_not_keep_the_folder(tmp_path: Path):
    held = RunLock(tmp_path)
    held.acquire()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    held.release()
    again = RunLock(tmp_path)
    again.acquire()
    again.release()
    os.close(writing)
    os.waitpid(child, 0)


def test_where_nothing_can_be_locked_the_later_start_wins(tmp_path: Path, monkeypatch, capsys):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    assert "cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().out
    second.acquire()
    assert first.loss()
    assert second.loss() is None


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_where_there_is_no_flock_a_file_stands_in_for_it(tmp_path: Path, monkeypatch):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.1)
    first = RunLock(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match="in use by process"):
        RunLock(tmp_path).acquire()
    first.release()
    RunLock(tmp_path).acquire()
