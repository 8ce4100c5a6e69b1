import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from testing.helpers import PATIENCE_SECONDS, ROOT, command_line, wait_for_training

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
PROCESSES = {"cpu": 1, "single_gpu": 1, "multi_gpu": 8, "multi_node": 16, "fsdp2": 8}


def test_there_is_a_config_for_each_kind_of_hardware():
    assert {path.stem for path in CONFIGS} == PROCESSES.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_is_one_that_accelerate_reads(path: Path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.num_processes == PROCESSES[path.stem]
    assert path.read_text().startswith("# When: ")


def launched(monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[dict[str, str], object]:
    """What `accelerate launch` would give torchrun, on a machine with eight GPUs, and the processes' environment."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*flags, "pretrain.py"]))
    return prepare_multi_gpu_env(args), args


def test_multi_node_is_data_parallel_over_all_machines(monkeypatch: pytest.MonkeyPatch):
    flags = ["--config_file", str(ROOT / "accelerate_configs/multi_node.yaml"), "--machine_rank", "1"]
    environment, args = launched(monkeypatch, *flags, "--main_process_ip", "10.0.0.1")
    assert (args.multi_gpu, args.nnodes, args.nproc_per_node, args.node_rank) == (True, "2", "8", 1)
    assert args.rdzv_endpoint == "10.0.0.1:29500"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_fsdp2_config_makes_the_plugin_that_is_served(monkeypatch: pytest.MonkeyPatch):
    environment, _ = launched(monkeypatch, "--config_file", str(ROOT / "accelerate_configs/fsdp2.yaml"))
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert not plugin.cpu_ram_efficient_loading


SRUN = """#!/bin/sh
# One node with two "GPUs".
[ "$1" = --kill-on-bad-exit=1 ] && shift
SLURM_NODEID=0 SLURM_NNODES=1 SLURM_GPUS_ON_NODE=2 ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 exec "$@"
"""
SCONTROL = """#!/bin/sh
[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> "$SCONTROL_LOG"
"""


@pytest.fixture
def sbatch(tmp_path: Path, flags: dict[str, object]):
    """A function that starts slurm.sbatch as Slurm would, with a Slurm of our own around it."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "SCONTROL_LOG": str(tmp_path / "scontrol.log")}
    environment |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "one"}
    # As on GPUs but for the precision.
    text = (ROOT / "accelerate_configs/multi_node.yaml").read_text()
    config = tmp_path / "config.yaml"
    config.write_text(text.replace("mixed_precision: bf16", "mixed_precision: 'no'"))
    environment |= {"ACCELERATE_CONFIG": str(config)}
    del flags["output_dir"]

    def start(changes: dict[str, object]) -> subprocess.Popen:
        command = [ROOT / "accelerate_configs/slurm.sbatch", tmp_path / "run", *command_line(flags | changes)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)

    return start


def requeued(tmp_path: Path) -> int:
    log = tmp_path / "scontrol.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.long
def test_slurm_job_goes_on_until_the_run_is_complete(sbatch, tmp_path: Path):
    process = sbatch({"max_steps": 100_000, "save_steps": 100_000, "logging_steps": 1})
    wait_for_training(tmp_path / "run")
    process.send_signal(signal.SIGUSR1)  # to the script alone, as `--signal=B:USR1` does
    assert process.wait(timeout=PATIENCE_SECONDS) == 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", "SIGUSR1")
    assert requeued(tmp_path) == 1

    assert sbatch({"max_steps": status["step"] + 1, "warmup_steps": 1}).wait(timeout=PATIENCE_SECONDS) == 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "complete"
    assert requeued(tmp_path) == 1


@pytest.mark.long
def test_slurm_job_that_cannot_start_is_not_queued_again(sbatch, tmp_path: Path):
    assert sbatch({"max_steps": 0}).wait(timeout=PATIENCE_SECONDS) == 1
    assert requeued(tmp_path) == 0
