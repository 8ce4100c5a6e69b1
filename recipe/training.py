"""The training loop: a `Trainer` makes update after update, each by `next_update`, `update_weights`, `train_step`."""

import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
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
from recipe.modeling.objectives import MaskedLMObjective
from recipe.modeling.optimizer import set_rate
from recipe.monitoring import SpikeGuard, TrainingLog, Update, to_device
from recipe.run.checkpoint import BYTES_PER_PARAMETER
from recipe.run.directory import LostFolderError
from recipe.run.launch import sum_over_hosts
from recipe.run.metrics import Stopwatch
from recipe.run.stopping import StopRequest, TrainingClock, handling_stop_signals
from recipe.run.watchdog import Watchdog
from recipe.session import Session

SLOW_DISK_BYTES_PER_SECOND = 1e8  # taken for the first checkpoint


def train(session: Session, data: TrainingData, resume: Resume) -> bool:
    """Train from `session.state.step` to `max_steps`, logging, evaluating and saving on the way.

    By hours, training ends with them. A run that begins evaluates before its first update, too.

    Returns:
        whether the run is complete; False when it was asked to stop, with a checkpoint of the last update.

    Raises:
        FloatingPointError: too many updates in a row were not finite, or the loss spikes again and again.
        LostFolderError: another process has taken the run's folder, or it is gone; nothing was saved since.
        UserError: a corpus cannot be read any more, or the device has no room for an evaluation. As after any error of
            the data or of an evaluation, there is a checkpoint of the last update.
    """
    trainer = Trainer(session, data)
    with trainer.bar, handling_stop_signals(trainer.request.handle), session.writer, trainer.watchdog:
        if session.args.eval_blocks and not session.state.step:  # what a released model knows, before it is trained on
            trainer.pause(evaluates=True)
        trainer.open_data(resume)  # in here, since worker processes inherit what is done with SIGINT
        return trainer.run()


class Trainer:
    """Makes the updates of a run, and reads what each of them did while the device makes the next one.

    So the device always has work, and the host never waits for it within an update. Before an evaluation or a
    checkpoint, and where training stops, the last update is read, too. Where an update turns out to be a spike that is
    rolled back, the next one is thrown away, and its data comes again after the rollback.
    """

    def __init__(self, session: Session, data: TrainingData) -> None:
        args, accelerator, done = session.args, session.accelerator, session.state.step
        self.session, self.data = session, data
        self.log, self.spikes = TrainingLog(session, data), SpikeGuard(session)
        by_steps = args.schedule_by == "steps"
        self.request = StopRequest(args.max_train_hours if by_steps else None, accelerator.is_main_process)
        total = args.max_steps if by_steps else None
        self.bar = progress_bar("training", total, "updates", accelerator.is_main_process, done)
        self.watchdog = Watchdog(accelerator)
        self.slow_write = BYTES_PER_PARAMETER * count_parameters(session.unwrapped.model) / SLOW_DISK_BYTES_PER_SECOND
        self.prepare = preparation(session.unwrapped, accelerator.device)
        self.scheduler = session.build_scheduler()
        self.enqueued: Update | None = None  # the newest update, until it is read
        self.read: Update | None = None  # the newest update that has been read
        self.clock: TrainingClock | None = None  # from the end of the first update on, which may wait for a compiler

    @property
    def step(self) -> int:
        """The number of updates that are done or enqueued."""
        return self.session.state.step + (self.enqueued is not None)

    @property
    def is_over(self) -> bool:
        """Whether the last update of the run is done or enqueued."""
        state = self.session.state
        began = self.enqueued.counts["milliseconds"] if self.enqueued else state.train_milliseconds
        return self.session.args.is_over(self.step, began)

    def milliseconds(self) -> int:
        """Return how long the run has trained by the clock of the main process; 0 on the others."""
        if not self.session.accelerator.is_main_process:
            return 0
        return self.clock.milliseconds() if self.clock else self.session.state.train_milliseconds

    def open_data(self, resume: Resume) -> None:
        """Begin to read the data at some place."""
        last = self.session.args.max_steps + self.session.state.updates_left_out
        self.updates = self.data.train_updates(self.session.rank, resume, last, self.request.is_set, self.prepare)

    def run(self) -> bool:
        """Make updates until all are made or the run is to stop; see `train`."""
        args = self.session.args
        while not self.is_over:
            began = self.milliseconds()
            with self.log.watch.waiting():
                local, counts, failure = next_update(self.session, self.updates, self.request, self.watchdog, began)
            if local is None:
                if counts["lost"] and failure:
                    raise failure
                if self.settle():
                    return self.stop(failure)
                continue
            if not self.enqueue(local, counts):
                continue
            evaluates = bool(args.eval_blocks) and (self.step % args.eval_steps == 0 or self.is_over)
            saves = self.step % args.save_steps == 0 or self.is_over
            if (evaluates or saves or self.read is None) and self.settle():
                self.pause(evaluates, saves)
            self.request.update_done(self.session.writer.seconds or self.slow_write)
        seconds = self.session.state.train_milliseconds / 1000
        if args.schedule_by == "hours" and seconds * 1000 < args.schedule_length:
            used = f"when {seconds / 3600:.3g} of {args.max_train_hours:g} hours were used"
            line = f"warning: `max_steps` ({args.max_steps:,}) came {used}, before the end of the schedule: give more"
            self.session.run.log([line])
        return True

    def enqueue(self, local: UpdateData, counts: Counts) -> bool:
        """Have the device make an update, and meanwhile read the one before it; return whether that one is kept."""
        self.watchdog.at(f"update {self.step + 1:,}")
        started = time.monotonic()
        position = self.session.args.schedule_position(self.step, counts["milliseconds"])
        learning_rate = set_rate(self.scheduler, position)
        result = update_weights(self.session, self.step, local, counts)
        before, self.enqueued = self.enqueued, Update(local, counts, learning_rate, started, result)
        return before is None or self.take_in(before)

    def settle(self) -> bool:
        """Read the newest update, if it has not been read; return whether it is kept."""
        before, self.enqueued = self.enqueued, None
        return before is None or self.take_in(before)

    def take_in(self, update: Update) -> bool:
        """Read an update, count it and log it; return False if training has gone back because of it."""
        session, args, state = self.session, self.session.args, self.session.state
        outcome = update.wait(session.accelerator.scaler is not None)
        if self.read is None:
            self.log.log_start(update)
            self.clock = TrainingClock(state.train_milliseconds)
        self.read = update
        self.log.count(update, outcome)
        self.bar.update()
        session.run.heartbeat(state.step)
        self.spikes.check_nonfinite()
        if checkpoint := self.spikes.find_rollback(outcome, update.counts["masked"]):
            self.go_back(checkpoint)
            return False
        if state.step % args.logging_steps == 0 or args.is_over(state.step, state.train_milliseconds):
            self.log.log_training(update, outcome)
        return True

    def go_back(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, past the data up to the newest update that was read."""
        self.enqueued = None
        self.updates.close()
        self.open_data(self.session.roll_back(checkpoint))
        self.log.watch = Stopwatch()
        self.bar.update(self.session.state.step - self.bar.n)

    def pause(self, evaluates: bool = False, saves: bool = False) -> None:
        """Evaluate and save; raise what an evaluation has failed with once all is saved."""
        failure, is_last = None, self.is_over
        with self.log.watch.paused():
            if evaluates:
                self.watchdog.at("evaluating")
                failure = self.log.evaluate()
            if saves or failure:
                self.save()
        if is_last or failure:
            self.session.wait_for_checkpoint()
        if failure:
            raise failure

    def save(self) -> None:
        """Begin to write a checkpoint of the newest update, unless there is one."""
        state, now = self.session.state, self.milliseconds()
        if self.read and state.step != self.session.last_saved_step:
            self.watchdog.at("saving")
            if not self.session.args.is_over(state.step, now):  # or the last update, still to come, would seem done
                state.train_milliseconds = max(state.train_milliseconds, now)
            self.log.log_data(self.read.counts)
            self.session.save(self.read.lanes)

    def stop(self, failure: Exception | None) -> bool:
        """Save what is not saved yet, and end with a failure if there is one, or as preempted."""
        self.save()
        self.session.wait_for_checkpoint()
        if failure:
            raise failure
        reason = next(filter(None, gather_object([self.request.reason])))  # of the first process that was asked
        self.session.run.write_status("preempted", self.session.state.step, reason)
        return False


def preparation(objective: MaskedLMObjective, device: torch.device) -> Callable[[UpdateData], UpdateData]:
    """Return what the thread that makes an update ahead does with its micro-batches, so that training finds them ready.

    They are arranged as the objective takes them, and copied to a GPU on a stream of their own, beside the update that
    is trained on.
    """
    if device.type != "cuda":
        return lambda update: replace(update, micro_batches=list(map(objective.arrange, update.micro_batches)))
    training, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)

    def copy(update: UpdateData) -> UpdateData:
        with torch.cuda.stream(copying):  # and so the device of this thread
            batches = [to_device(objective.arrange(batch), device) for batch in update.micro_batches]
        for batch in batches:
            for tensor in batch.values():
                tensor.record_stream(training)  # or its memory would be used again as soon as the update is enqueued
        copying.record_event().synchronize()
        return replace(update, micro_batches=batches)

    return copy


def next_update(
    session: Session, updates: Iterator[UpdateData], request: StopRequest, watchdog: Watchdog, milliseconds: int
) -> tuple[UpdateData | None, Counts, Exception | None]:
    """Wait for what this process has of the next update, and sum its counts over all processes.

    The main process counts the `milliseconds` that the run has trained, the others 0, so that all have its time.

    Returns:
        this process's part, None on all ranks if any of them has no more data or was asked to stop, so that none is
        left waiting; the counts of the whole update; and an error, unless there is data or a rank was asked to stop.
    """
    accelerator, num_corpora = session.accelerator, len(session.args.corpora)
    local, failure = None, None
    watchdog.at("reading its data")
    try:
        session.run.check_held()
        with noticing_dead_workers():
            local = next(updates)
        counts = Counts.without_data(num_corpora, "stopping") if request.is_set() else local.counts
    except InterruptedWaitError:
        counts = Counts.without_data(num_corpora, "stopping")
    except Exception as error:  # whatever it is, the other ranks have to know
        reason = "lost" if isinstance(error, LostFolderError) else "failed"
        failure, counts = error, Counts.without_data(num_corpora, reason)
    watchdog.at("the count of an update's data")
    counts["milliseconds"] = milliseconds
    counts = Counts(num_corpora, sum_over_hosts(counts.array))
    if counts["failed"] or counts["lost"]:
        own = f"rank {accelerator.process_index} on {platform.node()}: {failure}" if failure else ""
        found = next(filter(None, gather_object([own])))
        failure = failure or UserError(f"another process has ended, {found}")
        local = None
    if counts["stopping"]:
        local = None
    return local, counts, failure


def update_weights(session: Session, step: int, local: UpdateData, counts: Counts) -> torch.Tensor:
    """Enqueue the update after `step` others with what this process has of it, given the counts of all processes.

    Returns:
        what `train_step` does.

    Raises:
        UserError: the device has no room for a micro-batch; the message says which would fit.
    """
    accelerator, objective, optimizer = session.accelerator, session.objective, session.optimizer
    seed_dropout(session.args.seed, step, accelerator.process_index)
    divisors = [counts[counted] for counted in session.unwrapped.measures.values()]
    try:
        return train_step(accelerator, objective, optimizer, local.micro_batches, divisors, session.args.max_grad_norm)
    except torch.OutOfMemoryError as error:
        print_line(f"out of memory: {error}")
    # The error is gone here, which held on to the activations.
    raise UserError(describe_out_of_memory(session))


def train_step(
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: AcceleratedOptimizer,
    micro_batches: list[Batch],
    divisors: list[int],
    max_grad_norm: float,
) -> torch.Tensor:
    """Enqueue one update by the mean loss over the masked tokens of all its micro-batches on all ranks.

    A pair objective adds the mean loss over the pairs. The micro-batches' losses are sums, divided in the loss by the
    counts of the whole update; gradients are never rescaled afterwards. Whatever an engine averages over (accumulation,
    processes) is multiplied in beforehand.

    Nothing waits for the device, which leaves out by itself an update whose sums or gradient are not finite.

    Args:
        micro_batches: of this rank, as the objective takes them, on the device.
        divisors: of each of the objective's measures, what there is of it in the micro-batches of all ranks.
        max_grad_norm: 0 for no clipping.

    Returns:
        (measures + 1,) float32 on the device: the sum of each measure over all ranks, and the norm of the gradient.
    """
    averaged = accelerator.num_processes * accelerator.gradient_accumulation_steps
    # A number at a time, since the copy of a list would wait for the device.
    scale = torch.hstack([torch.full((1,), averaged / max(1, n), device=accelerator.device) for n in divisors])
    sums = torch.zeros_like(scale)
    for number, batch in enumerate(micro_batches):
        is_last = number == len(micro_batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(objective):
            micro_sums, _ = objective(**batch)
            accelerator.backward((micro_sums * scale).sum())
            sums = sums + micro_sums.detach()

    grad_norm = accelerator.clip_grad_norm_(objective.parameters(), max_grad_norm or math.inf)
    if isinstance(grad_norm, DTensor):  # of sharded gradients
        grad_norm = grad_norm.full_tensor()
    result = torch.hstack([accelerator.reduce(sums, "sum"), grad_norm])
    # As fp16's scaler tells a fused optimizer to leave an update out. Its own `step` would not know of the loss.
    inner: Any = optimizer.optimizer
    inner.found_inf = result.isfinite().all().logical_not().float()
    inner.step()
    if accelerator.scaler is not None:
        accelerator.scaler.update()  # it lowers its scale where the gradient, which it has looked at, overflows
    inner.zero_grad()
    return result


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
