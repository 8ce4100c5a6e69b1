"""What a run is going to do and to take, and whether it can begin: `pretrain.py --dry_run`.

1. `check_run` tries every precondition, and each gets a line: ok, or what the problem is and the way out.
2. Memory and kernels are tried for the hardware asked for, as far as they can be computed or tried without it.
3. The plan follows: model, batch, updates, passes over the corpora, hours of preparation and training, price.
4. If there was a problem, an error comes last.
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig

from recipe.arguments import PretrainArguments
from recipe.arguments.checks import divisors
from recipe.arguments.pretraining import describe_schedule
from recipe.base.errors import UserError, did_you_mean
from recipe.base.formatting import format_bytes, format_count, format_duration
from recipe.checks import CorpusSize, check_run
from recipe.modeling.memory import USABLE_FRACTION, compute_memory
from recipe.modeling.model import build_model, count_parameters, model_flops_per_token
from recipe.modeling.objectives import OBJECTIVES, MaskedLMObjective, try_kernels, why_nothing_compiles
from recipe.run.directory import RunDirectory
from recipe.run.hardware import device_name, matmul_flops

# Memory in GB and dense bf16 TFLOP/s of the data sheets.
GPUS = {
    "l4": (24, 121),
    "rtx-4090": (24, 165),
    "a100-40gb": (40, 312),
    "l40s": (48, 362),
    "a100-80gb": (80, 312),
    "h100": (80, 989),
    "h200": (141, 989),
    "b200": (180, 2250),
}
# What large products of random numbers sustain of the data sheet's: measured on an H200, assumed of the others.
DATASHEET_FRACTION = 736 / 989
ASSUMED_MFU = 0.4
ASSUMED_FROM = "assumed: published BERT pretraining reaches 20 to 60 %"
# The best MFU of this recipe in `benchmarks/results/throughput.json` by device, precision and size of model, with the
# paper's dropout: FLOPs of tokens without padding, as a share of what `matmul_flops` measured.
MEASURED = Path(__file__).with_name("measured_mfu.json")
# Passes over a corpus: those of the paper over 160 GB, and from where on a plan warns.
PAPER_PASSES, MAX_PASSES = 40, 200
SURE_FRACTION = 0.75  # of a device's memory, within which a larger micro-batch is recommended
RECOMPUTE_FACTOR = 4 / 3  # what gradient checkpointing does, of what is done without


@dataclass(frozen=True)
class Hardware:
    """What a run is planned for.

    Attributes:
        name: of the device.
        count: devices, each with a process.
        memory: bytes of a device.
        flops: FLOP/s that large matrix products sustain on it, of which an MFU is a share.
        precision: as accelerate calls it.
        is_gpu: whether the device is a GPU.
    """

    name: str
    count: int
    memory: float
    flops: float
    precision: str
    is_gpu: bool


def find_hardware(args: PretrainArguments, accelerator: Accelerator) -> Hardware:
    """Look up the GPUs asked for, or measure this machine's devices, which takes some tenths of a second.

    Raises:
        UserError: a GPU that is not known, or missing.
    """
    device, count = accelerator.device, args.num_gpus or accelerator.num_processes
    if args.gpu is not None:
        kind = args.gpu.lower()
        if kind not in GPUS:
            raise UserError(f"`gpu` is {args.gpu}; known are {', '.join(GPUS)}{did_you_mean(kind, GPUS)}")
        gigabytes, teraflops = GPUS[kind]
        return Hardware(kind.upper(), count, gigabytes * 1e9, teraflops * 1e12 * DATASHEET_FRACTION, "bf16", True)
    is_gpu = device.type == "cuda"
    for name in ("num_gpus", "price_per_gpu_hour"):
        if getattr(args, name) is not None and not is_gpu:
            raise UserError(
                f"`{name}` is {getattr(args, name)}, and this machine has no GPU; name a kind, --gpu h200 say"
            )
    if is_gpu:
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / accelerator.num_processes
    precision = accelerator.mixed_precision
    return Hardware(device_name(device), count, memory, matmul_flops(device, precision), precision, is_gpu)


def find_mfu(hardware: Hardware, flops_per_token: float) -> tuple[float, str]:
    """Find an MFU to plan with, and where it is from.

    That is a row of `MEASURED` of such a device, with the model nearest in size, or an assumption.
    """
    words = set(re.findall(r"\w+", hardware.name.upper()))
    fitting = [
        row
        for row in json.loads(MEASURED.read_text("utf-8"))
        if words <= set(re.findall(r"\w+", row["device"].upper())) and row["precision"] == hardware.precision
    ]
    if not fitting:
        return ASSUMED_MFU, ASSUMED_FROM
    nearest = min(fitting, key=lambda row: abs(math.log(row["mflops_per_token"] * 1e6 / flops_per_token)))
    return nearest["mfu"], f"measured on {nearest['device']} at {nearest['mflops_per_token']:.4g} MFLOPs a token"


def print_plan(args: PretrainArguments, accelerator: Accelerator, run: RunDirectory) -> None:
    """Print all that `check_run` tries, and what the run is going to do and take; the main process does.

    Raises:
        UserError: something has to be put right first, or there is no such GPU.
    """
    if not accelerator.is_main_process:
        return
    hardware = find_hardware(args, accelerator)
    check = check_run(args, accelerator, run)
    tried, config = check.tried, check.config
    if config:
        with tried.trying("memory") as remarks:
            remarks.append(check_memory(args, config, hardware))
    if args.gpu is None and config:
        with tried.trying("kernels") as remarks:
            remarks.append(check_kernels(args, config, accelerator.device, hardware.precision))
    elif args.gpu:
        print(f"unknown  kernels: can be tried on a machine with {args.gpu} only, by --dry_run without --gpu")
    if config and check.fits_world_size:
        for line in describe_plan(args, config, hardware.count):
            print(line)
        described = describe_passes(args, check.sizes), describe_preparation(args, check.sizes)
        print("\n".join([*chain(*described), describe_time(args, config, hardware)]))
    if tried.problems:
        raise UserError(f"{tried.problems} of the above {'are problems' if tried.problems > 1 else 'is a problem'}")
    print("next: the same command without --dry_run" + (", on such hardware" if args.gpu else ""))


def check_memory(args: PretrainArguments, config: PreTrainedConfig, hardware: Hardware) -> str:
    """Compute what a micro-batch takes of a device's memory.

    Raises:
        UserError: it does not fit into a device's memory, as far as can be computed.
    """

    def make_objective() -> MaskedLMObjective:
        model = build_model(config, None, args.predicts_pairs)
        return OBJECTIVES[args.objective](model, args.masked_share, args.gradient_checkpointing)

    rows = args.per_device_train_batch_size
    memory = compute_memory(
        make_objective, rows, args.max_seq_length, hardware.precision, hardware.is_gpu, args.bf16_residual
    )
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    sizes = " + ".join(f"{name} {format_bytes(getattr(memory, name))}" for name in parts)
    text = f"{format_bytes(memory.total)} of {format_bytes(hardware.memory)} = {sizes} (computed, not compiled)"
    if memory.total > USABLE_FRACTION * hardware.memory:
        largest = memory.largest_micro_batch(hardware.memory)
        remedy = f"give --per_device_train_batch_size {largest} or less" if largest else "train a smaller model"
        remedy += "" if args.gradient_checkpointing else ", or --gradient_checkpointing true"
        raise UserError(f"`per_device_train_batch_size` is {rows}, which takes {text}; {remedy}")
    largest_batch = max(stage.train_batch_size for stage in args.timeline.stages)
    share, room = largest_batch // hardware.count, memory.largest_micro_batch(SURE_FRACTION * hardware.memory)
    fitting = max(n for n in divisors(share) if n <= max(rows, room))
    if hardware.is_gpu and memory.total < hardware.memory / 4 and fitting >= 2 * rows:
        text += f"; most of it stays empty: --per_device_train_batch_size {fitting} fits too, for the same updates"
    return text


def check_kernels(args: PretrainArguments, config: PreTrainedConfig, device: torch.device, precision: str) -> str:
    """Try what the fast kernels need.

    Raises:
        UserError: nothing compiles here.
    """
    if args.torch_compile and (reason := why_nothing_compiles(device)):
        raise UserError(
            f"`torch_compile` is true, and nothing compiles here ({reason}); install a C++ compiler and, on a GPU, "
            "Triton, or give --torch_compile false"
        )
    rows, length = args.per_device_train_batch_size, args.max_seq_length
    _, _, lines = try_kernels(config, device, precision, rows, length)
    return "; ".join(["torch.compile works" if args.torch_compile else "torch.compile is not asked for", *lines])


def describe_plan(args: PretrainArguments, config: PreTrainedConfig, num_processes: int) -> list[str]:
    """Describe the model's size, the batch arithmetic, and positions, updates and FLOPs in all, a line each."""
    with torch.device("meta"):
        parameters = count_parameters(build_model(config, None, args.predicts_pairs))
    timeline = args.timeline
    at_most = "at most " if args.schedule_by == "hours" else ""
    return [
        f"model: {config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{config.vocab_size:,} entries, {format_count(parameters)} parameters",
        *describe_phases(args, num_processes),
        f"run: {at_most}{args.max_steps:,} updates, {format_count(timeline.positions(args.max_steps))} positions, "
        f"{format_count(count_flops(args, config))} FLOPs; "
        f"learning rate {describe_schedule(asdict(args))}",
    ]


def describe_phases(args: PretrainArguments, num_processes: int) -> list[str]:
    """Describe the updates of each phase, and how processes and micro-batches share them; a line each."""
    timeline, lines = args.timeline, []
    for number, (first, end) in enumerate(timeline.bounds):
        shared = args.describe_micro_batches(num_processes, first, end - 1)
        if not args.phases:
            return [f"update: {args.train_batch_size:,} blocks of {args.max_seq_length} = {shared}"]
        share = (timeline.positions(end) - timeline.positions(first)) / timeline.positions(args.max_steps)
        described = f"phase {number + 1}: {timeline.describe_phase(number)}"
        lines.append(f"{described}; {share:.1%} of the run's positions; an update is {shared}")
    return lines


def count_flops(args: PretrainArguments, config: PreTrainedConfig) -> float:
    """Count the FLOPs of the whole run."""
    timeline, flops = args.timeline, 0.0
    for first, end in pairwise([*(stage.first for stage in timeline.stages), args.max_steps]):
        settings = timeline.at((first + end - 1) // 2)
        lengths = settings.max_seq_length, settings.mlm_probability
        positions = timeline.positions(end) - timeline.positions(first)
        flops += positions * model_flops_per_token(config, *lengths, args.predicts_pairs)
    return flops


def describe_passes(args: PretrainArguments, sizes: list[CorpusSize]) -> list[str]:
    """Estimate how often the run reads the blocks of each corpus, and warn of passes without sense.

    Args:
        args: of the run.
        sizes: of its corpora.
    """
    timeline, blocks = args.timeline, np.array([size.blocks for size in sizes[: len(args.corpora)]])
    positions = np.zeros_like(blocks)  # of each corpus
    ends = [*(stretch.first for stretch in timeline.stretches[1:]), args.max_steps]
    for stretch, end in zip(timeline.stretches, ends, strict=True):
        weights = np.array(stretch.weights or blocks)
        share = weights / (weights.sum() or math.nan)
        positions += share * (timeline.positions(end) - timeline.positions(stretch.first))
    passes, lines = [], []
    for number, corpus in enumerate(args.corpora):
        share = positions[number] / positions.sum()
        times = positions[number] / (blocks[number] * args.max_seq_length or math.nan)
        text = f"{corpus.name} {format_count(times)} times, {share:.1%} of the positions"
        passes.append(f"{corpus.name} unknown" if math.isnan(times) else text)
        if times > MAX_PASSES and args.schedule_by == "steps":
            steps = max(1, round(args.max_steps * PAPER_PASSES / times))
            lines.append(
                f"warning: {format_count(times)} passes over corpus {corpus.name}, and more than {PAPER_PASSES} teach "
                f"little: `max_steps` {steps:,} makes as many; or give more text, or this corpus less `weight`"
            )
    return [f"passes{', at most' if args.schedule_by == 'hours' else ''}: " + "; ".join(passes), *lines]


def describe_preparation(args: PretrainArguments, sizes: list[CorpusSize]) -> list[str]:
    """Estimate how long it takes to make the token stores that are not there yet."""
    missing = [size for size in sizes if size.seconds]
    if args.streaming or not missing:
        return []
    seconds, text_bytes = sum(size.seconds for size in missing), sum(size.text_bytes for size in missing)
    return [
        f"preparation: {format_duration(seconds)} by one process here, at {format_bytes(text_bytes / seconds)} of text "
        "a second as measured; all processes of all nodes and `preprocessing_num_workers` share it. Token stores take "
        f"{format_bytes(sum(size.store_bytes for size in missing))}, on each node that does not share their folder"
    ]


def format_figure(value: float) -> str:
    """Format a whole number, or two digits of a small one."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def describe_time(args: PretrainArguments, config: PreTrainedConfig, hardware: Hardware) -> str:
    """Estimate the hours of training at a measured or assumed MFU; what comes before it is not counted."""
    flops = count_flops(args, config)
    mfu, source = find_mfu(hardware, flops / args.timeline.positions(args.max_steps))
    seconds = flops / (hardware.count * hardware.flops * mfu) * (RECOMPUTE_FACTOR if args.gradient_checkpointing else 1)
    an_update, fitting = seconds / args.max_steps, ""
    if args.schedule_by == "hours":
        updates = args.schedule_length / 1000 / an_update
        fitting = f"; {args.max_train_hours:g} hours are about {updates:,.0f} updates"
        if updates > args.max_steps:
            fitting += f", and `max_steps` ({args.max_steps:,}) would end the run before its schedule: give more"
        seconds = min(seconds, args.schedule_length / 1000)
    hours = hardware.count * seconds / 3600
    precision = "float32" if hardware.precision == "no" else hardware.precision
    line = (
        f"time: {format_duration(seconds)} on {hardware.count} x {hardware.name}, {an_update:.3g} s an "
        f"update, at {mfu:.0%} ({source}) of the "
        f"{hardware.flops / 1e12:.3g} TFLOP/s that large {precision} matrix products sustain{fitting}"
    )
    if hardware.is_gpu:
        line += f"; {format_figure(hours)} GPU-hours"
    if args.price_per_gpu_hour is not None:
        line += f", at {args.price_per_gpu_hour:g} each {format_figure(hours * args.price_per_gpu_hour)}"
    if hardware.count > 1:
        line += "; waiting for each other is not counted"
    return line
