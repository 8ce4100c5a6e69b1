"""Checkpoints on a disk that is full: a tmpfs of four megabytes, in a mount namespace of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.base.errors import UserError
from recipe.run.checkpoint import check_space, find_checkpoint
from recipe.run.directory import list_checkpoints
from testing.helpers import ROOT, command_line, learning

NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
# Arguments: the disk, where its contents go afterwards, a command.
ON_SMALL_DISK = """
disk=$1 kept=$2; shift 2
mount -t tmpfs -o size=4m small "$disk" || exit 99
"$@"; status=$?
cp -r "$disk/." "$kept"; exit $status
"""
FILL = """
import os, sys

def fill(path, room):
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            file.truncate(max(0, file.tell() - room))
"""


def has_namespaces(tmp_path_factory: pytest.TempPathFactory) -> bool:
    disk = tmp_path_factory.mktemp("disk")
    return not subprocess.run([*NAMESPACE, 'mount -t tmpfs none "$1"', "_", disk], capture_output=True).returncode


@pytest.fixture
def on_small_disk(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """A function that runs a script, with `disk` in it, on a small disk; what is there at the end is in `kept`."""
    if not has_namespaces(tmp_path_factory):
        pytest.skip("no right to mount")
    disk, kept, script = tmp_path / "disk", tmp_path / "kept", tmp_path / "script.py"
    disk.mkdir()
    kept.mkdir()

    def run(text: str, *words: str) -> subprocess.CompletedProcess:
        script.write_text(FILL + f"disk = {str(disk)!r}\n" + text)
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        command = [*NAMESPACE, ON_SMALL_DISK, "_", disk, kept, sys.executable, script, *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    return run


SAVE_WITH_LITTLE_ROOM = """
from pathlib import Path
from recipe.run.checkpoint import find_checkpoint, save_checkpoint
from tests.run.test_checkpoint import make_model, save

folder = Path(disk, "checkpoints")
good = save(folder, 1)
size = sum(file.stat().st_size for file in good.iterdir())
for room in range(0, size + 4096, 8192):
    fill(disk + "/filler", room)
    try:
        save(folder, 2)
    except Exception as error:
        print(room, type(error).__name__)
    else:
        sys.exit(f"a checkpoint of {size} bytes was written into {room} bytes")
    assert [path.name for path in folder.iterdir()] == [good.name]
    assert find_checkpoint(folder, "latest") == (good, [])
    os.remove(disk + "/filler")
save(folder, 2)
"""


def test_disk_that_fills_up_at_any_point_leaves_the_last_checkpoint(on_small_disk):
    result = on_small_disk(SAVE_WITH_LITTLE_ROOM)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) > 5


# Something else fills the disk while some checkpoints are written.
FULL_AT = """
import pretrain
import recipe.training
from recipe.base.errors import report_user_errors

def save_on_full_disk(folder, step, *rest):
    if step not in FULL:
        return save(folder, step, *rest)
    fill(disk + "/filler", 0)
    try:
        return save(folder, step, *rest)
    finally:
        os.remove(disk + "/filler")

save = recipe.training.save_checkpoint
recipe.training.save_checkpoint = save_on_full_disk
with report_user_errors():
    pretrain.main()
"""


def test_run_goes_on_with_the_last_good_checkpoint(flags, run_pretrain, on_small_disk, tmp_path: Path):
    flags |= {"save_steps": 2, "save_total_limit": 1, "token_store_dir": tmp_path / "stores"}
    run_pretrain(flags)
    flags |= {"output_dir": tmp_path / "disk" / "run"}
    result = on_small_disk("FULL = [4]" + FULL_AT, *command_line(flags))
    assert result.returncode == 0, result.stderr
    assert "warning: no checkpoint of update 4: " in result.stdout + result.stderr
    assert "the last one is " + str(tmp_path / "disk/run/checkpoints/step-00000002") in result.stdout + result.stderr
    run = tmp_path / "kept" / "run"
    assert json.loads((run / "status.json").read_text())["state"] == "complete"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert learning(run / "metrics.jsonl") == learning(tmp_path / "run" / "metrics.jsonl")


def test_run_whose_last_checkpoint_cannot_be_written_says_so(flags, on_small_disk, tmp_path: Path):
    flags |= {"save_steps": 2, "token_store_dir": tmp_path / "stores", "output_dir": tmp_path / "disk" / "run"}
    result = on_small_disk("FULL = [4, 6]" + FULL_AT, *command_line(flags))
    assert result.returncode == 2
    assert "error: the last checkpoint could not be written (" in result.stderr
    run = tmp_path / "kept" / "run"
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000002"]
    assert find_checkpoint(run / "checkpoints", "latest")[1] == []


def test_disk_that_is_full_at_the_start_is_refused(flags, on_small_disk, tmp_path: Path):
    flags |= {"token_store_dir": tmp_path / "stores", "output_dir": tmp_path / "disk" / "run"}
    text = 'fill(disk + "/filler", 8192)\nFULL = []' + FULL_AT
    result = on_small_disk(text, *command_line(flags))
    assert result.returncode == 2
    assert "`save_total_limit` is 3: 3 + 1 checkpoints of" in result.stderr
    assert not (tmp_path / "kept" / "run").exists()


def test_read_only_folder_is_refused(flags, on_small_disk, tmp_path: Path):
    flags |= {"output_dir": tmp_path / "disk" / "run"}
    text = 'import subprocess\nsubprocess.run(["mount", "-o", "remount,ro", disk], check=True)\nFULL = []' + FULL_AT
    result = on_small_disk(text, *command_line(flags))
    assert result.returncode == 2
    assert f"error: `output_dir` {tmp_path / 'disk' / 'run'}" in result.stderr


def test_room_is_measured_where_the_folder_will_be(tmp_path: Path):
    assert "3 + 1 checkpoints" in check_space(tmp_path / "not" / "there" / "yet", 1, 3)
    with pytest.raises(UserError, match="free some, or choose another `output_dir`"):
        check_space(tmp_path / "not", 10**15, 3)
