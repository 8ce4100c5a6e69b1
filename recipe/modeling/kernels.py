"""Dropout, residual and layer norm in one kernel, forward and backward, in Triton.

    norm(residual + dropout(hidden, p))

is what a post-norm layer ends its attention and its feed-forward part with. Torch moves the same numbers through memory
several times for it, and stores a mask. Here each number is read once and written once, and the mask is a function of
a seed, the row and the column: the backward pass computes it again, and so does gradient checkpointing.

Nothing is kept for the backward pass but the inputs, of which the next projections keep the residual anyway, and two
numbers a row. So what is normalised is never rounded, and both passes compute it from the same bits.

Everything is computed in float32, whatever the types of the inputs and of the result.
"""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.library import custom_op, triton_op, wrap_triton

from recipe.base.errors import describe_error

try:
    import triton
    from triton import language as tl
except Exception as error:  # on a CPU or macOS it is not installed; where it is broken, it raises what it likes
    triton, triton_error = None, describe_error(error)
    tl = SimpleNamespace(constexpr=int)  # for the annotations

INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on the CPU, for tests
MAX_WIDTH = 8192  # beyond it a row leaves the registers
MIN_CAPABILITY = (8, 0)  # the first with bfloat16

# The shape of the work is chosen once, by what ptxas makes of it for sm_90, and not by trying at the start: that takes
# time, and would make the order of summation a matter of chance. A row of up to 1024 belongs to one warp, whose sums
# need no barrier, and whose idle quarter at width 768 the compiler leaves out. With a gradient's sums it then takes all
# 255 registers of a thread, so eight warps are on a processor at a time. That is enough since the next row is on its
# way (`num_stages`) while one is computed, which takes half as many cycles as its bytes.
WARP_ELEMENTS = 1024
WARPS_PER_PROCESSOR = 8

jit = triton.jit if triton else lambda function: function


@jit
def scale_of(seed, row, columns, inside, DROPPED: tl.constexpr):
    """Compute what dropout multiplies the elements of a row by, 0 or 1 / (1 - p): float32, of the shape of columns.

    A hash of the seed and the row by splitmix64 gives each row 64 bits; 32 of these start a sequence of Weyl, whose
    element of the column is mixed by two rounds of Wellons' lowbias32, and 32 come in between. Philox, as torch has it,
    costs several times as much as the memory takes. The last shift of lowbias32 is left out, since it moves the lower
    half of the bits alone. DROPPED is the share of dropped elements times 2^32.
    """
    key = tl.load(seed).to(tl.uint64)
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    key = (key ^ (key >> 31)) + (row.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    key = key ^ (key >> 31)
    bits = key.to(tl.uint32) + columns.to(tl.uint32) * 0x9E3779B9
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15) ^ (key >> 32).to(tl.uint32)) * 0x846CA68B
    return tl.where(inside & (bits >= DROPPED), 4294967296.0 / (4294967296 - DROPPED), 0.0)


@jit
def forward_kernel(
    hidden, residual, weight, bias, seed, normed, statistics,
    DROPPED: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise a row."""
    row = tl.program_id(0).to(tl.int64)  # a large batch has over 2^31 numbers
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    places = row * WIDTH + columns
    total = tl.load(hidden + places, inside, 0.0).to(tl.float32)
    if DROPPED > 0:
        total *= scale_of(seed, row, columns, inside, DROPPED)
    total += tl.load(residual + places, inside, 0.0).to(tl.float32)
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
    grad, hidden, residual, weight, seed, statistics, grad_hidden, grad_residual, sums, num_rows,
    DROPPED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of every so many rows, and these rows' sums for the gradients of weight and bias."""
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gain = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for number in tl.range(tl.program_id(0), num_rows, tl.num_programs(0), num_stages=2):
        row = tl.cast(number, tl.int64)
        places = row * WIDTH + columns
        mean = tl.load(statistics + row)
        rstd = tl.load(statistics + num_rows + row)
        upper = tl.load(grad + places, inside, 0.0).to(tl.float32)
        total = tl.load(hidden + places, inside, 0.0).to(tl.float32)
        if DROPPED > 0:
            scale = scale_of(seed, row, columns, inside, DROPPED)
            total *= scale
        total += tl.load(residual + places, inside, 0.0).to(tl.float32)
        total = tl.where(inside, total * rstd - mean * rstd, 0.0)
        weight_sum += upper * total
        bias_sum += upper
        upper *= gain
        offset = tl.sum(upper, 0) / WIDTH * rstd
        slope = tl.sum(upper * total, 0) / WIDTH * rstd
        lower = upper * rstd - offset - total * slope
        tl.store(grad_residual + places, lower, inside)
        if DROPPED > 0:
            tl.store(grad_hidden + places, lower * scale, inside)
    place = sums + tl.program_id(0) * (2 * WIDTH) + columns
    tl.store(place, weight_sum, inside)
    tl.store(place + WIDTH, bias_sum, inside)


def shape_of_work(width: int) -> dict[str, int]:
    """Choose the block that a row fills, and the warps that work on it."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": max(1, block // WARP_ELEMENTS)}


def operator(function: Callable) -> Any:
    """Make an operator of torch of a function, which only allocates where its tensors are fake.

    Of one of Triton's, torch.compile sees the kernels and launches them itself. There are none to see in the
    interpreter, nor where there is no Triton.
    """
    define = triton_op if triton and not INTERPRETED else custom_op
    defined: Any = define(f"recipe::{function.__name__}", function, mutates_args=())
    defined.register_fake(function)
    return defined


@operator
def dropout_add_norm_forward(
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    dropped: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the normalised rows, and all means, then all reciprocal standard deviations: (2, rows) float32."""
    normed = residual.new_empty(residual.shape, dtype=dtype)
    statistics = residual.new_empty(2, residual.shape[:-1].numel(), dtype=torch.float32)
    if normed.numel() and not isinstance(normed, FakeTensor):
        hidden, residual, weight, bias = (tensor.contiguous() for tensor in (hidden, residual, weight, bias))
        wrap_triton(forward_kernel)[(statistics.shape[1],)](
            hidden, residual, weight, bias, seed, normed, statistics,
            DROPPED=dropped, EPS=eps, **shape_of_work(weight.shape[0]),
        )  # fmt: skip
    return normed, statistics


@operator
def dropout_add_norm_backward(
    grad: Tensor,
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    statistics: Tensor,
    dropped: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden (nothing without dropout), of residual, and of weight and bias: (2, width)."""
    rows, work = statistics.shape[1], shape_of_work(weight.shape[0])
    is_card = hidden.device.type == "cuda"
    processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count if is_card else 1
    programs = min(rows, max(1, WARPS_PER_PROCESSOR // work["num_warps"]) * processors)
    grad_hidden = hidden.new_empty(hidden.shape if dropped else 0)
    grad_residual = residual.new_empty(residual.shape)
    # Each program has sums of its own: atomic additions would come in another order in each run.
    sums = hidden.new_empty(programs, 2, weight.shape[0], dtype=torch.float32)
    if rows and not isinstance(sums, FakeTensor):
        grad, hidden, residual, weight = (tensor.contiguous() for tensor in (grad, hidden, residual, weight))
        wrap_triton(backward_kernel)[(programs,)](
            grad, hidden, residual, weight, seed, statistics, grad_hidden, grad_residual, sums, rows,
            DROPPED=dropped, **work,
        )  # fmt: skip
    return grad_hidden, grad_residual, sums.sum(0)


def keep_inputs(ctx, inputs, output) -> None:
    """Keep what the backward pass needs."""
    hidden, residual, weight, bias, seed, ctx.dropped, _, _ = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(hidden, residual, weight, seed, output[1])
    ctx.set_materialize_grads(False)


def differentiate(ctx, grad, _):
    """Compute the gradients of the forward operator's arguments."""
    hidden, _, weight, *_ = saved = ctx.saved_tensors  # once: gradient checkpointing makes them for it
    grad_hidden, grad_residual, sums = dropout_add_norm_backward(grad, *saved, ctx.dropped)
    if not ctx.dropped:
        grad_hidden = grad_residual.to(hidden.dtype)
    return grad_hidden, grad_residual, sums[0].to(weight.dtype), sums[1].to(ctx.bias_dtype), None, None, None, None


dropout_add_norm_forward.register_autograd(differentiate, setup_context=keep_inputs)


def dropout_add_norm(
    hidden: Tensor, residual: Tensor, norm: nn.LayerNorm, p: float, seed: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute `norm(residual + dropout(hidden, p))`: (…, width) of the given type.

    Args:
        hidden: (…, width), float32, bfloat16 or float16.
        residual: of the same shape, of any of these types.
        norm: a layer norm over the width, with weight and bias.
        p: the share of `hidden` that becomes zero; 0 in evaluation.
        seed: () int64 on the device, which decides what becomes zero; None where p is 0.
        dtype: the type of the result.

    Raises:
        ValueError: the shapes differ, the width is over `MAX_WIDTH`, or p is not in [0, 1).
    """
    dropped = round(p * 2**32)
    if hidden.shape != residual.shape or hidden.shape[-1] > MAX_WIDTH or not 0 <= dropped < 2**32:
        raise ValueError(f"no kernel for {tuple(hidden.shape)} added to {tuple(residual.shape)} with dropout {p}")
    return dropout_add_norm_forward(hidden, residual, norm.weight, norm.bias, seed, dropped, norm.eps, dtype)[0]


@cache
def why_no_kernels(device: torch.device, width: int = 96) -> str | None:
    """Find out by trying why the kernels do not serve a device, at a width; None if they do. Never raises."""
    if triton is None:
        return f"Triton cannot be imported ({triton_error})"
    if device.type != "cuda" and not INTERPRETED:
        return f"there are none for the device {device.type}"
    if width > MAX_WIDTH:
        return f"the width {width:,} is over {MAX_WIDTH:,}"
    try:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        is_right = compare_with_torch(device, width)
    except Exception as error:  # no compiler, no driver, versions that do not fit: each raises an error of its own kind
        return describe_error(error)
    return None if is_right else "they give other numbers than torch"


def compare_with_torch(device: torch.device, width: int) -> bool:
    """Try the kernels, forward and backward, on 64 rows; the gradients say what was dropped."""
    numbers = torch.arange(3 * 64 * width, device=device).reshape(3, 64, width).sin()
    hidden, residual, grad = (tensor.clone().requires_grad_() for tensor in numbers)
    norm, seed = nn.LayerNorm(width, device=device), torch.zeros((), dtype=torch.int64, device=device)
    inputs = [hidden, residual, norm.weight, norm.bias]
    with torch.enable_grad(), torch.cuda.device_of(numbers):
        ours = dropout_add_norm(hidden, residual, norm, 0.5, seed, torch.float32)
        our_grads = torch.autograd.grad(ours, inputs, grad)
        scale = 2.0 * (our_grads[0] != 0)
        theirs = norm(residual + hidden * scale)
        their_grads = torch.autograd.grad(theirs, inputs, grad)
    pairs = zip([ours, *our_grads], [theirs, *their_grads], strict=True)
    is_close = all(torch.allclose(one, other, 1e-4, 1e-4) for one, other in pairs)
    return is_close and 0.8 < scale.mean().item() < 1.2
