"""Checkpoints on a disk that is full: a tmpfs of four megabytes, in a mount namespace of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from recipe.base.errors import UserError
from recipe.run.checkpoint import check_space, find_checkpoint
from recipe.run.directory import list_checkpoints
from testing.helpers import PYTHONPATH, ROOT, command_line, learning, small_flags

NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
ON_SMALL_DISK = """
mount -t tmpfs -o size=4m small "$1" || exit 99
shift; exec "$@"
"""
# Everything that happens on the small disk, in one process: starting it costs more than the rest.
# Arguments: the disk, a folder for what is left of each run, flags of pretrain.py.
SCENES = """
import contextlib, io, json, os, shutil, subprocess, sys
from pathlib import Path

import pretrain
import recipe.session
from recipe.run.checkpoint import find_checkpoint
from recipe.base.errors import UserError
from testing.helpers import reset_accelerate
from tests.run.test_checkpoint import save

disk, kept, *words = sys.argv[1:]
filler = Path(disk, "filler")
scenes = {}


@contextlib.contextmanager
def filled(room=0):
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            file.truncate(max(0, file.tell() - room))
    try:
        yield
    finally:
        filler.unlink()


def save_on_full_disk(folder, step, *rest):
    with filled() if step in full_at else contextlib.nullcontext():
        return save_checkpoint(folder, step, *rest)


save_checkpoint, recipe.session.save_checkpoint = recipe.session.save_checkpoint, save_on_full_disk


def run(name, full=()):
    # Something else fills the disk while the checkpoints of these updates are written.
    global full_at
    full_at, run, error, printed = full, Path(disk, name), None, io.StringIO()
    sys.argv = ["pretrain.py", *words, f"--output_dir={run}"]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            pretrain.main()
        except UserError as caught:
            error = str(caught)
    reset_accelerate()
    scenes[name] = {"error": error, "printed": printed.getvalue()}
    if run.exists():
        shutil.move(run, Path(kept, name))


run("goes-on", {4})
run("ends-badly", {4, 6})
with filled(8192):
    run("starts-full")
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
run("read-only")
subprocess.run(["mount", "-o", "remount,rw", disk], check=True)

folder = Path(disk, "checkpoints")
good = save(folder, 1)
size = sum(file.stat().st_size for file in good.iterdir())
scenes["good"], scenes["rooms"] = good.name, []
for room in range(0, size + 4096, 8192):
    with filled(room):
        try:
            save(folder, 2)
            error = None
        except Exception as caught:
            error = type(caught).__name__
        found, faults = find_checkpoint(folder, "latest")
        scenes["rooms"].append([error, [path.name for path in folder.iterdir()], found.name, faults])
save(folder, 2)
Path(kept, "scenes.json").write_text(json.dumps(scenes))
"""


@pytest.fixture(scope="session")
def disk(common_folder: Path) -> Path:
    return common_folder / "small-disk"


@pytest.fixture(scope="session")
def kept(common_folder: Path) -> Path:
    return common_folder / "kept-of-small-disk"


@pytest.fixture(scope="session")
def scenes(disk: Path, kept: Path, corpus_file: Path, tokenizer_dir: Path, tmp_path_factory) -> dict[str, Any]:
    """Of each run its `error`, if any, and what was `printed`; its folder is in `kept`."""
    with FileLock(f"{disk}.lock"):
        if not (kept / "scenes.json").exists():
            kept.mkdir(exist_ok=True)
            disk.mkdir(exist_ok=True)
            play_scenes(disk, kept, small_flags(disk, corpus_file, tokenizer_dir), tmp_path_factory.mktemp("scenes"))
    return json.loads((kept / "scenes.json").read_text())


def play_scenes(disk: Path, kept: Path, flags: dict[str, object], folder: Path) -> None:
    if subprocess.run([*NAMESPACE, 'mount -t tmpfs none "$1"', "_", disk], capture_output=True).returncode:
        pytest.skip("no right to mount")
    flags |= {"save_steps": 2, "save_total_limit": 1, "token_store_dir": folder / "stores"}
    del flags["output_dir"]
    script = folder / "scenes.py"
    script.write_text(SCENES)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": PYTHONPATH}
    command = [*NAMESPACE, ON_SMALL_DISK, "_", disk, sys.executable, script, disk, kept, *command_line(flags)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_disk_that_fills_up_at_any_point_leaves_the_last_checkpoint(scenes):
    assert len(scenes["rooms"]) > 5
    for error, left, found, faults in scenes["rooms"]:
        assert error is not None, "a checkpoint was written into less room than it takes"
        assert left == [found] == [scenes["good"]]
        assert faults == []


def test_run_goes_on_with_the_last_good_checkpoint(scenes, kept, disk, flags, run_pretrain, tmp_path: Path):
    assert scenes["goes-on"]["error"] is None
    assert "warning: no checkpoint of update 4: " in scenes["goes-on"]["printed"]
    assert f"the last one is {disk / 'goes-on/checkpoints/step-00000002'}" in scenes["goes-on"]["printed"]
    run = kept / "goes-on"
    assert json.loads((run / "status.json").read_text())["state"] == "complete"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    run_pretrain(flags | {"save_steps": 2, "save_total_limit": 1})
    assert learning(run / "metrics.jsonl") == learning(tmp_path / "run" / "metrics.jsonl")


def test_run_whose_last_checkpoint_cannot_be_written_says_so(scenes, kept: Path):
    assert scenes["ends-badly"]["error"].startswith("the last checkpoint could not be written (")
    run = kept / "ends-badly"
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000002"]
    assert find_checkpoint(run / "checkpoints", "latest")[1] == []


def test_disk_that_is_full_at_the_start_is_refused(scenes, kept: Path):
    assert "1 + 1 checkpoints of" in scenes["starts-full"]["error"]
    assert "`save_total_limit` is 1: lower it" in scenes["starts-full"]["error"]
    assert not (kept / "starts-full").exists()


def test_read_only_folder_is_refused(scenes, disk: Path):
    assert scenes["read-only"]["error"].startswith(f"`output_dir` {disk / 'read-only'}")


def test_room_is_measured_where_the_folder_will_be(tmp_path: Path):
    assert "3 + 1 checkpoints" in check_space(tmp_path / "not" / "there" / "yet", 1, 3)
    with pytest.raises(UserError, match="free some, or choose another `output_dir`"):
        check_space(tmp_path / "not", 10**15, 3)
