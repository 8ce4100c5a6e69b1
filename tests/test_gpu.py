"""What a CPU cannot show: mixed precision, fused AdamW, kernels, copies without a wait, and resume on CUDA.

Runs share this process, since a new one takes seconds to import everything; those of FSDP2 have their own.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

import recipe.training
from recipe.modeling import kernels
from recipe.modeling.attention import KERNELS, Sequences, Trial, attend, attend_in_sequences, bounds_of, check_kernel
from testing.helpers import PYTHONPATH, ROOT, SMALL_MODEL, command_line, learning, read_lines, reset_accelerate, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
Run = Callable[[dict[str, object], str], None]
LENGTHS, HEADS, HEAD_SIZE, DROPOUT = (512, 300, 1, 77), 12, 64, 0.1


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that pretrains with these flags in a precision, in this process."""

    def pretrain(flags: dict[str, object], precision: str) -> None:
        reset_accelerate()
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *command_line(flags)])
        importlib.import_module("pretrain").main()
        reset_accelerate()

    return pretrain


def environment_of(folder: Path) -> dict[str, object]:
    return yaml.safe_load((folder / "config.yaml").read_text("utf-8"))["environment"]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    """A kernel that this GPU has; `test_some_kernel_serves` holds that it has one."""
    try:
        check_kernel(request.param, new_states(1))
    except Exception as error:
        pytest.skip(f"{request.param}: {error}")
    return request.param


def new_states(tokens: int, seed: int = 0) -> torch.Tensor:
    """Random queries, keys or values."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(tokens, HEADS, HEAD_SIZE, dtype=torch.bfloat16, device="cuda", generator=generator)


def test_some_kernel_serves():
    for name in KERNELS:
        try:
            check_kernel(name, new_states(1))
        except Exception as error:
            print(f"{name}: {error}")
        else:
            return
    pytest.fail("no kernel attends within sequences")


def test_attention_within_sequences_is_that_of_padded_rows(kernel: str):
    states = [new_states(sum(LENGTHS), seed).requires_grad_() for seed in range(3)]
    wanted = new_states(sum(LENGTHS), 3)
    bounds = bounds_of(LENGTHS, states[0].device)
    where = Sequences(bounds, bounds, max(LENGTHS), max(LENGTHS), kernel)
    out = attend(*states, where, 0.0, HEAD_SIZE**-0.5)
    found = [out, *torch.autograd.grad(out, states, wanted)]
    rows = [nn.utils.rnn.pad_sequence(part.split(LENGTHS), batch_first=True) for part in states]
    lengths = torch.tensor(LENGTHS, device="cuda")
    mask = torch.arange(max(LENGTHS), device="cuda") < lengths[:, None]
    padded = attend(*rows, mask[:, None, None, :], 0.0, HEAD_SIZE**-0.5)[mask]
    for one, other in zip(found, [padded, *torch.autograd.grad(padded, states, wanted)], strict=True):
        assert (one - other).abs().max() <= 0.02 * other.abs().max()


def test_dropout_of_attention_has_its_rate_and_is_the_same_forward_and_backward(kernel: str):
    trial = Trial(kernel, LENGTHS, LENGTHS, new_states(1))
    out, _, _, gradient = trial.run(DROPOUT)
    value = trial.inputs[2]
    forward, backward = (out.float() * trial.gradient).sum(), (gradient.float() * value).sum()
    assert abs(forward - backward) <= 0.02 * (out.float() * trial.gradient).square().sum().sqrt()
    query, key, _ = trial.inputs
    # Equal probabilities, so that a query's sum over ones is the share that is kept over what is expected.
    kept = attend(torch.zeros_like(query), key, torch.ones_like(value), trial.where, DROPOUT, trial.scale).float()
    first = kept[: LENGTHS[0], :, 0]
    assert first.mean().item() == pytest.approx(1, abs=5e-3)  # bf16 has 8 bits
    assert first.std() > 0


def test_operators_keep_the_rules_of_torch(kernel: str):
    trial = Trial(kernel, LENGTHS, LENGTHS, new_states(1))
    arguments = *trial.inputs, *trial.where[:4], 0.0, trial.scale, kernel
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(attend_in_sequences, arguments, test_utils=utils, rtol=0.02, atol=0.02)
    hidden, residual = (new_states(64, seed).flatten(1).requires_grad_() for seed in range(2))
    norm = nn.LayerNorm(HEADS * HEAD_SIZE, device="cuda")
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    arguments = hidden, residual, norm.weight, norm.bias, seed, round(DROPOUT * 2**32), norm.eps, torch.bfloat16
    for keeps_sum in (False, True):
        forward, every = kernels.dropout_add_norm_forward, (*arguments, keeps_sum)
        torch.library.opcheck(forward, every, test_utils=utils, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("width", [96, 768, 1000, 1024])
def test_fused_kernel_is_that_of_torch(width: int):
    for keeps_sum in (False, True):
        assert kernels.why_no_kernels(torch.device("cuda"), width, keeps_sum) is None
        assert kernels.compare_with_torch(torch.device("cuda"), width, keeps_sum, rows=1000)
    hidden, residual = torch.randn(2, 500, width, dtype=torch.bfloat16, device="cuda")
    norm = nn.LayerNorm(width, device="cuda")
    summed = hidden.float() + residual.float()
    expected = F.layer_norm(summed, (width,), norm.weight, norm.bias, norm.eps)
    found = kernels.dropout_add_norm(hidden, residual, norm, 0.0, None, torch.bfloat16)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=2e-2)
    found, found_sum = kernels.dropout_add_norm_sum(hidden, residual, norm, 0.0, None)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=4e-2)
    assert found_sum.equal(summed.bfloat16())


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("model_type", ["roberta", "roberta-prelayernorm"])
def test_precisions_learn_alike(echo_flags, run: Run, tmp_path: Path, precision: str, model_type: str):
    run(echo_flags | {"model_type": model_type}, precision)
    assert environment_of(tmp_path / "run")["mixed_precision"] == precision
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["eval_loss"] < 0.5 * last["unigram_loss"]


def test_training_without_padding_learns_as_with_it(flags, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = SMALL_MODEL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    flags |= {"model_config": json.dumps(plain), "max_steps": 30}
    run(flags, "bf16")
    monkeypatch.setattr("recipe.modeling.objectives.find_kernel", lambda *_: (None, ""))
    run(flags | {"output_dir": tmp_path / "padded"}, "bf16")
    for line, other in zip(*(learning(tmp_path / name / "metrics.jsonl") for name in ("run", "padded")), strict=True):
        for name in {"loss", "eval_loss"} & line.keys():
            assert line[name] == pytest.approx(other[name], rel=5e-3)


@pytest.mark.parametrize(
    ("compiled", "model_type"), [(False, "roberta"), (True, "roberta"), (True, "roberta-prelayernorm")]
)
def test_update_waits_for_nothing(flags, run: Run, monkeypatch: pytest.MonkeyPatch, compiled: bool, model_type: str):
    flags |= {"model_type": model_type}
    real, updates = recipe.training.update_weights, []

    def watched(*arguments):
        updates.append(1)
        torch.cuda.set_sync_debug_mode("default" if len(updates) <= 4 else "error")  # libraries start, code is compiled
        try:
            return real(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(recipe.training, "update_weights", watched)
    run(flags | {"torch_compile": compiled, "max_steps": 12, "packing": "contiguous"}, "bf16")
    assert len(updates) == 12


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resume_on_cuda_matches_uninterrupted_run(flags, run: Run, tmp_path: Path, precision: str):
    run(flags, precision)
    resumed = flags | {"output_dir": tmp_path / "resumed", "resume_from_checkpoint": "latest"}
    run(resumed, precision)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000006")
    run(resumed, precision)
    # Kernels may add in another order from run to run.
    for line, other in zip(*(learning(tmp_path / name / "metrics.jsonl") for name in ("run", "resumed")), strict=True):
        assert line == pytest.approx(other, rel=1e-3)
    one, two = weights(tmp_path / "run"), weights(tmp_path / "resumed")
    assert all(torch.allclose(one[name], two[name], rtol=1e-2, atol=1e-4) for name in one)


@pytest.mark.parametrize("compiled", [False, True])
def test_fsdp2_learns_as_one_process_and_goes_on_from_it(flags, run: Run, tmp_path: Path, compiled: bool):
    """On one GPU, which splits nothing up but runs all of accelerate's FSDP2."""
    run(flags, "bf16")
    sharded = flags | {
        "output_dir": tmp_path / "sharded",
        "torch_compile": compiled,
        "resume_from_checkpoint": "latest",
    }
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000003", tmp_path / "sharded/checkpoints/step-00000003")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        f"--config_file={ROOT}/accelerate_configs/fsdp2.yaml",
    ]
    command += ["--num_machines=1", "--num_processes=1", "--mixed_precision=bf16", "--dynamo_backend=no"]
    command += ["pretrain.py", *command_line(sharded)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": PYTHONPATH}, check=True)
    assert environment_of(tmp_path / "sharded")["distributed_type"] == "FSDP"
    one, two = (learning(tmp_path / name / "metrics.jsonl")[-1] for name in ("run", "sharded"))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-2)
