"""What fits into a device's memory: computed before anything runs, and found by trying when something did not fit."""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

USABLE = 0.9  # of a device's memory; the rest goes to the CUDA context, to buffers and to what fragments
LINEAR_FROM_ROWS = 64  # rows from which on memory grows by the same for each row more
# Of a logit: its log-softmax and the gradients of that and of the loss, in float32, all there at once.
LOGIT_BYTES = 12
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepMemory:
    """Bytes that training takes on a device at its peak: computed, nothing has run.

    Counted are all tensors of a forward and a backward pass, by running them with tensors that have shapes and no
    contents, and what stays between them: float32 weights, gradients and AdamW's two moments. Eager: compiled, a row
    takes less.

    Attributes:
        parameters: of all that is trained.
        activations: of a micro-batch, with the copies of weights that autocast makes.
        logits: of a micro-batch, with their gradients.
        row: what a row more takes, from `LINEAR_FROM_ROWS` rows on.
        first_rows: what `LINEAR_FROM_ROWS` rows take, weights and all.
    """

    parameters: int
    activations: int
    logits: int
    row: int
    first_rows: int

    @property
    def weights(self) -> int:
        return 4 * self.parameters

    gradients = weights

    @property
    def optimizer(self) -> int:
        return 8 * self.parameters

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    def largest_micro_batch(self, memory: float) -> int:
        """Rows for which `memory` bytes have room; a rough figure where there are few."""
        return max(0, LINEAR_FROM_ROWS + int((USABLE * memory - self.first_rows) // self.row))


def compute_memory(
    make_objective: Callable[[], nn.Module], rows: int, length: int, precision: str, on_gpu: bool
) -> StepMemory:
    """What training an objective takes.

    Args:
        make_objective: an objective with its model, from a batch to what it measures: (sums, counts).
        rows, length: of a micro-batch.
        precision: as accelerate calls it.
        on_gpu: whether dropout keeps what it keeps on a GPU, one byte an element, and attention nothing of it.
    """
    with FakeTensorMode():
        objective = make_objective().train()
        if on_gpu:
            replace_dropout(objective)
        parameters = sum(parameter.numel() for parameter in objective.parameters())
        peaks = [
            peak_bytes(objective, size, length, precision) for size in (rows, LINEAR_FROM_ROWS, 2 * LINEAR_FROM_ROWS)
        ]
    slots = rows * math.ceil(objective.masked_share * length)
    logits = LOGIT_BYTES * slots * objective.model.config.vocab_size
    gradients = 4 * parameters
    return StepMemory(
        parameters=parameters,
        activations=peaks[0] - gradients - logits,
        logits=logits,
        row=(peaks[2] - peaks[1]) // LINEAR_FROM_ROWS,
        first_rows=peaks[1] + 12 * parameters,
    )


def peak_bytes(objective: nn.Module, rows: int, length: int, precision: str) -> int:
    """Most bytes in use at once in a pass forward and backward that is not the first: with gradients, without weights.

    Args:
        objective: of tensors without contents.
    """
    ids = torch.zeros(rows, length, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "position_ids": ids, "token_type_ids": ids, "pair_label": ids[:, 0]}
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
    """Counts the bytes of all tensors that are made under it and not freed yet.

    Args:
        known: tensors that were there before.
    """

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

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
        self.now += num_bytes


class DropoutOfGPU(nn.Module):
    """Keeps one byte an element for the backward pass, as dropout does on a GPU. (On a CPU it keeps more, and keeps
    attention from its fused kernels.)
    """

    p = 0.0  # for attention, whose fused kernels keep a seed

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * torch.ones_like(hidden, dtype=torch.bool)


def replace_dropout(module: nn.Module) -> None:
    """Put `DropoutOfGPU` in the place of all dropout inside a module."""
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout) and child.p:
            setattr(module, name, DropoutOfGPU())
        else:
            replace_dropout(child)


def largest_micro_batch(
    objective: nn.Module, batch: dict[str, torch.Tensor], sizes: list[int], device: torch.device, reserve: int
) -> int | None:
    """The largest of some micro-batches that the device has room for, found by trying.

    Gradients are left at None.

    Args:
        objective: from a batch to what it measures: (sums, counts).
        batch: a micro-batch, at least as large as any of `sizes`.
        reserve: bytes that have to stay free, for what is not allocated yet.

    Returns:
        None if not even the smallest fits.
    """
    return next((size for size in sorted(sizes, reverse=True) if fits(objective, batch, size, device, reserve)), None)


def fits(objective: nn.Module, batch: dict[str, torch.Tensor], size: int, device: torch.device, reserve: int) -> bool:
    """Whether there is room for a forward and a backward pass of so many rows of a micro-batch."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        kept = torch.empty(reserve, dtype=torch.uint8, device=device)
        sums, _ = objective(**send_to_device({name: rows[:size] for name, rows in batch.items()}, device))
        sums.sum().backward()
        del kept
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        objective.zero_grad()
