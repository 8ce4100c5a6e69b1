"""The cached mode of training data: blocks from token stores on disk."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from recipe.arguments import CorpusArguments, PretrainArguments
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
from recipe.data.sampling import BlockOrder, permute
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
        copies = self.find_copies()
        self.packed = [
            PackedCorpus(store, preprocessor.format, copies.get(number)) for number, store in enumerate(self.stores)
        ]
        for packed in self.packed:
            packed.build(process_index)
            check_tokens(packed.store.corpus, packed.counts["tokens"], args.max_seq_length)
            if args.packing in PAIR_PACKINGS:
                first = np.arange(min(LABELLED_BLOCKS, len(packed)))
                sample = permute(first, len(packed), Purpose.PARTNER, args.seed).tolist()
                self.pair_labels.append(preprocessor.count_labels(map(packed.block, sample)))
                preprocessor.check_pairs(packed.store.corpus, self.pair_labels[-1], packed.counts["documents"])

        sizes = [len(packed) for packed in self.packed]
        train_sizes, eval_sizes = sizes[: len(args.corpora)], sizes[len(args.corpora) :]
        is_apart = bool(args.eval_corpora)
        held_out = count_held_out(args, train_sizes)
        self.order = BlockOrder(train_sizes, held_out, given_weights(args.corpora), args.seed)
        self.num_train = self.order.num_train
        corpora, blocks = self.order.held_out()
        if is_apart:
            held_out = apportion_eval_blocks(args.eval_blocks, args.eval_corpora, eval_sizes)
            held_out = list(map(min, held_out, eval_sizes))
            corpora, blocks = BlockOrder(eval_sizes, held_out, None, args.seed).held_out()
            corpora += len(args.corpora)
        self.hold_out(corpora, blocks)
        files = [file for packed in self.packed for file in packed.files_of_others()]
        self.verification = Verification(files if verifies else [])
        if args.prepare_only:
            self.verification.run(threading.Event())
            self.verification.report()
        for number, packed in enumerate(self.packed):
            packed.hold_out(blocks[corpora == number])

    def find_copies(self) -> dict[int, list[np.ndarray]]:
        """Find, for each corpus to train on and each of its shards, which documents are copies of earlier ones."""
        if not self.args.deduplicate:
            return {}
        checksums = [store.checksums() for store in self.stores[: len(self.args.corpora)]]
        is_copy = find_copies(np.concatenate([shard for corpus in checksums for shard in corpus]))
        shards = iter(np.split(is_copy, np.cumsum([len(shard) for corpus in checksums for shard in corpus])[:-1]))
        return {number: [next(shards) for _ in corpus] for number, corpus in enumerate(checksums)}

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return corpus, visit and block of the run's positions; with static masks, visits repeat."""
        corpora, visits, blocks = self.order.locate(positions)
        return corpora, visits % STATIC_VISITS if self.args.masking == "static" else visits, blocks

    def block(self, corpus: int, visit: int, number: int) -> Block:
        """Read a block from its corpus's packed store."""
        return self.packed[corpus].block(number, pass_key(Purpose.PARTNER, self.args.seed, corpus, visit))

    def identity(self) -> dict[str, list[Any]]:
        """Return documents, tokens, blocks and a digest of the texts of each corpus: a resume recognises its data."""
        return self.name_corpora(
            [packed.counts["documents"], packed.counts["tokens"], len(packed), packed.texts[:16]]
            for packed in self.packed
        )

    def describe(self) -> list[str]:
        """Return a line for each corpus: its documents, tokens and blocks, and what was dropped."""
        lines = []
        blocks_seen = self.args.max_steps * self.args.train_batch_size * self.order.quotas / self.order.quotas.sum()
        passes = float((blocks_seen / self.num_train).max())
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
        """Return per-corpus totals so far; passes follow from the blocks, and `streams` is empty in this mode."""
        return {
            name: dict(zip(COUNTED, seen, strict=True))
            | {"passes": round(seen[0] / int(self.num_train[number]), 4)}
            | self.packed[number].left_out
            | self.pair_record(number)
            for number, (name, seen) in enumerate(zip(self.names, counts, strict=True))
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
        sizes = self.args.train_batch_size, self.args.per_device_train_batch_size
        batches = MicroBatches(self.locate, self.example, self.preprocessor.train_collator, *sizes, rank)
        updates = batches.iterate(resume.first_update, last_update, self.args.dataloader_num_workers)
        made = (prepare(UpdateData(share, Counts.of_rows(rows, len(self.names)))) for share, rows in updates)
        with self.verification.running(), closing(one_ahead(made, is_stopping)) as ahead:
            for update in ahead:
                try:
                    self.verification.report()
                except UserError as error:
                    raise UserError(f"{error}. {TRAINED_ON_DAMAGE}") from None
                yield update

    def name_rows(self, update: int) -> list[str]:
        """Say of each row of an update which block of which corpus it is, and in which visit."""
        size = self.args.train_batch_size
        located = zip(*self.locate(np.arange(update * size, (update + 1) * size)), strict=True)
        return [f"{self.names[corpus]}, block {block:,}, visit {visit + 1}" for corpus, visit, block in located]

    def sample_blocks(self) -> Iterator[np.ndarray]:
        """Yield the ids of the first blocks in the order of training."""
        positions = np.arange(min(UNIGRAM_TOKENS // self.args.max_seq_length, int(self.num_train.sum())))
        for where in zip(*self.locate(positions), strict=True):
            yield self.block(*where).input_ids
