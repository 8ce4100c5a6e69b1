"""The largest micro-batch for a GPU's memory, computed: what autograd keeps of one row more, without running anything.

python benchmarks/memory.py

Counted are float32 weights, gradients and two moments; all tensors that the backward pass keeps, by fake tensors that
have shapes and no contents; one byte of mask for each element that dropout acts on; the head's gradients. 10 % of the
memory is left to the CUDA context and to fragments. Eager: compiled, a row takes less.
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import harness
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import RobertaConfig

from recipe.model import ROBERTA_DEFAULTS, build_model, count_parameters
from recipe.objectives import MaskedLMObjective

SHAPES = {
    "base": {},
    "large": {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
}
LENGTH, MASKED_SHARE = 512, 0.15
USABLE = 0.9


@contextmanager
def kept_tensors(weights: set[int]) -> Iterator[dict[int, tuple[torch.UntypedStorage, int]]]:
    """Storages that the backward pass keeps, other than the weights, and their bytes."""
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def kept_bytes(config: RobertaConfig, rows: int, gradient_checkpointing: bool) -> tuple[int, int]:
    """Parameters, and bytes that a micro-batch's forward pass leaves, in bf16 autocast, dropout's masks apart."""
    with FakeTensorMode():
        model = build_model(config, None).train()
        objective = MaskedLMObjective(model, MASKED_SHARE, gradient_checkpointing)
        ids = torch.zeros(rows, LENGTH, dtype=torch.long)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        with kept_tensors(weights) as kept, torch.autocast("cpu", dtype=torch.bfloat16):
            objective(ids, ids, ids, ids)
        return count_parameters(model), sum(size for _, size in kept.values())


def row_bytes(config: RobertaConfig, gradient_checkpointing: bool) -> int:
    """What the forward pass of a row more leaves, dropout's masks of one byte an element included."""
    one, two = (kept_bytes(config, rows, gradient_checkpointing)[1] for rows in (1, 2))
    # On the embeddings, and twice a layer; a layer that is checkpointed keeps none.
    masks = 1 if gradient_checkpointing else 1 + 2 * config.num_hidden_layers
    return two - one + masks * LENGTH * config.hidden_size


def largest(shape: str, gigabytes: float, gradient_checkpointing: bool) -> int:
    # Dropout on a CPU keeps its masks in another form, and keeps it from flash attention; see `row_bytes`.
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = RobertaConfig(**ROBERTA_DEFAULTS, **SHAPES[shape], **without_dropout, vocab_size=50_265)
    row = row_bytes(config, gradient_checkpointing)
    parameters, one = kept_bytes(config, 1, gradient_checkpointing)
    fixed = 16 * parameters + one - row
    # Gradients of the logits, in float32 and bf16.
    row += math.ceil(MASKED_SHARE * LENGTH) * config.vocab_size * (4 + 2)
    if gradient_checkpointing:  # the layer that is computed again
        three, two = (
            RobertaConfig(**(config.to_dict() | {"num_hidden_layers": number, "dtype": None})) for number in (3, 2)
        )
        row += row_bytes(three, False) - row_bytes(two, False)
    return max(0, int((gigabytes * 1e9 * USABLE - fixed) / row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[16, 24, 40, 80, 141])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    table: dict[str, list[int]] = {}
    print(f"{'':30}" + "".join(f"{size:>8.0f} GB" for size in args.gigabytes))
    for shape in SHAPES:
        for checkpointing in (False, True):
            name = shape + (", gradient_checkpointing" if checkpointing else "")
            table[name] = [largest(shape, size, checkpointing) for size in args.gigabytes]
            print(f"{name:30}" + "".join(f"{size:>11}" for size in table[name]))
    if args.output:
        report = harness.header([]) | {"gigabytes": args.gigabytes, "largest micro-batch": table}
        args.output.write_text(harness.to_json(report) + "\n")


if __name__ == "__main__":
    main()
