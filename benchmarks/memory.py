"""The largest micro-batch for a GPU's memory, computed without running anything (see recipe/modeling/memory.py).

python benchmarks/memory.py
"""

import argparse
from functools import partial
from pathlib import Path

import harness
from transformers import RobertaConfig

from recipe.modeling.memory import compute_memory
from recipe.modeling.model import ROBERTA_DEFAULTS, build_model
from recipe.modeling.objectives import MaskedLMObjective

SHAPES = {
    "base": {},
    "large": {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
}
LENGTH, MASKED_SHARE, VOCAB_SIZE = 512, 0.15, 50_265


def make_objective(shape: str, gradient_checkpointing: bool) -> MaskedLMObjective:
    config = RobertaConfig(**ROBERTA_DEFAULTS, **SHAPES[shape], vocab_size=VOCAB_SIZE)
    return MaskedLMObjective(build_model(config, None), MASKED_SHARE, gradient_checkpointing)


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
            make = partial(make_objective, shape, checkpointing)
            memory = compute_memory(make, 1, LENGTH, "bf16", on_gpu=True)
            table[name] = [memory.largest_micro_batch(size * 1e9) for size in args.gigabytes]
            print(f"{name:30}" + "".join(f"{size:>11}" for size in table[name]))
    if args.output:
        report = harness.header([]) | {"gigabytes": args.gigabytes, "largest micro-batch": table}
        args.output.write_text(harness.to_json(report) + "\n", "utf-8")


if __name__ == "__main__":
    main()
