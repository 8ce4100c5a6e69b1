"""What a CPU cannot show: mixed precision, fused AdamW and resume on CUDA."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from testing.helpers import PYTHONPATH, ROOT, command_line, learning, read_lines, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def launch(flags: dict[str, object], precision: str, *engine: str) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", *engine, "--num_machines=1", "--num_processes=1"]
    command += [f"--mixed_precision={precision}", "--dynamo_backend=no", "pretrain.py", *command_line(flags)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": PYTHONPATH}, check=True)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_precisions_learn_alike(echo_flags, tmp_path: Path, precision: str):
    launch(echo_flags, precision)
    environment = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["environment"]
    assert environment["mixed_precision"] == precision
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["eval_loss"] < 0.5 * last["unigram_loss"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resume_on_cuda_matches_uninterrupted_run(flags, tmp_path: Path, precision: str):
    launch(flags, precision)
    resumed = flags | {"output_dir": tmp_path / "resumed", "resume_from_checkpoint": "latest"}
    launch(resumed, precision)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000006")
    launch(resumed, precision)
    # Kernels may add in another order from run to run.
    for line, other in zip(*(learning(tmp_path / name / "metrics.jsonl") for name in ("run", "resumed")), strict=True):
        assert line == pytest.approx(other, rel=1e-3)
    one, two = weights(tmp_path / "run"), weights(tmp_path / "resumed")
    assert all(torch.allclose(one[name], two[name], rtol=1e-2, atol=1e-4) for name in one)


@pytest.mark.parametrize("compiled", [False, True])
def test_fsdp2_learns_as_one_process_and_goes_on_from_it(flags, tmp_path: Path, compiled: bool):
    """On one GPU, which splits nothing up but runs all of accelerate's FSDP2."""
    launch(flags, "bf16")
    sharded = flags | {
        "output_dir": tmp_path / "sharded",
        "torch_compile": compiled,
        "resume_from_checkpoint": "latest",
    }
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000003", tmp_path / "sharded/checkpoints/step-00000003")
    launch(sharded, "bf16", "--config_file", str(ROOT / "accelerate_configs/fsdp2.yaml"))
    environment = yaml.safe_load((tmp_path / "sharded" / "config.yaml").read_text())["environment"]
    assert environment["distributed_type"] == "FSDP"
    one, two = (learning(tmp_path / name / "metrics.jsonl")[-1] for name in ("run", "sharded"))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-2)
