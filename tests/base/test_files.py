import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.base.errors import UserError
from recipe.base.files import (
    check_free_space,
    check_output_dir,
    free_bytes,
    is_path,
    read_yaml,
    replace_file,
    replace_folder,
    sync,
    to_yaml,
    write_atomically,
)
from testing.helpers import PYTHONPATH

NAMES = {"name": "café", "count": 3, "list": [1, 2]}


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text("utf-8") for file in folder.rglob("*") if file.is_file()}


def test_text_is_utf8_whatever_the_locale(tmp_path: Path):
    code = (
        "import pathlib; from recipe.base.files import *\n"
        f"write_atomically(pathlib.Path('a.yaml'), to_yaml({NAMES!a}))\n"
        f"assert read_yaml(pathlib.Path('a.yaml')) == {NAMES!a}"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": PYTHONPATH}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert contents(tmp_path) == {"a.yaml": to_yaml(NAMES)}
    assert read_yaml(tmp_path / "a.yaml") == NAMES


def test_readers_see_the_old_file_until_the_new_one_is_complete(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    with replace_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert contents(tmp_path) == {"a.txt": "new"}


def test_a_file_that_fails_leaves_the_old_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert contents(tmp_path) == {"a.txt": "old"}


def full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced = []
    monkeypatch.setattr("recipe.base.files.sync", lambda path: (synced.append(path.name), sync(path)))
    folder = tmp_path / "runs" / "model"
    for text, suffix in (("old", "1"), ("new", "2")):
        with replace_folder(folder) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / suffix).write_text(text)
            (temporary / "config").write_text(text)
            assert contents(folder) == ({} if text == "old" else {"config": "old", "inner/1": "old"})
    assert contents(tmp_path / "runs") == {"model/config": "new", "model/inner/2": "new"}
    assert sorted(synced) == sorted(["1", "2", *["inner", "config", ".model", "runs"] * 2])


def fail_in(folder: Path, error: BaseException) -> None:
    with replace_folder(folder) as temporary:
        (temporary / "config").write_text("new")
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_folder_that_fails_leaves_the_old_one_alone(tmp_path: Path, error: BaseException):
    with replace_folder(tmp_path / "model") as temporary:
        (temporary / "config").write_text("old")
    with pytest.raises(type(error)):
        fail_in(tmp_path / "model", error)
    assert contents(tmp_path) == {"model/config": "old"}


def test_a_process_killed_on_the_way_leaves_no_folder_and_nothing_that_stays(tmp_path: Path):
    code = (
        "import os, pathlib; from recipe.base.files import replace_folder\n"
        "with replace_folder(pathlib.Path('model')) as temporary:\n"
        "    (temporary / 'half').write_text('half'); os._exit(9)"
    )
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False)
    (tmp_path / ".model.old").mkdir()
    assert not (tmp_path / "model").exists()
    assert contents(tmp_path) == {".model/half": "half"}
    with replace_folder(tmp_path / "model") as temporary:
        (temporary / "config").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert contents(tmp_path) == {"model/config": "new"}


def test_what_does_not_fit_on_the_disk_is_refused(tmp_path: Path):
    folder = tmp_path / "not" / "there"
    assert 0 < free_bytes(folder) <= free_bytes(Path("/")) or os.stat("/").st_dev != os.stat(tmp_path).st_dev
    text = check_free_space(folder, 1, "2 files", "free some")
    assert text.startswith(f"2 files in {folder}, ")
    assert text.endswith(" free")
    with pytest.raises(UserError, match=r"2 files in .*there, .* free; free some"):
        check_free_space(folder, 10**30, "2 files", "free some")


def test_output_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_output_dir(tmp_path / "new" / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"`output_dir` .*run: .*file is a file; name another"):
        check_output_dir(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot be written"):
        check_output_dir(tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("runs/x", True), ("", True), ("a\0b", False), ("x" * 256, False), ("x/" * 2100, False), ("\ud800", False)],
)
def test_paths_that_no_system_takes_are_known(name: str, expected: bool):
    assert is_path(name) == expected
