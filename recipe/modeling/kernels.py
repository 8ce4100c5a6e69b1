"""Dropout, residual and layer norm in one kernel, forward and backward, in Triton.

    norm(residual + dropout(hidden, p))

is what a post-norm layer ends its attention and its feed-forward part with. Torch moves the same numbers through memory
several times for it, and stores a mask. Here each number is read once and written once, and the mask is a function of
a seed, the row and the column: the backward pass computes it again, and so does gradient checkpointing.

Nothing is kept for the backward pass but the inputs, of which the next projections keep the residual anyway, and two
numbers a row. So what is normalised is never rounded, and both passes compute it from the same bits.

Everything is computed in float32, whatever the types of the inputs and of the result.
"""

from functools import cache
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from recipe.base.errors import describe_error

try:
    import triton
    from triton import language as tl
except Exception as error:  # on a CPU or macOS it is not installed; where it is broken, it raises what it likes
    triton, triton_error = None, describe_error(error)
    tl = SimpleNamespace(constexpr=int)  # for the annotations

INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on the CPU, for tests
MAX_WIDTH = 16384
MIN_CAPABILITY = (8, 0)  # the first with bfloat16

# The shape of the work, for sm_90; chosen once and not by trying at the start, which takes time and would make the
# order of summation a matter of chance. A thread holds 16 numbers of each tensor, two loads of 16 bytes of bfloat16.
TILE_ELEMENTS = 2048  # of the rows that a program works on at a time: more of them wait for memory together
NUM_WARPS = 4
PROGRAMS_PER_PROCESSOR = 4  # in the backward pass, each with sums of its own for the gradients of weight and bias


def jit(function):
    """Make a Triton kernel of a function, where Triton is there."""
    return triton.jit(function) if triton else function


@jit
def scale_of(seed, rows, columns, DROPPED: tl.constexpr):
    """Compute what dropout multiplies by, 0 or 1 / (1 - p): (rows, columns) float32.

    A hash of the seed and the row by splitmix64 gives each row 64 bits; 32 of these start a sequence of Weyl, whose
    element of the column is mixed by two rounds of Wellons' lowbias32, and 32 come in between. Philox, as torch has it,
    costs several times as much as the memory takes. The last shift of lowbias32 is left out, since it moves the lower
    half of the bits alone. DROPPED is the share of dropped elements times 2^32.
    """
    key = tl.load(seed).to(tl.uint64)
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    key = (key ^ (key >> 31)) + (rows.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    key = key ^ (key >> 31)
    bits = key.to(tl.uint32)[:, None] + columns.to(tl.uint32)[None, :] * 0x9E3779B9
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15) ^ (key >> 32).to(tl.uint32)[:, None]) * 0x846CA68B
    return tl.where(bits >= DROPPED, 4294967296.0 / (4294967296 - DROPPED), 0.0)


@jit
def forward_kernel(
    hidden, residual, weight, bias, seed, normed, means, rstds, num_rows,
    DROPPED: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Normalise ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: a large batch has over 2^31 numbers
    columns = tl.arange(0, BLOCK)
    is_column = columns < WIDTH
    inside = (rows < num_rows)[:, None] & is_column[None, :]
    places = rows[:, None] * WIDTH + columns[None, :]
    total = tl.load(hidden + places, inside, 0.0).to(tl.float32)
    if DROPPED > 0:
        total *= scale_of(seed, rows, columns, DROPPED)
    total += tl.load(residual + places, inside, 0.0).to(tl.float32)
    mean = tl.sum(total, 1) / WIDTH
    total = tl.where(inside, total - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(total * total, 1) / WIDTH + EPS)
    gain = tl.load(weight + columns, is_column, 0.0).to(tl.float32)
    shift = tl.load(bias + columns, is_column, 0.0).to(tl.float32)
    tl.store(normed + places, total * rstd[:, None] * gain[None, :] + shift[None, :], inside)
    tl.store(means + rows, mean, rows < num_rows)
    tl.store(rstds + rows, rstd, rows < num_rows)


@jit
def backward_kernel(
    grad, hidden, residual, weight, seed, means, rstds, grad_hidden, grad_residual, sums, num_rows,
    DROPPED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of every so many rows, and these rows' sums for the gradients of weight and bias."""
    columns = tl.arange(0, BLOCK)
    is_column = columns < WIDTH
    gain = tl.load(weight + columns, is_column, 0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & is_column[None, :]
        places = rows[:, None] * WIDTH + columns[None, :]
        rstd = tl.load(rstds + rows, rows < num_rows, 0.0)[:, None]
        mean = tl.load(means + rows, rows < num_rows, 0.0)[:, None]
        upper = tl.load(grad + places, inside, 0.0).to(tl.float32)
        total = tl.load(hidden + places, inside, 0.0).to(tl.float32)
        if DROPPED > 0:
            scale = scale_of(seed, rows, columns, DROPPED)
            total *= scale
        total += tl.load(residual + places, inside, 0.0).to(tl.float32)
        total = (total - mean) * rstd
        weight_sum += tl.sum(upper * total, 0)
        bias_sum += tl.sum(upper, 0)
        upper *= gain[None, :]
        along = tl.sum(upper * total, 1)[:, None] / WIDTH
        lower = (upper - tl.sum(upper, 1)[:, None] / WIDTH - total * along) * rstd
        tl.store(grad_residual + places, lower, inside)
        if DROPPED > 0:
            tl.store(grad_hidden + places, lower * scale, inside)
    place = sums + tl.program_id(0) * (2 * WIDTH) + columns
    tl.store(place, weight_sum, is_column)
    tl.store(place + WIDTH, bias_sum, is_column)


def shape_of_work(width: int) -> dict[str, int]:
    """Choose the block for a width, the rows of a tile and the warps that work on it."""
    block = triton.next_power_of_2(width)
    return {
        "WIDTH": width,
        "BLOCK": block,
        "ROWS": max(1, TILE_ELEMENTS // block),
        "num_warps": max(NUM_WARPS, block // 1024),
    }


def dropped_of(p: float) -> int:
    """Return the share of dropped elements times 2^32."""
    return round(p * 2**32)


# As an operator of Triton, torch.compile sees the kernels in it and launches them itself. In the interpreter, or where
# there is no Triton, there are none to see.
operator = torch.library.triton_op if triton and not INTERPRETED else torch.library.custom_op


def new_results(hidden, residual, weight, bias, seed, p, eps, dtype):
    """Allocate what the forward operator returns."""
    rows = residual.numel() // residual.shape[-1]
    statistics = [residual.new_empty(rows, dtype=torch.float32) for _ in range(2)]
    return residual.new_empty(residual.shape, dtype=dtype), *statistics


@operator("recipe::dropout_add_norm", mutates_args=())
def forward_operator(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the normalised rows, and their means and reciprocal standard deviations."""
    results = new_results(hidden, residual, weight, bias, seed, p, eps, dtype)
    rows, work = results[1].shape[0], shape_of_work(weight.shape[0])
    if rows:
        torch.library.wrap_triton(forward_kernel)[(triton.cdiv(rows, work["ROWS"]),)](
            hidden.contiguous(), residual.contiguous(), weight.contiguous(), bias.contiguous(), seed, *results, rows,
            DROPPED=dropped_of(p), EPS=eps, **work,
        )  # fmt: skip
    return results


def new_gradients(grad, hidden, residual, weight, seed, means, rstds, p):
    """Allocate what the backward operator returns."""
    sums = hidden.new_empty(2, weight.shape[0], dtype=torch.float32)
    return hidden.new_empty(hidden.shape if p else 0), residual.new_empty(residual.shape), sums


@operator("recipe::dropout_add_norm_backward", mutates_args=())
def backward_operator(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    seed: torch.Tensor | None,
    means: torch.Tensor,
    rstds: torch.Tensor,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of hidden (nothing without dropout), of residual, and of weight and bias: (2, width)."""
    grad_hidden, grad_residual, sums = new_gradients(grad, hidden, residual, weight, seed, means, rstds, p)
    rows, work = means.shape[0], shape_of_work(weight.shape[0])
    programs = min(triton.cdiv(rows, work["ROWS"]), num_programs(hidden.device))
    sums = sums.new_empty(programs, *sums.shape)
    if rows:
        torch.library.wrap_triton(backward_kernel)[(programs,)](
            grad.contiguous(), hidden.contiguous(), residual.contiguous(), weight.contiguous(), seed, means, rstds,
            grad_hidden, grad_residual, sums, rows, DROPPED=dropped_of(p), **work,
        )  # fmt: skip
    return grad_hidden, grad_residual, sums.sum(0)


def num_programs(device: torch.device) -> int:
    """Return how many programs share the rows in the backward pass: as many as run at a time."""
    is_card = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if is_card else 2
    return processors * PROGRAMS_PER_PROCESSOR


def keep_inputs(ctx, inputs, output):
    """Keep what the backward pass needs."""
    hidden, residual, weight, bias, seed, ctx.p, _, _ = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(hidden, residual, weight, seed, *output[1:])
    ctx.set_materialize_grads(False)


def differentiate(ctx, grad, *_):
    """Compute the gradients of the forward operator's arguments."""
    hidden, _, weight, *_ = saved = ctx.saved_tensors
    grad_hidden, grad_residual, sums = backward_operator(grad, *saved, ctx.p)
    if not ctx.p:
        grad_hidden = grad_residual.to(hidden.dtype)
    return grad_hidden, grad_residual, sums[0].to(weight.dtype), sums[1].to(ctx.bias_dtype), None, None, None, None


forward_operator.register_fake(new_results)
forward_operator.register_autograd(differentiate, setup_context=keep_inputs)
backward_operator.register_fake(new_gradients)


def dropout_add_norm(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    norm: nn.LayerNorm,
    p: float,
    seed: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Compute `norm(residual + dropout(hidden, p))`: (…, width) of the given type.

    Args:
        hidden: (…, width), float32, bfloat16 or float16.
        residual: of the same shape, of any of these types.
        norm: a layer norm over the width, at most `MAX_WIDTH`, with weight and bias.
        p: the share of `hidden` that becomes zero, in [0, 1); 0 in evaluation.
        seed: () int64 on the device, which decides what becomes zero; None where p is 0.
        dtype: the type of the result.
    """
    return forward_operator(hidden, residual, norm.weight, norm.bias, seed, p, norm.eps, dtype)[0]


@cache
def why_no_kernels(device: torch.device) -> str | None:
    """Find out by trying why the kernels do not serve a device; None if they do. Never raises."""
    if triton is None:
        return f"Triton cannot be imported ({triton_error})"
    if device.type != "cuda" and not INTERPRETED:
        return f"there are none for the device {device.type}"
    try:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        is_right = compare_with_torch(device)
    except Exception as error:  # no compiler, no driver, versions that do not fit: each raises an error of its own kind
        return describe_error(error)
    return None if is_right else "they give other numbers than torch"


def compare_with_torch(device: torch.device, width: int = 96, rows: int = 64) -> bool:
    """Try the kernels, forward and backward; the gradients say what was dropped."""
    numbers = torch.arange(3 * rows * width, device=device).reshape(3, rows, width).sin()
    hidden, residual, grad = numbers.unbind()
    hidden.requires_grad_(), residual.requires_grad_()
    norm = nn.LayerNorm(width, device=device)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    with torch.enable_grad():
        ours = dropout_add_norm(hidden, residual, norm, 0.5, seed, torch.float32)
        inputs = [hidden, residual, norm.weight, norm.bias]
        our_grads = torch.autograd.grad(ours, inputs, grad)
        scale = 2.0 * (our_grads[0] != 0)
        theirs = F.layer_norm(residual + hidden * scale, (width,), norm.weight, norm.bias, norm.eps)
        their_grads = torch.autograd.grad(theirs, inputs, grad)
    pairs = zip([ours, *our_grads], [theirs, *their_grads], strict=True)
    is_close = all(torch.allclose(one, other, 1e-4, 1e-4) for one, other in pairs)
    return is_close and 0.8 < scale.mean().item() < 1.2
