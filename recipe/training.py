"""The training loop, straight down: `train` calls `next_update`, `train_step` and `evaluate`."""

import math
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from recipe.base.errors import UserError
from recipe.base.hashing import hash64
from recipe.base.progress import print_line, progress_bar
from recipe.base.workers import InterruptedWaitError
from recipe.data.batches import Batch, Counts, MicroBatches, Resume, TrainingData, UpdateData
from recipe.modeling.memory import largest_micro_batch
from recipe.modeling.model import count_parameters, model_flops_per_token
from recipe.run.checkpoint import BYTES_PER_PARAMETER
from recipe.run.hardware import matmul_flops, peak_memory
from recipe.run.metrics import (
    Stopwatch,
    eval_record,
    format_data_line,
    format_eval_line,
    format_train_line,
    train_record,
)
from recipe.run.stopping import StopRequest
from recipe.run.watchdog import Watchdog
from recipe.session import Session

MAX_ROLLBACKS = 3  # to the same checkpoint
SLOW_DISK_BYTES_PER_SECOND = 1e8  # taken for the first checkpoint


@dataclass
class Update:
    """What an update did, the same on all ranks.

    Attributes:
        sums: of each of the objective's measures, over the whole update.
        grad_norm: of the whole update's gradient.
        skipped: None, `nonfinite` or `overflow`.
        stopping: whether some rank was asked to stop.
    """

    sums: list[float]
    grad_norm: float
    skipped: str | None
    stopping: bool

    @property
    def loss_sum(self) -> float:
        """Cross-entropy in nats, summed over the masked tokens."""
        return self.sums[0]


def train(session: Session, data: TrainingData, resume: Resume) -> bool:
    """Train from `session.state.step` to `max_steps`, logging, evaluating and saving on the way.

    Returns:
        whether the run is complete; False when it was asked to stop, with a checkpoint of the last update.

    Raises:
        FloatingPointError: too many updates in a row were not finite, or the loss spikes again and again.
        UserError: a corpus cannot be read any more. As after any error of the data, there is a checkpoint of the last
            update.
    """
    args, state, writer = session.args, session.state, session.writer
    log, spikes, request = TrainingLog(session, data), SpikeGuard(session), StopRequest(args.max_train_hours)
    slow_write = BYTES_PER_PARAMETER * count_parameters(session.unwrapped.model) / SLOW_DISK_BYTES_PER_SECOND
    is_main = session.accelerator.is_main_process
    lanes: dict[Any, Any] = {}  # in streaming mode, after the last update that was trained on

    def updates_from(resume: Resume) -> Generator[UpdateData]:
        return data.train_updates(session.rank, resume, args.max_steps + state.updates_left_out, request.is_set)

    def stop() -> bool:
        session.run.write_status("preempted", state.step, request.reason or "another process was asked to stop")
        return False

    scheduler = session.build_scheduler()
    bar = progress_bar("training", args.max_steps, "updates", is_main, state.step)
    with bar, request.listening(), writer, Watchdog(session.accelerator) as watchdog:
        # In here, since worker processes inherit what is done with SIGINT.
        updates = updates_from(resume)
        while state.step < args.max_steps:
            with log.watch.waiting():
                local, counts, failure = next_update(session.accelerator, updates, len(args.corpora), watchdog)
            if local is None:
                if state.step != session.last_saved_step:
                    session.save(lanes)
                session.wait_for_checkpoint()
                if failure:
                    raise failure
                return stop()
            watchdog.at(f"update {state.step + 1:,}")
            update = update_weights(session, local, counts, request)
            lanes, learning_rate = local.lanes, float(scheduler.get_last_lr()[0])
            scheduler.step()
            log.count(update, counts)
            bar.update()
            is_last = state.step == args.max_steps

            spikes.check_nonfinite()
            if checkpoint := spikes.find_rollback(update, counts["masked"]):
                updates.close()
                updates = updates_from(session.roll_back(checkpoint))
                scheduler = session.build_scheduler()
                log.watch = Stopwatch()
                bar.update(state.step - bar.n)
                continue
            if state.step % args.logging_steps == 0 or is_last:
                log.log_training(update, learning_rate, counts)
            with log.watch.paused():
                if args.eval_blocks and (state.step % args.eval_steps == 0 or is_last):
                    watchdog.at("evaluating")
                    log.evaluate()
                if state.step % args.save_steps == 0 or is_last or update.stopping:
                    watchdog.at("saving")
                    log.log_data(counts)
                    session.save(lanes)
            request.update_done(writer.seconds or slow_write)
            if is_last or update.stopping:
                session.wait_for_checkpoint()
            if update.stopping and not is_last:
                return stop()
    return True


class TrainingLog:
    """What is logged of training: lines at intervals, and what is counted between them."""

    def __init__(self, session: Session, data: TrainingData) -> None:
        self.session = session
        self.data = data
        self.watch = Stopwatch()
        self.measures = session.unwrapped.measures
        self.eval_batches = data.eval_batches(session.rank)
        has_baseline = session.args.eval_blocks and session.accelerator.is_main_process
        self.unigram_loss = data.unigram_loss() if has_baseline else math.nan
        accelerator = session.accelerator
        self.reachable_flops = matmul_flops(accelerator.device, accelerator.mixed_precision) * accelerator.num_processes

    def count(self, update: Update, counts: Counts) -> None:
        """Take in an update."""
        divisors = [counts[counted] for counted in self.measures.values()]
        measured = dict(zip(self.measures, zip(update.sums, divisors, strict=True), strict=True))
        self.session.state.count(measured, counts.corpora, counts["digest"], update.skipped)
        self.watch.count(counts.tokens)

    def corpora(self, counts: Counts) -> dict[str, dict[str, float]]:
        """Return the per-corpus totals so far."""
        return self.data.corpora_record(self.session.state.corpora, counts.streams)

    def log_training(self, update: Update, learning_rate: float, counts: Counts) -> None:
        """Log the means since the last line, and the throughput."""
        session, args, state = self.session, self.session.args, self.session.state
        length = args.seq_length(state.step - 1)
        flops = model_flops_per_token(session.unwrapped.model.config, length, args.mlm_probability, args.predicts_pairs)
        rates = self.watch.rates(flops / self.reachable_flops)
        rates["peak_memory"] = peak_memory(session.accelerator.device)
        settings = {"learning_rate": learning_rate, "grad_norm": update.grad_norm}
        record = train_record(state, settings, rates, self.corpora(counts), args.positions(state.step))
        session.report(record, format_train_line(record, args.max_steps))
        self.watch = Stopwatch()

    def log_data(self, counts: Counts) -> None:
        """Log what has been seen of each corpus."""
        args, state = self.session.args, self.session.state
        self.session.run.log(
            [format_data_line(state, self.corpora(counts), args.positions(state.step), args.max_steps)]
        )

    def evaluate(self) -> None:
        """Evaluate on the held-out blocks, and log it."""
        session = self.session
        means = evaluate(session.accelerator, session.objective, self.eval_batches)
        record = eval_record(session.state, dict(zip(self.measures, means, strict=True)), self.unigram_loss)
        session.report(record, format_eval_line(record, session.args.max_steps))


class SpikeGuard:
    """Ends a run whose numbers stay wrong, and takes one whose loss spikes back to a checkpoint."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.rollbacks: Counter[Path] = Counter()  # to each checkpoint

    def check_nonfinite(self) -> None:
        """Raise a FloatingPointError if too many updates in a row were skipped."""
        state, writer = self.session.state, self.session.writer
        if state.skipped_in_a_row >= self.session.args.max_nonfinite_updates:
            writer.wait()
            raise FloatingPointError(
                f"{state.skipped_in_a_row} updates in a row had a non-finite loss or gradient, up to update "
                f"{state.step}; the last checkpoint is {writer.last or 'not there yet'}. Go on from there with a "
                "lower --learning_rate, a longer --warmup_steps or, in place of fp16, --mixed_precision bf16"
            )

    def find_rollback(self, update: Update, masked: int) -> Path | None:
        """Take in the loss of an update, and warn of a spike.

        Returns:
            the checkpoint to go back to, if the loss has spiked, there is one, and `roll_back_loss_spikes` asks for it.

        Raises:
            FloatingPointError: training has gone back to that checkpoint too often.
        """
        session, args, loss = self.session, self.session.args, update.loss_sum / max(1, masked)
        spike = None if update.skipped else session.state.record_loss(loss, args.loss_spike_ratio)
        if not spike:
            return None
        place = f"update {session.state.step:,}: {loss:.3f}"
        session.run.log([f"warning: loss spike in {place}, {spike:.2f} times the median before it"])
        if not args.roll_back_loss_spikes or not (checkpoint := session.newest_checkpoint()):
            return None
        self.rollbacks[checkpoint] += 1
        if self.rollbacks[checkpoint] > MAX_ROLLBACKS:
            raise FloatingPointError(
                f"the loss spikes again after {MAX_ROLLBACKS} rollbacks to {checkpoint}; go on from there with a lower "
                "--learning_rate, or with a higher --loss_spike_ratio"
            )
        return checkpoint


def update_weights(session: Session, local: UpdateData, counts: Counts, request: StopRequest) -> Update:
    """Make one update with what this process has of it, given the counts of all processes.

    Raises:
        UserError: the device has no room for a micro-batch; the message says which would fit.
    """
    seed_dropout(session.args.seed, session.state.step, session.accelerator.process_index)
    divisors = [counts[counted] for counted in session.unwrapped.measures.values()]
    max_grad_norm, batches = session.args.max_grad_norm, local.micro_batches
    try:
        return train_step(
            session.accelerator, session.objective, session.optimizer, batches, divisors, max_grad_norm, request
        )
    except torch.OutOfMemoryError as error:
        print_line(f"out of memory: {error}")
    # The error is gone here, which held on to the activations.
    raise UserError(describe_out_of_memory(session, batches[0]))


def next_update(
    accelerator: Accelerator, updates: Iterator[UpdateData], num_corpora: int, watchdog: Watchdog
) -> tuple[UpdateData | None, Counts, Exception | None]:
    """Wait for what this process has of the next update, and sum its counts over all processes.

    Returns:
        this process's part, None on all ranks if any of them has no more data, so that none is left waiting; the counts
        of the whole update; and an error, unless there is data or a rank was asked to stop.
    """
    local, failure = None, None
    watchdog.at("reading its data")
    try:
        local = next(updates)
        counts = local.counts
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
        local = None
    return local, counts, failure


def train_step(
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    divisors: list[int],
    max_grad_norm: float,
    request: StopRequest,
) -> Update:
    """Make one update by the mean loss over the masked tokens of all its micro-batches on all ranks.

    A pair objective adds the mean loss over the pairs. The micro-batches' losses are sums, divided in the loss by the
    counts of the whole update; gradients are never rescaled afterwards. Whatever an engine averages over (accumulation,
    processes) is multiplied in beforehand. There is one wait for the device, at the end.

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
    """Copy a batch without the host waiting for it, which pinned memory allows."""
    if device.type != "cuda":
        return batch
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}


def describe_out_of_memory(session: Session, batch: Batch) -> str:
    """Say what to do about a micro-batch for which the device has no room."""
    accelerator, args, objective = session.accelerator, session.args, session.objective
    rows, local_rows = args.per_device_train_batch_size, args.train_batch_size // accelerator.num_processes
    problem = f"`per_device_train_batch_size` is {rows}, and the device's memory is too small for it"
    if accelerator.distributed_type == DistributedType.FSDP:  # other processes would have to try along
        return f"{problem}; give less"
    has_moments = bool(session.optimizer.state)
    moments = 0 if has_moments else 2 * sum(p.numel() * p.element_size() for p in objective.parameters())
    sizes = [size for size in range(1, rows) if not local_rows % size]
    with accelerator.no_sync(objective):
        largest = largest_micro_batch(objective, batch, sizes, accelerator.device, moments)
    remedy = "not even one fits: train a smaller model"
    if largest:
        remedy = f"the largest that fits is --per_device_train_batch_size {largest}, which leaves the update as it is"
    if not args.gradient_checkpointing:
        remedy += "; --gradient_checkpointing true fits more"
    return f"{problem}; {remedy}"


@torch.no_grad()
def evaluate(accelerator: Accelerator, objective: nn.Module, batches: MicroBatches) -> list[float]:
    """Return the means of the objective's measures over the held-out blocks, each counted once; NaN without any."""
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
