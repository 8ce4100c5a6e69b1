"""Memory of a device: computed before anything runs, or found by trying once something did not fit."""

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recipe.modeling.kernels import MAX_WIDTH
from recipe.modeling.objectives import PRECISIONS, MaskedLMObjective, residual_dtype

USABLE_FRACTION = 0.9  # of a device's memory; the CUDA context, buffers and fragmentation take the rest
LINEAR_FROM_ROWS = 64  # rows from which on memory grows by the same amount for each further row
LOGIT_BYTES = 12  # a logit's log-softmax, its gradient and the logit's own, in float32, are in memory at once


@dataclass(frozen=True)
class StepMemory:
    """Bytes that training takes on a device at its peak, computed without running anything.

    All tensors of a forward and a backward pass are counted by running them with tensors that have shapes and no
    contents, and what stays between passes: float32 weights, gradients and AdamW's two moments. This is for eager mode;
    compiled, a row takes less.
    """

    parameters: int  # their number
    weights: int
    gradients: int
    optimizer: int  # its two moments
    activations: int  # of a micro-batch, with the copies of weights that autocast makes
    logits: int  # of a micro-batch, and their gradients
    row: int  # for a further row, from `LINEAR_FROM_ROWS` rows on
    first_rows: int  # for `LINEAR_FROM_ROWS` rows, with weights, gradients and moments

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    def largest_micro_batch(self, memory: float) -> int:
        """Compute for how many rows `memory` bytes have room; the figure is rough where there are few."""
        return max(0, LINEAR_FROM_ROWS + int((USABLE_FRACTION * memory - self.first_rows) // self.row))


def compute_memory(
    make_objective: Callable[[], MaskedLMObjective],
    rows: int,
    length: int,
    precision: str,
    on_gpu: bool,
    bf16_residual: bool = True,
) -> StepMemory:
    """Compute what training takes with micro-batches of `rows` times `length` tokens.

    The precision is named as accelerate does, and `bf16_residual` is the option. On a GPU the fused kernel is taken to
    serve the widths that it is for; other dropout keeps one byte an element there, and attention nothing of it.
    """
    with FakeTensorMode():
        objective = make_objective().train()
        if on_gpu and objective.model.config.hidden_size <= MAX_WIDTH:
            objective.residual_dtype = residual_dtype(precision, bf16_residual)
        for module in objective.modules() if on_gpu else ():
            for name, child in module.named_children():
                if isinstance(child, nn.Dropout) and child.p:
                    setattr(module, name, DropoutOfGPU())
        parameters = sum(parameter.numel() for parameter in objective.parameters())
        sizes = (rows, LINEAR_FROM_ROWS, 2 * LINEAR_FROM_ROWS)
        peaks = [peak_bytes(objective, size, length, precision) for size in sizes]
    slots = rows * math.ceil(objective.masked_share * length)
    logits = LOGIT_BYTES * slots * objective.model.config.vocab_size
    return StepMemory(
        parameters=parameters,
        weights=4 * parameters,
        gradients=4 * parameters,
        optimizer=8 * parameters,
        activations=peaks[0] - 4 * parameters - logits,  # and without the gradients
        logits=logits,
        row=max(1, (peaks[2] - peaks[1]) // LINEAR_FROM_ROWS),  # beside weights of petabytes a row is nothing
        first_rows=peaks[1] + 12 * parameters,
    )


def peak_bytes(objective: nn.Module, rows: int, length: int, precision: str) -> int:
    """Count the bytes in use at the peak of a second pass forward and backward, with gradients and without weights."""
    batch = full_rows(rows, length, 1.0)
    autocast = torch.autocast("cpu", PRECISIONS.get(precision), enabled=precision in PRECISIONS)
    objective.zero_grad()
    with BytesInUse(objective.parameters()) as used:
        for _ in range(2):
            with autocast:
                sums, _ = objective(**batch)
            sums.sum().backward()
            del sums
    return used.peak


class BytesInUse(TorchDispatchMode):
    """A count of the bytes of all tensors that are made under it and not freed yet.

    torch's MemTracker counts the same, module by module, and takes eight times as long over roberta-base.
    """

    def __init__(self, known_before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages = weakref.WeakSet(tensor.untyped_storage() for tensor in known_before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.storages:
                self.storages.add(storage)
                self.count(storage.nbytes())
                weakref.finalize(storage, self.count, -storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def count(self, num_bytes: int) -> None:
        """Add bytes to those in use now; fewer than none are freed."""
        self.now += num_bytes


class DropoutOfGPU(nn.Module):
    """Dropout that keeps one byte an element, as on a GPU; on a CPU it keeps more, and attention from fused kernels."""

    p = 0.0  # for attention, whose fused kernels keep a seed

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Multiply with a mask that drops nothing."""
        return hidden * torch.ones_like(hidden, dtype=torch.bool)


def full_rows(rows: int, length: int, masked_share: float) -> dict[str, torch.Tensor]:
    """Make a batch of rows without padding, in the form of the collator's, for what only its size matters to."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    labels[:, : int(masked_share * length)] = 0
    return {"input_ids": ids, "labels": labels, "position_ids": ids, "token_type_ids": ids, "pair_label": ids[:, 0]}


def largest_micro_batch(
    objective: nn.Module,
    make_batch: Callable[[int], dict[str, torch.Tensor]],
    sizes: list[int],
    device: torch.device,
    reserve: int,
) -> int | None:
    """Find by trying the largest of some sizes for which the device has room; None if not even the smallest fits.

    Args:
        objective: as it is trained.
        make_batch: makes a micro-batch of so many rows, as the objective takes it, see `full_rows`.
        sizes: numbers of rows.
        device: of the objective.
        reserve: bytes that stay free for what is not allocated yet.
    """
    return next(
        (size for size in sorted(sizes, reverse=True) if fits(objective, make_batch(size), device, reserve)), None
    )


def fits(objective: nn.Module, batch: dict[str, torch.Tensor], device: torch.device, reserve: int) -> bool:
    """Try whether there is room for a forward and a backward pass of a micro-batch."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        kept = torch.empty(reserve, dtype=torch.uint8, device=device)
        sums, _ = objective(**send_to_device(batch, device))
        sums.sum().backward()
        del kept
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        objective.zero_grad()
