"""What fits into a device's memory."""

import torch
from accelerate.utils import send_to_device
from torch import nn


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
