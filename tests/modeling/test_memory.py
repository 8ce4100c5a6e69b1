from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AlbertConfig, RobertaConfig, RobertaPreLayerNormConfig

from recipe.modeling import kernels
from recipe.modeling.memory import LINEAR_FROM_ROWS, USABLE_FRACTION, BytesInUse, compute_memory
from recipe.modeling.model import ROBERTA_DEFAULTS, build_model
from recipe.modeling.objectives import MaskedLMObjective, SentenceOrderObjective

SIZES = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
CONFIG = RobertaConfig(**ROBERTA_DEFAULTS, **SIZES, vocab_size=5000)


def make_objective(gradient_checkpointing: bool = False, config: RobertaConfig = CONFIG) -> MaskedLMObjective:
    return MaskedLMObjective(build_model(config, None), 0.15, gradient_checkpointing)


def compute(rows: int = 8, gradient_checkpointing: bool = False, precision: str = "bf16", on_gpu: bool = True):
    return compute_memory(lambda: make_objective(gradient_checkpointing), rows, 128, precision, on_gpu=on_gpu)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_bytes_in_use_are_those_of_torchs_own_tracker(gradient_checkpointing):
    def step(objective: nn.Module) -> None:
        ids = torch.zeros(8, 128, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16):
            sums, _ = objective(ids, ids, ids)
        sums.sum().backward()

    with FakeTensorMode():
        objective, again = make_objective(gradient_checkpointing), make_objective(gradient_checkpointing)
        with BytesInUse(objective.parameters()) as used:
            step(objective)
        tracker = MemTracker()
        tracker.track_external(again)
        with tracker:
            step(again)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    weights = sum(parameter.nbytes for parameter in again.parameters())
    assert used.peak == pytest.approx(peak["Total"] - weights, rel=0.02)


def test_memory_is_the_sum_of_its_parts_and_grows_with_the_rows():
    memory, more = compute(rows=64), compute(rows=128)
    parameters = sum(parameter.numel() for parameter in make_objective().parameters())
    assert memory.parameters == parameters
    assert memory.weights + memory.gradients + memory.optimizer == 16 * parameters
    assert memory.logits == 64 * 20 * 5000 * 12
    assert more.total - memory.total == pytest.approx(64 * memory.row, rel=0.01)


def test_largest_micro_batch_is_the_largest_that_fits():
    gigabytes = 4e9
    largest = compute().largest_micro_batch(gigabytes)
    assert largest > LINEAR_FROM_ROWS
    assert compute(rows=largest).total <= USABLE_FRACTION * gigabytes < compute(rows=largest + 1).total
    assert compute().largest_micro_batch(1e6) == 0


def test_what_saves_memory_is_seen_to():
    plain = compute(rows=64)
    assert compute(rows=64, gradient_checkpointing=True).activations < 0.5 * plain.activations
    assert compute(rows=64, precision="no").activations > 1.2 * plain.activations
    # On a CPU dropout keeps more, and attention keeps its probabilities.
    assert compute(rows=64, on_gpu=False).activations > 1.2 * plain.activations


def test_layers_that_hand_on_float32_take_more():
    def activations(bf16_residual: bool) -> int:
        return compute_memory(make_objective, 64, 128, "bf16", True, bf16_residual).activations

    assert activations(bf16_residual=False) > 1.1 * activations(bf16_residual=True)


def test_pre_norm_layers_keep_one_sum_and_hand_on_two_tensors():
    def activations(config: RobertaConfig | RobertaPreLayerNormConfig, gradient_checkpointing: bool) -> int:
        make = partial(make_objective, gradient_checkpointing, config)
        return compute_memory(make, 64, 128, "bf16", on_gpu=True).activations

    config = RobertaPreLayerNormConfig(**ROBERTA_DEFAULTS, **SIZES, vocab_size=5000)
    assert activations(config, False) == pytest.approx(activations(CONFIG, False), rel=0.05)
    handed_on = 2 * 64 * 128 * SIZES["hidden_size"]
    more = activations(config, True) - activations(CONFIG, True)
    assert SIZES["num_hidden_layers"] / 2 < more / handed_on < SIZES["num_hidden_layers"] + 2


def test_memory_of_a_gpu_is_computed_without_triton_and_for_widths_beyond_the_kernel(monkeypatch):
    with_triton = compute()
    monkeypatch.setattr(kernels, "triton", None)
    assert compute() == with_triton
    config = RobertaConfig(
        num_hidden_layers=1, hidden_size=kernels.MAX_WIDTH + 64, num_attention_heads=1, vocab_size=100
    )
    assert compute_memory(lambda: make_objective(config=config), 1, 32, "bf16", True).activations > 0


def test_pairs_and_shared_layers_are_computed_too():
    config = AlbertConfig(**SIZES, vocab_size=5000, embedding_size=64)
    memory = compute_memory(
        lambda: SentenceOrderObjective(build_model(config, None, predicts_pairs=True), 0.15), 8, 128, "bf16", True
    )
    parameters = sum(parameter.numel() for parameter in build_model(config, None, predicts_pairs=True).parameters())
    assert memory.parameters == parameters
    assert memory.activations > 0


def test_weights_beside_which_a_row_is_nothing_have_no_micro_batch():
    sizes = {"hidden_size": 2**24, "intermediate_size": 2**24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**ROBERTA_DEFAULTS, **sizes, vocab_size=2**24)
    memory = compute_memory(lambda: make_objective(config=config), 4, 32, "no", on_gpu=False)
    assert memory.largest_micro_batch(1e11) == 0
