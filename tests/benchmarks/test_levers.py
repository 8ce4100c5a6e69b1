"""What the ladder compares computes the same: a lever is judged by its time alone."""

import math

import ceilings
import levers
import pytest
import torch
from torch import nn
from transformers import RobertaConfig, RobertaForMaskedLM

from recipe.modeling.model import model_flops_per_token
from recipe.modeling.objectives import MaskedLMObjective
from recipe.modeling.unpadding import Unpadding


@pytest.fixture
def model() -> RobertaForMaskedLM:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=34,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return RobertaForMaskedLM(config).train()


def make_batch(padding: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, 100, (3, 32), generator=generator)
    labels = torch.full_like(input_ids, -100)
    labels[:, 2:20:5] = input_ids[:, 2:20:5]
    batch = {"input_ids": input_ids, "labels": labels, "position_ids": torch.arange(2, 34).expand(3, -1)}
    if padding:
        batch["attention_mask"] = torch.ones_like(input_ids)
        batch["attention_mask"][:, -padding:] = 0
    return batch


def learn(objective: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients."""
    objective.zero_grad()
    sums, counts = objective(**batch)
    loss = (sums / counts).sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["HeadEverywhere", "LastLayerEverywhere", "OneProduct"])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("unpadding", [None, Unpadding("loop", 32, 0.15)], ids=["rows", "tokens"])
def test_a_lever_changes_no_loss_and_no_gradient(
    model: RobertaForMaskedLM, name: str, padding: int, unpadding: Unpadding | None
):
    results = []
    for kind in (MaskedLMObjective, getattr(levers, name)):
        objective = kind(model, 0.15)
        objective.unpadding = unpadding
        results.append(learn(objective, objective.arrange(make_batch(padding))))
    (ours, gradients), (theirs, others) = results
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert gradients.keys() == others.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(others[parameter], gradient, atol=1e-5, rtol=1e-4, msg=parameter)


@pytest.mark.parametrize("lever", [levers.pad_rows, levers.unfuse, levers.keep_float32, levers.attend_by("flash")])
def test_a_lever_that_changes_nothing_here_is_refused(model: RobertaForMaskedLM, lever):
    with pytest.raises(RuntimeError):
        lever(MaskedLMObjective(model, 0.15))


def test_residual_stream_in_bf16_rounds_and_no_more(model: RobertaForMaskedLM):
    batch = make_batch(4)
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = learn(MaskedLMObjective(model, 0.15), batch)
        theirs, _ = learn(levers.ResidualInBf16(model, 0.15), batch)
    assert theirs != ours
    assert theirs == pytest.approx(ours, rel=2e-2)


def test_ceilings_are_of_all_products_of_the_model():
    config, batch, length = RobertaConfig(vocab_size=50_265), 4, 512
    products = ceilings.products_of(config, batch, length)
    flops = sum(6 * math.prod(product) * times for product, times in products.items())
    masked = math.ceil(ceilings.MLM_PROBABILITY * length) / length
    scores = 12 * length * config.hidden_size * (config.num_hidden_layers - 1 + masked)  # and what they weigh
    expected = model_flops_per_token(config, length, masked)
    assert flops / (batch * length) + scores == pytest.approx(expected, rel=1e-3)
