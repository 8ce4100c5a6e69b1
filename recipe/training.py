"""The training loop, straight down: `train` calls `next_update`, `update_weights` and its `train_step`."""

import math
import platform
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.distributed.tensor import DTensor

from recipe.base.errors import UserError
from recipe.base.hashing import hash64
from recipe.base.progress import print_line, progress_bar
from recipe.base.workers import InterruptedWaitError
from recipe.data.batches import Batch, Counts, Resume, TrainingData, UpdateData, noticing_dead_workers
from recipe.modeling.memory import full_rows, largest_micro_batch
from recipe.modeling.model import count_parameters
from recipe.monitoring import SpikeGuard, TrainingLog, Update, to_device
from recipe.run.checkpoint import BYTES_PER_PARAMETER
from recipe.run.directory import LostFolderError
from recipe.run.metrics import Stopwatch
from recipe.run.stopping import StopRequest, handling_stop_signals
from recipe.run.watchdog import Watchdog
from recipe.session import Session

SLOW_DISK_BYTES_PER_SECOND = 1e8  # taken for the first checkpoint


def train(session: Session, data: TrainingData, resume: Resume) -> bool:
    """Train from `session.state.step` to `max_steps`, logging, evaluating and saving on the way.

    A run that begins evaluates before its first update, too.

    Returns:
        whether the run is complete; False when it was asked to stop, with a checkpoint of the last update.

    Raises:
        FloatingPointError: too many updates in a row were not finite, or the loss spikes again and again.
        LostFolderError: another process has taken the run's folder, or it is gone; nothing was saved since.
        UserError: a corpus cannot be read any more, or the device has no room for an evaluation. As after any error of
            the data or of an evaluation, there is a checkpoint of the last update.
    """
    args, state, writer = session.args, session.state, session.writer
    is_main = session.accelerator.is_main_process
    log, spikes, request = TrainingLog(session, data), SpikeGuard(session), StopRequest(args.max_train_hours, is_main)
    slow_write = BYTES_PER_PARAMETER * count_parameters(session.unwrapped.model) / SLOW_DISK_BYTES_PER_SECOND
    lanes: dict[Any, Any] = {}  # in streaming mode, after the last update that was trained on

    def updates_from(resume: Resume) -> Generator[UpdateData]:
        yield from data.train_updates(session.rank, resume, args.max_steps + state.updates_left_out, request.is_set)

    def stop() -> bool:
        session.run.write_status("preempted", state.step, request.reason or "another process was asked to stop")
        return False

    scheduler = session.build_scheduler()
    bar = progress_bar("training", args.max_steps, "updates", is_main, state.step)
    with bar, handling_stop_signals(request.handle), writer, Watchdog(session.accelerator) as watchdog:
        if args.eval_blocks and not state.step:  # what a model knows before it is trained on, such as a released one
            watchdog.at("evaluating")
            with log.watch.paused():
                failure = log.evaluate()
            if failure:
                raise failure
        # In here, since worker processes inherit what is done with SIGINT.
        updates = updates_from(resume)
        while state.step < args.max_steps:
            with log.watch.waiting():
                local, counts, failure = next_update(session, updates, watchdog)
            if local is None:
                if counts["lost"] and failure:
                    raise failure
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
            session.run.heartbeat(state.step)
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
            failure = None
            with log.watch.paused():
                if args.eval_blocks and (state.step % args.eval_steps == 0 or is_last):
                    watchdog.at("evaluating")
                    failure = log.evaluate()
                if state.step % args.save_steps == 0 or is_last or update.stopping or failure:
                    watchdog.at("saving")
                    log.log_data(counts)
                    session.save(lanes)
            request.update_done(writer.seconds or slow_write)
            if is_last or update.stopping or failure:
                session.wait_for_checkpoint()
            if failure:
                raise failure
            if update.stopping and not is_last:
                return stop()
    return True


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
    raise UserError(describe_out_of_memory(session))


def next_update(
    session: Session, updates: Iterator[UpdateData], watchdog: Watchdog
) -> tuple[UpdateData | None, Counts, Exception | None]:
    """Wait for what this process has of the next update, and sum its counts over all processes.

    Returns:
        this process's part, None on all ranks if any of them has no more data, so that none is left waiting; the counts
        of the whole update; and an error, unless there is data or a rank was asked to stop.
    """
    accelerator, num_corpora = session.accelerator, len(session.args.corpora)
    local, failure = None, None
    watchdog.at("reading its data")
    try:
        session.run.check_held()
        with noticing_dead_workers():
            local = next(updates)
        counts = local.counts
    except InterruptedWaitError:
        counts = Counts.without_data(num_corpora, "stopping")
    except Exception as error:  # whatever it is, the other ranks have to know
        reason = "lost" if isinstance(error, LostFolderError) else "failed"
        failure, counts = error, Counts.without_data(num_corpora, reason)
    watchdog.at("the count of an update's data")
    totals = accelerator.reduce(torch.from_numpy(counts.array).to(accelerator.device), "sum")
    counts = Counts(num_corpora, totals.cpu().numpy())
    if counts["failed"] or counts["lost"]:
        own = f"rank {accelerator.process_index} on {platform.node()}: {failure}" if failure else ""
        found = next(filter(None, gather_object([own])))
        failure = failure or UserError(f"another process has ended, {found}")
        local = None
    if counts["stopping"]:
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


def describe_out_of_memory(session: Session) -> str:
    """Say what to do about a micro-batch for which the device has no room."""
    accelerator, args, objective = session.accelerator, session.args, session.objective
    rows, local_rows = args.per_device_train_batch_size, args.train_batch_size // accelerator.num_processes
    problem = f"`per_device_train_batch_size` is {rows}, and the device's memory is too small for it"
    if accelerator.distributed_type == DistributedType.FSDP:  # other processes would have to try along
        return f"{problem}; give less"
    has_moments = bool(session.optimizer.state)
    moments = 0 if has_moments else 2 * sum(p.numel() * p.element_size() for p in objective.parameters())
    sizes = [size for size in range(1, rows) if not local_rows % size]

    def make_batch(size: int) -> Batch:
        return session.unwrapped.arrange(full_rows(size, args.max_seq_length, args.masked_share))

    with accelerator.no_sync(objective):
        largest = largest_micro_batch(objective, make_batch, sizes, accelerator.device, moments)
    remedy = "not even one fits: train a smaller model"
    if largest:
        remedy = f"the largest that fits is --per_device_train_batch_size {largest}, which leaves the update as it is"
    if not args.gradient_checkpointing:
        remedy += "; --gradient_checkpointing true fits more"
    return f"{problem}; {remedy}"


def seed_dropout(seed: int, step: int, process_index: int) -> None:
    """Make dropout a function of the update, so that a resume needs no generator state."""
    torch.manual_seed(int(hash64(seed, step, process_index) >> 1))
