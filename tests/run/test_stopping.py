"""Early ends: signals, the clock, a launcher that is gone; and that no process stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import recipe.run.stopping
from recipe.run.stopping import StopRequest, TrainingClock, handling_stop_signals
from testing.helpers import PATIENCE_SECONDS, ROOT, command_line, wait_for, wait_for_training
from tests.test_pretrain import start

LAUNCHERS = {
    "accelerate, 1": [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"],
    "torchrun, 2": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
}


def test_second_interrupt_ends_at_once():
    before = signal.getsignal(signal.SIGINT)  # a process started in the background ignores it
    request = StopRequest()
    with handling_stop_signals(request.handle):
        os.kill(os.getpid(), signal.SIGINT)
        assert request.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_first_signal_is_the_reason_and_one_process_says_so(capfd):
    for speaks in (True, False):
        request = StopRequest(speaks=speaks)
        with handling_stop_signals(request.handle):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)  # of a launcher that ends
            if (worker := os.fork()) == 0:
                request.reason = None
                os.kill(os.getpid(), signal.SIGUSR2)
                os._exit(0)
            os.waitpid(worker, 0)
        assert request.reason == "SIGINT"
    assert capfd.readouterr().err == "SIGINT: stopping after this update, saving …\n"


def test_hangup_is_a_request_unless_nohup_has_it_ignored():
    code = "import signal, recipe.run.stopping as s; print(signal.SIGHUP in s.STOP_SIGNALS)"
    for command, is_request in (([], True), (["nohup"], False)):
        result = subprocess.run([*command, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert result.stdout == f"{is_request}\n"


def test_limit_leaves_time_for_an_update_and_a_checkpoint(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(recipe.run.stopping, "START_SECONDS", 0.0)
    request = StopRequest(max_hours=1)
    now = 1060.0
    request.update_done(seconds_to_save=20.0)  # the slowest update: a minute
    now = 1070.0
    request.update_done(seconds_to_save=20.0)
    now = 3600.0 - 2 * (60 + 20) - 30
    assert not request.is_set()
    now += 1
    assert request.is_set()
    assert request.reason == "`max_train_hours` (1)"
    assert not StopRequest().is_set()


def test_clock_of_training_goes_on_from_before(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = TrainingClock(2500)
    assert clock.milliseconds() == 2500
    now = 1001.5
    assert clock.milliseconds() == 4000


def test_run_stops_in_time_and_goes_on(flags, run_pretrain, tmp_path: Path, monkeypatch, capsys):
    flags |= {"max_steps": 100_000, "save_steps": 100_000, "resume_from_checkpoint": "latest"}
    # An hour is over in a second more than the spare time.
    end = time.monotonic() + recipe.run.stopping.EXIT_MARGIN_SECONDS + 1
    monkeypatch.setattr(recipe.run.stopping, "START_SECONDS", end - 3600)
    run_pretrain(flags | {"max_train_hours": 1})
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "preempted"
    assert "max_train_hours" in status["reason"]
    assert time.monotonic() < end
    assert f"stopped after update {status['step']:,}" in capsys.readouterr().out
    run_pretrain(flags | {"max_steps": status["step"] + 1, "warmup_steps": 1})
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "complete"


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_no_process_outlives_its_launcher(flags, tmp_path: Path, launcher: str, number: signal.Signals):
    flags |= {"max_steps": 100_000, "save_steps": 100_000, "logging_steps": 1, "dataloader_num_workers": 2}
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*LAUNCHERS[launcher], "pretrain.py", *command_line(flags)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_training(tmp_path / "run")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3  # workers too
    process.send_signal(number)
    process.wait(timeout=PATIENCE_SECONDS)
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS)
    assert not alive
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", "SIGTERM")
    assert (tmp_path / "run" / "checkpoints" / f"step-{status['step']:08d}").is_dir()


@pytest.mark.long
def test_workers_end_with_a_process_that_was_killed(flags, tmp_path: Path):
    process = start(flags | {"max_steps": 100_000, "logging_steps": 1, "dataloader_num_workers": 2})
    wait_for_training(tmp_path / "run")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    process.kill()
    process.wait()
    assert not psutil.wait_procs(family, timeout=PATIENCE_SECONDS)[1]


@pytest.mark.long
def test_run_that_was_not_launched_outlives_its_shell(flags, tmp_path: Path):
    """As `nohup python pretrain.py &` should."""
    words = [sys.executable, "pretrain.py", *command_line(flags | {"max_steps": 60, "logging_steps": 1})]
    environment = {
        name: value for name, value in os.environ.items() if name not in recipe.run.stopping.LAUNCHER_VARIABLES
    }
    shell = subprocess.Popen(
        ["sh", "-c", '"$@" & sleep 6000', "sh", *map(str, words)],
        cwd=ROOT,
        env=environment | {"ACCELERATE_USE_CPU": "true"},
    )
    wait_for((tmp_path / "run" / "status.json").exists)
    [pid] = json.loads((tmp_path / "run" / "status.json").read_text())["pids"]
    run = psutil.Process(pid)
    sleeping = [child for child in psutil.Process(shell.pid).children() if child.pid != pid]
    shell.kill()
    shell.wait()
    for child in sleeping:
        child.kill()
    psutil.wait_procs([run], timeout=PATIENCE_SECONDS)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "complete"
