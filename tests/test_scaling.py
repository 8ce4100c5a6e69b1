"""Several machines and engines, and a run that goes from one to another."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, SAMPLE, SMALL_MODEL, command_line, learning

TWO_PROCESSES = ["--multi_gpu", "--num_processes=2", "--mixed_precision=no", "--dynamo_backend=no"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", *TWO_PROCESSES]
ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
NAMESPACES = ["unshare", "--map-root-user", "--net"]
HAS_NAMESPACES = (shutil.which("ip") and shutil.which("nsenter") and shutil.which("unshare")) and not subprocess.run(
    [*NAMESPACES, "ip", "link", "add", "type", "veth"], capture_output=True
).returncode


@pytest.fixture
def exact_flags(flags: dict[str, object]) -> dict[str, object]:
    """A run without dropout, whose draws depend on the number of processes; accumulating on one process and on two."""
    sizes = SMALL_MODEL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return flags | {
        "corpora": json.dumps([{"name": "tales", "path": str(SAMPLE / "tales.jsonl.gz")}]),
        "train_batch_size": 32,
        "model_config": json.dumps(sizes),
        "logging_steps": 1,
    }


def assert_same_losses(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    first, second = (learning(run / "metrics.jsonl") for run in (one, two))
    assert len(first) == len(second)
    for line, other in zip(first, second, strict=True):
        assert line["tokens"] == other["tokens"]
        assert line.get("data_digest") == other.get("data_digest")
        for name in {"loss", "grad_norm", "eval_loss"} & line.keys():
            assert other[name] == pytest.approx(line[name], rel=tolerance)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_machines_on_loopback_give_the_losses_of_one_process(exact_flags, run_pretrain, tmp_path: Path):
    run_pretrain(exact_flags)
    words = ["--num_machines=2", "--main_process_ip=127.0.0.1", f"--main_process_port={free_port()}", "pretrain.py"]
    words += command_line(exact_flags | {"output_dir": tmp_path / "two"})
    machines = [
        subprocess.Popen([*LAUNCH, f"--machine_rank={rank}", *words], cwd=ROOT, env=os.environ | ON_CPU)
        for rank in range(2)
    ]
    assert [machine.wait(timeout=300) for machine in machines] == [0, 0]
    assert_same_losses(tmp_path / "run", tmp_path / "two")


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no right to make network namespaces")
def test_two_machines_with_a_cable_give_the_losses_of_one_process(exact_flags, run_pretrain, tmp_path: Path):
    run_pretrain(exact_flags)
    words = [
        "--main_process_ip=10.99.0.1",
        "pretrain.py",
        *command_line(exact_flags | {"output_dir": tmp_path / "two"}),
    ]
    command = [*NAMESPACES, ROOT / "tests/two_machines.sh", sys.executable, *TWO_PROCESSES, *words]
    subprocess.run(command, cwd=ROOT, env=os.environ | ON_CPU, check=True)
    assert_same_losses(tmp_path / "run", tmp_path / "two")


def test_gradients_in_bf16_are_refused_where_torch_would(exact_flags, tmp_path: Path):
    words = ["pretrain.py", *command_line(exact_flags | {"ddp_comm_hook": "bf16"})]
    command = [*LAUNCH, "--main_process_port=0", *words]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | ON_CPU, capture_output=True, text=True)
    assert result.returncode != 0
    assert "error: `ddp_comm_hook` is bf16, which is for DDP on GPUs" in result.stderr
    assert not (tmp_path / "run").exists()


def test_torchrun_brings_a_run_back_after_a_process_died(exact_flags, run_pretrain, tmp_path: Path):
    """(The rendezvous that `accelerate launch` uses by itself cannot: its store keeps the addresses of the dead.)"""
    flags = exact_flags | {"max_steps": 60, "save_steps": 5}
    run_pretrain(flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    words = command_line(flags | {"output_dir": tmp_path / "two", "resume_from_checkpoint": "latest"})
    launcher = subprocess.Popen([*command, "pretrain.py", *words], cwd=ROOT, env=os.environ | ON_CPU)
    checkpoint = tmp_path / "two" / "checkpoints" / "step-00000020"
    deadline = time.monotonic() + 200
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    before = json.loads((tmp_path / "two" / "status.json").read_text())["pids"]
    os.kill(before[1], signal.SIGKILL)
    assert launcher.wait(timeout=300) == 0
    status = json.loads((tmp_path / "two" / "status.json").read_text())
    assert status["state"] == "complete"
    assert not set(status["pids"]) & set(before)
    assert_same_losses(tmp_path / "run", tmp_path / "two")
