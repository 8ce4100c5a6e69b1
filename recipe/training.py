"""The training loop, straight down: `train` calls `train_step` and `evaluate`."""

import atexit
import math
import os
import sys
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from huggingface_hub.utils import disable_progress_bars
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers.utils.logging import disable_progress_bar

from recipe.checkpoint import (
    BYTES_PER_PARAMETER,
    CheckpointWriter,
    load_training_state,
    read_state,
    save_checkpoint,
)
from recipe.config import PretrainArguments, UserError
from recipe.hashing import hash64
from recipe.hub import Publisher
from recipe.loader import Batch, Counts, Data, MicroBatches, UpdateData
from recipe.memory import largest_micro_batch
from recipe.metrics import (
    Stopwatch,
    TrainState,
    eval_record,
    format_data_line,
    format_eval_line,
    format_train_line,
    matmul_flops,
    peak_memory,
    train_record,
)
from recipe.model import count_parameters, model_flops_per_token
from recipe.optimizer import build_scheduler
from recipe.plots import Curves, plot_runs
from recipe.progress import print_line, progress_bar
from recipe.run_directory import RunDirectory
from recipe.stopping import StopRequest, stop_with_launcher
from recipe.streaming import Buffer, InterruptedWaitError, to_arrays, to_tensors
from recipe.trackers import check_trackers, log_metrics
from recipe.watchdog import Watchdog

UNSERVED_ENGINES = {
    DistributedType.DEEPSPEED,
    DistributedType.MEGATRON_LM,
    DistributedType.XLA,
}
# A rank may have to wait for a source longer than the ten minutes that the others would have patience for.
COLLECTIVE_TIMEOUT = timedelta(hours=1)
MAX_ROLLBACKS = 3  # to the same checkpoint
SLOW_DISK = 1e8  # bytes/s, taken for the first checkpoint
Result = TypeVar("Result")


def start_accelerator(
    report_to: str | list[str] = "none",
    logging_dir: str | None = None,
    serves_fsdp: bool = False,
    ddp_comm_hook: str | None = None,
) -> Accelerator:
    """The accelerator as the launcher set it up; the libraries' own progress bars are kept to the main process.

    Args:
        report_to: trackers, see `check_trackers`.
        logging_dir: for trackers that write files.
        serves_fsdp: whether the script can have its model split up.
        ddp_comm_hook: `bf16` to have DDP send gradients in it.

    Raises:
        UserError: an engine or a precision that this code does not serve.
    """
    trackers = check_trackers(report_to)
    stop_with_launcher()
    # No buffer of the model ever changes, so none has to be sent around at each forward.
    ddp = DistributedDataParallelKwargs(
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        comm_hook=DDPCommunicationHookType(ddp_comm_hook or "no"),
    )
    try:
        accelerator = Accelerator(
            log_with=trackers or None,
            project_config=ProjectConfiguration(logging_dir=logging_dir),
            kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
        )
    except ValueError as error:  # of a precision that the device does not have
        raise UserError(f"{error} Give accelerate another --mixed_precision") from None
    atexit.register(leave_process_group)
    disable_progress_bar()  # transformers', one for each file that it writes
    if not accelerator.is_main_process:
        disable_progress_bars()
        datasets.disable_progress_bars()
    is_bf16_on_gpu = accelerator.device.type == "cuda" and accelerator.mixed_precision == "bf16"
    if is_bf16_on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"`mixed_precision` is bf16, which {torch.cuda.get_device_name()} does not have; give accelerate "
            "--mixed_precision fp16"
        )
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if accelerator.distributed_type in UNSERVED_ENGINES or (is_fsdp and not serves_fsdp):
        raise UserError(
            f"`distributed_type` is {accelerator.distributed_type.value}, and here only one process"
            f"{', DDP and FSDP2' if serves_fsdp else ' and DDP'} are served; take another of accelerate_configs/"
        )
    if is_fsdp:
        set_up_fsdp(accelerator)
    if ddp_comm_hook and accelerator.distributed_type not in (DistributedType.MULTI_GPU, DistributedType.NO):
        raise UserError(
            f"`ddp_comm_hook` is {ddp_comm_hook}, which is for DDP on GPUs, and `distributed_type` is "
            f"{accelerator.distributed_type.value}; leave it out"
        )
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":
            raise UserError(
                "`mixed_precision` is fp16, which needs a GPU; give accelerate --mixed_precision no or bf16"
            )
        cores = (os.cpu_count() or 1) // accelerator.num_processes
        if torch.get_num_threads() < cores:
            accelerator.print(
                f"warning: {torch.get_num_threads()} of {cores} cores in use; set OMP_NUM_THREADS={cores}"
            )
    return accelerator


def on_main(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """What a function comes to that the main process runs for all.

    Raises:
        UserError: the function's, on all processes.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1]:
        raise UserError(outcome[1])
    return outcome[0]


def leave_process_group() -> None:
    """End the process group's own threads while there is an interpreter: one of gloo's that lets go of a tensor later
    aborts the process, which torchrun takes for a failed run.

    After an error that nobody foresaw nccl's is left alone: to take it down could wait for the other processes.
    """
    if distributed.is_initialized() and (distributed.get_backend() == "gloo" or not hasattr(sys, "last_value")):
        distributed.destroy_process_group()


def set_up_fsdp(accelerator: Accelerator) -> None:
    """
    Raises:
        UserError: FSDP1, or fp16.
    """
    if not accelerator.is_fsdp2:
        raise UserError("`fsdp_version` is 1, which is not served; start from accelerate_configs/fsdp2.yaml")
    if accelerator.mixed_precision == "fp16":
        raise UserError(
            "`mixed_precision` is fp16, which is not served with FSDP2; give accelerate --mixed_precision bf16"
        )
    if accelerator.mixed_precision == "bf16":
        # Accelerate's own would round the gradients' sum over processes, and the losses that the objective returns.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def prepare(
    accelerator: Accelerator, objective: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Objective and optimizer as the engine wants them."""
    objective, optimizer = accelerator.prepare(objective, optimizer)
    accelerator.unwrap_model(objective).serve_fsdp()
    return objective, optimizer


@dataclass
class Update:
    """What an update did, the same on all ranks.

    `sums`: of each of the objective's measures, over the whole update; `skipped` is None, `nonfinite` or `overflow`;
    `stopping` says that some rank was asked to stop.
    """

    sums: list[float]
    grad_norm: float
    skipped: str | None
    stopping: bool

    @property
    def loss_sum(self) -> float:
        """In nats, over the masked tokens."""
        return self.sums[0]


def train(
    accelerator: Accelerator,
    args: PretrainArguments,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    state: TrainState,
    run: RunDirectory,
    identity: dict[str, Any],
    checkpoint: Path | None,
    saved_lanes: dict[str, Any],
    publisher: Publisher,
) -> bool:
    """Train from `state.step` to `max_steps`, logging, evaluating and saving on the way.

    Args:
        objective, optimizer: prepared by the accelerator.
        state: advanced in place.
        identity: of the run, kept in its checkpoints.
        checkpoint, saved_lanes: that training goes on from and, in streaming mode, its lanes.
        publisher: of all checkpoints but the one after the last update.

    Returns:
        whether the run is complete; False when it was asked to stop, with a checkpoint of the last update.

    Raises:
        FloatingPointError: too many updates in a row were not finite, or the loss spikes again and again.
        UserError: a corpus cannot be read any more. As after any error of the data, there is a checkpoint of the last
            update.
    """
    process = accelerator.process_index, accelerator.num_processes
    eval_batches = data.eval_batches(*process)
    unigram_loss = data.unigram_loss() if args.eval_blocks and accelerator.is_main_process else math.nan
    request, watch = StopRequest(args.max_train_hours), Stopwatch()
    saved = state.step  # the update of the newest checkpoint, complete or being written
    bar = progress_bar("training", args.max_steps, "updates", accelerator.is_main_process, state.step)

    def report(record: dict[str, Any], line: str) -> None:
        run.append_metrics(record)
        log_metrics(accelerator, record)
        if accelerator.is_main_process:
            print_line(line)

    writer = CheckpointWriter(print_line, checkpoint)
    bare = accelerator.unwrap_model(objective)
    measures, config = bare.measures, bare.model.config
    slow_write = BYTES_PER_PARAMETER * count_parameters(bare.model) / SLOW_DISK
    reachable = matmul_flops(accelerator.device, accelerator.mixed_precision) * accelerator.num_processes
    lanes: dict[tuple[int, int], Buffer] = {}  # in streaming mode, after the last update that was trained on

    def updates_from(lanes: dict[str, Any], left_out: int) -> Iterator[UpdateData]:
        """What comes after `state.step`, and after the data of `left_out` updates, which is passed over."""
        first, end = state.step + state.updates_left_out, args.max_steps + state.updates_left_out
        return data.train_updates(*process, first, end, lanes, request.is_set, left_out)

    rollbacks: Counter[Path] = Counter()  # to each checkpoint
    scheduler = build_scheduler(optimizer.optimizer, args.warmup_steps, args.max_steps, state.step)
    with bar, request.listening(), writer, Watchdog(accelerator) as watchdog:
        # In here, since worker processes inherit what is done with SIGINT.
        updates = updates_from(saved_lanes, 0)
        while state.step < args.max_steps:
            with watch.waiting():
                share, counts, failure = next_update(accelerator, updates, len(args.corpora), watchdog)
            if share is None:
                if state.step != saved:
                    save(accelerator, args, objective, optimizer, state, run, identity, lanes, writer, publisher)
                wait_for_checkpoint(accelerator, writer)
                if failure:
                    raise failure
                run.write_status("preempted", state.step, request.reason or "another process was asked to stop")
                return False
            seed_dropout(args.seed, state.step, accelerator.process_index)
            watchdog.at(f"update {state.step + 1:,}")
            divisors = [counts[counted] for counted in measures.values()]
            update = None
            try:
                update = train_step(
                    accelerator,
                    objective,
                    optimizer,
                    share.micro_batches,
                    divisors,
                    args.max_grad_norm,
                    request,
                )
            except torch.OutOfMemoryError as error:
                print_line(f"out of memory: {error}")
            if update is None:  # and the error is gone, which held on to the activations
                raise UserError(out_of_memory(accelerator, args, objective, optimizer, share.micro_batches[0]))
            lanes = share.lanes
            learning_rate = scheduler.get_last_lr()[0]
            scheduler.step()
            measured = dict(zip(measures, zip(update.sums, divisors, strict=True), strict=True))
            state.count(measured, counts.corpora, counts["digest"], update.skipped)
            watch.count(counts.tokens)
            bar.update()
            is_last = state.step == args.max_steps

            if state.skipped_in_a_row >= args.max_nonfinite_updates:
                writer.wait()
                raise FloatingPointError(
                    f"{state.skipped_in_a_row} updates in a row had a non-finite loss or gradient, up to update "
                    f"{state.step}; the last checkpoint is {writer.last or 'not there yet'}. Go on from there with a "
                    "lower --learning_rate, a longer --warmup_steps or, in place of fp16, --mixed_precision bf16"
                )
            loss = update.loss_sum / max(1, divisors[0])
            spike = None if update.skipped else state.find_spike(loss, args.loss_spike_ratio)
            if spike and accelerator.is_main_process:
                print_line(
                    f"warning: loss spike in update {state.step:,}: {loss:.3f}, {spike:.2f} times the median before it"
                )
            if spike and args.roll_back_loss_spikes and (last := newest_checkpoint(accelerator, writer)):
                rollbacks[last] += 1
                if rollbacks[last] > MAX_ROLLBACKS:
                    raise FloatingPointError(
                        f"the loss spikes again after {MAX_ROLLBACKS} rollbacks to {last}; go on from there with a "
                        "lower --learning_rate, or with a higher --loss_spike_ratio"
                    )
                updates.close()
                saved_lanes, left_out = roll_back(accelerator, objective, optimizer, state, run, last)
                updates = updates_from(saved_lanes, left_out)
                scheduler = build_scheduler(optimizer.optimizer, args.warmup_steps, args.max_steps, state.step)
                saved, watch = state.step, Stopwatch()
                bar.update(state.step - bar.n)
                continue
            seen = data.corpora_record(state.corpora, counts.streams)
            if state.step % args.logging_steps == 0 or is_last:
                length = args.seq_length(state.step - 1)
                flops = model_flops_per_token(config, length, args.mlm_probability, args.predicts_pairs)
                record = train_record(
                    state,
                    watch,
                    learning_rate,
                    update.grad_norm,
                    args.positions(state.step),
                    seen,
                    flops / reachable,
                    peak_memory(accelerator.device),
                )
                report(record, format_train_line(record, args.max_steps))
                watch = Stopwatch()
            with watch.paused():
                if args.eval_blocks and (state.step % args.eval_steps == 0 or is_last):
                    watchdog.at("evaluating")
                    means = dict(zip(measures, evaluate(accelerator, objective, eval_batches), strict=True))
                    record = eval_record(state, means, unigram_loss)
                    report(record, format_eval_line(record, args.max_steps))
                if state.step % args.save_steps == 0 or is_last or update.stopping:
                    if accelerator.is_main_process:
                        print_line(format_data_line(state, seen, args.positions(state.step), args.max_steps))
                    watchdog.at("saving")
                    save(accelerator, args, objective, optimizer, state, run, identity, lanes, writer, publisher)
                    saved = state.step
            request.update_done(writer.seconds or slow_write)
            if is_last or update.stopping:
                wait_for_checkpoint(accelerator, writer)
            if update.stopping and not is_last:
                run.write_status("preempted", state.step, request.reason or "another process was asked to stop")
                return False
    return True


def next_update(
    accelerator: Accelerator, updates: Iterator[UpdateData], num_corpora: int, watchdog: Watchdog
) -> tuple[UpdateData | None, Counts, Exception | None]:
    """This process's share of the next update, and the counts of all shares.

    Returns:
        None for the share on all ranks if any of them has no more data, so that none is left waiting; with an error
        unless it was asked to stop.
    """
    share, failure = None, None
    watchdog.at("reading its data")
    try:
        share = next(updates)
        counts = share.counts
    except InterruptedWaitError:
        counts = Counts.of_nothing(num_corpora, "stopping")
    except Exception as error:  # whatever it is, the other ranks have to know
        failure, counts = error, Counts.of_nothing(num_corpora, "failed")
    watchdog.at("the count of an update's data")
    totals = accelerator.reduce(torch.from_numpy(counts.array).to(accelerator.device), "sum")
    counts = Counts(num_corpora, totals.cpu().numpy())
    if counts["failed"]:
        failure = failure or UserError("another process cannot read its corpora any more; see its message")
    if counts["failed"] or counts["stopping"]:
        share = None
    return share, counts, failure


def train_step(
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    divisors: list[int],
    max_grad_norm: float,
    request: StopRequest,
) -> Update:
    """One update, the gradient that of the mean loss over the masked tokens of all its micro-batches on all ranks and,
    of a pair objective, of the mean loss over its pairs.

    The micro-batches' losses are sums, divided in the loss by the counts of the whole update; gradients are never
    rescaled afterwards. Whatever an engine averages over (accumulation, processes) is multiplied in beforehand. There
    is one wait for the device, at the end.

    Args:
        micro_batches: of this rank, from the collator.
        divisors: of each of the objective's measures, what there is of it in the micro-batches of all ranks.
        max_grad_norm: 0 for no clipping.
    """
    averaged = accelerator.num_processes * accelerator.gradient_accumulation_steps
    scale = averaged / torch.tensor(divisors, device=accelerator.device).clamp(min=1)
    sums = torch.zeros_like(scale)
    for number, batch in enumerate(micro_batches):
        is_last = number == len(micro_batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(objective):
            micro_sums, _ = objective(**to_device(batch, accelerator.device))
            accelerator.backward((micro_sums * scale).sum())
            sums = sums + micro_sums.detach()

    grad_norm = accelerator.clip_grad_norm_(objective.parameters(), max_grad_norm or math.inf)
    if isinstance(grad_norm, DTensor):  # of sharded gradients
        grad_norm = grad_norm.full_tensor()
    stopping = torch.tensor(float(request.is_set()), device=accelerator.device)
    totals = accelerator.reduce(torch.hstack([sums, stopping]), "sum")
    *totals, stopping, norm = torch.hstack([totals, grad_norm]).tolist()
    skipped, scaler = None, accelerator.scaler
    is_finite = all(map(math.isfinite, totals))
    if not math.isfinite(norm) or not is_finite:
        skipped = "overflow" if scaler is not None and is_finite else "nonfinite"
    if skipped != "nonfinite":
        # A scaler leaves out an overflowing update by itself and lowers its scale. (Under a fused optimizer accelerate
        # does not notice, and its `optimizer_step_was_skipped` says nothing.)
        optimizer.step()
    elif scaler is not None:
        scaler.update()
    optimizer.zero_grad()
    return Update(totals, norm, skipped, stopping > 0)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copies that the host does not wait for, since they come from pinned memory."""
    if device.type != "cuda":
        return batch
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}


def out_of_memory(
    accelerator: Accelerator,
    args: PretrainArguments,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
) -> str:
    """What to do about a micro-batch for which the device has no room."""
    rows, share = args.per_device_train_batch_size, args.train_batch_size // accelerator.num_processes
    if accelerator.distributed_type == DistributedType.FSDP:  # other processes would have to try along
        return f"`per_device_train_batch_size` is {rows}, and the device's memory is too small for it; give less"
    moments = 0 if optimizer.state else 2 * sum(p.numel() * p.element_size() for p in objective.parameters())
    sizes = [size for size in range(1, rows) if not share % size]
    with accelerator.no_sync(objective):
        largest = largest_micro_batch(objective, batch, sizes, accelerator.device, moments)
    remedy = "not even one fits: train a smaller model"
    if largest:
        remedy = f"the largest that fits is --per_device_train_batch_size {largest}, which leaves the update as it is"
    if not args.gradient_checkpointing:
        remedy += "; --gradient_checkpointing true fits more"
    return f"`per_device_train_batch_size` is {rows}, and the device's memory is too small for it; {remedy}"


@torch.no_grad()
def evaluate(accelerator: Accelerator, objective: nn.Module, batches: MicroBatches) -> list[float]:
    """Means of the objective's measures over the held-out blocks, each of which counts once; NaN of nothing."""
    objective.eval()
    totals = torch.zeros((), device=accelerator.device)
    micro_batches = next(batches.iterate(0, 1, num_workers=0))[0]
    with progress_bar(
        "evaluating", len(micro_batches), "micro-batches", accelerator.is_main_process, stays=False
    ) as bar:
        for batch in micro_batches:
            totals = totals + torch.stack(objective(**to_device(batch, accelerator.device)))
            bar.update()
    objective.train()
    sums, counts = accelerator.reduce(totals, "sum")
    return (sums / counts).tolist()


def seed_dropout(seed: int, step: int, process_index: int) -> None:
    """Make dropout a function of the update, so that a resume needs no generator state."""
    torch.manual_seed(int(hash64(seed, step, process_index) >> 1))


def save(
    accelerator: Accelerator,
    args: PretrainArguments,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    run: RunDirectory,
    identity: dict[str, Any],
    lanes: dict[tuple[int, int], Buffer],
    writer: CheckpointWriter,
    publisher: Publisher,
) -> None:
    """Checkpoint, status, plot and push, in the background. Training waits for the checkpoint before, and a copy."""
    copied = writer.copy(objective, optimizer.optimizer, keep=accelerator.is_main_process)
    all_lanes = gather_object([to_arrays(lanes)])
    if copied is None:
        return
    model, step = accelerator.unwrap_model(objective).model, state.step
    weights = {name: tensor for name, tensor in copied["weights"].items() if name.startswith("model.")}
    tensors = {
        "optimizer": copied["optimizer"],
        "beside_model": {name: tensor for name, tensor in copied["weights"].items() if name not in weights},
        "lanes": to_tensors(deepcopy(dict(ChainMap(*all_lanes)))),
    }
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    if accelerator.scaler is not None:
        tensors["scaler"] = accelerator.scaler.state_dict()
    kept = {"train_state": asdict(state), "identity": identity, "arguments": asdict(args)}

    def write() -> Path:
        return save_checkpoint(run.checkpoints, step, model, weights, tensors, kept, args.save_total_limit)

    def tell(path: Path) -> None:
        run.write_status("running", step)
        plot_runs([Curves(str(run.path), run.read_metrics(), args.expected_loss)], run.loss_plot)
        if step < args.max_steps:  # the last one is pushed when the run is complete
            publisher.publish(path, is_last=False)

    writer.start(step, write, tell)


def roll_back(
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    run: RunDirectory,
    checkpoint: Path,
) -> tuple[dict[str, Any], int]:
    """Weights, moments, counts and metrics as of a checkpoint.

    Returns:
        its lanes, and how many updates' data after it is to be left out.
    """
    left_out = state.go_back(TrainState(**read_state(checkpoint)["train_state"]))
    lanes = load_training_state(checkpoint, objective, optimizer.optimizer, accelerator.scaler)
    run.cut_metrics(state.step)
    if accelerator.is_main_process:
        print_line(f"back to {checkpoint}; the data of {left_out:,} updates after it is left out")
    return lanes, left_out


def newest_checkpoint(accelerator: Accelerator, writer: CheckpointWriter) -> Path | None:
    """Once it is complete, on all processes."""
    writer.wait()
    return on_main(accelerator, lambda: writer.last)


def wait_for_checkpoint(accelerator: Accelerator, writer: CheckpointWriter) -> None:
    """
    Raises:
        UserError: on all processes, if it could not be written.
    """
    writer.wait()
    failure, *_ = gather_object([writer.failure])
    if failure:
        raise UserError(
            f"the last checkpoint could not be written ({failure}); make room and go on with "
            "--resume_from_checkpoint latest"
        )
