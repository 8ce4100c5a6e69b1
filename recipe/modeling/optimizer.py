"""The optimizer, AdamW as in the paper, and the schedule of its learning rate, a function of the place in the run."""

import inspect
import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from recipe.base.errors import UserError, describe_error, did_you_mean

# Arguments of schedules that have options of their own, or that torch has.
GIVEN_ELSEWHERE = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
PREVIEWED = 100  # points of a schedule, at which it is tried before a run


def build_optimizer(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.AdamW:
    """Build AdamW (fused kernels) without weight decay on biases and layer norms, the parameters of one dimension."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)


def build_scheduler(
    optimizer: torch.optim.Optimizer, name: str, arguments: dict[str, Any], warmup: int, length: int, position: int
) -> LambdaLR:
    """Build a schedule of the learning rate that stands at a position.

    It is not for `accelerator.prepare`, which would step it once for each process.

    Args:
        optimizer: whose first learning rate is the peak.
        name, arguments: of the schedule, as transformers has them.
        warmup, length: the schedule's steps of warmup and in all, in what the run counts: updates, or milliseconds.
        position: steps before the next update.

    Raises:
        UserError: the schedule does not take these arguments.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    make: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    taken = inspect.signature(make).parameters.keys() - GIVEN_ELSEWHERE
    remedy = f"{name} takes {', '.join(sorted(taken)) or 'none'}"
    for argument in arguments.keys() - taken:
        raise UserError(f"`lr_scheduler_kwargs` has `{argument}`{did_you_mean(argument, taken)}; {remedy}")
    try:
        scheduler = get_scheduler(name, optimizer, warmup, length, arguments)
        with warnings.catch_warnings(action="ignore"):  # torch's of a step before one of the optimizer
            set_rate(scheduler, position)
    except Exception as error:  # of one schedule or another, about what is missing or a value
        raise UserError(f"`lr_scheduler_kwargs` is {arguments}: {describe_error(error)}; {remedy}") from error
    return scheduler


def set_rate(scheduler: LambdaLR, position: int) -> float:
    """Set the learning rate to that of a position in the schedule, and return it."""
    scheduler.last_epoch = position - 1  # of which its rates are a function
    scheduler.step()
    return float(scheduler.get_last_lr()[0])


def preview_rates(learning_rate: float, name: str, arguments: dict[str, Any], warmup: int, length: int) -> list[float]:
    """Return the learning rates of positions spread over a run, and at last that of its end; see above."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=learning_rate)
    positions = sorted({*(length * part // PREVIEWED for part in range(PREVIEWED + 1)), warmup})
    rates = [
        float(build_scheduler(optimizer, name, arguments, warmup, length, position).get_last_lr()[0])
        for position in positions
    ]
    if not all(map(math.isfinite, rates)) or min(rates) < 0:
        raise UserError(f"`lr_scheduler_kwargs` is {arguments}, with which {name} has the rates {rates}")
    return rates
