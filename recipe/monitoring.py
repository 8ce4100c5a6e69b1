"""What is watched of training: the log, the held-out loss, and numbers that go wrong."""

import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from recipe.arguments import PretrainArguments
from recipe.base.errors import UserError
from recipe.base.progress import progress_bar
from recipe.data.batches import Batch, Counts, MicroBatches, TrainingData, UpdateData
from recipe.modeling.model import model_flops_per_token
from recipe.run.hardware import matmul_flops, peak_memory
from recipe.run.metrics import (
    Stopwatch,
    TrainState,
    eval_record,
    format_data_line,
    format_eval_line,
    format_train_line,
    train_record,
)
from recipe.run.stopping import START_SECONDS
from recipe.session import Session

MAX_ROLLBACKS = 3  # to the same checkpoint
# Within so many nats of a unigram model's loss, a model hardly uses context. On the plateau, losses were seen from 0.01
# under to 0.07 over it, and a baseline of 250K tokens is 0.1 too high (docs/results.md); a model that leaves it falls
# fast.
PLATEAU_NATS = 0.2
WAYS_OFF_PLATEAU = (
    "What is known to help: short blocks first or a smaller batch first (`phases`), pre-norm layers (`model_type: "
    "roberta-prelayernorm`), more updates, more `warmup_steps` or a lower `learning_rate`; see docs/running.md"
)


@dataclass(frozen=True)
class Outcome:
    """What an update did, the same on all ranks.

    Attributes:
        sums: of each of the objective's measures, over the whole update; of the loss, in nats, first.
        grad_norm: of the whole update's gradient.
        skipped: None, `nonfinite` or `overflow`.
    """

    sums: list[float]
    grad_norm: float
    skipped: str | None


class Update:
    """An update that the device has been given, and may not have made yet.

    Args:
        data: what this process has of it.
        counts: of all processes.
        learning_rate: by which it is made.
        started: when this process began with it, by `time.monotonic`.
        result: (measures + 1,) float32, from `train_step`, on its way to pinned memory from now on.
    """

    def __init__(
        self, data: UpdateData, counts: Counts, learning_rate: float, started: float, result: torch.Tensor
    ) -> None:
        self.lanes, self.counts, self.learning_rate, self.started = data.lanes, counts, learning_rate, started
        self.result = result.to("cpu", non_blocking=result.is_cuda)
        self.arrival = torch.cuda.current_stream(result.device).record_event() if result.is_cuda else None
        self.ended = time.monotonic()  # on a CPU; the end of an update on a GPU is known when it has been waited for

    def wait(self, has_scaler: bool) -> Outcome:
        """Wait until the device has made the update, and read what it did; fp16's scaler looks for overflows."""
        if self.arrival is not None:
            self.arrival.synchronize()
            self.ended = time.monotonic()
        *sums, grad_norm = self.result.tolist()
        is_finite = all(map(math.isfinite, sums))
        if is_finite and math.isfinite(grad_norm):
            return Outcome(sums, grad_norm, None)
        return Outcome(sums, grad_norm, "overflow" if has_scaler and is_finite else "nonfinite")


class TrainingLog:
    """What is logged of training: lines at intervals, and what is counted between them."""

    def __init__(self, session: Session, data: TrainingData) -> None:
        self.session = session
        self.data = data
        self.watch = Stopwatch()
        # What the next line of training says once: how long the start took, and where the run was resumed.
        self.said_once: dict[str, float] = {"resumed_from": session.state.step} if session.state.step else {}
        self.measures = session.unwrapped.measures
        self.eval_batches = data.eval_batches(session.rank)
        has_baseline = session.args.eval_blocks and session.accelerator.is_main_process
        self.unigram_loss = data.unigram_loss() if has_baseline else math.nan
        self.reachable_flops = self.measure_reachable_flops()

    def measure_reachable_flops(self) -> float:
        """Measure the FLOP/s that large matrix products reach on all devices, as many as there are processes."""
        accelerator = self.session.accelerator
        return matmul_flops(accelerator.device, accelerator.mixed_precision) * accelerator.num_processes

    def log_start(self, first: Update) -> None:
        """Log how long the first update since the start of the process was in coming, and how long it took itself."""
        total, own = first.ended - START_SECONDS, first.ended - first.started
        self.said_once["seconds_to_first_update"] = round(total, 1)
        compiling = ", compiling included" if self.session.args.torch_compile else ""
        self.session.run.log(
            [f"first update {total:.1f} s after the start of the process; it took {own:.1f} s{compiling}"]
        )

    def count(self, update: Update, outcome: Outcome) -> None:
        """Take in an update and what it did."""
        counts = update.counts
        divisors = [counts[counted] for counted in self.measures.values()]
        measured = dict(zip(self.measures, zip(outcome.sums, divisors, strict=True), strict=True))
        state = self.session.state
        length = self.session.args.timeline.at(state.step + state.updates_left_out).max_seq_length
        state.count(measured, counts.corpora, length, counts["digest"], outcome.skipped)
        state.train_milliseconds = counts["milliseconds"]
        self.watch.count(counts.tokens, update.ended)

    def corpora(self, counts: Counts) -> dict[str, dict[str, float]]:
        """Return the per-corpus totals so far."""
        return self.data.corpora_record(self.session.state.corpora, counts.streams)

    def log_training(self, update: Update, outcome: Outcome) -> None:
        """Log the means since the last line, and the throughput."""
        session, args, state = self.session, self.session.args, self.session.state
        settings = args.timeline.at(state.step - 1 + state.updates_left_out)
        lengths = settings.max_seq_length, settings.mlm_probability
        flops = model_flops_per_token(session.unwrapped.model.config, *lengths, args.predicts_pairs)
        rates = self.watch.rates(flops / self.reachable_flops)
        if rates["mfu"] > 1:  # the machine was busy when that was measured
            reached = rates["mfu"] * self.reachable_flops
            self.reachable_flops = max(reached, self.measure_reachable_flops())
            rates["mfu"] = round(reached / self.reachable_flops, 4)
        rates["peak_memory"] = peak_memory(session.accelerator.device)
        made_with = {"learning_rate": update.learning_rate, "grad_norm": outcome.grad_norm}
        made_with |= settings._asdict() if args.phases else {}
        record = train_record(state, made_with, rates, self.corpora(update.counts))
        max_seconds = math.inf if args.schedule_by == "steps" else args.schedule_length / 1000
        session.report(record | self.said_once, format_train_line(record, args.max_steps, max_seconds))
        self.said_once = {}
        self.watch = self.watch.go_on()

    def log_data(self, counts: Counts) -> None:
        """Log what has been seen of each corpus."""
        state, max_steps = self.session.state, self.session.args.max_steps
        self.session.run.log([format_data_line(state, self.corpora(counts), max_steps)])

    def evaluate(self) -> Exception | None:
        """Evaluate on the held-out blocks, and log it; return an error on all ranks if one of them has failed."""
        session = self.session
        means, failure = evaluate(session.accelerator, session.objective, self.eval_batches)
        if failure:
            return failure
        state = session.state
        record = eval_record(state, dict(zip(self.measures, means, strict=True)), self.unigram_loss)
        notice = find_plateau(session.args, state, record["eval_loss"], self.unigram_loss)
        record |= {"notice": notice} if notice else {}
        session.report(record, format_eval_line(record, session.args.max_steps))
        if notice and not state.plateau_said:
            state.plateau_said = True
            session.run.log([f"warning: {notice}. {WAYS_OFF_PLATEAU}"])
        return None


def find_plateau(
    args: PretrainArguments, state: TrainState, eval_loss: float | None, unigram_loss: float
) -> str | None:
    """Take in a held-out loss, in nats; once warmup is over, tell since when it has been about that of a unigram model.

    A loss that is so once may be passing: it takes two evaluations in a row, or the last of the run. The baseline is
    NaN where there is none, as on all processes but the main one.
    """
    if eval_loss is None or not abs(eval_loss - unigram_loss) < PLATEAU_NATS:
        state.plateau_since = 0
        return None
    state.plateau_since = since = state.plateau_since or state.step
    _, _, warmup, _ = args.schedule
    is_warm = args.schedule_position(state.step, state.train_milliseconds) > warmup
    if not is_warm or (since == state.step and not args.is_over(state.step, state.train_milliseconds)):
        return None
    return (
        f"the held-out loss ({eval_loss:.3f}) has been about that of a unigram model ({unigram_loss:.3f}) since update "
        f"{since:,}: the model hardly uses context yet"
    )


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

    def find_rollback(self, outcome: Outcome, masked: int) -> Path | None:
        """Take in the loss of an update, and warn of a spike.

        Returns:
            the checkpoint to go back to, if the loss has spiked, there is one, and `roll_back_loss_spikes` asks for it.

        Raises:
            FloatingPointError: training has gone back to that checkpoint too often.
        """
        session, args, loss = self.session, self.session.args, outcome.sums[0] / max(1, masked)
        update = session.state.step - 1 + session.state.updates_left_out
        first, _ = args.timeline.bounds[args.timeline.at(update).phase - 1]  # other phases may have other losses
        spike = None if outcome.skipped else session.state.record_loss(loss, args.loss_spike_ratio, update - first)
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


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, objective: nn.Module, batches: MicroBatches
) -> tuple[list[float], Exception | None]:
    """Return the means of the objective's measures over the held-out blocks, each counted once; NaN without any.

    Also an error, on all ranks if any of them has failed, so that they can save and end together.
    """
    failure: Exception | None = None
    objective.eval()
    arrange = accelerator.unwrap_model(objective).arrange
    totals = torch.zeros((), device=accelerator.device)
    try:
        micro_batches = next(batches.iterate(0, 1, num_workers=0))[0]
        with progress_bar(
            "evaluating", len(micro_batches), "micro-batches", accelerator.is_main_process, stays=False
        ) as bar:
            for batch in micro_batches:
                totals = totals + torch.stack(objective(**to_device(arrange(batch), accelerator.device)))
                bar.update()
    except torch.OutOfMemoryError as error:
        size = max(batches.sizes(0))
        failure = UserError(
            f"`per_device_eval_batch_size` is {size}, and the device's memory is too small for it ({error}); give "
            "less; a run goes on with --resume_from_checkpoint latest"
        )
    except Exception as error:  # whatever it is, the other ranks have to know
        failure = error
    objective.train()
    if accelerator.reduce(torch.tensor(float(failure is not None), device=accelerator.device), "sum").item():
        return [], failure or UserError("another process cannot evaluate; see its message")
    sums, counts = accelerator.reduce(totals, "sum")
    return (sums / counts).tolist(), None


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch without the host waiting for it, which pinned memory allows."""
    if device.type != "cuda":
        return batch
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
