"""How far a run is, its throughput, and the lines of the log and of metrics.jsonl."""

import itertools
import math
import statistics
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from recipe.base.errors import raising_damaged_file
from recipe.base.formatting import format_count, format_duration, number
from recipe.base.hashing import hash64

COUNTERS = ("nonfinite_updates", "overflows", "loss_spikes", "updates_left_out")  # of what goes wrong, by `TrainState`
LINE_CHARACTERS = 100  # of a line of the log that lists all corpora


@dataclass
class TrainState:
    """How far a run is; everything of it is in the checkpoint, so that a resume writes the same metrics."""

    step: int = 0  # completed updates
    # That the run had trained, over all its processes, when the newest update began, or when it was saved after that.
    train_milliseconds: int = 0
    nonfinite_updates: int = 0  # skipped, because a loss or a gradient was not finite
    overflows: int = 0  # updates that fp16's gradient scaler skipped
    skipped_in_a_row: int = 0  # updates since the last one that was not skipped
    loss_spikes: int = 0
    recent_losses: list[float] = field(default_factory=list)  # of up to 100 updates, by which a spike is recognised
    updates_left_out: int = 0  # whose data was left out after spikes
    # Of the evaluations whose loss has been a unigram model's since, the update of the first; 0 where the last was not.
    plateau_since: int = 0
    plateau_said: bool = False  # whether the log has said so
    # Of what the objective measures, the sums since the last line of the log and what to divide them by.
    window: dict[str, list[float]] = field(default_factory=dict)
    corpora: list[list[int]] = field(default_factory=list)  # of each corpus, blocks, tokens and documents seen
    positions: int = 0  # of all blocks seen, padding included
    data_digest: int = 0  # of which blocks were seen and what was masked in them, in the order of updates

    @classmethod
    def restore(cls, values: dict[str, Any], num_corpora: int, checkpoint: Path) -> "TrainState":
        """Restore the state of a `checkpoint` from its fields, and refuse one that is missing, unknown or wrong."""

        def is_count(value: Any) -> bool:
            return type(value) is int and 0 <= value < 2**64

        with raising_damaged_file(checkpoint / "state.json", f"remove {checkpoint} to go on from the one before it"):
            if wrong := sorted({f.name for f in fields(cls)} ^ values.keys()):
                raise ValueError(f"`train_state` lacks or has {', '.join(wrong)}")
            wrong = [f.name for f in fields(cls) if f.type is int and not is_count(values[f.name])]
            if wrong or not all(map(is_count, itertools.chain.from_iterable(values["corpora"]))):
                raise ValueError(f"a count of `train_state` is no whole number: {', '.join(wrong) or 'corpora'}")
            if type(values["plateau_said"]) is not bool:
                raise ValueError("`plateau_said` of `train_state` is neither true nor false")
            if [len(counts) for counts in values["corpora"]] != [3] * num_corpora:
                raise ValueError(f"`corpora` of `train_state` are not {num_corpora} with three counts each")
            if not all(math.isfinite(total) and is_count(count) for total, count in values["window"].values()):
                raise ValueError("`window` of `train_state` is not of sums and counts")
            if not all(map(math.isfinite, values["recent_losses"])):
                raise ValueError("`recent_losses` of `train_state` are not")
        return cls(**values)

    @property
    def blocks(self) -> int:
        """Blocks seen so far."""
        return sum(blocks for blocks, _, _ in self.corpora)

    @property
    def tokens(self) -> int:
        """Tokens seen so far, without padding."""
        return sum(tokens for _, tokens, _ in self.corpora)

    def count(
        self, measured: dict[str, tuple[float, int]], corpora: np.ndarray, length: int, digest: int, skipped: str | None
    ) -> None:
        """Take in one update; one that was skipped, as `nonfinite` or `overflow`, is counted without its measures.

        Args:
            measured: for each of the objective's measures, the sum and what to divide it by.
            corpora: (corpora, 3) blocks, tokens and documents of the update.
            length: of its blocks, padding included.
            digest: of its blocks and masks.
        """
        self.step += 1
        self.corpora = (np.array(self.corpora or np.zeros_like(corpora)) + corpora).tolist()
        self.positions += int(corpora[:, 0].sum()) * length
        self.data_digest = int(hash64(self.data_digest, digest))
        self.nonfinite_updates += skipped == "nonfinite"
        self.overflows += skipped == "overflow"
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        for name, values in measured.items():
            window = self.window.setdefault(name, [0.0, 0])
            if skipped is None:
                self.window[name] = [total + value for total, value in zip(window, values, strict=True)]

    def record_loss(self, loss: float, ratio: float, comparable: int) -> float | None:
        """Take in the loss of an update, in nats; return its ratio to the median loss if that is a spike.

        It is one if it is more than `ratio` times the median of up to 100 losses before it, of at least 20, which are
        of the last `comparable` updates.
        """
        before = self.recent_losses[max(0, len(self.recent_losses) - comparable) :]
        self.recent_losses = [*self.recent_losses, loss][-100:]
        if len(before) < 20 or loss <= ratio * statistics.median(before):
            return None
        self.loss_spikes += 1
        return loss / statistics.median(before)

    def go_back(self, saved: "TrainState") -> int:
        """Return to the state of a checkpoint, and count the updates after it whose data is left out."""
        left_out = self.step + self.updates_left_out - saved.step - saved.updates_left_out
        kept = {"updates_left_out": saved.updates_left_out + left_out, "loss_spikes": self.loss_spikes}
        kept["plateau_said"] = self.plateau_said
        vars(self).update(vars(saved) | kept)
        return left_out

    @property
    def padding_share(self) -> float:
        """The share of padding among all positions so far."""
        return 1 - self.tokens / self.positions

    def take_means(self) -> dict[str, float | None]:
        """Return the means since the last call, losses in nats; None if every update was skipped."""
        means = {name: total / count if count else None for name, (total, count) in self.window.items()}
        self.window = {}
        return means


@dataclass
class Stopwatch:
    """Measures training from some time on, by `time.monotonic`, to the end of the last update that it has counted."""

    started: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    steps: int = 0
    tokens: int = 0
    waits: list[tuple[float, float]] = field(default_factory=list)  # for data, when each began and ended

    def go_on(self) -> "Stopwatch":
        """Return one that goes on where this one has ended: of a later update, the data may have been waited for."""
        return Stopwatch(self.ended, waits=[wait for wait in self.waits if wait[1] > self.ended])

    def count(self, tokens: int, ended: float) -> None:
        """Count an update, its tokens, and when it ended."""
        self.ended = ended
        self.steps += 1
        self.tokens += tokens

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        asked = time.monotonic()
        yield
        self.waits.append((asked, time.monotonic()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside, which is not training."""
        stopped = time.monotonic()
        yield
        self.started += time.monotonic() - stopped

    def rates(self, flops_share: float) -> dict[str, float]:
        """Return the throughput so far; `flops_share` is the MFU of one token a second."""
        seconds = self.ended - self.started
        waited = sum(end - asked for asked, end in self.waits if end <= self.ended)
        return {
            "tokens_per_second": round(self.tokens / seconds, 1),
            "mfu": round(self.tokens / seconds * flops_share, 4),
            "data_wait_share": round(waited / seconds, 4),
            "seconds_per_update": round(seconds / self.steps, 4),
        }


def train_record(
    state: TrainState,
    made_with: dict[str, float],
    rates: dict[str, float],
    corpora: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Make a training line of metrics.jsonl; it ends the window of `state`.

    Args:
        made_with: `learning_rate` and `grad_norm` of the last update, and its settings where there are phases.
        rates: see `Stopwatch.rates`, and `peak_memory` in bytes.
        corpora: of each corpus what has been seen, `blocks` and `passes` among it.
    """
    epoch = sum(seen["passes"] * seen["blocks"] for seen in corpora.values()) / state.blocks
    return {
        "step": state.step,
        **state.take_means(),
        **{name: value if math.isfinite(value) else None for name, value in made_with.items()},  # JSON has no NaN
        "tokens": state.tokens,
        "train_seconds": state.train_milliseconds / 1000,
        "epoch": round(epoch, 4),
        **{name: getattr(state, name) for name in COUNTERS},
        **rates,
        "padding_share": round(state.padding_share, 4),
        "data_digest": f"{state.data_digest:016x}",
        "corpora": corpora,
    }


def eval_record(state: TrainState, means: dict[str, float], unigram_loss: float) -> dict[str, Any]:
    """Make an evaluation line of metrics.jsonl, from `means` of what the objective measures and `loss` among it."""
    return {
        "step": state.step,
        "tokens": state.tokens,
        **{f"eval_{name}": mean if math.isfinite(mean) else None for name, mean in means.items()},
        "eval_perplexity": math.exp(means["loss"]) if means["loss"] < 700 else None,
        "unigram_loss": unigram_loss,
    }


def format_accuracies(record: dict[str, Any]) -> list[str]:
    """Format the accuracies that a pair objective measures beside the loss."""
    return [
        f"{name.removeprefix('eval_').replace('_', ' ')} {number(value, '.3f')}"
        for name, value in record.items()
        if name.endswith("_accuracy")
    ]


def format_train_line(record: dict[str, Any], max_steps: int, max_seconds: float = math.inf) -> str:
    """Format a training record as one aligned line of the log; `max_seconds` is how long the run trains at most."""
    left = (max_steps - record["step"]) * record["seconds_per_update"]
    left = max(0.0, min(left, max_seconds - record["train_seconds"]))
    skipped = [f"{record[name]} {name}" for name in ("nonfinite_updates", "overflows", "loss_spikes") if record[name]]
    return "  ".join(
        [
            f"step {record['step']:>{len(str(max_steps))}}/{max_steps}",
            f"loss {number(record['loss'], '6.3f')}",
            *format_accuracies(record),
            f"lr {record['learning_rate']:.2e}",
            f"grad norm {number(record['grad_norm'], '6.2f')}",
            f"{format_count(record['tokens']):>5} tokens",
            f"{format_count(record['tokens_per_second']):>5} tokens/s",
            f"mfu {record['mfu']:4.0%}",
            f"data wait {record['data_wait_share']:4.0%}",
            f"memory {record['peak_memory'] / 1e9:.1f} GB",
            f"left {format_duration(left)}",
            *skipped,
        ]
    )


def format_data_line(state: TrainState, corpora: dict[str, dict[str, float]], max_steps: int) -> str:
    """Format what has been seen of each corpus, see `train_record`, as a line of the log."""
    seen = ", ".join(
        f"{name} {format_count(corpus['tokens'])} ({corpus['passes']:.2f} passes)" for name, corpus in corpora.items()
    )
    step = f"step {state.step:>{len(str(max_steps))}}/{max_steps}"
    text = f"{step}  tokens seen: {seen}; padding {state.padding_share:.1%}"
    return textwrap.fill(text, LINE_CHARACTERS, subsequent_indent=" " * len(f"{step}  "), break_on_hyphens=False)


def format_eval_line(record: dict[str, Any], max_steps: int) -> str:
    """Format an evaluation record as a line of the log."""
    return "  ".join(
        [
            f"step {record['step']:>{len(str(max_steps))}}/{max_steps}",
            f"held-out loss {number(record['eval_loss'], '.3f')}",
            f"perplexity {number(record['eval_perplexity'], '.2f')}",
            f"(unigram model: loss {record['unigram_loss']:.3f})",
            *format_accuracies(record),
        ]
    )
