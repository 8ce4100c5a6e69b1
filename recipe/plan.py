"""What a run is going to do and to take, and whether it can begin: `pretrain.py --dry_run`.

1. Every precondition is tried, and gets a line: ok, or what the problem is and how to mend it.
2. The plan: model, batch, updates, passes over the corpora, hours, price, memory and disk on the hardware asked for.
3. An error at the end if there was a problem.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from recipe.arguments import CorpusArguments, PretrainArguments, identity_of
from recipe.base.errors import UserError, did_you_mean
from recipe.base.files import nearest_existing_parent
from recipe.base.formatting import format_bytes, format_count, format_duration
from recipe.data.batches import Data
from recipe.data.cached import CachedData
from recipe.data.corpora import check_corpus, corpus_bytes, open_source
from recipe.data.streamed import StreamedData
from recipe.data.tokenizer import load_tokenizer, tokenizer_checksum
from recipe.modeling.memory import PRECISIONS, USABLE_FRACTION, compute_memory
from recipe.modeling.model import build_config, build_model, count_parameters, model_flops_per_token
from recipe.modeling.objectives import OBJECTIVES, why_nothing_compiles
from recipe.publish.hub import SCHEME, check_push, fetch_checkpoint
from recipe.run.checkpoint import check_space, open_checkpoint
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
DATASHEET_FRACTION = (
    790 / 989
)  # of the data sheet's, by a large matrix product: measured on an H200, assumed of the others
ASSUMED_MFU = 0.4
ASSUMED_FROM = "assumed: published BERT pretraining reaches 20 to 60 %"
MEASURED = Path(__file__).with_name(
    "measured_mfu.json"
)  # of `benchmarks/throughput.py`, a row for each device and size
HEAD_BYTES = 300_000  # of a corpus's text, that its tokens are estimated from
BYTES_PER_TOKEN = 4.4  # of English, by RoBERTa's vocabulary; for a plan made before there is one
STORE_OVERHEAD = 0.7  # bytes of a token store for each token, beside its id: sentence ends and tables of blocks
RECOMPUTED = 4 / 3  # what gradient checkpointing does, of what is done without


@dataclass(frozen=True)
class Hardware:
    """What a run is planned for: `count` devices, each with a process.

    `memory`: bytes of a device. `flops`: FLOP/s that a large matrix product reaches on it, what MFU is of.
    """

    name: str
    count: int
    memory: float
    flops: float
    precision: str
    is_gpu: bool


def find_hardware(args: PretrainArguments, accelerator: Accelerator) -> Hardware:
    """The GPUs asked for, or this machine's devices, whose speed is measured in some tenths of a second.

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
    """MFU to plan with and where it is from: a result of `benchmarks/throughput.py` on such a device, of the model
    nearest in size, or an assumption.
    """
    words = set(re.findall(r"\w+", hardware.name.upper()))
    fitting = [
        row
        for row in json.loads(MEASURED.read_text())
        if words <= set(re.findall(r"\w+", row["device"].upper())) and row["precision"] == hardware.precision
    ]
    if not fitting:
        return ASSUMED_MFU, ASSUMED_FROM
    nearest = min(fitting, key=lambda row: abs(math.log(row["mflops_per_token"] * 1e6 / flops_per_token)))
    return nearest["mfu"], f"measured on {nearest['device']} at {nearest['mflops_per_token']:.4g} MFLOPs a token"


class Preconditions:
    """Prints a line for each thing that is tried, and counts the problems."""

    problems = 0

    @contextmanager
    def trying(self, what: str) -> Iterator[list[str]]:
        """Report how it went; a `UserError` goes no further.

        Yields:
            a list for what there is to say if all is well.
        """
        remarks: list[str] = []
        try:
            yield remarks
        except UserError as error:
            self.problems += 1
            print(f"problem  {what}: {' '.join(str(error).split())}")
        else:
            print(f"ok       {what}: {'; '.join(remarks)}")


def print_plan(args: PretrainArguments, accelerator: Accelerator, run: RunDirectory) -> None:
    """Try everything that a run needs, and print what it is going to do and take; the main process does.

    Raises:
        UserError: something has to be mended first, or there is no such GPU.
    """
    if not accelerator.is_main_process:
        return
    hardware = find_hardware(args, accelerator)
    tried = Preconditions()
    tokenizer, config, is_even = None, None, False
    with tried.trying("output_dir") as remarks:
        run.check(args.resume_from_checkpoint)
        remarks.append(f"{run.path} can be written")
    with tried.trying("tokenizer") as remarks:
        tokenizer = load_tokenizer(args.tokenizer_name or args.model_name_or_path)
        remarks.append(f"{len(tokenizer):,} entries")
    with tried.trying("model") as remarks:
        source = args.model_name_or_path
        config = build_config(args.model_config, source, tokenizer, args.max_seq_length, args.model_type)
        if source:
            build_model(config, source, args.predicts_pairs)
        remarks.append("fits the tokenizer" if tokenizer else f"{config.vocab_size:,} entries, without a tokenizer")
    with tried.trying("batch") as remarks:
        args.check_lanes(hardware.count)
        accumulation = args.gradient_accumulation_steps(hardware.count)
        remarks.append(f"{hardware.count} x {args.per_device_train_batch_size} blocks, {accumulation} times an update")
        is_even = True
    wanted, checkpoint = args.resume_from_checkpoint, None
    if wanted is not None and tokenizer:
        with tried.trying("checkpoint") as remarks:
            identity = identity_of(args) | {"tokenizer": tokenizer_checksum(tokenizer)}
            checkpoint, _, lines = open_checkpoint(run.checkpoints, fetch_checkpoint(args), identity, asdict(args))
            remarks += lines or [f"{wanted} is there" if wanted.startswith(SCHEME) else "there is none yet"]
    if args.push_to_hub:
        with tried.trying("hub") as remarks:
            is_fresh = checkpoint is None and not (wanted or "").startswith(SCHEME)
            repo_id, warnings = check_push(args, is_fresh)
            remarks += warnings or [f"{repo_id} can be written"]
    tokens = try_data(args, tokenizer, tried)
    if config:
        with torch.device("meta"):
            parameters = count_parameters(build_model(config, None, args.predicts_pairs))
        with tried.trying("disk") as remarks:
            remarks.append(check_space(run.checkpoints, parameters, args.save_total_limit))
        with tried.trying("memory") as remarks:
            remarks.append(check_memory(args, config, hardware))
    if args.gpu is None:
        with tried.trying("kernels") as remarks:
            remarks.append(check_kernels(args.torch_compile, accelerator.device, hardware.precision))
    else:
        print(f"unknown  kernels: can be tried on a machine with {args.gpu} only, by --dry_run without --gpu")
    if config and is_even:
        for line in describe_plan(args, config, hardware.count):
            print(line)
        print(describe_passes(args, tokens))
        print(describe_time(args, config, hardware))
    if tried.problems:
        raise UserError(f"{tried.problems} of the above {'are problems' if tried.problems > 1 else 'is a problem'}")
    print("next: the same command without --dry_run" + (", on such hardware" if args.gpu else ""))


def try_data(
    args: PretrainArguments, tokenizer: PreTrainedTokenizerFast | None, tried: Preconditions
) -> dict[str, float]:
    """Try each corpus, and all together.

    Returns:
        of the corpora that can be read about how many tokens they have, NaN where that cannot be told.
    """
    mode = StreamedData if args.streaming else CachedData
    tokens: dict[str, float] = {}
    for corpus in (corpora := [*args.corpora, *args.eval_corpora]):
        with tried.trying(f"corpus {corpus.name}") as remarks:
            data = mode(replace(args, corpora=[corpus], eval_corpora=[]), tokenizer) if tokenizer else None
            tokens[corpus.name], remark = count_tokens(corpus, data, args.max_unreadable_documents)
            remarks.append(f"{corpus.path}, {remark}")
    if tokenizer and len(tokens) == len(corpora):
        with tried.trying("data") as remarks:
            data = mode(args, tokenizer)
            if args.streaming:  # is opened in seconds
                data.prepare(0)
                remarks += data.describe()[len(args.corpora) :]
            else:
                remarks.append(check_stores(data, tokens))
    return tokens


def count_tokens(corpus: CorpusArguments, data: Data | None, max_unreadable: int) -> tuple[float, str]:
    """The tokens of a corpus, counted where it has a token store and else estimated from its size and its head; NaN if
    its size is not known. And a remark.

    Args:
        data: of this corpus alone; None where there is no tokenizer.

    Raises:
        UserError: the corpus cannot be read.
    """
    if isinstance(data, CachedData) and data.stores[0].is_complete:
        tokens = data.stores[0].counts()["tokens"]
        return tokens, f"{tokens:,} tokens, in a token store"
    if data is None:
        check_corpus(corpus, max_unreadable)
    try:
        size = corpus_bytes(corpus)
    except UserError:
        return math.nan, "which does not publish its size"
    tokens = size / (bytes_per_token(corpus, data) if data else BYTES_PER_TOKEN)
    return tokens, f"about {format_bytes(size)} of text, {format_count(tokens)} tokens"


def bytes_per_token(corpus: CorpusArguments, data: Data) -> float:
    """Of the head of a corpus."""
    texts, size = [], 0
    for _, text in open_source(corpus).read(0):
        if isinstance(text, str):
            texts.append(text[:HEAD_BYTES])
            size += len(texts[-1].encode())
        if size >= HEAD_BYTES:
            break
    return size / max(1, sum(len(ids) for ids, _ in data.encoder(texts)))


def check_stores(data: CachedData, tokens: dict[str, float]) -> str:
    """
    Raises:
        UserError: the token stores that are missing do not fit on the disk.
    """
    missing = [store for store in data.stores if not store.is_complete]
    if not missing:
        return "all token stores are there"
    root = missing[0].path.parent
    free = shutil.disk_usage(nearest_existing_parent(root)).free
    token_bytes = data.encoder.dtype.itemsize + STORE_OVERHEAD
    known = [tokens[store.corpus.name] for store in missing if not math.isnan(tokens[store.corpus.name])]
    sizes = f"{format_bytes(sum(known) * token_bytes)}{'' if len(known) == len(missing) else ' and more'}"
    if sum(known) * token_bytes > free:
        raise UserError(
            f"token stores of about {sizes} are still to be made in {root}, and {format_bytes(free)} are free; free "
            "some, set `token_store_dir` to a folder on another disk, or `streaming: true`"
        )
    return f"{len(missing)} token stores of about {sizes} are made first, in {root}, {format_bytes(free)} free"


def check_memory(args: PretrainArguments, config: PreTrainedConfig, hardware: Hardware) -> str:
    """
    Raises:
        UserError: a micro-batch does not fit into a device's memory, as far as can be computed.
    """

    def make_objective() -> nn.Module:
        model = build_model(config, None, args.predicts_pairs)
        return OBJECTIVES[args.objective](model, args.masked_share, args.gradient_checkpointing)

    rows = args.per_device_train_batch_size
    memory = compute_memory(make_objective, rows, args.max_seq_length, hardware.precision, on_gpu=hardware.is_gpu)
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    sizes = " + ".join(f"{name} {format_bytes(getattr(memory, name))}" for name in parts)
    text = f"{format_bytes(memory.total)} of {format_bytes(hardware.memory)} = {sizes} (computed, not compiled)"
    if memory.total > USABLE_FRACTION * hardware.memory:
        largest = memory.largest_micro_batch(hardware.memory)
        remedy = f"give --per_device_train_batch_size {largest} or less" if largest else "train a smaller model"
        remedy += "" if args.gradient_checkpointing else ", or --gradient_checkpointing true"
        raise UserError(f"`per_device_train_batch_size` is {rows}, which takes {text}; {remedy}")
    return text


def check_kernels(torch_compile: bool, device: torch.device, precision: str) -> str:
    """
    Raises:
        UserError: nothing compiles here, or attention has no fused kernel.
    """
    if torch_compile and (reason := why_nothing_compiles(device)):
        raise UserError(
            f"`torch_compile` is true, and nothing compiles here ({reason}); install a C++ compiler and, on a GPU, "
            "Triton, or give --torch_compile false"
        )
    remark = "torch.compile works" if torch_compile else "torch.compile is not asked for"
    if device.type != "cuda":
        return remark
    query = torch.zeros(1, 1, 64, 64, device=device, dtype=PRECISIONS.get(precision, torch.float32))
    mask = torch.ones(1, 1, 1, 64, device=device, dtype=torch.bool)
    try:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
            scaled_dot_product_attention(query, query, query, mask, 0.1)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"attention has no fused kernel here ({reason}); use a newer GPU or build of torch") from None
    return f"{remark}; attention with a mask and dropout is fused"


def describe_plan(args: PretrainArguments, config: PreTrainedConfig, num_processes: int) -> list[str]:
    """Lines with the model's size, the batch arithmetic, and positions, updates and FLOPs in all."""
    with torch.device("meta"):
        parameters = count_parameters(build_model(config, None, args.predicts_pairs))
    accumulation = args.gradient_accumulation_steps(num_processes)
    return [
        f"model: {config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{config.vocab_size:,} entries, {format_count(parameters)} parameters",
        f"update: {args.train_batch_size:,} blocks of {args.max_seq_length} = {num_processes} processes x "
        f"{args.per_device_train_batch_size} a micro-batch x {accumulation} accumulated",
        f"run: {args.max_steps:,} updates, {format_count(args.positions(args.max_steps))} positions, "
        f"{format_count(count_flops(args, config))} FLOPs; "
        f"learning rate {args.learning_rate:g} after {args.warmup_steps:,} updates, then to zero",
    ]


def count_flops(args: PretrainArguments, config: PreTrainedConfig) -> float:
    """Of the whole run."""
    short = args.positions(min(args.max_steps, args.seq_length_warmup_steps))
    long = args.positions(args.max_steps) - short
    return sum(
        positions * model_flops_per_token(config, length, args.mlm_probability, args.predicts_pairs)
        for positions, length in ((short, args.seq_length(0)), (long, args.max_seq_length))
    )


def describe_passes(args: PretrainArguments, tokens: dict[str, float]) -> str:
    """About how often the run reads each corpus, if all positions held tokens.

    Args:
        tokens: of the corpora whose size is known.
    """
    sizes = [tokens.get(corpus.name, math.nan) for corpus in args.corpora]
    weights = [corpus.weight or size for corpus, size in zip(args.corpora, sizes, strict=True)]
    passes = []
    for corpus, size, weight in zip(args.corpora, sizes, weights, strict=True):
        share = weight / sum(weights)
        is_known = not math.isnan(share * size)
        times = f"{format_count(share * args.positions(args.max_steps) / size)} times, {share:.1%} of the blocks"
        passes.append(f"{corpus.name} {times if is_known else 'unknown'}")
    return "passes: " + "; ".join(passes)


def describe_time(args: PretrainArguments, config: PreTrainedConfig, hardware: Hardware) -> str:
    """Hours of training at the MFU that is measured or assumed; what comes before it is not counted."""
    flops = count_flops(args, config)
    mfu, source = find_mfu(hardware, flops / args.positions(args.max_steps))
    seconds = flops / (hardware.count * hardware.flops * mfu) * (RECOMPUTED if args.gradient_checkpointing else 1)
    hours = hardware.count * seconds / 3600
    precision = "float32" if hardware.precision == "no" else hardware.precision
    line = (
        f"time: {format_duration(seconds)} on {hardware.count} x {hardware.name}, at {mfu:.0%} ({source}) of the "
        f"{hardware.flops / 1e12:.3g} TFLOP/s that a large {precision} matrix product reaches"
    )
    if hardware.is_gpu:
        line += f"; {hours:,.0f} GPU-hours"
    if args.price_per_gpu_hour is not None:
        line += f", at {args.price_per_gpu_hour:g} each {hours * args.price_per_gpu_hour:,.0f}"
    if hardware.count > 1:
        line += "; waiting for each other is not counted"
    return line
