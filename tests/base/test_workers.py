"""How workers wait, and how they share work."""

import errno
import re
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from recipe.base.errors import UserError
from recipe.base.workers import InterruptedWaitError, build_together, one_ahead, starting_workers
from testing.helpers import PATIENCE_SECONDS, never


def test_what_others_work_on_is_left_to_them_unless_they_die(tmp_path: Path):
    (tmp_path / "locks").mkdir()
    held, died = threading.Event(), threading.Event()
    done: list[int] = []

    def hold() -> None:
        with FileLock(tmp_path / "locks" / "00001"):
            held.set()
            died.wait(PATIENCE_SECONDS)

    def make(shard: int) -> None:
        done.append(shard)
        if len(done) == 3:
            died.set()

    threading.Thread(target=hold).start()
    held.wait(PATIENCE_SECONDS)
    build_together(tmp_path, 4, 1, done.__contains__, make)
    assert done == [2, 3, 0, 1]


def test_wait_for_another_process_is_told_and_ends_when_asked(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("recipe.base.workers.FIRST_WORD_SECONDS", 0)
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "00001.holder").write_text("process 7 on node3")
    with FileLock(tmp_path / "locks" / "00001"):
        for index, expected in ((0, 1), (1, 0)):  # the main process alone says it
            with pytest.raises(InterruptedWaitError):
                build_together(tmp_path, 2, index, lambda shard: False, lambda shard: None, lambda: True)
            told = (
                rf"waiting since 0:00:\d\d for process 7 on node3, which makes shard 1 of {tmp_path} and holds .*00001;"
            )
            assert len(re.findall(told, capsys.readouterr().out)) == expected


def test_error_of_a_shard_is_not_taken_for_a_lock(tmp_path: Path):
    def make(shard: int) -> None:
        raise Timeout("a lock of its own")

    with pytest.raises(Timeout, match="a lock of its own"):
        build_together(tmp_path, 1, 0, lambda shard: False, make)


def test_one_ahead_keeps_order_and_errors():
    def items():
        yield from range(5)
        raise KeyError("end")

    ahead = one_ahead(items(), never)
    assert [next(ahead) for _ in range(5)] == list(range(5))
    with pytest.raises(KeyError):
        next(ahead)
    assert list(one_ahead(iter(range(3)), never)) == [0, 1, 2]


def test_waiting_for_data_ends_when_the_process_is_to_stop():
    def items():
        yield 1
        threading.Event().wait(PATIENCE_SECONDS)

    stopping = []
    ahead = one_ahead(items(), lambda: bool(stopping))
    assert next(ahead) == 1
    stopping.append(True)
    started = time.monotonic()
    with pytest.raises(InterruptedWaitError):
        next(ahead)
    assert time.monotonic() - started < PATIENCE_SECONDS / 2


def test_full_shared_memory_is_named():
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(UserError, match=r"/dev/shm is full.*do without `some_workers`"),
        starting_workers("some_workers"),
    ):
        raise full
    with pytest.raises(PermissionError), starting_workers("some_workers"):
        raise PermissionError(errno.EACCES, "no")
