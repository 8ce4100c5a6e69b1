"""What this device allows a RoBERTa: the rates of its matrix products and of attention, and the positions/s of both.

python benchmarks/ceilings.py --shape base --precision bf16 --batch 64 --output benchmarks/results/ceilings.json

Timed are, forward and backward, each shape of product in the model (rows are positions) and the attention of a layer,
by each backend of `scaled_dot_product_attention`, without a mask and with padding masked, with dropout and without.
The sum over the model (last layer and head at masked positions, as the objective computes them) is the rate that
training would have if all else took no time: embeddings, norms, activations, dropout, loss, optimizer, data.
"""

import argparse
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import harness
import torch
from throughput import MLM_PROBABILITY, SHAPES
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from transformers import RobertaConfig

from recipe.base.errors import run_script
from recipe.modeling.model import ROBERTA_DEFAULTS
from recipe.run.hardware import device_name, matmul_flops

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


class Product(NamedTuple):
    """Rows of `width` numbers, each to `outputs` numbers."""

    rows: int
    width: int
    outputs: int


def products_of(config: RobertaConfig, batch: int, length: int) -> Counter[Product]:
    """How often a forward pass of the objective multiplies which shapes; the backward pass does each twice over."""
    width, inner, every = config.hidden_size, config.intermediate_size, batch * length
    masked = batch * math.ceil(MLM_PROBABILITY * length)
    layers = config.num_hidden_layers - 1
    return Counter(
        {
            Product(every, width, width): 4 * layers + 2,  # of the last layer keys and values alone
            Product(every, width, inner): layers,
            Product(every, inner, width): layers,
        }
    ) + Counter(
        {
            Product(masked, width, width): 3,  # queries and output of the last layer, and the head's first
            Product(masked, width, inner): 1,
            Product(masked, inner, width): 1,
            Product(masked, width, config.vocab_size): 1,
        }
    )


def seconds(statement: str, **names: object) -> float:
    """Median of a statement's runs; of a GPU's work, until it is done."""
    return (
        Timer(statement, globals=names, num_threads=torch.get_num_threads()).blocked_autorange(min_run_time=0.3).median
    )


def time_product(product: Product, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a product and of the two of its backward pass."""
    rows = torch.randn(product.rows, product.width, dtype=dtype, device=device)
    weight = torch.randn(product.outputs, product.width, dtype=dtype, device=device)
    gradient = torch.randn(product.rows, product.outputs, dtype=dtype, device=device)
    return (
        seconds("rows @ weight.T", rows=rows, weight=weight)
        + seconds("gradient @ weight", gradient=gradient, weight=weight)
        + seconds("gradient.T @ rows", gradient=gradient, rows=rows)
    )


def time_attention(
    config: RobertaConfig,
    batch: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    padded: bool,
    dropout: float,
) -> dict[str, float | None]:
    """Seconds of a layer's attention, forward and backward, by backend; None for one that cannot do it here."""
    heads = config.num_attention_heads
    query, key, value, gradient = torch.randn(
        4, batch, heads, length, config.hidden_size // heads, dtype=dtype, device=device
    ).unbind()
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    mask = None
    if padded:
        mask = torch.ones(batch, 1, 1, length, dtype=torch.bool, device=device)
        mask[..., -length // 20 :] = False  # 5 % of a row
    measured = {}

    def attend(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            mixed = F.scaled_dot_product_attention(*inputs, mask, dropout)
        torch.autograd.grad(mixed, inputs, gradient)

    warnings.simplefilter("ignore")  # torch's reasons why a backend does not do it
    for name in BACKENDS:
        try:
            attend(getattr(SDPBackend, name))
        except RuntimeError:
            measured[name] = None
        else:
            measured[name] = seconds("attend(backend)", attend=attend, backend=getattr(SDPBackend, name))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="base", choices=list(SHAPES))
    parser.add_argument("--precision", default="bf16", choices=list(DTYPES))
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64, help="rows of `--length` positions")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[args.precision]
    config = RobertaConfig(**ROBERTA_DEFAULTS | SHAPES[args.shape] | {"vocab_size": 50_265})
    report = harness.header([]) | {"device": device_name(device), "batch": args.batch, "length": args.length}
    large = matmul_flops(device, args.precision)
    report["large matrix products, TFLOP/s"] = round(large / 1e12, 3)
    print(f"{device_name(device)}; large matrix products {large / 1e12:.3f} TFLOP/s")
    total, rows = 0.0, []
    for product, times in products_of(config, args.batch, args.length).items():
        spent = time_product(product, dtype, device)
        rate = 6 * math.prod(product) / spent
        total += times * spent
        rows.append([*product, times, round(rate / 1e12, 3)])
        shape = f"{product.rows:,} x {product.width:,} -> {product.outputs:,}"
        print(f"{shape:28}{times:4} times {rate / 1e12:9.3f} TFLOP/s {rate / large:6.0%}")
    report["rows, width, outputs, times, TFLOP/s"] = rows
    attention = {}
    for padded in (False, True):
        for dropout in (0.0, 0.1):
            measured = time_attention(config, args.batch, args.length, dtype, device, padded, dropout)
            what = f"{'padding masked' if padded else 'no mask'}, dropout {dropout}"
            attention[what] = {name: spent and round(spent * 1e3, 3) for name, spent in measured.items()}
            shown = (f"{name} {'-' if spent is None else f'{spent * 1e3:.2f} ms'}" for name, spent in measured.items())
            print(f"attention, {what:28}{'; '.join(shown)}")
    report["attention of a layer, ms"] = attention
    report["positions/s"] = {}
    share = config.num_hidden_layers - 1 + MLM_PROBABILITY  # the last layer has queries at masked positions only
    for what, measured in attention.items():
        best = min(spent for spent in measured.values() if spent is not None)
        rate = args.batch * args.length / (total + share * best / 1e3)
        report["positions/s"][what] = round(rate)
        print(f"allowed, {what:28}{rate:>12,.0f} positions/s")
    if args.output:
        harness.keep(args.output, f"{args.shape}, {args.precision}", report)


if __name__ == "__main__":
    run_script(main)
