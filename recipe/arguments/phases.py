"""The phases of a run: updates in a row with a length of blocks, a batch, masks and weights of their own."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from recipe.arguments.checks import NonNegativeFloat, PositiveInt, Rule, SequenceLength, Share, check_values
from recipe.base.errors import UserError, did_you_mean, require

if TYPE_CHECKING:
    from recipe.arguments.pretraining import PretrainArguments

Steps = Annotated[int | float, Rule("1 or more, or a share below 1", lambda n: 0 < n < 1 or (n > 0 and n % 1 == 0))]


@dataclass(kw_only=True)
class PhaseArguments:
    """One entry of `phases`; what it leaves out is as the run's own option says."""

    steps: Steps
    """Number of updates, or below 1 their share of `max_steps`."""
    max_seq_length: SequenceLength | None = None
    """Length of a block in tokens; the run's own is the longest. A micro-batch has as many more shorter blocks."""
    train_batch_size: PositiveInt | list[PositiveInt] | None = None
    """Number of blocks in an update; `[64, 4096]` grows from 64 to 4096 over the phase, in multiples of 64."""
    mlm_probability: Share | list[Share] | None = None
    """Share of the tokens to predict; `[0.3, 0.15]` goes from 30 % to 15 % over the phase."""
    weights: dict[str, NonNegativeFloat] | None = None
    """Share of each corpus, by its name, relative to the others; 0 leaves one out."""


class Settings(NamedTuple):
    """What an update is made with."""

    phase: int  # its number, from 1
    max_seq_length: int
    train_batch_size: int  # blocks
    mlm_probability: float


class Stretch(NamedTuple):
    """Updates in a row whose blocks have one length, and whose corpora have the same weights."""

    first: int  # update, from 0
    max_seq_length: int
    weights: list[float] | None  # of `corpora`; None: their sizes


class Stage(NamedTuple):
    """Updates in a row with as many blocks of the same length each."""

    first: int  # update, from 0
    phase: int  # number, from 0
    max_seq_length: int
    train_batch_size: int
    blocks: int  # of the run before it
    positions: int  # of the run before it


class Timeline:
    """What each update of a run is made with, as its `phases` say; the last phase goes on beyond `max_steps`.

    Raises:
        UserError: the phases do not add up to `max_steps`, or one of them has a value that cannot be.
    """

    def __init__(self, args: "PretrainArguments | SimpleNamespace") -> None:
        phases = args.phases or [PhaseArguments(steps=args.max_steps)]
        self.is_one = not args.phases
        for number, phase in enumerate(phases):
            check_values(phase, f" of phase {number + 1}")
        steps = [phase.steps * (args.max_steps if phase.steps < 1 else 1) for phase in phases]
        missing = args.max_steps - sum(steps)
        if abs(missing) >= 0.5:
            raise UserError(
                f"`phases` have {sum(steps):,.10g} updates together, and `max_steps` is {args.max_steps:,}: change the "
                f"`steps` of one by {missing:+,.10g}, or `max_steps`"
            )
        ends = [round(end) for end in accumulate(steps)]
        self.bounds = list(zip([0, *ends], ends, strict=False))  # of each phase, its first update and the next one's
        self.masks: list[list[float]] = []
        self.stages: list[Stage] = []
        self.stretches: list[Stretch] = []
        blocks = positions = 0
        for number, (phase, (first, end)) in enumerate(zip(phases, self.bounds, strict=True)):
            check_phase(args, phase, number + 1, end - first)
            length = phase.max_seq_length or args.max_seq_length
            self.masks.append(as_ramp(phase.mlm_probability or args.mlm_probability))
            for at, size, count in batch_stages(as_ramp(phase.train_batch_size or args.train_batch_size), first, end):
                self.stages.append(Stage(at, number, length, size, blocks, positions))
                blocks, positions = blocks + size * count, positions + size * count * length
            weights = [corpus.weight for corpus in args.corpora if corpus.weight is not None] or None
            if phase.weights is not None:
                weights = [phase.weights[corpus.name] for corpus in args.corpora]
            stretch = Stretch(first, length, weights)
            if not self.stretches or self.stretches[-1][1:] != stretch[1:]:
                self.stretches.append(stretch)

    @classmethod
    def of_record(cls, values: dict[str, Any]) -> "Timeline":
        """Make the timeline of a run from its recorded arguments."""
        phases = [PhaseArguments(**phase) for phase in values["phases"]]
        corpora = [SimpleNamespace(**corpus) for corpus in values["corpora"]]
        return cls(SimpleNamespace(**values | {"phases": phases, "corpora": corpora}))

    def differs_at(self, other: "Timeline", updates: int) -> int | None:
        """Return one of so many updates that the two timelines make differently, if there is; of a ramp, the last."""
        firsts = {stage.first for timeline in (self, other) for stage in timeline.stages}
        # Between these, masks change evenly and all else stays.
        for update in sorted({*firsts, *(first - 1 for first in firsts), updates - 1}):
            mine, others = ((t.at(update)[1:], t.stretches[t.stretch(update)].weights) for t in (self, other))
            if 0 <= update < updates and mine != others:
                return update
        return None

    def stage(self, update: int) -> Stage:
        """Return the stage of an update; updates count from 0."""
        return self.stages[bisect_right(self.stages, update, key=lambda stage: stage.first) - 1]

    def stretch(self, update: int) -> int:
        """Return the number of the stretch of an update."""
        return bisect_right(self.stretches, update, key=lambda stretch: stretch.first) - 1

    def at(self, update: int) -> Settings:
        """Return what an update is made with."""
        _, phase, length, size, *_ = self.stage(update)
        start, end = self.masks[phase]
        first, after = self.bounds[phase]
        share = start + (end - start) * min(1.0, (update - first) / max(1, after - 1 - first))
        return Settings(phase + 1, length, size, share)

    def blocks(self, update: int) -> int:
        """Return the number of blocks in the updates before one."""
        stage = self.stage(update)
        return stage.blocks + (update - stage.first) * stage.train_batch_size

    def positions(self, update: int) -> int:
        """Return the number of positions, padding included, in the updates before one."""
        stage = self.stage(update)
        return stage.positions + (update - stage.first) * stage.train_batch_size * stage.max_seq_length

    def smallest_batch(self, phase: int) -> int:
        """Return the smallest `train_batch_size` of a phase, whose number counts from 1."""
        return min(stage.train_batch_size for stage in self.stages if stage.phase == phase - 1)

    def owner(self, stage: Stage) -> str:
        """Return ` of phase 2` for a stage, to name it in an error; nothing where the run has no phases."""
        return "" if self.is_one else f" of phase {stage.phase + 1}"

    @property
    def lengths(self) -> list[int]:
        """The lengths of blocks, each once, ascending."""
        return sorted({stage.max_seq_length for stage in self.stages})

    @property
    def length_changes(self) -> list[int]:
        """The updates from which on blocks have another length than before."""
        pairs = pairwise(self.stretches)
        return [after.first for before, after in pairs if before.max_seq_length != after.max_seq_length]

    @property
    def masked_share(self) -> float:
        """The largest share of a row that is masked."""
        return max(map(max, self.masks))

    def describe_phase(self, number: int) -> str:
        """Describe a phase."""
        first, end = self.bounds[number]
        stages = [stage for stage in self.stages if stage.phase == number]
        sizes = dict.fromkeys([stages[0].train_batch_size, stages[-1].train_batch_size])
        weights = self.stretches[self.stretch(first)].weights
        shares = " : ".join(f"{weight:g}" for weight in weights or [])
        masks = " to ".join(f"{100 * share:.3g}" for share in dict.fromkeys(self.masks[number]))
        return (
            f"updates {first + 1:,} to {end:,}: {' to '.join(f'{size:,}' for size in sizes)} blocks of "
            f"{stages[0].max_seq_length} tokens, {masks} % masked" + (f", corpora by {shares}" if shares else "")
        )


def check_phase(args: "PretrainArguments | SimpleNamespace", phase: PhaseArguments, number: int, updates: int) -> None:
    """Raise a `UserError` if a phase has a value that cannot be; the first one has number 1."""

    def check(condition: bool, name: str, value: Any, remedy: str) -> None:
        require(condition, name, value, remedy, f" of phase {number}" if args.phases else "")

    check(updates >= 1, "steps", phase.steps, f"that is no update of {args.max_steps:,}: give more, or leave it out")
    length = phase.max_seq_length or args.max_seq_length
    remedy = f"the run's own is {args.max_seq_length}, which is the longest: raise that, or lower this one"
    check(length <= args.max_seq_length, "max_seq_length", length, remedy)
    for name in ("train_batch_size", "mlm_probability"):
        if isinstance(ramp := getattr(phase, name), list):
            check(len(ramp) == 2, name, ramp, "a ramp is its first and its last value, as in [64, 4096]")
            check(ramp[0] != ramp[1], name, ramp, f"that goes nowhere: give {ramp[0]}, or two values that differ")
            check(updates > 1, name, ramp, "a phase of one update has no ramp: give it more, or one value")
    if isinstance(ramp := phase.train_batch_size, list):
        small, large = sorted(ramp)
        times = large // small
        remedy = f"it goes by multiples of the smaller one: give {(times + 1) * small:,} for {large:,}"
        check(large % small == 0, "train_batch_size", ramp, remedy)
        remedy = f"that is {times} batches in {updates} updates: give the phase more, or the ramp a larger step"
        check(times <= updates, "train_batch_size", ramp, remedy)
    for share in as_ramp(phase.mlm_probability or args.mlm_probability):
        remedy = f"that is less than one masked token in a block of `max_seq_length` ({length}): raise either"
        check(share * (length - 2) >= 1, "mlm_probability", share, remedy)
    if phase.weights is not None:
        names = [corpus.name for corpus in args.corpora]
        for name in phase.weights:
            remedy = f"`corpora` are {', '.join(names)}{did_you_mean(name, names)}"
            check(name in names, "weights", phase.weights, remedy)
        missing = ", ".join(name for name in names if name not in phase.weights)
        check(not missing, "weights", phase.weights, f"{missing} has none: give each corpus one; 0 leaves it out")
        check(any(phase.weights.values()), "weights", phase.weights, "give one of them more than 0")


def as_ramp(value: int | float | list) -> list:
    """Return the first and the last value of a phase."""
    return value if isinstance(value, list) else [value, value]


def batch_stages(ramp: list[int], first: int, end: int) -> list[tuple[int, int, int]]:
    """Split a phase into stages of equal batches: first update, blocks an update, updates of each.

    A ramp goes from its one end to the other by its smaller value, in stages that are equally long.
    """
    sizes = [ramp[0]]
    if ramp[0] != ramp[1]:
        step = min(ramp) if ramp[1] > ramp[0] else -min(ramp)
        sizes = list(range(ramp[0], ramp[1] + step, step))
    starts = [first - (-number * (end - first) // len(sizes)) for number in range(len(sizes) + 1)]
    spans = zip(starts, sizes, starts[1:], strict=False)
    return [(start, size, following - start) for start, size, following in spans if following > start]
