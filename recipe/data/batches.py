"""The micro-batches of an update, as training sees them in both modes of the data.

1. Blocks come from token stores on disk (`CachedData`) or from the corpora as they are read (`StreamedData`); some are
   held out for evaluation.
2. An order says which block stands at which position of the run. Update `t` holds the same blocks with the same masks,
   whatever the number of processes, workers or micro-batches.
3. `TrainingData.train_updates` yields what one process has of each update, from any update on, with its counts.
"""

import signal
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.base.errors import UserError
from recipe.base.model_files import count_ids
from recipe.base.workers import start_worker, starting_workers
from recipe.data.masking import DynamicMaskingCollator
from recipe.data.packing import CONTINUES, RANDOM, Block
from recipe.data.preprocessor import Preprocessor
from recipe.data.sampling import apportion
from recipe.data.streaming import Buffer
from recipe.data.token_store import LEFT_OUT
from recipe.data.tokenizer import role_ids

Batch = dict[str, torch.Tensor]

EVAL_VISIT = -1  # held-out blocks have the masks of this visit, every time
EMPTY_BLOCK = -1  # number of the blocks that fill the last evaluation micro-batches up
SCALARS = ("failed", "lost", "stopping", "milliseconds", "masked", "pairs", "digest")  # of an update
COUNTED = ("blocks", "tokens", "documents")  # of each corpus, in an update


@dataclass(frozen=True)
class Rank:
    """Which of how many training processes this is."""

    index: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class Resume:
    """Where in its data a run goes on."""

    first_update: int = 0  # whose data comes first, counted from the start of the run
    lanes: dict[str, Any] = field(default_factory=dict)  # in streaming mode, of all processes, as a checkpoint has them
    skipped_updates: int = 0  # that lie between those lanes and `first_update`; their data is passed over


class Counts:
    """The counts of an update as one array of integers, which processes can add up at once."""

    def __init__(self, num_corpora: int, array: np.ndarray | None = None) -> None:
        sizes = len(SCALARS), num_corpora * len(COUNTED), num_corpora * (len(LEFT_OUT) + 1)
        self.array = np.zeros(sum(sizes), np.int64) if array is None else array
        # See `SCALARS`: processes that `failed` to read data, have `lost` the run's folder or are `stopping`, the
        # `milliseconds` that the run has trained by the main process's clock, `masked` tokens, `pairs` of two parts,
        # and the `digest` of all blocks and of what is masked in them.
        self.scalars, corpora, streams = np.split(self.array, np.cumsum(sizes[:2]))
        self.corpora = corpora.reshape(num_corpora, -1)  # (corpora, 3), see `COUNTED`
        # (corpora, 4), in streaming mode the documents dropped so far, see `LEFT_OUT`; and the passes in millionths, in
        # streaming mode summed over lanes.
        self.streams = streams.reshape(num_corpora, -1)

    @classmethod
    def of_rows(cls, rows: np.ndarray, num_corpora: int) -> "Counts":
        """Count rows, given as (rows, 6) int64, see `ROW`."""
        counts = cls(num_corpora)
        corpus, tokens, documents, masked, pairs, digests = rows.T
        counts.scalars[SCALARS.index("masked") :] = masked.sum(), pairs.sum(), digests.sum()
        np.add.at(counts.corpora, corpus, np.stack([np.ones_like(tokens), tokens, documents], 1))
        return counts

    @classmethod
    def without_data(cls, num_corpora: int, reason: str) -> "Counts":
        """Count a process that has no more data, because it `failed`, is `stopping` or has `lost` the run's folder."""
        counts = cls(num_corpora)
        counts[reason] = 1
        return counts

    def __getitem__(self, name: str) -> int:
        """Return one of `SCALARS` by its name."""
        return int(self.scalars[SCALARS.index(name)])

    def __setitem__(self, name: str, value: int) -> None:
        """Set one of `SCALARS` by its name."""
        self.scalars[SCALARS.index(name)] = value

    @property
    def tokens(self) -> int:
        """Tokens of all corpora, without padding."""
        return int(self.corpora[:, COUNTED.index("tokens")].sum())


@dataclass
class UpdateData:
    """What one process has of an update."""

    micro_batches: list[Batch]
    counts: Counts  # of these micro-batches, to be summed over the processes
    # In streaming mode, the lanes of this process after the update; empty in cached mode.
    lanes: dict[tuple[int, int], Buffer] = field(default_factory=dict)


class Row(NamedTuple):
    """Which block a row of an update is."""

    corpus: int
    visit: int
    block: int
    max_seq_length: int


@dataclass
class MicroBatches(torch.utils.data.Dataset):
    """The micro-batches of one process, each by its update and its number there."""

    rows: Callable[[int], list[Row]]  # of a whole update
    example: Callable[[Row], dict[str, Any]]  # for the collator
    collator: Callable[[int], DynamicMaskingCollator]  # of an update
    sizes: Callable[[int], list[int]]  # blocks of each of the micro-batches that a process has of an update
    rank: Rank  # of the process; of the blocks of an update, each process takes a micro-batch in turn
    # The rows of one update: locating them all at once costs little more than a micro-batch's.
    update: int = -1
    located: list[Row] = field(default_factory=list)

    def __getitem__(self, place: tuple[int, int]) -> Batch | UserError:
        """Return a micro-batch; or an error as it is, since one raised in a worker would bring its traceback along."""
        try:
            return self.micro_batch(*place)
        except UserError as error:
            return error

    def micro_batch(self, update: int, number: int) -> Batch:
        """Make a micro-batch, or raise a `UserError` if what is stored of its blocks is damaged."""
        if update != self.update:
            self.located = self.rows(update)
            self.update = update
        sizes = self.sizes(update)
        first = self.rank.world_size * sum(sizes[:number]) + self.rank.index * sizes[number]
        return self.collator(update)([self.example(row) for row in self.located[first : first + sizes[number]]])

    def iterate(
        self, first_update: int, last_update: int, num_workers: int
    ) -> Iterator[tuple[list[Batch], np.ndarray]]:
        """Return an iterator over the micro-batches of each update, and their rows (`ROW`).

        They go from `first_update` to before `last_update`. Workers are forked from the thread that calls this, and
        stay one update ahead.
        """
        updates = range(first_update, last_update)
        most = max(len(self.sizes(update)) for update in (first_update, last_update - 1)) if updates else 1
        loader = DataLoader(
            self,
            sampler=((update, number) for update in updates for number in range(len(self.sizes(update)))),
            batch_size=None,
            collate_fn=to_numpy,  # type: ignore[arg-type]  # given one item where there is no batch size
            num_workers=num_workers,
            worker_init_fn=start_worker,
            prefetch_factor=max(2, -(-most // num_workers)) if num_workers else None,
            # DataLoader draws a seed for its workers; not from the generator that dropout uses.
            generator=torch.Generator(),
        )
        with starting_workers("dataloader_num_workers"):
            items = iter(loader)

        def collect(update: int) -> tuple[list[Batch], np.ndarray]:
            arrays = [unless_error(next(items)) for _ in self.sizes(update)]
            rows = np.concatenate([batch.pop("rows") for batch in arrays])
            return [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in arrays], rows

        return map(collect, updates)


@contextmanager
def noticing_dead_workers() -> Iterator[None]:
    """Have the end of a worker process interrupt the main thread inside the context, where it waits for its data.

    Without that, a worker that is killed while it sends something leaves its reader waiting for the rest.

    Raises:
        UserError: a worker was killed, now or since the last time.
    """

    def check(*_: object) -> None:
        _error_if_any_worker_fails()

    handler = signal.signal(signal.SIGCHLD, check)
    try:
        check()
        yield
    except RuntimeError as raised:
        # Over the error that has the signal's name, torch may put one that says `exited unexpectedly`.
        error = raised.__cause__ if isinstance(raised.__cause__, RuntimeError) else raised
        if not str(error).startswith("DataLoader worker"):
            raise
        cause = "memory ran out: lower `dataloader_num_workers` or give the job more"
        if "Bus error" in str(error):
            cause = (
                "/dev/shm is full (lower `dataloader_num_workers`, or give the container more, docker: --shm-size), or "
                "a file of the token store was cut short while it was read (restore or remove the store)"
            )
        raise UserError(
            f"{str(error).strip(' .')}. Probably {cause}. Go on with --resume_from_checkpoint latest"
        ) from error
    finally:
        signal.signal(signal.SIGCHLD, handler)


def unless_error(sent: Any) -> Any:
    """Return what a worker has sent, or raise it if it is an error."""
    if isinstance(sent, UserError):
        raise sent
    return sent


def to_numpy(batch: Batch | UserError) -> dict[str, np.ndarray] | UserError:
    """Convert a batch to arrays, which a worker sends by value.

    A tensor would hold an open file and shared memory until it is freed, and an update of 8,192 rows on one device is
    more of them than most systems allow.
    """
    return batch if isinstance(batch, UserError) else {name: tensor.numpy() for name, tensor in batch.items()}


def as_it_is(update: UpdateData) -> UpdateData:
    """Return what a process has of an update without preparing it."""
    return update


class TrainingData(ABC):
    """Training and held-out blocks of a run; what training calls of either mode. It is ready once it is constructed."""

    def __init__(self, args: PretrainArguments, preprocessor: Preprocessor) -> None:
        self.args = args
        self.preprocessor = preprocessor
        # Those to train on, then those to evaluate on; a block's masks depend on its corpus's place here.
        self.corpora = [*args.corpora, *args.eval_corpora]
        self.names = [corpus.name for corpus in args.corpora]  # of those to train on
        self.pair_labels: list[Counter[int]] = []  # of some blocks of each corpus, where blocks are pairs

    @abstractmethod
    def identity(self) -> dict[str, list[Any]]:
        """Return, for each corpus, what a resume recognises its data by."""

    def stamps(self) -> dict[str, list[Any]]:
        """Return, for each corpus that `identity` knows in part, what changes with its text, and in a copy too."""
        return {}

    @abstractmethod
    def describe(self) -> list[str]:
        """Return lines for the log: what there is of each corpus."""

    @abstractmethod
    def block(self, row: Row) -> Block:
        """Return the block of a row, as it is in its visit."""

    @abstractmethod
    def train_updates(
        self,
        rank: Rank,
        resume: Resume,
        last_update: int,
        is_stopping: Callable[[], bool],
        prepare: Callable[[UpdateData], UpdateData] = as_it_is,
    ) -> Generator[UpdateData]:
        """Yield what a process has of each update, the next of which a thread makes ahead.

        Args:
            rank: which of the processes.
            resume: where to begin.
            last_update: number of the update to end before.
            is_stopping: whether this process was asked to stop, which ends a wait for data.
            prepare: what that thread does with an update at the end.

        Raises:
            InterruptedWaitError: the process was asked to stop while it waited.
            UserError: a corpus cannot be read any more.
        """

    @abstractmethod
    def name_rows(self, update: int) -> list[str]:
        """Say of each row of an update, in their order on one process, where its block is from."""

    @abstractmethod
    def corpora_record(self, counts: list[list[int]], streams: np.ndarray) -> dict[str, dict[str, float]]:
        """Return per-corpus totals so far (blocks, tokens, documents, passes, dropped), as metrics.jsonl has them.

        Args:
            counts: of each corpus, see `COUNTED`, since the start of the run.
            streams: see `Counts`; what was dropped there is of what was read, which is ahead of what was seen.
        """

    @abstractmethod
    def sample_blocks(self) -> Iterator[np.ndarray]:
        """Yield the ids of some blocks that are trained on."""

    def name_corpora(self, values: Iterable[list[Any]]) -> dict[str, list[Any]]:
        """Name values, one for each of `corpora`, by their corpus; those to evaluate on have a prefix."""
        names = [*self.names, *(f"eval {corpus.name}" for corpus in self.args.eval_corpora)]
        return dict(zip(names, values, strict=True))

    def pair_record(self, corpus: int) -> dict[str, float]:
        """Return which share of the pairs of a corpus is random or swapped; nothing where blocks are no pairs."""
        labels = self.pair_labels[corpus] if self.pair_labels else Counter()
        pairs = labels[CONTINUES] + labels[RANDOM]
        return {"negative_pairs": round(labels[RANDOM] / pairs, 3)} if pairs else {}

    def describe_pairs(self, corpus: int) -> str:
        """Say for the log what `pair_record` returns."""
        kind = "are swapped" if self.args.packing == "sentence_order" else "have parts of two documents"
        return "".join(f"; {share:.0%} of the pairs {kind}" for share in self.pair_record(corpus).values())

    def hold_out(self, corpora: np.ndarray, blocks: np.ndarray) -> None:
        """Note the (corpus, block) of every held-out block, (n,) integers each."""
        # `eval_corpora` are counted from the end: their masks do not depend on how many there are to train on.
        self.eval_corpora = corpora - len(self.corpora) if self.args.eval_corpora else corpora
        self.eval_blocks = blocks

    def example(self, row: Row) -> dict[str, Any]:
        """Return a block as the collator takes it; `EMPTY_BLOCK` gives one with nothing to predict."""
        block = self.preprocessor.empty_block if row.block == EMPTY_BLOCK else self.block(row)
        return self.preprocessor.example(block, row.corpus, row.visit, row.block)

    def eval_batches(self, rank: Rank) -> MicroBatches:
        """Return all held-out blocks as one update, with as many micro-batches in every process; empty ones are last.

        They have the length of the run, whatever a phase trains with, so that all evaluations are of the same tokens.
        """
        size, length = self.args.per_device_eval_batch_size, self.args.max_seq_length
        count = -(-len(self.eval_blocks) // (size * rank.world_size))
        missing = size * rank.world_size * count - len(self.eval_blocks)
        corpora = np.pad(self.eval_corpora, (0, missing)).tolist()
        blocks = np.pad(self.eval_blocks, (0, missing), constant_values=EMPTY_BLOCK).tolist()
        rows = list(map(Row, corpora, repeat(EVAL_VISIT), blocks, repeat(length)))
        collator = self.preprocessor.eval_collator
        return MicroBatches(lambda _: rows, self.example, lambda _: collator, lambda _: [size] * count, rank)

    def unigram_loss(self) -> float:
        """Return the cross-entropy, in nats, of the held-out targets under the frequencies of some training blocks.

        With add-one smoothing over the vocabulary. This is what a model without context would reach.
        """
        tokenizer = self.preprocessor.tokenizer
        counts = np.zeros(count_ids(tokenizer.get_vocab()))
        counts[[*tokenizer.get_vocab().values()]] = 1
        for ids in self.sample_blocks():
            counts += np.bincount(ids, minlength=len(counts))
        counts[role_ids(tokenizer)] = 0
        nats = -np.log(counts / counts.sum(), where=counts > 0, out=np.zeros_like(counts))
        batches, _ = next(self.eval_batches(Rank()).iterate(0, 1, num_workers=0))
        labels = torch.cat([batch["labels"].flatten() for batch in batches]).numpy()
        labels = labels[labels != -100]
        return float(nats[labels].sum()) / max(1, len(labels))


def given_weights(corpora: list[CorpusArguments]) -> list[float] | None:
    """Return the corpora's weights, or None where they have none and their sizes decide."""
    weights = [corpus.weight for corpus in corpora if corpus.weight is not None]
    return weights if len(weights) == len(corpora) else None


def apportion_eval_blocks(eval_blocks: int, corpora: list[CorpusArguments], sizes: Sequence[float]) -> list[int]:
    """Share held-out blocks among corpora by their weights, or by their sizes where they have none."""
    weights = given_weights(corpora)
    return apportion(eval_blocks, list(sizes) if weights is None else weights)
