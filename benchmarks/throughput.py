"""Our training step against the stock loop, side by side in one process: the same model, precision and packed blocks.

python benchmarks/throughput.py --shape small --tokenizer runs/demo-tokenizer --corpora sample_data/novels.jsonl.gz

Sides take turns, a window of training each, for `--rounds` rounds after a warm-up:

ours            pretrain.py's own data path, objective, optimizer and step; with --torch_compile compiled
stock, shipped  the loop of transformers' run_mlm_no_trainer.py with its defaults: the loss of `RobertaForMaskedLM`, the
                stock collator in the training process, AdamW as torch picks it
stock, tuned    the same with fused AdamW, `--workers` loader workers and the micro-batch that suits it best

With `--ladder`, in place of the stock loop: ours with each lever off or on alone (levers.py); what this machine cannot
run is named and left out.

Rates are non-padding tokens a second: medians over the rounds, and the median of the ratios, round by round. MFU is
the model's FLOPs for those tokens (head and last layer at masked positions only, whoever computes more) over what a
large matrix product reaches in the same precision in the same run. Peak memory is what training adds, in a process of
its own.
"""

import argparse
import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import levers
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.data.batches import Rank, Resume
from recipe.data.cached import CachedData
from recipe.data.preprocessor import Preprocessor
from recipe.data.tokenizer import load_tokenizer
from recipe.modeling.model import build_config, build_model, model_flops_per_token
from recipe.modeling.objectives import MaskedLMObjective, compile_in_place
from recipe.modeling.optimizer import build_optimizer
from recipe.run.hardware import device_name, matmul_flops
from recipe.run.stopping import StopRequest
from recipe.training import train_step

SHAPES = {
    "small": {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
    },
    "base": {},
    "large": {
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
    },
}
MLM_PROBABILITY = 0.15


@dataclass(frozen=True)
class Side:
    """One way to train."""

    name: str
    micro_batch: int
    objective: type[nn.Module] | None = MaskedLMObjective  # None: the stock loop
    packing: str = "full_sentences"
    fused: bool = True
    workers: int = 2
    torch_compile: bool = False
    compile_mode: str | None = None
    gradient_checkpointing: bool = False
    backend: SDPBackend | None = None  # of the attention; None: torch chooses


class Bench:
    """What all sides have in common."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        self.args = args
        self.accelerator = Accelerator(mixed_precision=args.precision)
        self.tokenizer: PreTrainedTokenizerFast = load_tokenizer(args.tokenizer)
        self.folder = folder
        self.config = build_config(SHAPES[args.shape] | {"vocab_size": 50_265}, None, self.tokenizer, args.length)
        predicted = int(np.ceil(MLM_PROBABILITY * args.length)) / args.length
        self.flops_per_token = model_flops_per_token(self.config, args.length, predicted)

    def data(self, side: Side) -> CachedData:
        corpora = [CorpusArguments(name=Path(path).name, path=path) for path in self.args.corpora]
        arguments = PretrainArguments(
            output_dir="unused",
            corpora=corpora,
            tokenizer_name=self.args.tokenizer,
            max_seq_length=self.args.length,
            packing=side.packing,
            eval_blocks=0,
            train_batch_size=side.micro_batch * self.args.accumulation,
            per_device_train_batch_size=side.micro_batch,
            dataloader_num_workers=side.workers,
            token_store_dir=self.folder,
        )
        return CachedData(arguments, Preprocessor(arguments, self.tokenizer), process_index=0)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return build_model(self.config, None).train()

    def start(self, side: Side) -> Callable[[], tuple[float, int]]:
        """A function that trains for one update and gives its seconds and its non-padding tokens."""
        updates = self.stock_updates(side) if side.objective is None else self.our_updates(side)

        def update() -> tuple[float, int]:
            self.wait()
            started = time.perf_counter()
            with sdpa_kernel(side.backend) if side.backend else nullcontext():
                tokens = next(updates)
            self.wait()
            return time.perf_counter() - started, tokens

        return update

    def wait(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    def our_updates(self, side: Side) -> Iterator[int]:
        data = self.data(side)
        model = self.model()
        objective = side.objective(model, data.args.masked_share, side.gradient_checkpointing)
        if side.compile_mode:
            objective.compile(fullgraph=True, dynamic=False, mode=side.compile_mode)
        elif side.torch_compile:
            compile_in_place(objective, self.accelerator.device)
        adamw = build_optimizer(objective, 1e-4, (0.9, 0.98), 1e-6, 0.01)
        for group in adamw.param_groups:
            group["fused"] = side.fused
        objective, optimizer = self.accelerator.prepare(objective, adamw)
        for share in data.train_updates(Rank(), Resume(), 10**9, lambda: False):
            masked = share.counts["masked"]
            train_step(self.accelerator, objective, optimizer, share.micro_batches, [masked], 0.0, StopRequest())
            yield share.counts.tokens

    def stock_updates(self, side: Side) -> Iterator[int]:
        data = self.data(replace(side, workers=0))
        [packed] = data.packed[:1]
        rows = [packed.block(number).input_ids.tolist() for number in range(min(len(packed), 4096))]
        blocks = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        collator = DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=MLM_PROBABILITY)
        loader = DataLoader(
            blocks, side.micro_batch, shuffle=True, collate_fn=collator, num_workers=side.workers, drop_last=True
        )
        model = self.model()
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=side.fused or None)
        model, optimizer, loader = self.accelerator.prepare(model, optimizer, loader)
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        total_loss = torch.zeros((), device=self.accelerator.device)
        while True:
            tokens = torch.zeros((), dtype=torch.long, device=self.accelerator.device)
            for number in range(self.args.accumulation):
                batch = next(batches)
                tokens += batch["attention_mask"].sum()
                is_last = number == self.args.accumulation - 1
                with nullcontext() if is_last else self.accelerator.no_sync(model):
                    loss = model(**batch).loss
                    total_loss += loss.detach().float()
                    self.accelerator.backward(loss / self.args.accumulation)
            optimizer.step()
            optimizer.zero_grad()
            yield int(tokens)


def sides_of(args: argparse.Namespace) -> list[Side]:
    ours = Side("ours", args.micro_batch, workers=args.workers, torch_compile=args.torch_compile)
    if not args.ladder:
        stock_batch = args.stock_micro_batch or args.micro_batch
        stock = Side("stock, shipped", min(8, stock_batch), objective=None, fused=False, workers=0)
        return [ours, stock, Side("stock, tuned", stock_batch, objective=None, workers=args.workers)]
    sides = [
        ours,
        replace(ours, name="last layer at all positions", objective=levers.LastLayerEverywhere),
        replace(ours, name="head and last layer at all positions", objective=levers.HeadEverywhere),
        replace(ours, name="vocabulary padded to 64", objective=levers.PaddedVocabulary),
        replace(ours, name="queries, keys, values in one product", objective=levers.OneProduct),
        replace(ours, name="contiguous: no padding, no mask", packing="contiguous"),
        replace(ours, name="no mask, as if tails were filled", objective=levers.Unmasked),
        replace(ours, name="compile " + ("off" if ours.torch_compile else "on"), torch_compile=not ours.torch_compile),
        replace(ours, name="CUDA graphs", compile_mode="reduce-overhead"),
        replace(ours, name="AdamW not fused", fused=False),
        replace(ours, name="loader workers off", workers=0),
        replace(ours, name="gradient checkpointing", gradient_checkpointing=True),
    ]
    for backend in ("EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "FLASH_ATTENTION"):
        sides.append(replace(ours, name=f"mask, {backend}", backend=getattr(SDPBackend, backend)))
        unmasked = replace(ours, objective=levers.Unmasked, backend=getattr(SDPBackend, backend))
        sides.append(replace(unmasked, name=f"no mask, {backend}"))
    if args.precision == "bf16":
        sides.append(replace(ours, name="residual stream in bf16", objective=levers.ResidualInBf16))
    if unknown := set(args.only or ()) - {side.name for side in sides}:
        sys.exit(f"--only {', '.join(unknown)}: the ladder has {', '.join(side.name for side in sides)}")
    return [side for side in sides if not args.only or side.name in args.only or side is ours]


def peak_megabytes(args: argparse.Namespace, side: Side, folder: str) -> float:
    """What two updates add to the memory, at most; for a process that has done nothing else."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    bench = Bench(args, folder)
    on_gpu = bench.accelerator.device.type == "cuda"
    data = bench.data(side)  # opened before, so that only training counts
    del data
    before = harness.resident_megabytes()
    update = bench.start(side)
    update()
    update()
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 1e6
    return harness.peak_resident_megabytes() - before


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Of the command line, beside the parser's own options, what is trained on what; threads are set."""
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--corpora", nargs="+", required=True)
    parser.add_argument("--shape", default="base", choices=list(SHAPES))
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--micro_batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in an update")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--torch_compile", action="store_true")
    args = parser.parse_args()
    args.tokenizer, *args.corpora = harness.resolve([args.tokenizer, *args.corpora])
    torch.set_num_threads(args.threads or torch.get_num_threads())
    return args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock_micro_batch", type=int, help="of the tuned stock loop; default: ours")
    parser.add_argument("--updates", type=int, default=1, help="in a window")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument("--only", nargs="+", help="of the ladder: sides by name")
    parser.add_argument("--output", type=Path)
    args = parse(parser)
    report: dict[str, Any] = harness.header(args.corpora) | {
        "arguments": {
            name: value for name, value in vars(args).items() if name not in ("tokenizer", "corpora", "output")
        }
    }
    sides = sides_of(args)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        report["device"] = device_name(bench.accelerator.device)
        ceiling = matmul_flops(bench.accelerator.device, args.precision)
        updates = {}
        for side in sides:
            update = bench.start(side)
            try:
                update()  # warm-up, compilation included
                update()
            except RuntimeError as error:
                if side is sides[0]:
                    raise
                print(f"{side.name}: not here: {str(error).strip().splitlines()[0]}")
            else:
                updates[side.name] = update
        sides = [side for side in sides if side.name in updates]
        rates: dict[str, list[float]] = {side.name: [] for side in sides}
        for number in range(args.rounds):
            first = number % len(sides)  # nobody is always the first, or always after the slowest
            for side in sides[first:] + sides[:first]:
                spent = [updates[side.name]() for _ in range(args.updates)]
                rates[side.name].append(sum(tokens for _, tokens in spent) / sum(seconds for seconds, _ in spent))
        del updates
        gc.collect()
        report["matmul_tflops"] = round(ceiling / 1e12, 3)
        report["model_mflops_per_token"] = round(bench.flops_per_token / 1e6, 1)
        report["sides"] = {}
        for side in sides:
            ratios = np.array(rates["ours"]) / np.array(rates[side.name])
            report["sides"][side.name] = {
                "micro_batch": side.micro_batch,
                "tokens_per_second": round(float(np.median(rates[side.name])), 1),
                "range": [round(min(rates[side.name]), 1), round(max(rates[side.name]), 1)],
                "mfu": round(float(np.median(rates[side.name])) * bench.flops_per_token / ceiling, 3),
                "peak_megabytes": round(harness.in_child(peak_megabytes, args, side, folder)),
                "ours_over_it": round(float(np.median(ratios)), 3),
                "ratio_range": [round(float(ratios.min()), 3), round(float(ratios.max()), 3)],
            }
    print_table(report)
    if args.output:
        name = f"{args.shape}, {args.precision}" + (", ladder" if args.ladder else "")
        harness.keep(args.output, ", ".join([name, *(args.only or [])]), report)


def print_table(report: dict[str, Any]) -> None:
    print(f"{report['device']}; large matrix product {report['matmul_tflops']} TFLOP/s")
    columns = f"{'':38}{'batch':>6}{'tokens/s':>11}{'MFU':>7}{'peak MB':>9}{'ours / it':>11}{'range':>15}"
    print(columns)
    for name, row in report["sides"].items():
        low, high = row["ratio_range"]
        print(
            f"{name:38}{row['micro_batch']:>6}{row['tokens_per_second']:>11,.0f}{row['mfu']:>7.1%}"
            f"{row['peak_megabytes']:>9,}{row['ours_over_it']:>10.2f}x{f'{low:.2f} to {high:.2f}':>15}"
        )


if __name__ == "__main__":
    main()
