"""Attention within sequences, and the trials by which its kernels are chosen."""

import pytest
import torch
from torch.library import opcheck

import recipe.modeling.attention
from recipe.modeling.attention import Trial, attend_backward, attend_in_sequences, check_kernel, find_kernel, loop_over

LIKE = torch.zeros(1, 3, 16)


def test_loop_passes_its_own_trial():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        check_kernel("loop", LIKE.to(dtype))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_those_of_differences(dropout, monkeypatch):
    """Each call drops the same, so that the output is a function of its inputs."""
    monkeypatch.setattr("torch.randint", lambda *_: torch.tensor(5))
    trial = Trial("loop", (4, 1, 0), (6, 2, 0), LIKE.double()[..., :4])

    def mix(*states: torch.Tensor) -> torch.Tensor:
        return attend_in_sequences(*states, *trial.where[:4], dropout, 0.5, "loop")[0]

    assert torch.autograd.gradcheck(mix, trial.inputs)


def test_operator_is_one_that_torch_can_compile():
    trial = Trial("loop", (5, 3), (7, 4), LIKE)
    opcheck(attend_in_sequences, (*trial.inputs, *trial.where[:4], 0.0, trial.scale, "loop"))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_flash_returns_what_torch_says_it_does(dropout):
    """Compiled code allocates by this, and nothing here can run the kernel."""
    query = torch.zeros(20, 3, 16, dtype=torch.bfloat16, device="meta")
    bounds = torch.zeros(4, dtype=torch.int32, device="meta")
    made = attend_in_sequences(query, query, query, bounds, bounds, 9, 9, dropout, 0.25, "flash")
    of_torch = torch.ops.aten._flash_attention_forward(
        query, query, query, bounds, bounds, 9, 9, dropout, False, False, scale=0.25
    )
    for ours, theirs in zip(made, of_torch, strict=False):
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
    inputs, forward = [query, query, query, bounds, bounds], list(made)
    found = attend_backward(query, inputs, forward, 9, 9, dropout, 0.25, "flash")
    assert [gradient.shape for gradient in found] == [query.shape] * 3


def scaled_twice(inputs, dropout, scale, seed, gradient=None):
    return loop_over(inputs, dropout, 2 * scale, seed, gradient)


def forgetting_its_mask(inputs, dropout, scale, seed, gradient=None):
    return loop_over(inputs, dropout, scale, seed if gradient is None else seed + 1, gradient)


def dropping_too_much(inputs, dropout, scale, seed, gradient=None):
    return [(1 - dropout) * made for made in loop_over(inputs, dropout, scale, seed, gradient)]


def dropping_nothing(inputs, dropout, scale, seed, gradient=None):
    return loop_over(inputs, 0.0, scale, seed, gradient)


def with_strides_of_its_own(inputs, dropout, scale, seed, gradient=None):
    return [made.mT.contiguous().mT for made in loop_over(inputs, dropout, scale, seed, gradient)]


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (scaled_twice, "it is wrong by"),
        (forgetting_its_mask, "not the same forward and backward"),
        (dropping_too_much, "leaves 0.7"),
        (dropping_nothing, "leaves 1.000"),
        (with_strides_of_its_own, "it returns"),
    ],
)
def test_wrong_kernel_is_refused(monkeypatch, broken, problem):
    monkeypatch.setattr("recipe.modeling.attention.loop_over", broken)
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=problem):
        check_kernel("loop", LIKE)


def test_fastest_right_kernel_is_taken(monkeypatch):
    monkeypatch.setattr(recipe.modeling.attention, "KERNELS", {"cpu": {"flash": 1.0, "loop": 1.0}})
    state = torch.get_rng_state()
    kernel, problems = find_kernel(LIKE.bfloat16(), 2, 16)
    assert kernel == "loop"
    assert problems.startswith("flash: NotImplementedError: Could not run 'aten::_flash_attention_forward'")
    assert torch.get_rng_state().equal(state)
    assert find_kernel(LIKE, 2, 16) == (None, "")  # none is tried for float32
    monkeypatch.setattr(
        recipe.modeling.attention, "time_kernel", lambda kernel, *_: {"loop": 1.05, "flash": 1.0}[kernel]
    )
    monkeypatch.setattr(recipe.modeling.attention, "check_kernel", lambda *_: None)
    assert find_kernel(LIKE.bfloat16(), 2, 16) == ("flash", "")
    monkeypatch.setattr(recipe.modeling.attention, "KERNELS", {"cpu": {"flash": 1.1, "loop": 1.0}})
    assert find_kernel(LIKE.bfloat16(), 2, 16) == ("loop", "")


def test_device_without_kernels_has_none():
    assert find_kernel(LIKE.bfloat16(), 2, 16) == (None, "")
