"""The optimizer, AdamW as in the paper, and its learning rate schedule."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup


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
    optimizer: torch.optim.Optimizer, warmup_steps: int, max_steps: int, completed_steps: int
) -> LambdaLR:
    """Build a schedule of linear warmup and linear decay to zero that goes on after `completed_steps` updates.

    It is not for `accelerator.prepare`, which would step it once for each process.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return get_linear_schedule_with_warmup(optimizer, warmup_steps, max_steps, last_epoch=completed_steps - 1)
