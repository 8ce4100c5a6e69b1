"""The kernels in Triton's interpreter: `test_kernels.py` runs these tests in a process with TRITON_INTERPRET=1."""

import pytest
import torch
import triton
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import RobertaConfig, RobertaPreLayerNormConfig
from triton import language as tl

from recipe.modeling import kernels
from recipe.modeling.kernels import dropout_add_norm, dropout_add_norm_sum, mix, scale_of, why_no_kernels
from recipe.modeling.model import build_model
from recipe.modeling.objectives import MaskedLMObjective

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
# The interpreter cuts off the end of a bfloat16, where a GPU rounds.
ROUNDING = {FLOAT32: 1e-5, BFLOAT16: 2**-7, FLOAT16: 2**-10}
CPU = torch.device("cpu")


@triton.jit
def scale_kernel(seed, scales, DROPPED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    key, inside = mix(tl.load(seed).to(tl.uint64)), columns < WIDTH
    tl.store(scales + row * WIDTH + columns, scale_of(key, row, columns, inside, DROPPED), inside)


def scales_of(seed: torch.Tensor, rows: int, width: int, p: float) -> torch.Tensor:
    """What dropout multiplies by, from the kernels themselves."""
    scales = torch.empty(rows, width)
    scale_kernel[(rows,)](seed, scales, round(p * 2**32), width, triton.next_power_of_2(width))
    return scales


def seed_of(number: int) -> torch.Tensor:
    return torch.tensor(number)


def make_inputs(shape: tuple[int, ...], *types: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) * 2 + 0.5).to(dtype).requires_grad_() for dtype in types]


def make_norm(width: int, dtype: torch.dtype = FLOAT32) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, eps=1e-12)
    nn.init.normal_(norm.weight, 1, 0.5)
    nn.init.normal_(norm.bias)
    return norm.to(dtype)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    rounding = ROUNDING[ours.dtype]
    largest = theirs.abs().max().item() if theirs.numel() else 0.0
    torch.testing.assert_close(ours.double(), theirs, rtol=rounding, atol=1e-5 * max(1.0, largest))


def compare(hidden, residual, norm, p: float, dtype: torch.dtype | None, number: int = 1) -> None:
    """Compare the results and all gradients with torch's in float64, with the kernels' own mask; dtype None: the sum
    is a result too.
    """
    shape, width = hidden.shape, hidden.shape[-1]
    seed = seed_of(number) if p else None
    scales = scales_of(seed, shape[:-1].numel(), width, p).reshape(shape).double() if p else 1.0
    parameters = [hidden, residual, norm.weight, norm.bias]
    doubles = [parameter.detach().double().requires_grad_() for parameter in parameters]
    theirs_sum = doubles[1] + doubles[0] * scales
    if dtype is None:
        ours = dropout_add_norm_sum(hidden, residual, norm, p, seed)
        assert [result.dtype for result in ours] == [hidden.dtype, residual.dtype]
        assert_close(ours[1], theirs_sum)
        theirs_sum = theirs_sum + (ours[1].double() - theirs_sum).detach()  # what is normalised is rounded
    else:
        ours = (dropout_add_norm(hidden, residual, norm, p, seed, dtype),)
        assert ours[0].dtype == dtype
    theirs = (nn.functional.layer_norm(theirs_sum, (width,), *doubles[2:], norm.eps), theirs_sum)[: len(ours)]
    generator = torch.Generator().manual_seed(2)
    uppers = [torch.randn(shape, generator=generator).to(result.dtype) for result in ours]
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == shape
        assert_close(one, other)
    our_grads = torch.autograd.grad(ours, parameters, uppers)
    their_grads = torch.autograd.grad(theirs, doubles, [upper.double() for upper in uppers])
    for one, other, parameter in zip(our_grads, their_grads, parameters, strict=True):
        assert one.dtype == parameter.dtype
        assert_close(one, other)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("types", [(FLOAT32,) * 3, (BFLOAT16,) * 3, (FLOAT16,) * 3, (BFLOAT16, FLOAT32, FLOAT32)])
def test_result_and_gradients_are_those_of_torch_in_float64(types, p):
    hidden, residual = make_inputs((3, 5, 96), *types[:2])
    compare(hidden, residual, make_norm(96), p, types[2])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("types", [(FLOAT32,) * 2, (BFLOAT16,) * 2, (FLOAT16, FLOAT32), (BFLOAT16, FLOAT32)])
def test_sum_and_all_gradients_are_those_of_torch_in_float64(types, p):
    hidden, residual = make_inputs((3, 5, 96), *types)
    compare(hidden, residual, make_norm(96), p, None)


@pytest.mark.parametrize("dtype", [FLOAT32, None])
@pytest.mark.parametrize("width", [1, 5, 768, 1000, 1024, 2048, 8192])
def test_all_widths_are_served(width, dtype):
    hidden, residual = make_inputs((17, width), FLOAT32, FLOAT32)
    compare(hidden, residual, make_norm(width), 0.3 * (width > 1), dtype)


@pytest.mark.parametrize("result", [FLOAT32, None])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_parameters_may_be_of_any_type(dtype, result):
    hidden, residual = make_inputs((4, 32), FLOAT32, BFLOAT16)
    compare(hidden, residual, make_norm(32, dtype), 0.1, result)


@pytest.mark.parametrize("dtype", [FLOAT32, None])
@pytest.mark.parametrize("rows", [0, 1, 7, 100])  # fewer and more than there are programs
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_any_number_of_rows_is_served(rows, p, dtype):
    hidden, residual = make_inputs((rows, 64), FLOAT32, FLOAT32)
    compare(hidden, residual, make_norm(64), p, dtype)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_each_of_norm_and_sum_may_be_used_alone(p):
    hidden, residual = make_inputs((6, 32), FLOAT32, FLOAT32)
    norm, seed = make_norm(32), seed_of(4)
    inputs = [hidden, residual, norm.weight, norm.bias]
    normed, summed = dropout_add_norm_sum(hidden, residual, norm, p, seed)
    grads = torch.autograd.grad(normed.square().sum(), inputs, retain_graph=True)
    expected = dropout_add_norm(hidden, residual, norm, p, seed, FLOAT32)
    for one, other in zip(grads, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    scales = scales_of(seed, 6, 32, p) if p else torch.ones(6, 32)
    for one, other in zip(torch.autograd.grad(summed.sum(), inputs[:3]), (scales, 1.0, 0.0), strict=True):
        torch.testing.assert_close(one, torch.as_tensor(other).expand_as(one))


def test_strides_do_not_matter():
    hidden, residual, upper = (tensor.detach() for tensor in make_inputs((6, 64, 8), *[FLOAT32] * 3))
    hidden, residual, norm = hidden.mT.requires_grad_(), residual.mT[:, :, ::1].requires_grad_(), make_norm(64)
    for dtype in (FLOAT32, None):
        compare(hidden, residual, norm, 0.1, dtype)
    ours = dropout_add_norm(hidden, residual, norm, 0.0, None, FLOAT32)
    theirs = norm(residual + hidden)
    for grad in (upper.mT, torch.ones(()).expand(ours.shape)):
        for one, other in zip(
            torch.autograd.grad(ours, [hidden, residual], grad, retain_graph=True),
            torch.autograd.grad(theirs, [hidden, residual], grad, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_large_means_keep_their_precision():
    hidden, residual = make_inputs((8, 768), FLOAT32, FLOAT32)
    hidden = (hidden.detach() + 300).requires_grad_()
    norm = make_norm(768)
    ours = dropout_add_norm(hidden, residual, norm, 0.0, None, FLOAT32)
    theirs = norm.double()(residual.double() + hidden.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_share_of_dropped_elements_is_p(p):
    scales = scales_of(seed_of(3), 64, 8192, p)
    dropped = scales == 0
    assert scales[~dropped].unique().tolist() == pytest.approx([1 / (1 - p)])
    assert abs(dropped.double().mean() - p) < 4 * (p * (1 - p) / dropped.numel()) ** 0.5


def z_scores(deviations: torch.Tensor, others: torch.Tensor, variance: float) -> float:
    """By how many standard deviations the sum of products of independent deviations differs from zero."""
    return (deviations * others).sum().item() / (variance * deviations.numel() ** 0.5)


def test_mask_is_uniform_and_uncorrelated():
    p, rows, width = 0.1, 256, 2048
    variance = p * (1 - p)
    one, other, negative = ((scales_of(seed_of(n), rows, width, p) == 0).double() - p for n in (6, 7, -6))
    for dim, length in ((0, rows), (1, width)):  # sums of columns, then of rows, are binomial
        squares = one.sum(dim).square() / (length * variance)
        assert abs(squares.sum().item() - squares.numel()) < 4 * (2 * squares.numel()) ** 0.5
    scores = [z_scores(one, another, variance) for another in (other, negative)]
    scores += [z_scores(one[:, lag:], one[:, :-lag], variance) for lag in (1, 2, 3, 4, 8, 16, 32, 256, 1024)]
    scores += [z_scores(one[lag:], one[:-lag], variance) for lag in (1, 2, 3, 4, 8, 16, 32, 128)]
    scores += [z_scores(one[1:], other[:-1], variance), z_scores(other[1:], one[:-1], variance)]
    assert max(map(abs, scores)) < 4
    assert len(torch.stack([one, other, negative]).flatten(0, 1).unique(dim=0)) == 3 * rows


def test_a_rerun_gives_the_same_bits_and_another_seed_others():
    hidden, residual = make_inputs((50, 96), BFLOAT16, BFLOAT16)
    norm = make_norm(96)
    runs = []
    for number in (1, 1, 2**40 + 1):
        result = dropout_add_norm(hidden, residual, norm, 0.1, seed_of(number), BFLOAT16)
        runs.append([result, *torch.autograd.grad(result.sum(), [hidden, residual, norm.weight, norm.bias])])
    assert all(torch.equal(one, other) for one, other in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])


def test_gradient_checkpointing_drops_the_same_elements():
    hidden, residual = make_inputs((20, 96), FLOAT32, FLOAT32)
    norm, seed = make_norm(96), seed_of(5)

    def run(hidden, residual):
        return dropout_add_norm(hidden.sin(), residual, norm, 0.5, seed, FLOAT32)

    inputs = [hidden, residual, norm.weight]
    plain = torch.autograd.grad(run(hidden, residual).square().sum(), inputs)
    again = torch.autograd.grad(checkpoint(run, hidden, residual, use_reentrant=False).square().sum(), inputs)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_torch_finds_the_operators_well_formed(p):
    hidden, residual = make_inputs((3, 4, 32), FLOAT32, FLOAT32)
    norm, dropped = make_norm(32), round(p * 2**32)
    seed = seed_of(1) if p else None
    for keeps_sum in (False, True):
        arguments = (hidden, residual, norm.weight, norm.bias, seed, dropped, 1e-5, FLOAT32, keeps_sum)
        torch.library.opcheck(kernels.dropout_add_norm_forward, arguments)
        statistics = kernels.dropout_add_norm_forward(*arguments)[1].detach()
        grad, *inputs, weight = (tensor.detach() for tensor in (hidden, hidden, residual, norm.weight))
        inputs = [grad, None, inputs[1]] if keeps_sum else [None, *inputs]
        arguments = grad, *inputs, weight, seed, statistics, dropped
        torch.library.opcheck(kernels.dropout_add_norm_backward, arguments)


class Ending(nn.Module):
    """How a layer ends: a projection, dropout, the residual and a norm."""

    def __init__(self, fused: bool, p: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.norm, self.fused, self.p = nn.Linear(64, 32), make_norm(32), fused, p

    def forward(self, inner: torch.Tensor, residual: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        hidden = self.dense(inner)
        if self.fused:
            return dropout_add_norm(hidden, residual, self.norm, self.p, seed, hidden.dtype)
        return self.norm(residual + hidden)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_whole_it_gives_the_same(backend):
    inner, residual, seed = torch.randn(4, 6, 64), torch.randn(4, 6, 32), seed_of(9)
    ending = Ending(fused=True, p=0.1)
    compiled = torch.compile(ending, fullgraph=True, backend=backend)
    runs = []
    for module in (ending, compiled):
        result = module(inner, residual, seed)
        runs.append([result, *torch.autograd.grad(result.square().sum(), list(ending.parameters()))])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other)


def test_under_autocast_types_are_those_of_the_projection():
    inner, residual = torch.randn(4, 6, 64), torch.randn(4, 6, 32)
    runs = []
    for fused in (True, False):
        ending = Ending(fused, 0.0)
        with torch.autocast("cpu", torch.bfloat16):
            result = ending(inner, residual, None)
        assert result.dtype == (BFLOAT16 if fused else FLOAT32)
        result.float().square().sum().backward()
        runs.append([result.float(), *(parameter.grad for parameter in ending.parameters())])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * other.abs().max().item())


def learn(config, fused: bool, recompute: bool = False) -> list[torch.Tensor]:
    """The loss of a batch, and all gradients, of layers that run the kernel or not."""
    torch.manual_seed(0)
    objective = MaskedLMObjective(build_model(config, None), 0.15, recompute).train()
    objective.residual_dtype = FLOAT32 if fused else None
    ids = torch.randint(5, 100, (2, 10))
    labels = torch.full_like(ids, -100)
    labels[:, ::8] = 7
    sums, _ = objective(ids, labels, torch.arange(2, 12).expand(2, -1))
    return [sums, *torch.autograd.grad(sums, list(objective.parameters()))]


@pytest.mark.parametrize("config_class", [RobertaConfig, RobertaPreLayerNormConfig])
def test_layers_of_the_kernel_are_those_of_plain_modules(config_class):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    sizes |= {"vocab_size": 100, "type_vocab_size": 1, "attention_probs_dropout_prob": 0.0}
    config = config_class(**sizes, hidden_dropout_prob=0.0)
    for one, other in zip(learn(config, True), learn(config, False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    config = config_class(**sizes, hidden_dropout_prob=0.1)
    for one, other in zip(learn(config, True), learn(config, True, recompute=True), strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_not_served_is_refused():
    norm = make_norm(8)
    for hidden, residual, p in [
        (torch.ones(2, 8), torch.ones(8), 0.1),
        (torch.ones(1, 8193), torch.ones(1, 8193), 0.1),
        (torch.ones(1, 8), torch.ones(1, 8), 1.0),
        (torch.ones(1, 8), torch.ones(1, 8), -0.1),
    ]:
        with pytest.raises(ValueError, match="no kernel for"):
            dropout_add_norm(hidden, residual, norm, p, seed_of(0), FLOAT32)
        with pytest.raises(ValueError, match="no kernel for"):
            dropout_add_norm_sum(hidden, residual, norm, p, seed_of(0))


def test_kernels_are_tried(monkeypatch):
    why = why_no_kernels.__wrapped__
    generator_state = torch.get_rng_state()
    assert why(CPU) is None
    with torch.no_grad():
        assert why(CPU, 1000) is None
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert why(CPU, 8193) == "the width 8,193 is over 8,192"
    for wrong in (
        lambda *arguments: dropout_add_norm(*arguments) * 1.001,
        lambda *arguments: dropout_add_norm(*arguments[:3], 0.9, *arguments[4:]),
        lambda hidden, residual, norm, *_: norm(hidden * 2 + residual),
    ):
        monkeypatch.setattr(kernels, "dropout_add_norm", wrong)
        assert why(CPU) == "they give other numbers than torch"
        assert why(CPU, keeps_sum=True) is None
    monkeypatch.setattr(kernels, "dropout_add_norm", lambda *_: 1 / 0)
    assert why(CPU) == "ZeroDivisionError: division by zero"
    for wrong in (
        lambda *arguments: [result * 1.001 for result in dropout_add_norm_sum(*arguments)],
        lambda *arguments: dropout_add_norm_sum(*arguments)[:1] * 2,
        lambda hidden, residual, *rest: (dropout_add_norm_sum(hidden, residual, *rest)[0], hidden + residual),
    ):
        monkeypatch.setattr(kernels, "dropout_add_norm_sum", wrong)
        assert why(CPU, keeps_sum=True) == "they give other numbers than torch"
