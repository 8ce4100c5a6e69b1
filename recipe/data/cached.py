"""The cached mode of training data: blocks from token stores on disk."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from recipe.arguments import PretrainArguments
from recipe.base.errors import UserError
from recipe.data.batches import COUNTED, UNIGRAM_BLOCKS, Counts, Data, MicroBatches, UpdateData
from recipe.data.hygiene import find_copies
from recipe.data.packed_corpus import PackedCorpus
from recipe.data.packing import Block
from recipe.data.sampling import BlockOrder
from recipe.data.token_store import TokenStore, check_space


class CachedData(Data):
    """Training and held-out blocks of a run, from token stores on disk.

    Args:
        args: of the run.
        tokenizer: what the corpora are encoded with.

    Raises:
        UserError: a corpus that cannot be read, or a disk that is too small for its store.
    """

    def __init__(self, args: PretrainArguments, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(args, tokenizer)
        given = args.token_store_dir
        root = Path(given).expanduser() if given else Path(datasets.config.HF_DATASETS_CACHE) / "token_stores"
        self.stores = [TokenStore(corpus, self.encoder, self.decontaminator, root) for corpus in self.corpora]
        for store in self.stores:
            if not store.is_complete:
                self.check_corpus(store.corpus)
        check_space(root, self.stores)

    def prepare(self, process_index: int) -> None:
        """Make what is not there yet of the stores and their blocks, together with all processes; hold out some blocks.

        Args:
            process_index: of this process among all that do this.

        Raises:
            UserError: a corpus that cannot be read, is too small, or has too few blocks to hold some out; a full disk.
        """
        args = self.args
        for store in self.stores:
            store.build(process_index, args.preprocessing_num_workers, args.max_unreadable_documents)
        copies = self.find_copies()
        self.packed = [PackedCorpus(store, self.format, copies.get(number)) for number, store in enumerate(self.stores)]
        for packed in self.packed:
            packed.build(process_index)
            if packed.counts["tokens"] < args.max_seq_length - 2:
                raise UserError(
                    f"corpus {packed.store.corpus.name!r} has {packed.counts['tokens']} tokens, too few for a single "
                    f"block of `max_seq_length` ({args.max_seq_length}); give more text or shorter blocks"
                )
            if args.predicts_pairs:
                self.check_pairs(packed.store.corpus, packed.count_labels(), packed.counts["documents"])

        sizes = [len(packed) for packed in self.packed[: len(args.corpora)]]
        held_out = [0] * len(sizes) if args.eval_corpora else self.shares(args.corpora, sizes)
        for corpus, size, held in zip(args.corpora, sizes, held_out, strict=True):
            if held >= size:
                raise UserError(
                    f"`eval_blocks` ({args.eval_blocks}) takes {held} blocks of corpus {corpus.name!r}, which has "
                    f"{size}; lower it, or give `eval_corpora`"
                )
        weights = [c.weight for c in args.corpora]
        self.order = BlockOrder(sizes, held_out, None if None in weights else weights, args.seed)
        self.num_train = self.order.num_train
        if args.eval_corpora:
            eval_sizes = [len(packed) for packed in self.packed[len(sizes) :]]
            eval_held_out = [
                min(pair) for pair in zip(self.shares(args.eval_corpora, eval_sizes), eval_sizes, strict=True)
            ]
            corpora, blocks = BlockOrder(eval_sizes, eval_held_out, None, args.seed).held_out()
            self.set_eval_blocks(corpora + len(sizes), blocks)
        else:
            self.set_eval_blocks(*self.order.held_out())

    def find_copies(self) -> dict[int, list[np.ndarray]]:
        """Of each corpus to train on, and each of its shards, which documents are copies of earlier ones."""
        if not self.args.deduplicate:
            return {}
        checksums = [store.checksums() for store in self.stores[: len(self.args.corpora)]]
        is_copy = find_copies(np.concatenate([shard for corpus in checksums for shard in corpus]))
        shards = iter(np.split(is_copy, np.cumsum([len(shard) for corpus in checksums for shard in corpus])[:-1]))
        return {number: [next(shards) for _ in corpus] for number, corpus in enumerate(checksums)}

    def block(self, corpus: int, number: int) -> Block:
        return self.packed[corpus].block(number)

    def identity(self) -> dict[str, list[int]]:
        """Documents, tokens and blocks of each corpus, by which a resume recognises its data."""
        return {
            ("" if number < len(self.names) else "eval ") + packed.store.corpus.name: [
                packed.counts["documents"],
                packed.counts["tokens"],
                len(packed),
            ]
            for number, packed in enumerate(self.packed)
        }

    def describe(self) -> list[str]:
        """A line a corpus for the log."""
        lines = []
        for (name, (documents, tokens, blocks)), packed in zip(self.identity().items(), self.packed, strict=True):
            padding = 1 - (tokens + 2 * blocks) / (blocks * self.args.max_seq_length)
            left_out = [f"{count:,} {reason}" for reason, count in packed.left_out.items() if count]
            lines.append(
                f"corpus {name}: {documents:,} documents, {tokens:,} tokens, {blocks:,} blocks "
                f"({padding:.1%} of the positions are padding or between documents)"
                + (f"; left out: {', '.join(left_out)}" if left_out else "")
            )
        return lines

    def corpora_record(self, counts: list[list[int]], streams: np.ndarray) -> dict[str, dict[str, float]]:
        """Of each corpus what has been seen so far, for metrics.jsonl.

        Args:
            counts: of each corpus, see `COUNTED`, since the start of the run.
            streams: see `Counts`; of no use in this mode.
        """
        return {
            name: dict(zip(COUNTED, seen, strict=True)) | {"passes": round(seen[0] / int(size), 4)} | packed.left_out
            for name, seen, size, packed in zip(self.names, counts, self.num_train, self.packed, strict=False)
        }

    def train_updates(
        self,
        process_index: int,
        num_processes: int,
        first_update: int,
        last_update: int,
        saved: dict[str, Any],
        is_stopping: Callable[[], bool],
        left_out: int = 0,
    ) -> Iterator[UpdateData]:
        """This process's share of each update. Its position is its number: `saved` and `left_out` are of no use in this
        mode, and data is there soon or never: nor is `is_stopping`.
        """
        batches = MicroBatches(
            locate=self.order.locate,
            example=self.example,
            collator=self.train_collator,
            batch_size=self.args.train_batch_size,
            micro_batch_size=self.args.per_device_train_batch_size,
            process_index=process_index,
            num_processes=num_processes,
        )
        for micro_batches, rows in batches.iterate(first_update, last_update, self.args.dataloader_num_workers):
            yield UpdateData(micro_batches, Counts.of_rows(rows, len(self.names)))

    def training_sample(self) -> Iterator[np.ndarray]:
        positions = np.arange(min(UNIGRAM_BLOCKS, int(self.num_train.sum())))
        for corpus, _, block in zip(*self.order.locate(positions), strict=True):
            yield self.block(corpus, block).input_ids
