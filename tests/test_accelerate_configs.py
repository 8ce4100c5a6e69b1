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


# A Slurm of one node with two "GPUs", whose jobs run where they are submitted.
SBATCH = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_JOB_ID=$$ SLURM_JOB_NODELIST=one SLURM_CPUS_PER_TASK=2 exec "$@"
"""
SRUN = """#!/bin/sh
echo "$@" | head -n 1 >> "$SLURM_LOG"
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_NODEID=0 SLURM_PROCID=${FAKE_PROCID:-0} SLURM_NNODES=1 SLURM_GPUS_ON_NODE=$FAKE_GPUS ACCELERATE_USE_CPU=true \\
    OMP_NUM_THREADS=1 exec "$@"
"""
SCONTROL = """#!/bin/sh
[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> "$SLURM_LOG"
"""
TRAIN, PREPARE = "accelerate_configs/slurm.sbatch", "accelerate_configs/slurm_prepare.sbatch"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment with a Slurm of our own, which notes its steps and requests in `slurm.log`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    # As on GPUs but for the precision.
    text = (ROOT / "accelerate_configs/multi_node.yaml").read_text()
    config = tmp_path / "config.yaml"
    config.write_text(text.replace("mixed_precision: bf16", "mixed_precision: 'no'"))
    environment = {"PATH": path, "SLURM_LOG": str(tmp_path / "slurm.log"), "FAKE_GPUS": "2"}
    return os.environ | environment | {"ACCELERATE_CONFIG": str(config)}


@pytest.fixture
def run_job(slurm, tmp_path: Path):
    """A function that submits a job, waits for it, and returns its result."""

    def run(
        *words: object, cwd: Path = ROOT, submit: str = "sbatch", **environment: str
    ) -> subprocess.CompletedProcess:
        command = [submit, *map(str, words)]
        return subprocess.run(command, cwd=cwd, env=slurm | environment, capture_output=True, text=True)

    return run


@pytest.fixture
def start_training(slurm, tmp_path: Path, flags: dict[str, object]):
    """A function that submits the job of a run into `tmp_path / "run"`."""
    del flags["output_dir"]

    def start(changes: dict[str, object]) -> subprocess.Popen:
        command = ["sbatch", "--nodes=1", TRAIN, tmp_path / "run", *command_line(flags | changes)]
        return subprocess.Popen(command, cwd=ROOT, env=slurm, start_new_session=True)

    return start


def logged(tmp_path: Path, what: str) -> list[str]:
    log = tmp_path / "slurm.log"
    return [line for line in (log.read_text().splitlines() if log.exists() else []) if line.startswith(what)]


@pytest.mark.long
def test_slurm_job_goes_on_until_the_run_is_complete(start_training, tmp_path: Path):
    process = start_training({"max_steps": 100_000, "save_steps": 100_000, "logging_steps": 1})
    wait_for_training(tmp_path / "run")
    process.send_signal(signal.SIGUSR1)  # to the script alone, as `--signal=B:USR1` does
    assert process.wait(timeout=PATIENCE_SECONDS) == 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", "SIGUSR1")
    assert len(logged(tmp_path, "requeue")) == 1

    assert start_training({"max_steps": status["step"] + 1, "warmup_steps": 1}).wait(timeout=PATIENCE_SECONDS) == 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "complete"
    assert len(logged(tmp_path, "requeue")) == 1
    assert all(step.startswith("--kill-on-bad-exit=1 --cpus-per-task=2 ") for step in logged(tmp_path, "--"))


@pytest.mark.long
def test_slurm_job_that_cannot_start_is_not_queued_again(run_job, flags, tmp_path: Path):
    del flags["output_dir"]
    result = run_job(TRAIN, tmp_path / "run", *command_line(flags | {"tokenizer_name": tmp_path / "nowhere"}))
    assert result.returncode == 1
    assert "`tokenizer_name` is " in result.stderr
    assert result.stderr.endswith("run/status.json: there is none, so the reason stands above\n")
    assert not logged(tmp_path, "requeue")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([TRAIN], "error: the run's folder is missing: sbatch "),
        ([TRAIN, "--config", "tiny.yaml"], "error: the run's folder is missing: sbatch "),
        ([TRAIN, "run", "FLAGS", "--prepare_only"], f"error: `prepare_only` is True; that is the job of {PREPARE}"),
        ([TRAIN, "run", "FLAGS", "--dry_run=true"], "error: `dry_run` is True; that needs no job"),
        ([TRAIN, "run", "FLAGS", "--max_step", "3"], "error: there is no field `max_step` (on the command line); did"),
        ([TRAIN, "run", "FLAGS", "--max_steps=0"], "error: `max_steps` is 0; give 1 or more"),
        ([TRAIN, "run", "--config", "nowhere.yaml"], "error: --config nowhere.yaml: there is no such file"),
        ([PREPARE], "error: give the flags of the run only: sbatch "),
        ([PREPARE, "run", "--config", "tiny.yaml"], "error: give the flags of the run only: sbatch "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_of_a_job_are_named(run_job, flags, tmp_path: Path, words: list[str], message: str):
    given = [flag for word in words for flag in (command_line(flags) if word == "FLAGS" else [word])]
    result = run_job("--nodes=1", *given)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == 1  # nothing of the shell's own
    assert not (tmp_path / "slurm.log").exists()  # nothing was started


@pytest.mark.parametrize("script", [TRAIN, PREPARE])
def test_job_is_refused_in_the_wrong_place(run_job, tmp_path: Path, script: str):
    words = [
        ROOT / script,
        *(["run"] if script == TRAIN else []),
        "--config",
        ROOT / "recipe/configs/pretrain/tiny.yaml",
    ]
    result = run_job(*words, cwd=tmp_path)
    assert (result.returncode, "there is no pretrain.py in " in result.stderr) == (2, True)
    result = run_job(*words, submit="bash")
    assert (result.returncode, "this is no job" in result.stderr) == (2, True)
    result = run_job(*words[:-2], "--config", "nowhere.yaml", submit="bash")
    assert result.returncode == 2
    assert ("nowhere.yaml: there is no such file" in result.stderr) == (script == TRAIN)


def test_training_job_needs_its_launch_config_and_gpus(run_job, flags, tmp_path: Path):
    words = [TRAIN, tmp_path / "run", *command_line(flags)]
    result = run_job(*words, ACCELERATE_CONFIG="nowhere.yaml")
    assert (result.returncode, result.stderr) == (2, "error: ACCELERATE_CONFIG: there is no file nowhere.yaml\n")
    result = run_job(*words, FAKE_GPUS="")
    assert result.returncode == 1
    assert "the job has no GPUs; give sbatch --gpus-per-node" in result.stderr


def test_preparation_starts_a_process_on_each_node(run_job, tmp_path: Path):
    python = tmp_path / "tools" / "python3"
    python.write_text('#!/bin/sh\necho "$@"\nexit 3\n')
    python.chmod(0o755)
    words = ["--config", "recipe/configs/pretrain/tiny.yaml", "--max_seq_length=64"]
    result = run_job("--nodes=2", PREPARE, *words)
    started = f"pretrain.py --preprocessing_num_workers 2 {' '.join(words)} --prepare_only true\n"
    assert (result.returncode, result.stdout) == (3, started)
    assert run_job("--nodes=2", PREPARE, *words, FAKE_PROCID="1").stdout == ""  # one process speaks
    assert all(step.startswith("--kill-on-bad-exit=1 --mpi=none --cpus-per-task=2 ") for step in logged(tmp_path, "--"))


@pytest.mark.long
def test_preparation_is_a_job_of_its_own(run_job, flags, tmp_path: Path):
    """It makes the stores, and no run."""
    flags |= {"token_store_dir": tmp_path / "stores"}
    result = run_job("--nodes=1", PREPARE, *command_line(flags))
    assert result.returncode == 0, result.stderr
    assert "corpus sample: 120 documents" in result.stdout
    (store,) = (tmp_path / "stores").glob("sample-*")
    assert (store / "shard-00000.json").is_file()
    assert not (tmp_path / "run").exists()
    assert not logged(tmp_path, "requeue")
    result = run_job(PREPARE, *command_line(flags | {"streaming": True}))
    assert result.returncode == 2
    assert "error: `prepare_only` makes token stores, and a stream does without" in result.stderr
