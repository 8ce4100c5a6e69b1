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
    check_yaml,
    free_bytes,
    is_path,
    read_json,
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


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 50_000, "more than 50 lists and mappings in each other"),
        ("- " * 50_000, "more than 50"),
        ("{a: " * 50_000, "more than 50"),
        (BOMB, r"the alias \*a"),
        ("a: " + "x" * 2**20, "1.05 MB, and no more than 1.05 MB is read"),
    ],
)
def test_yaml_that_would_crash_or_fill_the_memory_is_named(tmp_path: Path, text: str, expected: str):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"a\.yaml is damaged or missing \(ValueError: {expected}"):
        read_yaml(tmp_path / "a.yaml")


def test_yaml_that_is_written_can_be_read(tmp_path: Path):
    values = {"one": (shared := [{"a": 1}]), "two": shared}
    write_atomically(tmp_path / "a.yaml", to_yaml(values))
    assert read_yaml(tmp_path / "a.yaml") == values


def test_yaml_of_every_day_is_not_refused():
    for text in ("[" * 50 + "]" * 50, "{path: data/*.txt, name: '*a', other: R&D}", "3", "null", "-"):
        assert check_yaml(text) == text


def test_json_that_is_large_or_deep_is_not_read(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.json").write_text("[" * 50_000)
    with pytest.raises(RecursionError):
        read_json(tmp_path / "a.json")
    os.truncate(tmp_path / "a.json", 2**40)
    with pytest.raises(ValueError, match=r"and no more than 16\.8 MB is read"):
        read_json(tmp_path / "a.json")


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
    (tmp_path / "link").symlink_to("unmounted/disk")
    for name in ("link", "link/run"):
        with pytest.raises(
            UserError, match=r"link is a link to unmounted/disk, which does not exist; create that, mount"
        ):
            check_output_dir(tmp_path / name)
    for path in (tmp_path / ("x" * 300), Path("/proc/run")):
        with pytest.raises(UserError, match=r"`output_dir` .* cannot be written: \[Errno"):
            check_output_dir(path)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left"):
        check_output_dir(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("runs/x", True), ("", True), ("a\0b", False), ("x" * 256, False), ("x/" * 2100, False), ("\ud800", False)],
)
def test_paths_that_no_system_takes_are_known(name: str, expected: bool):
    assert is_path(name) == expected
