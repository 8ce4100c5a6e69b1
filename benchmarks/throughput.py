"""Our training step against the stock loop, side by side in one process: the same model, precision and packed blocks.

python benchmarks/throughput.py --shape small --tokenizer runs/demo-tokenizer --corpora sample_data/novels.jsonl.gz

Sides take turns, a window of training each, for `--rounds` rounds after a warm-up:

ours             pretrain.py's own data path, objective, optimizer and step; with --torch_compile compiled
stock, shipped   the loop of transformers' run_mlm_no_trainer.py with its defaults: the loss of `RobertaForMaskedLM`,
                 the stock collator in the training process, AdamW as torch picks it
stock, tuned     the same with fused AdamW, `--workers` loader workers and the micro-batch that suits it best
stock, compiled  the tuned loop compiled, on contiguous rows, so that all shapes are static; with --torch_compile only

With `--ladder`, in place of the stock loop: ours with each lever off or on alone (levers.py); what this machine cannot
run is named and left out.

Rates are non-padding tokens a second: medians over the rounds, and the median of the ratios, round by round. Inside a
window nothing waits for the device but what the loop itself has. MFU is the model's FLOPs for those tokens (head and
last layer at masked positions only, whoever computes more) over what large matrix products sustain in the same
precision in the same run. Peak memory is what training adds: on a GPU in the warm-up, on a CPU in a process of its own.
"""

import argparse
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import harness
import levers
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.base.errors import run_script
from recipe.data.batches import Rank, Resume
from recipe.data.cached import CachedData
from recipe.data.preprocessor import Preprocessor
from recipe.data.tokenizer import load_tokenizer
from recipe.modeling.model import build_config, build_model, model_flops_per_token
from recipe.modeling.objectives import MaskedLMObjective, compile_in_place, use_kernels
from recipe.modeling.optimizer import build_optimizer
from recipe.monitoring import Update
from recipe.run.hardware import device_name, matmul_flops
from recipe.training import preparation, train_step

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
COMPILED_WARM_UPS = 4


@dataclass(frozen=True)
class Side:
    """One way to train."""

    name: str
    micro_batch: int
    objective: type[nn.Module] | None = MaskedLMObjective  # None: the stock loop
    packing: str = "full_sentences"
    fused: bool = True  # AdamW of the stock loop; ours has to be
    workers: int = 2
    torch_compile: bool = False
    one_graph: bool = False  # the whole objective is compiled, in place of a layer for all
    compile_mode: str | None = None  # of that graph
    gradient_checkpointing: bool = False
    lever: Callable[[MaskedLMObjective], None] | None = None  # changes the objective, see levers.py


class CountingCollator(DataCollatorForLanguageModeling):
    """The stock collator, which also counts the tokens, so that nobody has to ask the device for them."""

    def torch_call(self, examples: list[dict[str, Any]]) -> Any:
        batch = super().torch_call(examples)
        batch["tokens"] = sum(len(example["input_ids"]) for example in examples)
        return batch


class Bench:
    """What all sides have in common."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        self.args = args
        torch._dynamo.config.recompile_limit = 64  # all sides compile the same few functions
        self.accelerator = Accelerator(mixed_precision=args.precision)
        self.tokenizer: PreTrainedTokenizerFast = load_tokenizer(args.tokenizer)
        self.folder = args.token_store_dir or folder
        dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), args.dropout)
        shape = SHAPES[args.shape] | {"vocab_size": 50_265} | dropout
        self.config = build_config(shape, None, self.tokenizer, args.length)
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

    def start(self, side: Side) -> Callable[[int], tuple[float, int]]:
        """A function that trains for a window of some updates and gives its seconds and its non-padding tokens."""
        updates = self.stock_updates(side) if side.objective is None else self.our_updates(side)

        def train(number: int) -> tuple[float, int]:
            self.wait()
            started = time.perf_counter()
            tokens = sum(itertools.islice(updates, number))
            self.wait()
            return time.perf_counter() - started, tokens

        return train

    def wait(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    def our_updates(self, side: Side) -> Iterator[int]:
        """Train by updates of the recipe; yields the tokens of each."""
        data = self.data(side)
        objective = side.objective(self.model(), data.args.masked_share, side.gradient_checkpointing)
        device, precision = self.accelerator.device, self.accelerator.mixed_precision
        use_kernels(objective, device, precision, side.micro_batch, self.args.length, data.args.bf16_residual)
        if side.lever:
            side.lever(objective)
        prepare = preparation(objective, device)
        if side.one_graph:
            objective.compile(fullgraph=True, dynamic=False, mode=side.compile_mode)
        elif side.torch_compile:
            compile_in_place(objective, device)
        optimizer = build_optimizer(objective, 1e-4, (0.9, 0.98), 1e-6, 0.01)
        objective, optimizer = self.accelerator.prepare(objective, optimizer)
        before = None
        for share in data.train_updates(Rank(), Resume(), 10**9, lambda: False, prepare):
            masked = share.counts["masked"]
            result = train_step(self.accelerator, objective, optimizer, share.micro_batches, [masked], 0.0)
            update = Update(share, share.counts, 1e-4, 0.0, result)
            if before:  # one late, as pretrain.py reads it
                before.wait(has_scaler=False)
            before = update
            yield share.counts.tokens

    def stock_updates(self, side: Side) -> Iterator[int]:
        """Train by updates of the stock loop; yields the tokens of each."""
        data = self.data(replace(side, workers=0))
        [packed] = data.packed[:1]
        rows = [packed.block(number).input_ids.tolist() for number in range(min(len(packed), 4096))]
        blocks = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        collator = CountingCollator(self.tokenizer, mlm_probability=MLM_PROBABILITY)
        endless = RandomSampler(blocks, replacement=True, num_samples=2**40)  # workers start once, as in a long epoch
        loader = DataLoader(
            blocks, side.micro_batch, sampler=endless, collate_fn=collator, num_workers=side.workers, drop_last=True
        )
        model = self.model()
        if side.torch_compile:
            model.compile(dynamic=False)
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=side.fused or None)
        model, optimizer, loader = self.accelerator.prepare(model, optimizer, loader)
        batches = iter(loader)
        total_loss = torch.zeros((), device=self.accelerator.device)
        while True:
            tokens = 0
            for number in range(self.args.accumulation):
                batch = next(batches)
                tokens += batch.pop("tokens")
                is_last = number == self.args.accumulation - 1
                with nullcontext() if is_last else self.accelerator.no_sync(model):
                    loss = model(**batch).loss
                    total_loss += loss.detach().float()
                    self.accelerator.backward(loss / self.args.accumulation)
            optimizer.step()
            optimizer.zero_grad()
            yield tokens


def sides_of(args: argparse.Namespace) -> list[Side]:
    ours = Side("ours", args.micro_batch, workers=args.workers, torch_compile=args.torch_compile)
    if not args.ladder:
        shipped = Side("stock, shipped", min(8, args.micro_batch), objective=None, fused=False, workers=0)
        tuned = Side("stock, tuned", args.tuned_micro_batch or args.micro_batch, objective=None, workers=args.workers)
        compiled = replace(
            tuned,
            name="stock, compiled",
            micro_batch=args.compiled_micro_batch or args.micro_batch,
            packing="contiguous",
            torch_compile=True,
        )
        return choose([ours, shipped, tuned, *([compiled] if args.torch_compile else [])], args.only)
    whole = replace(ours, one_graph=True)
    sides = [
        ours,
        replace(ours, name="padded rows", lever=levers.pad_rows),
        replace(ours, name="attention by flash", lever=levers.attend_by("flash")),
        replace(ours, name="attention by cuDNN", lever=levers.attend_by("cudnn")),
        replace(ours, name="dropout, residual, norm apart", lever=levers.unfuse),
        replace(ours, name="residual stream in float32", lever=levers.keep_float32),
        replace(ours, name="last layer at all positions", objective=levers.LastLayerEverywhere),
        replace(ours, name="head and last layer at all positions", objective=levers.HeadEverywhere),
        replace(ours, name="queries, keys, values in one product", objective=levers.OneProduct),
        replace(ours, name="contiguous: no padding, no mask", packing="contiguous"),
        replace(ours, name="compile " + ("off" if ours.torch_compile else "on"), torch_compile=not ours.torch_compile),
        replace(whole, name="compiled as one graph"),
        replace(whole, name="CUDA graphs", compile_mode="reduce-overhead"),
        replace(ours, name="loader workers off", workers=0),
        replace(ours, name="gradient checkpointing", gradient_checkpointing=True),
    ]
    return choose(sides, args.only)


def choose(sides: list[Side], names: list[str] | None) -> list[Side]:
    """Of the sides, the first and those of these names, or all."""
    if unknown := set(names or ()) - {side.name for side in sides}:
        sys.exit(f"--only {', '.join(unknown)}: there are {', '.join(side.name for side in sides)}")
    return [side for side in sides if not names or side.name in names or side is sides[0]]


@dataclass
class Running:
    """A side that trains."""

    side: Side
    train: Callable[[int], tuple[float, int]]
    updates: int  # in a window
    peak_megabytes: float | None  # None on a CPU
    rates: list[float] = field(default_factory=list)


def start_sides(bench: Bench, sides: list[Side]) -> list[Running]:
    """Warm up all sides that this machine can run, the first of which has to."""
    running: list[Running] = []
    begun = time.perf_counter()
    for side in sides:
        if running and time.perf_counter() - begun > bench.args.warm_up_seconds:
            print(f"{side.name}: left out, since warming up has taken {bench.args.warm_up_seconds:g} s", flush=True)
            continue
        on_gpu = bench.accelerator.device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        started = time.perf_counter()
        try:
            train = bench.start(side)
            train(1)  # compilation included
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            # Sizes that come later are compiled later: the fastest of some tells how many updates a window has.
            seconds = min(train(2)[0] for _ in range(COMPILED_WARM_UPS if side.torch_compile else 1))
        except Exception as error:  # a lever that is not there for this machine, memory that is too small
            if side is sides[0]:
                raise
            print(f"{side.name}: not here: {str(error).strip().splitlines()[0]}", flush=True)
            continue
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if on_gpu else None
        print(f"{side.name}: ready after {time.perf_counter() - started:.1f} s", flush=True)
        running.append(Running(side, train, max(1, round(bench.args.window_seconds / (seconds / 2))), peak))
    return running


def take_turns(running: list[Running], number: int) -> None:
    """Measure the rate of each side in a round."""
    first = number % len(running)  # nobody is always the first, or always after the slowest
    for one in running[first:] + running[:first]:
        seconds, tokens = one.train(one.updates)
        one.rates.append(tokens / seconds)


def peak_megabytes_on_cpu(args: argparse.Namespace, side: Side, folder: str) -> float:
    """What two updates add to the memory, at most; for a process that has done nothing else."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    bench = Bench(args, folder)
    data = bench.data(side)  # opened before, so that only training counts
    del data
    before = harness.resident_megabytes()
    bench.start(side)(2)
    return harness.peak_resident_megabytes() - before


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Of the command line, beside the parser's own options, what is trained on what; threads are set."""
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--corpora", nargs="+", required=True)
    parser.add_argument("--token_store_dir", help="where other benchmarks find the stores; default: none finds them")
    parser.add_argument("--shape", default="base", choices=list(SHAPES))
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--dropout", type=float, default=0.1, help="of hidden states and of attention")
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
    parser.add_argument("--tuned_micro_batch", type=int, help="of the tuned stock loop; default: ours")
    parser.add_argument("--compiled_micro_batch", type=int, help="of the compiled stock loop; default: ours")
    parser.add_argument("--window_seconds", type=float, default=2, help="a window has as many updates, one at least")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument("--warm_up_seconds", type=float, default=math.inf, help="after them no further side is begun")
    parser.add_argument("--only", nargs="+", help="sides by name, beside the first")
    parser.add_argument("--output", type=Path)
    args = parse(parser)
    report: dict[str, Any] = harness.header(args.corpora) | {
        "arguments": {
            name: value
            for name, value in vars(args).items()
            if name not in ("tokenizer", "corpora", "token_store_dir", "output")
        }
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        running = start_sides(bench, sides_of(args))
        ceiling = matmul_flops(bench.accelerator.device, args.precision)  # of a device that is warm
        report |= {"device": device_name(bench.accelerator.device), "matmul_tflops": round(ceiling / 1e12, 3)}
        report["model_mflops_per_token"] = round(bench.flops_per_token / 1e6, 1)
        for number in range(args.rounds):
            take_turns(running, number)
            report["sides"] = describe_sides(running, bench.flops_per_token / ceiling)
            keep(args, report)  # as it comes: a benchmark may be ended from outside
        for one in running:
            one.train = None  # its memory is not another's
        for one in running:
            if one.peak_megabytes is None:
                one.peak_megabytes = harness.in_child(peak_megabytes_on_cpu, args, one.side, folder)
    report["sides"] = describe_sides(running, bench.flops_per_token / ceiling)
    keep(args, report)
    print_table(report)


def describe_sides(running: list[Running], flops_share: float) -> dict[str, dict[str, Any]]:
    """What is known of each side so far; `flops_share` is the MFU of one token a second."""
    described = {}
    for one in running:
        ratios = np.array(running[0].rates) / np.array(one.rates)
        rate = float(np.median(one.rates))
        described[one.side.name] = {
            "micro_batch": one.side.micro_batch,
            "updates": one.updates,
            "tokens_per_second": round(rate, 1),
            "range": [round(min(one.rates), 1), round(max(one.rates), 1)],
            "mfu": round(rate * flops_share, 3),
            "peak_megabytes": one.peak_megabytes and round(one.peak_megabytes),
            "ours_over_it": round(float(np.median(ratios)), 3),
            "ratio_range": [round(float(ratios.min()), 3), round(float(ratios.max()), 3)],
        }
    return described


def keep(args: argparse.Namespace, report: dict[str, Any]) -> None:
    if args.output:
        dropout = "" if args.dropout == 0.1 else f", dropout {args.dropout:g}"
        name = f"{args.shape}, {args.precision}{dropout}"
        harness.keep(args.output, ", ".join([name, "ladder", *(args.only or [])]) if args.ladder else name, report)


def print_table(report: dict[str, Any]) -> None:
    print(f"{report['device']}; large matrix products {report['matmul_tflops']} TFLOP/s")
    columns = f"{'':38}{'batch':>6}{'tokens/s':>11}{'MFU':>7}{'peak MB':>9}{'ours / it':>11}{'range':>15}"
    print(columns)
    for name, row in report["sides"].items():
        low, high = row["ratio_range"]
        print(
            f"{name:38}{row['micro_batch']:>6}{row['tokens_per_second']:>11,.0f}{row['mfu']:>7.1%}"
            f"{row['peak_megabytes']:>9,}{row['ours_over_it']:>10.2f}x{f'{low:.2f} to {high:.2f}':>15}"
        )


if __name__ == "__main__":
    run_script(main)
