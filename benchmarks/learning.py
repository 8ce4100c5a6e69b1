"""The learning curve of our step beside the stock loop's, on the same batches from the same weights.

python benchmarks/learning.py --tokenizer runs/demo-tokenizer --corpora sample_data/novels.jsonl.gz --output learning

Dropout is off. In float32 the two curves have to coincide. In bf16 they may part as far as those of two seeds do.
Writes OUTPUT.json and OUTPUT.png.
"""

import argparse
import tempfile
from pathlib import Path

import harness
import numpy as np
import torch
from accelerate import Accelerator
from levers import ResidualInBf16
from matplotlib.figure import Figure
from torch import nn

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.base.errors import run_script
from recipe.data.batches import Rank, Resume
from recipe.data.modes import open_data
from recipe.data.preprocessor import Preprocessor
from recipe.data.tokenizer import load_tokenizer
from recipe.modeling.model import build_config, build_model
from recipe.modeling.objectives import MaskedLMObjective
from recipe.modeling.optimizer import build_optimizer
from recipe.run.hardware import device_name
from recipe.training import train_step

MODEL = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

STOCK = [("stock", None, 0), ("stock, another seed", None, 1)]
# By precision: name, objective, seed.
SIDES = {
    "no": [("ours", MaskedLMObjective, 0), *STOCK],
    "bf16": [("ours", MaskedLMObjective, 0), *STOCK, ("residual stream in bf16", ResidualInBf16, 0)],
}


def curve(
    args: argparse.Namespace, accelerator: Accelerator, folder: str, objective: type[nn.Module] | None, seed: int
) -> list[float]:
    """Loss before each update, in nats; without an objective the stock loop's."""
    stock = objective is None
    tokenizer = load_tokenizer(args.tokenizer)
    arguments = PretrainArguments(
        output_dir="unused",
        corpora=[CorpusArguments(name=Path(path).name, path=path) for path in args.corpora],
        tokenizer_name=args.tokenizer,
        max_seq_length=128,
        eval_blocks=0,
        train_batch_size=32,
        per_device_train_batch_size=32 if stock else 8,
        dataloader_num_workers=0,
        token_store_dir=folder,
    )
    data = open_data(arguments, Preprocessor(arguments, tokenizer))
    torch.manual_seed(seed)
    model = build_model(build_config(MODEL, None, tokenizer, 128), None)
    module = objective(model, arguments.masked_share) if objective else model
    module, optimizer = accelerator.prepare(
        module, build_optimizer(module, args.learning_rate, (0.9, 0.98), 1e-6, 0.01)
    )
    losses = []
    for share in data.train_updates(Rank(), Resume(), args.updates, lambda: False):
        masked = share.counts["masked"]
        if stock:
            [batch] = share.micro_batches
            loss = module(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        else:
            loss_sum, _ = train_step(accelerator, module, optimizer, share.micro_batches, [masked], 0.0).tolist()
            losses.append(loss_sum / masked)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--corpora", nargs="+", required=True)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.tokenizer, *args.corpora = harness.resolve([args.tokenizer, *args.corpora])
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("no", "bf16"):
            for name, objective, seed in SIDES[precision]:
                accelerator = Accelerator(mixed_precision=precision)
                device = device_name(accelerator.device)
                curves[f"{precision}: {name}"] = curve(args, accelerator, folder, objective, seed)
                harness.reset_accelerate()

    def apart(one: str, two: str) -> dict[str, float]:
        gap = np.abs(np.array(curves[one]) - np.array(curves[two]))
        return {"largest": float(gap.max()), "mean": float(gap.mean())}

    report = harness.header(args.corpora) | {
        "device": device,
        "apart, in nats": {
            f"{precision}: ours and {other}": apart(f"{precision}: ours", f"{precision}: {other}")
            for precision, [_, *others] in SIDES.items()
            for other, _, _ in others
        },
        "losses": {name: [round(loss, 5) for loss in losses] for name, losses in curves.items()},
    }
    args.output.with_suffix(".json").write_text(harness.to_json(report) + "\n", "utf-8")
    for name, gap in report["apart, in nats"].items():
        print(f"{name:38} apart by {gap['largest']:.2e} at most, {gap['mean']:.2e} in the mean")
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, precision in zip(figure.subplots(1, 2, sharey=True), ("no", "bf16"), strict=True):
        for name, style in (("stock, another seed", ":"), ("stock", "-"), ("ours", "--")):
            width = 3 if name == "stock" else 1.5
            axes.plot(curves[f"{precision}: {name}"], style, linewidth=width, label=name)
        axes.set(title={"no": "fp32"}.get(precision, precision), xlabel="update")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("masked-LM loss (nats a token)")
    figure.savefig(args.output.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    run_script(main)
