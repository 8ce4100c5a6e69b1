import pytest
import torch
from transformers import RobertaConfig, RobertaForMaskedLM

from recipe.modeling.optimizer import build_optimizer, build_scheduler
from testing.helpers import SMALL_MODEL


def test_biases_and_layer_norms_do_not_decay():
    model = RobertaForMaskedLM(RobertaConfig(**SMALL_MODEL, vocab_size=100))
    optimizer = build_optimizer(model, 1e-3, (0.9, 0.98), 1e-6, 0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for p in optimizer.param_groups[0]["params"]}
    rest = {names[id(p)] for p in optimizer.param_groups[1]["params"]}
    assert decayed | rest == set(names.values())
    assert all(name.endswith(".bias") or "LayerNorm" in name or "layer_norm" in name for name in rest)
    assert not any(name.endswith(".bias") or "LayerNorm" in name or "layer_norm" in name for name in decayed)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def make(completed: int) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), 6e-4, (0.9, 0.98), 1e-6, 0.01)
    return optimizer, build_scheduler(optimizer, warmup_steps=10, max_steps=110, completed_steps=completed)


def test_schedule_is_the_papers():
    optimizer, scheduler = make(0)
    rates = []
    for _ in range(110):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:11] == pytest.approx([6e-4 * step / 10 for step in range(11)])
    assert rates[10:] == pytest.approx([6e-4 * (110 - step) / 100 for step in range(10, 110)])
    assert scheduler.get_last_lr()[0] == 0


@pytest.mark.parametrize("completed", [1, 10, 63])
def test_schedule_goes_on_where_it_stopped(completed):
    optimizer, scheduler = make(0)
    for _ in range(completed):
        optimizer.step()
        scheduler.step()
    resumed_optimizer, resumed = make(completed)
    assert resumed.get_last_lr() == scheduler.get_last_lr()
    assert resumed_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    resumed_optimizer.step()
    resumed.step()
    optimizer.step()
    scheduler.step()
    assert resumed.get_last_lr() == scheduler.get_last_lr()
