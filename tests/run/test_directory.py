import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

import recipe.run.directory
from recipe.base.errors import UserError, report_user_errors
from recipe.run.directory import RunDirectory, checkpoint_path, list_checkpoints, read_step
from recipe.run.lock import JOB_VARIABLES
from testing.helpers import ROOT


def test_next_command_can_be_pasted_whatever_the_path(tmp_path: Path):
    line = RunDirectory(tmp_path / "my runs" / "a", True, []).describe()[-1]
    flags = shlex.split(line.removeprefix("next: "))
    assert flags[flags.index("--model_name_or_path") + 1] == str(tmp_path / "my runs" / "a" / "model")


def test_folder_and_early_stops_load_no_torch():
    """A pushing process and `--help` load them, and should start at once."""
    code = "import sys, recipe.run.directory, recipe.run.stopping; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("line", ['{"step": 1', "[]", "{}", '{"step": "1"}', '{"step": true}', "[" * 20_000, "\ud800"])
def test_line_of_metrics_that_is_no_record_is_named(tmp_path: Path, line: str):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n', errors="surrogatepass")
    before = metrics.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged or missing"):
        RunDirectory(tmp_path, True, []).cut_metrics(1)
    assert metrics.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"step": "../x"}', '{"step": -1}', '{"step": 1.5}'])
def test_status_without_a_step_is_named(tmp_path: Path, text: str):
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(UserError, match=r"status\.json is damaged or missing"):
        read_step(tmp_path)


def test_metrics_are_cut_back_and_a_torn_line_forgotten(tmp_path: Path):
    run = RunDirectory(tmp_path, is_main=True, pids=[1])
    for step in (0, 1, 2, 2, 3):
        run.append_metrics({"step": step})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in run.read_metrics()] == [0, 1, 2, 2, 3]
    run.cut_metrics(2)
    run.append_metrics({"step": 3})
    assert [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()] == [0, 1, 2, 2, 3]
    run.cut_metrics(0)  # a run that begins evaluates again
    assert run.read_metrics() == []


def test_metrics_wait_while_they_cannot_be_written(tmp_path: Path, capsys):
    run = RunDirectory(tmp_path / "gone", is_main=True, pids=[1])
    run.append_metrics({"step": 1})
    assert "metrics.jsonl could not be written, and is tried again" in capsys.readouterr().err
    run.path.mkdir()
    run.append_metrics({"step": 2})
    assert [line["step"] for line in run.read_metrics()] == [1, 2]


@pytest.mark.parametrize("name", ["status.json", "metrics.jsonl", "checkpoints", "model"])
def test_folder_with_a_run_is_refused(tmp_path: Path, name: str):
    run = RunDirectory(tmp_path, is_main=True, pids=[])
    run.check(None)
    if name.endswith("json"):
        run.write_status("running", 0)
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"already holds a run.*--resume_from_checkpoint latest"):
        run.check(None)
    with pytest.raises(UserError, match="already holds a run"):
        run.check("another/run/checkpoints/step-00000001")
    run.check(str(tmp_path / "checkpoints" / "step-00000001"))


def test_folder_that_cannot_be_one_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"`output_dir` .* is a file"):
            RunDirectory(path, is_main=True, pids=[]).check(None)


def test_only_the_main_process_writes(tmp_path: Path):
    run = RunDirectory(tmp_path / "run", is_main=False, pids=[])
    run.write_config({"a": 1}, {})
    run.write_status("running", 0)
    run.append_metrics({"step": 1})
    assert not (tmp_path / "run").exists()


def read_status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def test_status_names_state_progress_time_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in (*JOB_VARIABLES, "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    run = RunDirectory(tmp_path, is_main=True, pids=[11, 12])
    run.write_status("preempted", 7, "SIGTERM")
    status = read_status(tmp_path)
    time = datetime.fromisoformat(status.pop("time"))
    assert time.utcoffset() == timedelta()
    assert time.microsecond == 0
    assert status == {
        "state": "preempted",
        "step": 7,
        "saved_step": None,
        "loss": None,
        "reason": "SIGTERM",
        "notice": None,
        "host": platform.node(),
        "job": None,
        "pids": [11, 12],
    }
    run.append_metrics({"step": 8, "loss": 2.5})
    run.append_metrics({"step": 8, "eval_loss": 3.5})
    run.saved_step = 8
    monkeypatch.setenv("PBS_JOBID", "123.head")
    run.write_status("running", 9)
    status = read_status(tmp_path)
    assert (status["loss"], status["saved_step"], status["job"]) == (2.5, 8, "123.head")
    assert read_step(tmp_path) == 8  # of the weights that a card describes
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    run.write_status("running", 9)
    assert read_status(tmp_path)["job"] == platform.node()


def test_status_is_written_again_while_updates_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr(recipe.run.directory.time, "monotonic", lambda: now)
    run = RunDirectory(tmp_path, is_main=True, pids=[])
    run.write_status("running", 0)
    now += recipe.run.directory.HEARTBEAT_SECONDS
    run.heartbeat(1)
    assert read_status(tmp_path)["step"] == 0
    now += 1
    run.heartbeat(2)
    run.heartbeat(3)
    assert read_status(tmp_path)["step"] == 2
    with pytest.raises(KeyError), run.noting_failure():
        raise KeyError("x")
    assert (read_status(tmp_path)["state"], read_status(tmp_path)["step"]) == ("failed", 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGXCPU])
def test_stop_before_or_after_training_is_a_preemption(tmp_path: Path, number: signal.Signals):
    """And status.json is no longer `running`, which would be a run that was killed."""
    run = RunDirectory(tmp_path, is_main=True, pids=[])
    run.write_status("running", 7)
    with pytest.raises(SystemExit) as ended, report_user_errors(), run.noting_failure():
        os.kill(os.getpid(), number)
    status = read_status(tmp_path)
    assert (status["state"], status["step"], status["reason"]) == ("preempted", 7, number.name)
    assert ended.value.code == 128 + number


def test_failure_before_a_run_has_begun_leaves_no_status(tmp_path: Path):
    run = RunDirectory(tmp_path / "run", is_main=True, pids=[])
    with pytest.raises(UserError), run.noting_failure():
        raise UserError("refused")
    assert not run.path.exists()


def test_status_on_a_full_disk_takes_the_place_of_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    run = RunDirectory(tmp_path, is_main=True, pids=[])
    run.write_status("running", 5, "a reason that is longer than the next one")
    monkeypatch.setattr(recipe.run.directory, "write_atomically", full)
    run.write_status("failed", 6)
    assert read_status(tmp_path)["state"] == "failed"
    assert not capsys.readouterr().err
    run.status_file.unlink()
    run.write_status("failed", 6)
    assert "status.json could not be set to failed (6 updates)" in capsys.readouterr().err


def make_remains(run: Path, kind: str) -> None:
    """Leave in a folder what tells of a checkpoint that is no longer there."""
    run.mkdir()
    if kind == "link":
        (run / "checkpoints").symlink_to(run / "unmounted")
    elif kind == "model":
        (run / "model").mkdir()
    elif kind == "status":
        (run / "status.json").write_text('{"state": "failed", "step": 25, "saved_step": 20}')
    elif kind.startswith("metrics"):
        if kind == "metrics":
            (run / "config.yaml").write_text("save_steps: 20\n")
        (run / "metrics.jsonl").write_text('{"step": 25}\n')
    elif kind == "download":
        (run / "checkpoints" / ".from-hub").mkdir(parents=True)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("link", "is a link to .*unmounted, which is not there"),
        ("model", "is the model of a complete run"),
        ("status", "says that update 20 was saved"),
        ("metrics", "tells of 25 updates"),
        ("metrics alone", "tells of 25 updates"),
        ("download", "is a download that has not ended; give the same hub:// address again"),
    ],
)
def test_latest_never_begins_anew_over_the_remains_of_a_run(tmp_path: Path, kind: str, expected: str):
    make_remains(tmp_path / "run", kind)
    with pytest.raises(UserError, match=f"`resume_from_checkpoint` is latest, and .*{expected}"):
        RunDirectory(tmp_path / "run", True, []).check("latest")


def test_latest_begins_where_nothing_was_saved(tmp_path: Path):
    run = RunDirectory(tmp_path, True, [])
    run.check("latest")
    (tmp_path / "config.yaml").write_text("save_steps: 20\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 19}\n')
    run.check("latest")
    run.checkpoints.mkdir()
    (tmp_path / "status.json").write_text('{"state": "failed", "step": 25, "saved_step": null}')
    run.check("latest")


def test_download_that_was_killed_goes_on_by_the_same_address(tmp_path: Path):
    make_remains(tmp_path / "run", "download")
    run = RunDirectory(tmp_path / "run", True, [])
    run.metrics_file.write_text("")  # it is moved before the checkpoint
    run.check("hub://ann/run")
    with pytest.raises(UserError, match="already holds a run"):
        run.check(None)
    run.write_status("running", 3)
    with pytest.raises(UserError, match="already holds a run"):
        run.check("hub://ann/run")


def test_only_numbered_folders_are_checkpoints_in_the_order_of_their_numbers(tmp_path: Path):
    names = ["step-00000040", "step-00000040-best", "step-best", "step-00000020.bak", "step-100000000", "step-99999995"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000050").write_text("")
    found = [path.name for path in list_checkpoints(tmp_path)]
    assert found == ["step-00000040", "step-99999995", "step-100000000"]
    assert checkpoint_path(tmp_path, 100_000_000) == tmp_path / "step-100000000"


def test_config_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "config.yaml" / "folder").mkdir(parents=True)
    with pytest.raises(UserError, match=r"config\.yaml cannot be written: .*put that right or name another"):
        RunDirectory(tmp_path, is_main=True, pids=[]).write_config({}, {})
