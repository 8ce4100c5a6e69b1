"""Attention: of rows under a mask, or within sequences of various lengths that lie one behind the other.

The second form computes nothing at padding and needs no mask. Its kernels are torch's own: `flash` and `cudnn` on a
GPU, which `find_kernel` tries, and `loop`, one sequence after the other, which stands in for them where there is none.
"""

import itertools
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from recipe.base.errors import describe_error

KERNELS = ("flash", "cudnn")  # of a GPU
HANDICAPS = {"flash": 1.0, "cudnn": 1.1}  # on their times: what a resume chooses is not to depend on noise
TOLERANCE = 0.02  # of the largest value: bf16 has 8 bits
TRIAL_LENGTHS = (64, 1, 17, 0, 0)  # of the sequences that a kernel is tried on: a single token, and none at all
TRIAL_QUERIES = (9, 1, 3, 0, 0)  # of each of them, where only some positions attend
TRIAL_DROPOUT = 0.25
TIMED_CALLS = 5


class Sequences(NamedTuple):
    """Where sequences lie in one dimension of tokens.

    Attributes:
        query_bounds, key_bounds: (sequences + 1,) int32, where each begins among the queries and among the keys, and
            at last where all end.
        max_queries, max_keys: a sequence has no more.
        kernel: which attends within them.
    """

    query_bounds: Tensor
    key_bounds: Tensor
    max_queries: int
    max_keys: int
    kernel: str


def attend(
    query: Tensor, key: Tensor, value: Tensor, where: Tensor | Sequences | None, dropout: float, scale: float
) -> Tensor:
    """Attend, by scaled dot products with dropout on the probabilities.

    Args:
        query: (batch, queries, heads, head size), or (queries, heads, head size) of sequences.
        key, value: (batch, length, heads, head size), or (tokens, heads, head size).
        where: of a batch, None or a mask that broadcasts to (batch, heads, queries, length), True where a query sees a
            key; or the sequences, in which each query sees all keys of its own.
        dropout: share of the probabilities that is dropped.
        scale: of the products.

    Returns:
        The mixed values, shaped as the queries.
    """
    if isinstance(where, Sequences):
        return attend_in_sequences(query, key, value, *where[:4], dropout, scale, where.kernel)[0]
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, where, dropout, scale=scale).transpose(1, 2)


@torch.library.custom_op("recipe::attend_in_sequences", mutates_args=())
def attend_in_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    max_queries: int,
    max_keys: int,
    dropout: float,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend within sequences, see `attend`; return the output, and what `attend_backward` wants of the forward."""
    bounds = query_bounds, key_bounds, max_queries, max_keys
    if kernel == "flash":
        out, normalizer, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *bounds, dropout, False, False, scale=scale
        )
    elif kernel == "cudnn":
        results = torch.ops.aten._cudnn_attention_forward(
            query, key, value, None, *bounds, True, dropout, False, False, scale=scale
        )
        out, normalizer, seed, offset = results[0], results[1], results[6], results[7]
    else:
        normalizer, seed = query.new_empty(0, dtype=torch.float32), torch.randint(2**62, ())
        offset = torch.zeros_like(seed)
        [out] = loop_over((query, key, value, query_bounds, key_bounds), dropout, scale, seed)
    if kernel == "flash" and not dropout:  # then it leaves these as it likes
        seed, offset = (torch.zeros(size, dtype=torch.uint64, device=query.device) for size in ((2,), ()))
    return out, normalizer, seed, offset


@attend_in_sequences.register_fake
def _(query, key, value, query_bounds, key_bounds, max_queries, max_keys, dropout, scale, kernel):
    tokens, heads, _ = query.shape
    normalizer = {"flash": (heads, tokens), "cudnn": (tokens, heads, 1), "loop": (0,)}[kernel]
    dtype = torch.uint64 if kernel == "flash" else torch.int64
    return (
        query.new_empty(query.shape),
        query.new_empty(normalizer, dtype=torch.float32),
        query.new_empty((2,) if kernel == "flash" else (), dtype=dtype),
        query.new_empty((), dtype=dtype),
    )


@torch.library.custom_op("recipe::attend_in_sequences_backward", mutates_args=())
def attend_backward(
    gradient: Tensor,
    inputs: list[Tensor],
    forward: list[Tensor],
    max_queries: int,
    max_keys: int,
    dropout: float,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values.

    Args:
        gradient: of the output.
        inputs: queries, keys, values and both bounds.
        forward: what the forward has returned.
    """
    query, key, value, *bounds = inputs
    out, normalizer, seed, offset = forward
    sizes = max_queries, max_keys, dropout, False
    if kernel == "flash":
        return torch.ops.aten._flash_attention_backward(
            gradient, query, key, value, out, normalizer, *bounds, *sizes, seed, offset, scale=scale
        )
    if kernel == "cudnn":
        return torch.ops.aten._cudnn_attention_backward(
            gradient, query, key, value, out, normalizer, seed, offset, None, *bounds, *sizes, scale=scale
        )
    of_query, of_key, of_value = loop_over(inputs, dropout, scale, seed, gradient)
    return of_query, of_key, of_value


@attend_backward.register_fake
def _(gradient, inputs, forward, max_queries, max_keys, dropout, scale, kernel):
    return tuple(states.new_empty(states.shape) for states in inputs[:3])


def keep_for_backward(ctx, inputs, output) -> None:
    """Keep what the backward pass needs."""
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.sizes = inputs[5:]


def backward(ctx, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradients of the operator's arguments."""
    saved = list(ctx.saved_tensors)
    return *attend_backward(gradient, saved[:5], saved[5:], *ctx.sizes), *[None] * 7


attend_in_sequences.register_autograd(backward, setup_context=keep_for_backward)


def loop_over(
    inputs: Sequence[Tensor], dropout: float, scale: float, seed: Tensor, gradient: Tensor | None = None
) -> list[Tensor]:
    """Attend in one sequence after the other; the seed decides what is dropped.

    Args:
        inputs: queries, keys, values and both bounds.
        dropout, scale, seed: see `attend`.
        gradient: of the output, if the gradients of queries, keys and values are wanted.

    Returns:
        The output, or these gradients.
    """
    *states, query_bounds, key_bounds = inputs
    made = [torch.empty_like(t) for t in (states[:1] if gradient is None else states)]
    draw = torch.Generator().manual_seed(int(seed))
    for queries, keys in zip(parts_of(query_bounds), parts_of(key_bounds), strict=True):
        query, key, value = (t[part].transpose(0, 1) for t, part in zip(states, (queries, keys, keys), strict=True))
        shares = (scale * query @ key.mT).softmax(2)
        kept = (torch.rand(shares.shape, generator=draw) >= dropout).to(shares) / (1 - dropout)
        if gradient is None:
            made[0][queries] = ((shares * kept) @ value).transpose(0, 1)
            continue
        wanted = gradient[queries].transpose(0, 1)
        of_shares = wanted @ value.mT * kept
        of_scores = scale * shares * (of_shares - (of_shares * shares).sum(2, keepdim=True))
        made[0][queries] = (of_scores @ key).transpose(0, 1)
        made[1][keys] = (of_scores.mT @ query).transpose(0, 1)
        made[2][keys] = ((shares * kept).mT @ wanted).transpose(0, 1)
    return made


def parts_of(bounds: Tensor) -> list[slice]:
    """Return the part of each sequence."""
    return [slice(*ends) for ends in itertools.pairwise(bounds.tolist())]


def bounds_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return where sequences of these lengths begin, and where the last one ends: (sequences + 1,) int32."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


class Trial:
    """Random queries, keys and values of sequences, on which a kernel is tried."""

    def __init__(self, kernel: str, queries: Sequence[int], keys: Sequence[int], like: Tensor) -> None:
        query_bounds, key_bounds = bounds_of(queries, like.device), bounds_of(keys, like.device)
        self.where = Sequences(query_bounds, key_bounds, max(queries), max(keys), kernel)
        sizes = [(sum(count), *like.shape[1:]) for count in (queries, keys, keys, queries)]
        made = [torch.randn(size, dtype=like.dtype, device=like.device) for size in sizes]
        self.inputs, self.gradient = [states.requires_grad_() for states in made[:3]], made[3]
        self.scale = like.shape[2] ** -0.5

    def run(self, dropout: float) -> list[Tensor]:
        """Return the output and the gradients of queries, keys and values."""
        query, key, value = self.inputs
        out = attend(query, key, value, self.where, dropout, self.scale)
        return [out, *torch.autograd.grad(out, self.inputs, self.gradient)]

    def expected(self) -> list[Tensor]:
        """Return what `run` should without dropout, in float32."""
        query, key, value = inputs = [states.detach().float().requires_grad_() for states in self.inputs]
        pairs = zip(parts_of(self.where.query_bounds), parts_of(self.where.key_bounds), strict=True)
        outs = [attend(query[None, a], key[None, b], value[None, b], None, 0.0, self.scale)[0] for a, b in pairs]
        return [torch.cat(outs), *torch.autograd.grad(torch.cat(outs), inputs, self.gradient.float())]

    def check_outputs(self, dropout: float) -> None:
        """Check that all outputs have the shapes that compiled code takes them to have."""
        arguments = *self.inputs, *self.where[:4], dropout, self.scale, self.where.kernel
        with FakeTensorMode() as mode:
            fakes = attend_in_sequences(
                *(mode.from_tensor(value) if isinstance(value, Tensor) else value for value in arguments)
            )
        for output, fake in zip(attend_in_sequences(*arguments), fakes, strict=True):
            found, known = ((t.shape, t.stride(), t.dtype, t.device.type) for t in (output, fake))
            if found != known:
                raise RuntimeError(f"it returns {found}, not {known}")


def check_kernel(kernel: str, like: Tensor) -> None:
    """Raise an error if a kernel is wrong: against plain attention in float32, and in what dropout leaves out."""
    for queries in (TRIAL_QUERIES, TRIAL_LENGTHS):
        trial = Trial(kernel, queries, TRIAL_LENGTHS, like)
        trial.check_outputs(0.0)
        trial.check_outputs(TRIAL_DROPOUT)
        for found, expected in zip(trial.run(0.0), trial.expected(), strict=True):
            if not (found - expected).abs().max() <= TOLERANCE * expected.abs().max():
                raise RuntimeError(f"it is wrong by {(found - expected).abs().max():.2g} of {expected.abs().max():.2g}")
    # The output is linear in the values: with one mask forward and backward, both products are the same.
    out, _, _, value_gradient = trial.run(TRIAL_DROPOUT)
    forward, back = (out.float() * trial.gradient).sum(), (value_gradient.float() * trial.inputs[2]).sum()
    spread = (out.float() * trial.gradient).square().sum().sqrt()
    if not abs(forward - back) <= TOLERANCE * spread:
        raise RuntimeError("its dropout is not the same forward and backward")
    query, key, value = trial.inputs
    kept = attend(query, key, torch.ones_like(value), trial.where, TRIAL_DROPOUT, trial.scale)[: TRIAL_LENGTHS[0]]
    if not 0.9 <= kept.float().mean() <= 1.1 or kept.float().std() == 0:
        raise RuntimeError(f"its dropout leaves {kept.float().mean():.3f} of the probabilities, not 1")


def time_kernel(kernel: str, like: Tensor, rows: int, length: int) -> float:
    """Return the seconds of the fastest of some calls, forward and backward, on rows of full length."""
    trial, seconds = Trial(kernel, [length] * rows, [length] * rows, like), []
    for _ in range(TIMED_CALLS):
        torch.cuda.synchronize(like.device)
        started = time.perf_counter()
        trial.run(0.1)
        torch.cuda.synchronize(like.device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def find_kernel(like: Tensor, rows: int, length: int) -> tuple[str | None, str]:
    """Find the fastest kernel that is right, by trying all of a GPU.

    Args:
        like: (1, heads, head size) of the model, of the type and on the device of queries, keys and values.
        rows, length: of a micro-batch, on which the kernels are timed.

    Returns:
        Its name, or None where none serves; and what is wrong with those that do not. There are none for float32.
    """
    seconds, problems = {}, []
    for kernel in KERNELS if like.is_cuda and like.dtype != torch.float32 else ():
        try:
            with torch.random.fork_rng(devices=[like.device]):
                torch.manual_seed(0)
                check_kernel(kernel, like)
                seconds[kernel] = time_kernel(kernel, like, rows, length) * HANDICAPS[kernel]
        except Exception as error:  # one that is not built in, or does not take this, raises an error of its own kind
            problems.append(f"{kernel}: {describe_error(error)}")
    return min(seconds, key=seconds.__getitem__, default=None), "; ".join(problems)
