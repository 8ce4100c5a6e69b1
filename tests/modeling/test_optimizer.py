from typing import get_args

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import RobertaConfig, RobertaForMaskedLM, get_scheduler
from transformers import SchedulerType as TransformersType

from recipe.arguments.pretraining import SchedulerType
from recipe.base.errors import UserError
from recipe.modeling.optimizer import build_optimizer, build_scheduler, preview_rates
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


def make(completed: int, name: str = "linear", **arguments: object):
    optimizer = build_optimizer(torch.nn.Linear(2, 2), 6e-4, (0.9, 0.98), 1e-6, 0.01)
    return optimizer, build_scheduler(optimizer, name, arguments, 0 if name == "constant" else 10, 110, completed)


def take_steps(optimizer: torch.optim.AdamW, scheduler: LambdaLR, updates: int) -> list[float]:
    rates = []
    for _ in range(updates):
        rates.append(scheduler.get_last_lr()[0])
        assert all(group["lr"] == rates[-1] for group in optimizer.param_groups)
        optimizer.step()
        scheduler.step()
    return rates


def test_schedule_is_the_papers():
    optimizer, scheduler = make(0)
    rates = take_steps(optimizer, scheduler, 110)
    assert rates[:11] == pytest.approx([6e-4 * step / 10 for step in range(11)])
    assert rates[10:] == pytest.approx([6e-4 * (110 - step) / 100 for step in range(10, 110)])
    assert scheduler.get_last_lr()[0] == 0


ARGUMENTS = {
    "warmup_stable_decay": {"num_decay_steps": 20},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "polynomial": {"power": 2.0, "lr_end": 1e-5},
}


@pytest.mark.parametrize("name", get_args(SchedulerType))
def test_schedule_is_transformers_and_goes_on_where_it_stopped(name):
    arguments = ARGUMENTS.get(name, {})
    optimizer = build_optimizer(torch.nn.Linear(2, 2), 6e-4, (0.9, 0.98), 1e-6, 0.01)
    theirs = get_scheduler(name, optimizer, 10, 110, arguments)
    expected = take_steps(optimizer, theirs, 110)
    for completed in (0, 1, 10, 63, 109):
        assert take_steps(*make(completed, name, **arguments), 110 - completed) == expected[completed:]
    assert preview_rates(6e-4, name, arguments, 0 if name == "constant" else 10, 110)[-1] == theirs.get_last_lr()[0]


def test_every_schedule_that_does_not_follow_the_loss_is_there():
    names = {str(kind.value) for kind in TransformersType if kind.value not in ("reduce_lr_on_plateau", "greedy")}
    assert names == set(get_args(SchedulerType))


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("cosine", {"num_cycle": 2}, "has `num_cycle`; did you mean `num_cycles`.; cosine takes num_cycles"),
        ("linear", {"power": 2}, "has `power`; linear takes none"),
        ("warmup_stable_decay", {}, "'num_decay_steps'.*warmup_stable_decay takes decay_type, min_lr_ratio"),
        ("warmup_stable_decay", {"num_decay_steps": "ten"}, "`lr_scheduler_kwargs` is .*ten"),
        ("polynomial", {"lr_end": -1.0}, "with which polynomial has the rates"),
        ("constant_with_warmup", {"anything": 1}, "has `anything`; constant_with_warmup takes none"),
    ],
)
def test_arguments_that_a_schedule_does_not_take_are_named(name, arguments, problem):
    with pytest.raises(UserError, match=problem):
        preview_rates(6e-4, name, arguments, 10, 110)
