"""One epoch of a GLUE task: batches of rows of like length against rows in random order padded to 128.

python benchmarks/glue.py --model runs/demo/model --glue_dir glue --output benchmarks/results/glue.json

Both sides make the same updates on as many rows, in alternating windows of `--window` updates, from the same weights.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import harness
import numpy as np
import torch
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from recipe.arguments import GlueArguments
from recipe.finetune.classifier import load_classifier, load_glue_tokenizer
from recipe.finetune.finetuning import EncodedSplit, Finetuner, encode_splits, epoch_batches
from recipe.finetune.tasks.glue import TASKS
from recipe.finetune.tasks.loading import load_task
from recipe.modeling.optimizer import build_optimizer
from recipe.run.hardware import device_name

PADDED_LENGTH = 128


class PaddedFinetuner(Finetuner):
    """The step on rows padded to 128, as with `padding="max_length"`."""

    def logits(self, module: torch.nn.Module, split: EncodedSplit, rows: np.ndarray) -> torch.Tensor:
        batch = self.tokenizer.pad(
            split.rows[rows], padding="max_length", max_length=PADDED_LENGTH, return_tensors="pt"
        )
        with self.accelerator.autocast():
            return module(**batch.to(self.device)).logits.float().squeeze(-1)


def updates(
    finetuner: Finetuner, model: torch.nn.Module, name: str, split: EncodedSplit, batches: list
) -> Iterator[int]:
    """Rows of each update, after it."""
    optimizer = build_optimizer(model, 1e-5, (0.9, 0.98), 1e-6, 0.1)
    scaler = torch.amp.GradScaler(finetuner.device.type, enabled=False)
    for rows in batches:
        finetuner.backward(model, TASKS[name], split, rows, scaler)
        optimizer.step()
        optimizer.zero_grad()
        yield len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--glue_dir", required=True)
    parser.add_argument("--task", default="sst2", choices=list(TASKS))
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--window", type=int, default=150)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    disable_progress_bar()
    datasets.disable_progress_bars()
    set_verbosity_error()
    accelerator = Accelerator()
    args = GlueArguments(output_dir="unused", model_name_or_path=given.model, max_seq_length=PADDED_LENGTH)
    tokenizer = load_glue_tokenizer(given.model, PADDED_LENGTH)
    train = encode_splits(load_task(given.task, given.glue_dir)[0], TASKS[given.task], tokenizer, PADDED_LENGTH)[
        "train"
    ]
    order = np.random.default_rng(0).permutation(len(train.lengths))
    batches = {
        "ours": epoch_batches(train.lengths, given.batch_size, 0, 0),
        "padded to 128": [order[i : i + given.batch_size] for i in range(0, len(order), given.batch_size)],
    }
    sides = {}
    for name, cls in (("ours", Finetuner), ("padded to 128", PaddedFinetuner)):
        model = load_classifier(given.model, TASKS[given.task]).to(accelerator.device).train()
        finetuner = cls(accelerator, args, tokenizer, is_shared=False)
        sides[name] = updates(finetuner, model, given.task, train, batches[name])
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(len(batches["ours"]) // given.window):
        for name, side in sides.items():
            started = time.perf_counter()
            rows = sum(next(side) for _ in range(given.window))
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            rates[name].append(rows / (time.perf_counter() - started))
    ratios = np.array(rates["ours"]) / np.array(rates["padded to 128"])
    report = harness.header([]) | {
        "device": device_name(accelerator.device),
        "task": TASKS[given.task].title,
        "batch_size": given.batch_size,
        "window": given.window,
        "updates": given.window * len(ratios),
        "mean_tokens": round(float(train.lengths.mean()), 1),
        "sequences_per_second": {name: round(float(np.median(values)), 1) for name, values in rates.items()},
        "ratio": round(float(np.median(ratios)), 2),
        "ratio_range": [round(float(ratios.min()), 2), round(float(ratios.max()), 2)],
    }
    print(harness.to_json(report))
    if given.output:
        given.output.write_text(harness.to_json(report) + "\n", "utf-8")


if __name__ == "__main__":
    main()
