"""Dropout, residual and layer norm in one kernel, forward and backward, in Triton.

    norm(residual + dropout(hidden, p))

is what the attention and the feed-forward part of a post-norm layer end with, and what those of a pre-norm layer begin
with, which need the sum beside its norm. Torch moves the same numbers through memory several times for it, and stores a
mask. Here each is read and written once, and the mask is a function of a seed, the row and the column, which the
backward pass computes again, as gradient checkpointing does.

All is computed in float32, whatever the types of the tensors. Nothing is kept for the backward pass but two numbers a
row and the inputs, of which the next projections keep the residual anyway, so that what is normalised is never rounded;
or the sum in their place where it is a result, which is normalised as it is rounded.
"""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from recipe.base.errors import describe_error

try:
    import triton
    from triton import language as tl

    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on the CPU, for tests
    jit, _ = triton.jit, tl.constexpr
except Exception as error:  # not installed, as beside a torch for the CPU, or too old or broken in a way of its own
    triton, triton_error, INTERPRETED = None, describe_error(error), False
    jit, tl = lambda function: function, SimpleNamespace(constexpr=int)  # for the annotations

# The shape of the work is chosen by what ptxas makes of it for sm_90, and not by trying at the start: that takes time,
# and would make the order of summation a matter of chance. A row of up to 1024 belongs to one warp, whose sums need no
# barrier and whose idle quarter at width 768 the compiler leaves out. With sums for the gradients it takes all 255
# registers, so eight warps run on a processor at a time. They are enough, since the next row is on its way
# (`num_stages`) while one is computed, in about half the cycles that its bytes take.
WARP_ELEMENTS = 1024
WARPS_PER_PROCESSOR = 8
MAX_WIDTH = 8192  # beyond it a row leaves the registers

# Of an operator of Triton's, torch.compile sees the kernels; there are none to see without it and in the interpreter.
define: Any = torch.library.triton_op if triton and not INTERPRETED else torch.library.custom_op
wrap_triton = (lambda kernel: kernel) if INTERPRETED else torch.library.wrap_triton


@jit
def mix(bits):
    """Mix 64 bits as splitmix64 does (Steele, Lea and Flood, 2014)."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@jit
def scale_of(key, row, columns, inside, DROPPED: tl.constexpr):
    """Compute what dropout multiplies a row by, 0 or 1 / (1 - p): float32. DROPPED is p times 2^32, key the mixed seed.

    Splitmix64 gives each row 64 bits. Half of them start a Weyl sequence, whose element of the column is mixed by
    lowbias32 (Wellons, 2018), and the other half come in between. Its last shift is left out: it moves the lower bits
    alone, which decide one element in 65,536. So an element takes 10 instructions of sm_90; Triton's Philox takes 53.
    """
    key = mix(key + (row.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15)
    bits = key.to(tl.uint32) + columns.to(tl.uint32) * 0x9E3779B9
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15) ^ (key >> 32).to(tl.uint32)) * 0x846CA68B
    return tl.where(inside & (bits >= DROPPED), 4294967296.0 / (4294967296 - DROPPED), 0.0)


@jit
def forward_kernel(
    hidden, residual, weight, bias, seed, normed, statistics, summed,
    DROPPED: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise a row, and store its sum too unless `summed` is None."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < WIDTH
    places = row * WIDTH + columns  # int64: a large batch has over 2^31 numbers
    total = tl.load(hidden + places, inside, 0.0).to(tl.float32)
    if DROPPED > 0:
        total *= scale_of(mix(tl.load(seed).to(tl.uint64)), row, columns, inside, DROPPED)
    total += tl.load(residual + places, inside, 0.0).to(tl.float32)
    if summed is not None:
        total = total.to(summed.dtype.element_ty)
        tl.store(summed + places, total, inside)
        total = total.to(tl.float32)
    mean = tl.sum(total, 0) / WIDTH
    total = tl.where(inside, total - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(total * total, 0) / WIDTH + EPS)
    gain = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + columns, inside, 0.0).to(tl.float32)
    tl.store(normed + places, total * rstd * gain + shift, inside)
    tl.store(statistics + row, mean)
    tl.store(statistics + tl.num_programs(0) + row, rstd)


@jit
def backward_kernel(
    grad, grad_summed, hidden, residual, weight, seed, statistics, grad_hidden, grad_residual, sums, num_rows,
    DROPPED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of every so many rows, and these rows' sums for the gradients of weight and bias.

    With `grad_summed`, the gradient of the sum, `residual` is the sum itself, and `hidden` is None.
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gain = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    weight_sum, bias_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if DROPPED > 0:
        key = mix(tl.load(seed).to(tl.uint64))
    for number in tl.range(tl.program_id(0), num_rows, tl.num_programs(0), num_stages=3):
        row = tl.cast(number, tl.int64)
        places = row * WIDTH + columns
        mean, rstd = tl.load(statistics + row), tl.load(statistics + num_rows + row)
        upper = tl.load(grad + places, inside, 0.0).to(tl.float32)
        if DROPPED > 0:
            scale = scale_of(key, row, columns, inside, DROPPED)
        total = tl.load(residual + places, inside, 0.0).to(tl.float32)
        if hidden is not None:
            added = tl.load(hidden + places, inside, 0.0).to(tl.float32)
            if DROPPED > 0:
                added *= scale
            total += added
        total = tl.where(inside, total * rstd - mean * rstd, 0.0)
        weight_sum += upper * total
        bias_sum += upper
        upper *= gain
        offset = tl.sum(upper, 0) / WIDTH * rstd
        slope = tl.sum(upper * total, 0) / WIDTH * rstd
        lower = upper * rstd - offset - total * slope
        if grad_summed is not None:
            lower += tl.load(grad_summed + places, inside, 0.0).to(tl.float32)
        tl.store(grad_residual + places, lower, inside)
        if DROPPED > 0:
            tl.store(grad_hidden + places, lower * scale, inside)
    place = sums + tl.program_id(0) * (2 * WIDTH) + columns
    tl.store(place, weight_sum, inside)
    tl.store(place + WIDTH, bias_sum, inside)


def shape_of_work(width: int) -> dict[str, int]:
    """Choose the block that a row fills, and the warps that work on it."""
    block = 1 << (width - 1).bit_length()  # not by Triton: the memory of a GPU is computed where there is none, too
    return {"WIDTH": width, "BLOCK": block, "num_warps": max(1, block // WARP_ELEMENTS)}


def operator(function: Callable) -> Any:
    """Make an operator of torch, whose function serves fake tensors too: it allocates, and launches nothing."""
    defined: Any = define(f"recipe::{function.__name__}", function, mutates_args=())
    defined.register_fake(function)
    return defined


@operator
def dropout_add_norm_forward(
    hidden: Tensor, residual: Tensor, weight: Tensor, bias: Tensor,
    seed: Tensor | None, dropped: int, eps: float, dtype: torch.dtype, keeps_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the normalised rows; all means, then all reciprocal standard deviations: (2, rows) float32; and the sums.

    These have the type of `residual`; they are empty unless `keeps_sum`.
    """
    normed = residual.new_empty(residual.shape, dtype=dtype)
    summed = residual.new_empty(residual.shape if keeps_sum else 0)
    statistics = residual.new_empty(2, residual.shape[:-1].numel(), dtype=torch.float32)
    if normed.numel() and not isinstance(normed, FakeTensor):
        inputs = [tensor.contiguous() for tensor in (hidden, residual, weight, bias)]
        work = {"DROPPED": dropped, "EPS": eps} | shape_of_work(weight.shape[0])
        results = normed, statistics, summed if keeps_sum else None
        wrap_triton(forward_kernel)[(statistics.shape[1],)](*inputs, seed, *results, **work)
    return normed, statistics, summed


@operator
def dropout_add_norm_backward(
    grad: Tensor, grad_summed: Tensor | None, hidden: Tensor | None, residual: Tensor, weight: Tensor,
    seed: Tensor | None, statistics: Tensor, dropped: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of hidden (nothing without dropout), of residual, and of weight and bias: (2, width).

    Without `hidden`, `residual` is the sum, and that of hidden has the type of `grad`.
    """
    rows, work = statistics.shape[1], shape_of_work(weight.shape[0])
    processors = torch.cuda.get_device_properties(grad.device).multi_processor_count if grad.is_cuda else 1
    programs = min(rows, WARPS_PER_PROCESSOR // work["num_warps"] * processors)
    grad_hidden = (grad if hidden is None else hidden).new_empty(residual.shape if dropped else 0)
    grad_residual = residual.new_empty(residual.shape)
    # Of each program, since atomic additions would come in another order in each run.
    sums = grad.new_empty(programs, 2, weight.shape[0], dtype=torch.float32)
    if rows and not isinstance(sums, FakeTensor):
        tensors = grad, grad_summed, hidden, residual, weight
        inputs = [None if tensor is None else tensor.contiguous() for tensor in tensors]
        results = [grad_hidden, grad_residual, sums]
        wrap_triton(backward_kernel)[(programs,)](*inputs, seed, statistics, *results, rows, DROPPED=dropped, **work)
    return grad_hidden, grad_residual, sums.sum(0)


def keep_inputs(ctx, inputs, output) -> None:
    """Keep what the backward pass needs."""
    hidden, residual, weight, bias, seed, ctx.dropped, *_, keeps_sum = inputs
    _, statistics, summed = output
    ctx.types = hidden.dtype, bias.dtype
    ctx.save_for_backward(*(None, summed) if keeps_sum else (hidden, residual), weight, seed, statistics)
    ctx.set_materialize_grads(False)


def differentiate(ctx, grad: Tensor | None, _, grad_summed: Tensor | None) -> tuple:
    """Compute the gradients of the forward operator's arguments."""
    hidden, residual, weight, *_ = saved = ctx.saved_tensors  # read once, or gradient checkpointing refuses
    hidden_dtype, bias_dtype = ctx.types
    if grad is None:  # the sum alone was used
        grad = residual.new_zeros(residual.shape, dtype=hidden_dtype)
    grad_hidden, grad_residual, sums = dropout_add_norm_backward(
        grad, None if hidden is not None else grad_summed, *saved, ctx.dropped
    )
    if not ctx.dropped:
        grad_hidden = grad_residual.to(hidden_dtype)
    return grad_hidden, grad_residual, sums[0].to(weight.dtype), sums[1].to(bias_dtype), *[None] * 5


dropout_add_norm_forward.register_autograd(differentiate, setup_context=keep_inputs)


def dropout_add_norm(
    hidden: Tensor, residual: Tensor, norm: nn.LayerNorm, p: float, seed: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute `norm(residual + dropout(hidden, p))`: (…, width) of the given type.

    Args:
        hidden: (…, width), float32, bfloat16 or float16.
        residual: of the same shape, of any of these types.
        norm: a layer norm over the width, which is at most `MAX_WIDTH`, with weight and bias.
        p: the share of `hidden` that becomes zero, in [0, 1); 0 in evaluation.
        seed: () int64 on the device, which decides what becomes zero; None where p is 0.
        dtype: the type of the result.
    """
    return run_forward(hidden, residual, norm, p, seed, dtype, keeps_sum=False)[0]


def dropout_add_norm_sum(
    hidden: Tensor, residual: Tensor, norm: nn.LayerNorm, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute `norm(sum)`, of the type of `hidden`, and `sum = residual + dropout(hidden, p)`, of that of `residual`.

    See `dropout_add_norm`.
    """
    normed, _, summed = run_forward(hidden, residual, norm, p, seed, hidden.dtype, keeps_sum=True)
    return normed, summed


def run_forward(
    hidden: Tensor, residual: Tensor, norm: nn.LayerNorm, p: float, seed: Tensor | None,
    dtype: torch.dtype, keeps_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Refuse what the kernel does not serve, and run it."""
    dropped = round(p * 2**32)
    if hidden.shape != residual.shape or hidden.shape[-1] > MAX_WIDTH or not 0 <= dropped < 2**32:
        raise ValueError(f"no kernel for {tuple(hidden.shape)} added to {tuple(residual.shape)} with dropout {p}")
    return dropout_add_norm_forward(hidden, residual, norm.weight, norm.bias, seed, dropped, norm.eps, dtype, keeps_sum)


@cache
def why_no_kernels(device: torch.device, width: int = 96, keeps_sum: bool = False) -> str | None:
    """Find out by trying why the kernels do not serve a device, at a width; None if they do. Never raises."""
    if triton is None:
        return f"Triton cannot be imported ({triton_error})"
    if device.type != "cuda" and not INTERPRETED:
        return f"there are none for the device {device.type}"
    if width > MAX_WIDTH:
        return f"the width {width:,} is over {MAX_WIDTH:,}"
    try:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} has not the compute capability 8.0 that bfloat16 needs"
        return None if compare_with_torch(device, width, keeps_sum) else "they give other numbers than torch"
    except Exception as error:  # no compiler, no driver, versions that do not fit: each raises an error of its own kind
        return describe_error(error)


def compare_with_torch(device: torch.device, width: int, keeps_sum: bool, rows: int = 16) -> bool:
    """Try the kernels, forward and backward; the gradients say what was dropped."""
    hidden, residual, *grads = torch.arange(4 * rows * width, device=device).reshape(4, rows, width).sin()
    norm, seed = nn.LayerNorm(width, device=device), torch.zeros((), dtype=torch.int64, device=device)
    inputs = [hidden.requires_grad_(), residual.requires_grad_(), norm.weight, norm.bias]
    grads = grads[: 1 + keeps_sum]
    with torch.enable_grad(), torch.cuda.device_of(hidden):
        ours: tuple[Tensor, ...]
        if keeps_sum:
            ours = dropout_add_norm_sum(hidden, residual, norm, 0.5, seed)
        else:
            ours = (dropout_add_norm(hidden, residual, norm, 0.5, seed, torch.float32),)
        our_grads = torch.autograd.grad(ours, inputs, grads)
        scale = 2.0 * (our_grads[0] != 0)
        summed = residual + hidden * scale
        theirs = (norm(summed), summed)[: 1 + keeps_sum]
        their_grads = torch.autograd.grad(theirs, inputs, grads)
    pairs = zip([*ours, *our_grads], [*theirs, *their_grads], strict=True)
    return all(torch.allclose(one, other, 1e-4, 1e-4) for one, other in pairs) and abs(scale.mean().item() - 1) < 0.2
