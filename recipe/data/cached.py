"""The cached mode of training data: blocks from token stores on disk."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.arguments.phases import Stretch
from recipe.arguments.pretraining import PAIR_PACKINGS
from recipe.base.errors import UserError
from recipe.base.hashing import Purpose, pass_key
from recipe.base.workers import one_ahead
from recipe.data.batches import (
    COUNTED,
    Counts,
    MicroBatches,
    Rank,
    Resume,
    Row,
    TrainingData,
    UpdateData,
    apportion_eval_blocks,
    as_it_is,
    given_weights,
)
from recipe.data.hygiene import find_copies
from recipe.data.integrity import Verification
from recipe.data.packed_corpus import PackedCorpus
from recipe.data.packing import Block
from recipe.data.preprocessor import Preprocessor
from recipe.data.sampling import BlockOrder, draw_held_out, permute
from recipe.data.token_store import TokenStore

TRAINED_ON_DAMAGE = (
    "The updates since this start may have been trained on it: to be sure, resume from a checkpoint that is older"
)
LABELLED_BLOCKS = 4_000  # of each corpus, on which the labels of pairs are counted
STATIC_VISITS = 10  # that differ (paper, section 4.1: BERT's data was duplicated ten times)
# Of training text, that the unigram baseline is counted on: 0.004 nats more than on 23M, with 50,265 entries.
UNIGRAM_TOKENS = 5_000_000


def find_store(args: PretrainArguments, preprocessor: Preprocessor, corpus: CorpusArguments) -> TokenStore:
    """Find the token store of a corpus, complete or not, or raise the `UserError` of `TokenStore`."""
    given = args.token_store_dir
    root = Path(given).expanduser() if given else Path(datasets.config.HF_DATASETS_CACHE) / "token_stores"
    return TokenStore(corpus, preprocessor.encoder, preprocessor.decontaminator, root)


def plan_views(
    args: PretrainArguments,
    preprocessor: Preprocessor,
    stores: list[TokenStore],
    copies: dict[int, list[np.ndarray]],
) -> dict[int, list[PackedCorpus]]:
    """Plan the views of a run by their length: of every corpus one of the run's own, of those to train on one of each.

    Args:
        copies: see `CachedData.find_copies`.
    """
    return {
        length: [
            PackedCorpus(store, preprocessor.format_of(length), copies.get(number))
            for number, store in enumerate(stores[: None if length == args.max_seq_length else len(args.corpora)])
        ]
        for length in sorted({args.max_seq_length, *args.timeline.lengths})
    }


def check_tokens(corpus: CorpusArguments, tokens: float, max_seq_length: int) -> None:
    """Raise a `UserError` if a corpus has not enough tokens for a block."""
    if tokens < max_seq_length - 2:
        raise UserError(
            f"corpus {corpus.name!r} has {tokens:,.0f} tokens, too few for a single block of `max_seq_length` "
            f"({max_seq_length}); give more text or shorter blocks"
        )


def count_held_out(args: PretrainArguments, num_blocks: Sequence[float]) -> list[int]:
    """Return how many of its blocks each corpus to train on holds out; raise a `UserError` if one has no others."""
    if args.eval_corpora:
        return [0] * len(args.corpora)
    held_out = apportion_eval_blocks(args.eval_blocks, args.corpora, num_blocks)
    for corpus, size, held in zip(args.corpora, num_blocks, held_out, strict=True):
        if held >= size:
            raise UserError(
                f"`eval_blocks` ({args.eval_blocks}) takes {held:,} blocks of corpus {corpus.name!r}, which has "
                f"{size:,.0f}; lower it, or give `eval_corpora`"
            )
    return held_out


class OrderedStretch(NamedTuple):
    """The order of updates in a row whose blocks have one length, and whose corpora have the same weights."""

    max_seq_length: int
    first_block: int  # of the run
    passes: np.ndarray  # (corpora,) float, over each corpus before it
    order: BlockOrder


class CachedData(TrainingData):
    """Training and held-out blocks of a run, from token stores on disk; all processes make what is missing of these.

    Args:
        args: of the run.
        preprocessor: of the run.
        process_index: of all processes.
        verifies: whether this process compares with their checksums the files that it has not just made: before the
            stores are used elsewhere (`prepare_only`), or else while training runs.
    """

    def __init__(
        self, args: PretrainArguments, preprocessor: Preprocessor, process_index: int, verifies: bool = True
    ) -> None:
        super().__init__(args, preprocessor)
        self.stores = [find_store(args, preprocessor, corpus) for corpus in self.corpora]
        for store in self.stores:
            store.build(process_index, args.preprocessing_num_workers, args.max_unreadable_documents)
        num_corpora = len(args.corpora)
        self.views = plan_views(args, preprocessor, self.stores, self.find_copies())
        views = [view for same in self.views.values() for view in same]
        for view in views:
            view.build(process_index)
        self.packed = self.views[args.max_seq_length]
        for packed in self.packed:
            check_tokens(packed.store.corpus, packed.counts["tokens"], args.max_seq_length)
            if args.packing in PAIR_PACKINGS:
                first = np.arange(min(LABELLED_BLOCKS, len(packed)))
                sample = permute(first, len(packed), Purpose.PARTNER, args.seed).tolist()
                self.pair_labels.append(preprocessor.count_labels(map(packed.block, sample)))
                preprocessor.check_pairs(packed.store.corpus, self.pair_labels[-1], packed.counts["documents"])

        sizes = [len(packed) for packed in self.packed]
        train_sizes, eval_sizes = sizes[:num_corpora], sizes[num_corpora:]
        held = draw_held_out(train_sizes, count_held_out(args, train_sizes), args.seed)
        if args.eval_corpora:
            held_out = apportion_eval_blocks(args.eval_blocks, args.eval_corpora, eval_sizes)
            held += draw_held_out(eval_sizes, list(map(min, held_out, eval_sizes)), args.seed)
        self.hold_out(np.repeat(np.arange(len(held)), [len(blocks) for blocks in held]), np.concatenate(held))
        self.left_out = {length: self.leave_out(views, held) for length, views in self.views.items()}
        self.stretches: list[OrderedStretch] = []
        for stretch in args.timeline.stretches:
            self.stretches.append(self.plan_order(stretch))
        files = [file for view in views for file in view.files_of_others()]
        self.verification = Verification(files if verifies else [])
        if args.prepare_only:
            self.verification.run(threading.Event())
            self.verification.report()

    def leave_out(self, views: list[PackedCorpus], held: list[np.ndarray]) -> list[np.ndarray]:
        """Hold blocks out of views, given those of the run's length, and return those that are not trained on.

        In views of another length, these are the blocks that have a token of held-out ones.
        """
        pairs = zip(views, self.packed, held, strict=False)
        left_out = [own if view is base else view.sharing_text(base, own) for view, base, own in pairs]
        for view, blocks in zip(views, left_out, strict=True):
            view.hold_out(blocks)
        for view, blocks in list(zip(views, left_out, strict=True))[: len(self.names)]:
            if len(blocks) == len(view):
                raise UserError(
                    f"`eval_blocks` ({self.args.eval_blocks}) take text of all blocks of {view.format.max_seq_length} "
                    f"tokens of corpus {view.store.corpus.name!r}; lower it, or give `eval_corpora`"
                )
        return left_out

    def plan_order(self, stretch: Stretch) -> "OrderedStretch":
        """Plan the order of a stretch of the run, after those before it.

        Where the weights alone change, each corpus goes on where it is. Blocks of another length begin with the next
        pass over their corpora, since they share the text of blocks that have been passed.
        """
        args, length, num_corpora = self.args, stretch.max_seq_length, len(self.names)
        sizes, left_out = list(map(len, self.views[length][:num_corpora])), self.left_out[length][:num_corpora]
        first_block, passes = args.timeline.blocks(stretch.first), self.passes(stretch.first)
        starts = np.zeros(num_corpora, np.int64)
        if self.stretches:
            before = self.stretches[-1]
            starts = before.order.passed(first_block - before.first_block)
            if length != before.max_seq_length:
                num_train = np.array(sizes) - [len(blocks) for blocks in left_out]
                starts = -(-starts // before.order.num_train) * num_train
        return OrderedStretch(
            length, first_block, passes, BlockOrder(sizes, left_out, stretch.weights, args.seed, starts)
        )

    def passes(self, update: int) -> np.ndarray:
        """Return (corpora,) float: how often each corpus has been read before an update."""
        if not update:
            return np.zeros(len(self.names))
        stretch = self.stretches[self.args.timeline.stretch(update - 1)]
        order = stretch.order
        passed = order.passed(self.args.timeline.blocks(update) - stretch.first_block)
        return stretch.passes + (passed - order.starts) / order.num_train

    def find_copies(self) -> dict[int, list[np.ndarray]]:
        """Find, for each corpus to train on and each of its shards, which documents are copies of earlier ones."""
        if not self.args.deduplicate:
            return {}
        checksums = [store.checksums() for store in self.stores[: len(self.args.corpora)]]
        is_copy = find_copies(np.concatenate([shard for corpus in checksums for shard in corpus]))
        shards = iter(np.split(is_copy, np.cumsum([len(shard) for corpus in checksums for shard in corpus])[:-1]))
        return {number: [next(shards) for _ in corpus] for number, corpus in enumerate(checksums)}

    def rows(self, update: int) -> list[Row]:
        """Return the rows of an update; with static masks, visits repeat."""
        timeline = self.args.timeline
        stretch = self.stretches[timeline.stretch(update)]
        positions = np.arange(timeline.blocks(update), timeline.blocks(update + 1)) - stretch.first_block
        corpora, visits, blocks = stretch.order.locate(positions)
        visits = visits % STATIC_VISITS if self.args.masking == "static" else visits
        return list(map(Row, corpora.tolist(), visits.tolist(), blocks.tolist(), repeat(stretch.max_seq_length)))

    def block(self, row: Row) -> Block:
        """Read a block from its corpus's packed store."""
        key = pass_key(Purpose.PARTNER, self.args.seed, row.corpus, row.visit)
        return self.views[row.max_seq_length][row.corpus].block(row.block, key)

    def identity(self) -> dict[str, list[Any]]:
        """Return documents, tokens, blocks and a digest of the texts of each corpus: a resume recognises its data."""
        return self.name_corpora(
            [packed.counts["documents"], packed.counts["tokens"], len(packed), packed.texts[:16]]
            for packed in self.packed
        )

    def describe(self) -> list[str]:
        """Return a line for each corpus: its documents, tokens and blocks, and what was dropped."""
        lines = []
        passes = float(self.passes(self.args.max_steps).max())
        if self.args.masking == "static" and passes <= STATIC_VISITS:
            lines.append(
                f"warning: `masking` is static, which repeats after {STATIC_VISITS} passes, and `max_steps` makes "
                f"{passes:.3g}: the run is the same as a dynamic one"
            )
        described = zip(self.identity().items(), self.packed, strict=True)
        for number, ((name, (documents, tokens, blocks, _)), packed) in enumerate(described):
            padding = 1 - (tokens + 2 * blocks) / (blocks * self.args.max_seq_length)
            left_out = [f"{count:,} {reason}" for reason, count in packed.left_out.items() if count]
            lines.append(
                f"corpus {name}: {documents:,} documents, {tokens:,} tokens, {blocks:,} blocks "
                f"({padding:.1%} of the positions are padding or between documents)"
                + self.describe_pairs(number)
                + (f"; left out: {', '.join(left_out)}" if left_out else "")
            )
            counts = packed.store.counts()
            lines += self.preprocessor.describe_unknown(name, counts["unknown"], counts["tokens"])
        if self.args.prepare_only:
            given, root = self.args.token_store_dir, self.stores[0].path.parent
            with_stores = "" if given else f", and --token_store_dir {root} where that is not the cache of `datasets`"
            lines.append(f"next: the same command without --prepare_only{with_stores}")
        return lines

    def corpora_record(self, counts: list[list[int]], streams: np.ndarray) -> dict[str, dict[str, float]]:
        """Return per-corpus totals so far; passes are as the process of rank 0 reports them."""
        return {
            name: dict(zip(COUNTED, seen, strict=True))
            | {"passes": round(int(stream[-1]) / 1e6, 4)}
            | self.packed[number].left_out
            | self.pair_record(number)
            for number, (name, seen, stream) in enumerate(zip(self.names, counts, streams, strict=True))
        }

    def train_updates(
        self,
        rank: Rank,
        resume: Resume,
        last_update: int,
        is_stopping: Callable[[], bool],
        prepare: Callable[[UpdateData], UpdateData] = as_it_is,
    ) -> Generator[UpdateData]:
        """Yield what a process has of each update, by its number alone; data is there soon or never."""
        sizes = partial(self.args.micro_batch_sizes, rank.world_size)
        batches = MicroBatches(self.rows, self.example, self.preprocessor.train_collator, sizes, rank)
        updates = batches.iterate(resume.first_update, last_update, self.args.dataloader_num_workers)
        numbered = enumerate(updates, resume.first_update)
        made = (prepare(UpdateData(share, self.count(rows, update, rank))) for update, (share, rows) in numbered)
        with self.verification.running(), closing(one_ahead(made, is_stopping)) as ahead:
            for update in ahead:
                try:
                    self.verification.report()
                except UserError as error:
                    raise UserError(f"{error}. {TRAINED_ON_DAMAGE}") from None
                yield update

    def count(self, rows: np.ndarray, update: int, rank: Rank) -> Counts:
        """Count what a process has of an update, and one of them the passes over each corpus after it."""
        counts = Counts.of_rows(rows, len(self.names))
        if rank.index == 0:
            counts.streams[:, -1] = np.round(self.passes(update + 1) * 1e6)
        return counts

    def name_rows(self, update: int) -> list[str]:
        """Say of each row of an update which block of which corpus it is, and in which visit."""
        return [f"{self.names[row.corpus]}, block {row.block:,}, visit {row.visit + 1}" for row in self.rows(update)]

    def sample_blocks(self) -> Iterator[np.ndarray]:
        """Yield the ids of the first blocks in the order of training without phases, which may begin with a corpus."""
        args, length, num_corpora = self.args, self.args.max_seq_length, len(self.names)
        sizes, left_out = list(map(len, self.packed[:num_corpora])), self.left_out[length][:num_corpora]
        order = BlockOrder(sizes, left_out, given_weights(args.corpora), args.seed)
        count = min(UNIGRAM_TOKENS // length, int(order.num_train.sum()))
        for where in zip(*order.locate(np.arange(count)), strict=True):
            yield self.block(Row(*where, length)).input_ids
