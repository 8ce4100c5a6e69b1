"""The training loop, straight down: `train` calls `train_step` and `evaluate`."""

import math
from collections import ChainMap, Counter
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    gather_object,
)
from torch import nn
from torch.distributed.tensor import DTensor

from recipe.arguments import PretrainArguments
from recipe.base.errors import UserError
from recipe.base.hashing import hash64
from recipe.base.progress import print_line, progress_bar
from recipe.base.workers import InterruptedWaitError
from recipe.data.batches import Batch, Counts, Data, MicroBatches, UpdateData
from recipe.data.streaming import Buffer, to_arrays, to_tensors
from recipe.modeling.memory import largest_micro_batch
from recipe.modeling.model import count_parameters, model_flops_per_token
from recipe.modeling.optimizer import build_scheduler
from recipe.publish.hub import Publisher
from recipe.run.checkpoint import (
    BYTES_PER_PARAMETER,
    CheckpointWriter,
    load_training_state,
    read_state,
    save_checkpoint,
)
from recipe.run.directory import RunDirectory
from recipe.run.hardware import matmul_flops, peak_memory
from recipe.run.launch import on_main
from recipe.run.metrics import (
    Stopwatch,
    TrainState,
    eval_record,
    format_data_line,
    format_eval_line,
    format_train_line,
    train_record,
)
from recipe.run.plots import Curves, plot_runs
from recipe.run.stopping import StopRequest
from recipe.run.trackers import log_metrics
from recipe.run.watchdog import Watchdog

MAX_ROLLBACKS = 3  # to the same checkpoint
SLOW_DISK = 1e8  # bytes/s, taken for the first checkpoint


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
            spike = None if update.skipped else state.record_loss(loss, args.loss_spike_ratio)
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
        counts = Counts.without_data(num_corpora, "stopping")
    except Exception as error:  # whatever it is, the other ranks have to know
        failure, counts = error, Counts.without_data(num_corpora, "failed")
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
