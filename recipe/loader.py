"""From blocks to an update's micro-batches.

1. Blocks come from token stores on disk (`CachedData`) or from the corpora as they are read (`StreamedData`); some are
   held out for evaluation.
2. An order says which block stands at which position of the run. Update `t` holds the same blocks with the same masks,
   whatever the number of processes, workers or micro-batches.
3. `train_updates` gives a process's share of each update, from any update on, with what there is to count in it.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from recipe.config import CorpusArguments, PretrainArguments, UserError
from recipe.corpora import check_corpus, corpus_bytes, digest, open_source
from recipe.hygiene import Decontaminator, DocumentFilter, find_copies
from recipe.masking import DynamicMaskingCollator
from recipe.model import first_position
from recipe.packing import Block, BlockFormat
from recipe.sampling import BlockOrder, LaneOrder, apportion, permute
from recipe.streaming import Buffer, CorpusReader, Lanes, Refill, Schedule, from_tensors, one_ahead
from recipe.token_store import LEFT_OUT, PackedCorpus, TokenStore, as_it_is, check_space, start_worker
from recipe.tokenizer import DocumentEncoder

Batch = dict[str, torch.Tensor]

EVAL_VISIT = -1  # held-out blocks have the masks of this visit, every time
EMPTY = -1  # what fills the last evaluation micro-batches up
UNIGRAM_BLOCKS = 20_000  # blocks of training text that the unigram baseline is counted on
UNIGRAM_STREAMED_BLOCKS = 2_000  # the same where they have to be tokenised first
HELD_OUT_SHARDS = 8  # of a streamed corpus, whose heads are held out, if those are long enough
# What is looked at for pairs before a corpus is tokenised: of its head, and of one document in it.
HEAD_CHARACTERS, DOCUMENT_CHARACTERS = 2_000_000, 100_000
LEAST_PAIRS = 0.05  # share of the blocks that each of the two kinds of pairs must have
HEADS = 6  # what a permutation is for, as part of its key, beside those of recipe/sampling.py and streaming.py
SCALARS = ("failed", "stopping", "masked", "pairs", "digest")  # of an update
COUNTED = ("blocks", "tokens", "documents")  # of each corpus, in an update


class Counts:
    """The counts of an update as one array of integers, which processes can add up at once.

    `failed` and `stopping`: processes that have no more data, for an error or a signal; `masked` tokens; `pairs` of two
    parts; `digest`: of all blocks and what is masked in them; `corpora`: (corpora, 3), see `COUNTED`; `streams`:
    (corpora, 4) so far, see `LEFT_OUT`, and last the passes, in millionths, summed over lanes.
    """

    def __init__(self, num_corpora: int, array: np.ndarray | None = None) -> None:
        size = len(SCALARS) + num_corpora * (len(COUNTED) + len(LEFT_OUT) + 1)
        self.array = np.zeros(size, np.int64) if array is None else array
        self.scalars, corpora, streams = np.split(self.array, [len(SCALARS), len(SCALARS) + num_corpora * len(COUNTED)])
        self.corpora, self.streams = corpora.reshape(num_corpora, -1), streams.reshape(num_corpora, -1)

    @classmethod
    def of_rows(cls, rows: np.ndarray, num_corpora: int) -> "Counts":
        """
        Args:
            rows: (rows, 6) int64, see `ROW`.
        """
        counts = cls(num_corpora)
        corpus, tokens, documents, masked, pairs, digests = rows.T
        counts.scalars[2:] = masked.sum(), pairs.sum(), digests.sum()
        for column, values in enumerate((np.ones_like(tokens), tokens, documents)):
            np.add.at(counts.corpora[:, column], corpus, values)
        return counts

    @classmethod
    def of_nothing(cls, num_corpora: int, reason: str) -> "Counts":
        """
        Args:
            reason: `failed` or `stopping`.
        """
        counts = cls(num_corpora)
        counts.scalars[SCALARS.index(reason)] = 1
        return counts

    def __getitem__(self, name: str) -> int:
        """One of `SCALARS`."""
        return int(self.scalars[SCALARS.index(name)])

    @property
    def tokens(self) -> int:
        return int(self.corpora[:, COUNTED.index("tokens")].sum())


@dataclass
class UpdateData:
    """A process's share of an update.

    `counts`: to be summed over the processes. `lanes`: in streaming mode, this process's after the update.
    """

    micro_batches: list[Batch]
    counts: Counts
    lanes: dict[tuple[int, int], Buffer] = field(default_factory=dict)


@dataclass
class MicroBatches(torch.utils.data.Dataset):
    """Micro-batch `k` of one process, counted from the start of the run.

    Args:
        locate: positions (n,) -> corpus, visit and block of each, (n,) integers.
        example: corpus, visit, block -> example for the collator.
        collator: of an update: examples -> batch.
        batch_size: blocks in an update.
        micro_batch_size: blocks in a micro-batch of one process.
        process_index, num_processes: which share of an update is this process's.
    """

    locate: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
    example: Callable[[int, int, int], dict[str, Any]]
    collator: Callable[[int], DynamicMaskingCollator]
    batch_size: int
    micro_batch_size: int
    process_index: int
    num_processes: int
    # The blocks of one update: locating them all at once costs little more than a micro-batch's.
    update: int = -1
    located: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def per_update(self) -> int:
        return self.batch_size // (self.micro_batch_size * self.num_processes)

    def __getitem__(self, k: int) -> Batch:
        update, number = divmod(k, self.per_update)
        if update != self.update:
            positions = np.arange(update * self.batch_size, (update + 1) * self.batch_size)
            self.located = list(zip(*(array.tolist() for array in self.locate(positions)), strict=True))
            self.update = update
        first = (number * self.num_processes + self.process_index) * self.micro_batch_size
        rows = self.located[first : first + self.micro_batch_size]
        return self.collator(update)([self.example(*where) for where in rows])

    def iterate(
        self, first_update: int, last_update: int, num_workers: int
    ) -> Iterator[tuple[list[Batch], np.ndarray]]:
        """The micro-batches of each update from `first_update` to before `last_update`, and their rows (see `ROW`).

        Workers stay one update ahead.
        """
        loader = iter(
            DataLoader(
                self,
                sampler=range(first_update * self.per_update, last_update * self.per_update),
                batch_size=None,
                collate_fn=to_numpy,
                num_workers=num_workers,
                worker_init_fn=start_worker,
                prefetch_factor=max(2, -(-self.per_update // num_workers)) if num_workers else None,
                # DataLoader draws a seed for its workers; not from the generator that dropout uses.
                generator=torch.Generator(),
            )
        )
        for _ in range(first_update, last_update):
            arrays = [next(loader) for _ in range(self.per_update)]
            rows = np.concatenate([batch.pop("rows") for batch in arrays])
            yield [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in arrays], rows


def to_numpy(batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What a worker sends by value. A tensor would hold an open file and shared memory until it is freed, and an update
    of 8,192 rows on one device is more of them than most systems allow.
    """
    return {name: tensor.numpy() for name, tensor in batch.items()}


class Data:
    """What both modes have in common: the tokenizer's side of things, and evaluation."""

    def __init__(self, args: PretrainArguments, tokenizer: PreTrainedTokenizerFast) -> None:
        self.args = args
        self.collator = DynamicMaskingCollator(
            tokenizer,
            mlm_probability=args.mlm_probability,
            max_seq_length=args.max_seq_length,
            seed=args.seed,
            packing=args.packing,
            masking=args.masking,
            first_position=first_position(args.model_type, tokenizer.pad_token_id),
        )
        self.warmup_collator = replace(self.collator, max_seq_length=args.seq_length(0))
        # Held-out blocks have one mask each, the same whatever the training masks.
        self.eval_collator = replace(self.collator, mlm_probability=args.eval_mlm_probability, masking="dynamic")
        self.encoder = DocumentEncoder(tokenizer, args.sentence_splitter, args.language)
        self.decontaminator = Decontaminator(args.decontaminate_against)
        special = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        pair_special_tokens = tokenizer.num_special_tokens_to_add(pair=True)
        self.format = BlockFormat(args.packing, args.max_seq_length, *special, pair_special_tokens, args.seed)
        # Corpora to train on, then those to evaluate on; a block's masks depend on its corpus's place here.
        self.corpora = [*args.corpora, *args.eval_corpora]
        self.names = [corpus.name for corpus in args.corpora]
        ids = np.array(special, self.encoder.dtype)
        self.empty_block = Block(ids, np.array([len(ids)], np.int32), -100, 0)

    def train_collator(self, update: int) -> DynamicMaskingCollator:
        return self.warmup_collator if update < self.args.seq_length_warmup_steps else self.collator

    def collator_of_eval(self, _: int) -> DynamicMaskingCollator:
        return self.eval_collator

    def shares(self, corpora: list[CorpusArguments], sizes: list[float]) -> list[int]:
        """`eval_blocks` by weight, by default by size."""
        weights = [corpus.weight for corpus in corpora]
        return apportion(self.args.eval_blocks, sizes if None in weights else weights)

    def check_corpus(self, corpus: CorpusArguments) -> None:
        """Read a little of a corpus, before anything expensive.

        Raises:
            UserError: it cannot be read, or has no pairs to learn from.
        """
        check_corpus(corpus, self.args.max_unreadable_documents)
        if not self.args.predicts_pairs:
            return
        documents = DocumentFilter(corpus.name, self.args.max_unreadable_documents, self.decontaminator)
        reader = CorpusReader(open_source(corpus), {}, self.encoder, lambda: documents, self.format)
        records = (text for shard in range(reader.source.num_shards) for _, text in reader.source.read(shard))
        texts: list[str] = []
        characters = 0
        for text in filter(documents.lets_through, records):
            texts.append(text[:DOCUMENT_CHARACTERS])
            characters += len(texts[-1])
            if characters >= HEAD_CHARACTERS:
                break
        blocks, _ = reader.pack_texts(texts, reader.nothing)
        self.check_pairs(corpus, Counter(block.label for block in blocks), documents.counts["documents"])

    def check_pairs(self, corpus: CorpusArguments, labels: Counter[int], documents: int) -> None:
        """
        Args:
            labels: how many blocks have which.
            documents: that they were made of.
        """
        if min(labels[0], labels[1]) < LEAST_PAIRS * labels.total():
            raise UserError(
                f"`objective` is {self.args.objective}, and {documents:,} documents of corpus {corpus.name!r} do not "
                "make pairs of both kinds; give more documents, of two sentences and more, or `objective: masked_lm`"
            )

    def prepare(self, process_index: int) -> None:
        """Whatever takes long, before the first block."""
        raise NotImplementedError

    def block(self, corpus: int, number: int) -> Block:
        raise NotImplementedError

    def example(self, corpus: int, visit: int, block: int) -> dict[str, Any]:
        """A block as the collator takes it; `EMPTY` in place of its number gives one with nothing to predict."""
        found = self.empty_block if block == EMPTY else self.block(corpus, block)
        return found._asdict() | {"corpus": corpus, "block": block, "visit": visit}

    def set_eval_blocks(self, corpora: np.ndarray, blocks: np.ndarray) -> None:
        # `eval_corpora` are counted from the end: their masks do not depend on how many there are to train on.
        self.eval_corpora = corpora - len(self.corpora) if self.args.eval_corpora else corpora
        self.eval_blocks = blocks

    def locate_eval(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Corpus, visit and block of held-out blocks; behind the last one `EMPTY` blocks."""
        missing = max(0, int(positions[-1]) + 1 - len(self.eval_blocks))
        corpora = np.pad(self.eval_corpora, (0, missing))[positions]
        blocks = np.pad(self.eval_blocks, (0, missing), constant_values=EMPTY)[positions]
        return corpora, np.full_like(blocks, EVAL_VISIT), blocks

    def eval_batches(self, process_index: int, num_processes: int) -> MicroBatches:
        """All held-out blocks as one update, with as many micro-batches in every process."""
        rows = self.args.per_device_eval_batch_size * num_processes
        return MicroBatches(
            locate=self.locate_eval,
            example=self.example,
            collator=self.collator_of_eval,
            batch_size=-(-len(self.eval_blocks) // rows) * rows,
            micro_batch_size=self.args.per_device_eval_batch_size,
            process_index=process_index,
            num_processes=num_processes,
        )

    def training_sample(self) -> Iterator[np.ndarray]:
        """Ids of blocks that are trained on."""
        raise NotImplementedError

    def unigram_loss(self) -> float:
        """Cross-entropy, in nats, of the held-out targets under the frequencies of a sample of training blocks.

        Add-one smoothing over the vocabulary. What a model without context would reach.
        """
        counts = np.ones(len(self.collator.tokenizer))
        for ids in self.training_sample():
            counts += np.bincount(ids, minlength=len(counts))
        counts[self.collator.tokenizer.all_special_ids] = 0
        nats = -np.log(counts / counts.sum(), where=counts > 0, out=np.zeros_like(counts))
        total, targets = 0.0, 0
        for batch in next(self.eval_batches(0, 1).iterate(0, 1, num_workers=0))[0]:
            labels = batch["labels"].numpy()
            labels = labels[labels != -100]
            total += float(nats[labels].sum())
            targets += len(labels)
        return total / max(1, targets)


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


class StreamedData(Data):
    """Training and held-out blocks of a run, tokenised and packed as they are needed.

    Args:
        args: of the run.
        tokenizer: what the corpora are encoded with.

    Raises:
        UserError: a corpus that cannot be read.
    """

    def __init__(self, args: PretrainArguments, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(args, tokenizer)
        weights = [corpus.weight for corpus in args.corpora]
        self.quotas = [corpus_bytes(corpus) for corpus in args.corpora] if None in weights else weights
        for corpus in self.corpora:
            self.check_corpus(corpus)

    def prepare(self, process_index: int) -> None:
        """Open the corpora and hold out whole documents at the heads of some shards.

        Args:
            process_index: of no use in this mode: every process does the same.

        Raises:
            UserError: a corpus that has too few documents to hold some out.
        """
        args = self.args
        self.readers = [self.reader(corpus) for corpus in self.corpora]
        self.held: list[list[Block]] = [[] for _ in self.corpora]
        eval_corpora = args.eval_corpora or args.corpora
        first = len(self.corpora) - len(eval_corpora)
        sizes = self.quotas if not args.eval_corpora else [corpus_bytes(corpus) for corpus in eval_corpora]
        for corpus, wanted in enumerate(self.shares(eval_corpora, sizes), start=first):
            self.hold_out(corpus, wanted)
        self.set_eval_blocks(
            np.repeat(np.arange(len(self.held)), [len(blocks) for blocks in self.held]),
            np.concatenate([np.arange(len(blocks)) for blocks in self.held]),
        )
        order = LaneOrder(args.num_lanes, self.quotas, args.seed)
        buffer_sizes = np.ceil(args.shuffle_buffer_size * self.quota_shares / args.num_lanes).astype(int).tolist()
        self.schedule = Schedule(order, buffer_sizes, args.train_batch_size // args.num_lanes)

    @property
    def quota_shares(self) -> np.ndarray:
        return np.array(self.quotas) / np.sum(self.quotas)

    def reader(self, corpus: CorpusArguments) -> CorpusReader:
        documents = partial(DocumentFilter, corpus.name, self.args.max_unreadable_documents, self.decontaminator)
        source = open_source(corpus)
        lane_characters = corpus_bytes(corpus) / self.args.num_lanes if source.shard_bytes else 0.0
        return CorpusReader(source, {}, self.encoder, documents, self.format, lane_characters)

    def hold_out(self, corpus: int, wanted: int) -> None:
        """Take blocks from the heads of some shards, and have training begin behind them.

        Raises:
            UserError: they take all that there is of a corpus to train on.
        """
        reader, is_trained_on = self.readers[corpus], corpus < len(self.names)
        num_shards, whole = reader.source.num_shards, 0
        shards = permute(np.arange(num_shards), num_shards, HEADS, self.args.seed, corpus).tolist()
        for number, shard in enumerate(shards):
            # The rest, shared evenly with the shards to come; all of it, when there have been so many.
            missing = wanted - len(self.held[corpus])
            if missing <= 0:
                break
            here = -(-missing // max(1, min(num_shards, HELD_OUT_SHARDS) - number))
            blocks, reader.held_out[shard], is_whole = reader.read_head(shard, 0, here)
            self.held[corpus] += blocks
            whole += is_whole
        if is_trained_on and whole == num_shards:
            raise UserError(
                f"`eval_blocks` ({self.args.eval_blocks}) takes all of corpus {reader.source.corpus.name!r}; lower it, "
                "or give `eval_corpora`"
            )

    def block(self, corpus: int, number: int) -> Block:
        return self.held[corpus][number]

    def identity(self) -> dict[str, list[Any]]:
        """Shards, their sizes and the held-out blocks of each corpus, by which a resume recognises its data."""
        return {
            ("" if number < len(self.names) else "eval ") + reader.source.corpus.name: [
                reader.source.num_shards,
                digest(reader.source.shard_bytes, *(block.input_ids.tobytes() for block in held))[:16],
            ]
            for number, (reader, held) in enumerate(zip(self.readers, self.held, strict=True))
        }

    def describe(self) -> list[str]:
        """Lines for the log: of each corpus its shards and what sharing them costs, and how far a resume reads."""
        lines, lanes = [], self.args.num_lanes
        for reader, share in zip(self.readers, self.quota_shares, strict=False):
            source = reader.source
            line = f"corpus {source.corpus.name}: {share:.1%} of the blocks, {source.num_shards:,} shards"
            if source.num_shards < lanes:
                line += (
                    f" for {lanes} lanes: each is read by {lanes / source.num_shards:.3g} of them, which take turns at "
                    "its documents and read past those of the others"
                )
            lines.append(line)
        sizes = [size for reader in self.readers for size in reader.source.shard_bytes]
        is_known = all(reader.source.shard_bytes for reader in self.readers)
        size = f"the largest has {max(sizes) / 1e6:.3g} MB" if is_known else "not all sizes are known"
        lines.append(
            f"streaming: {lanes} lanes, {sum(self.schedule.buffer_sizes) * lanes:,} blocks held back for shuffling; a "
            f"resume reads past what was read of one shard ({size}) for each lane and corpus"
        )
        return lines

    def corpora_record(self, counts: list[list[int]], streams: np.ndarray) -> dict[str, dict[str, float]]:
        """Of each corpus what has been seen so far, for metrics.jsonl.

        Args:
            counts: of each corpus, see `COUNTED`, since the start of the run.
            streams: see `Counts`; what was left out is of what was read, which is ahead of what was seen.
        """
        return {
            name: dict(zip(COUNTED, seen, strict=True))
            | {"passes": round(int(stream[-1]) / 1e6 / self.args.num_lanes, 4)}
            | dict(zip(LEFT_OUT, stream[:-1].tolist(), strict=True))
            for name, seen, stream in zip(self.names, counts, streams, strict=True)
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
        """This process's share of each update.

        Args:
            saved: `lanes` of all processes after the update `left_out` before `first_update`, from a checkpoint.
            left_out: updates between them, whose data is passed over.
            is_stopping: whether this process was asked to stop, which ends a wait for data.

        Raises:
            InterruptedWaitError: it was.
        """
        own = list(range(process_index, self.args.num_lanes, num_processes))
        lanes = Lanes(self.readers, self.schedule, own, from_tensors(saved, own))
        updates = range(first_update - left_out, last_update)
        workers = self.args.dataloader_num_workers
        # Here and not in the generator, which runs in a thread: worker processes are forked from this one.
        refills = iter(
            DataLoader(
                lanes.pump(updates),
                batch_size=None,
                num_workers=workers,
                collate_fn=as_it_is,
                worker_init_fn=start_worker,
                generator=torch.Generator(),
            )
        )
        made = self.collate(lanes, refills, updates, max(1, workers))
        return one_ahead(itertools.islice(made, left_out, None), is_stopping)

    def collate(
        self, lanes: Lanes, refills: Iterator[list[Refill] | UserError], updates: range, num_workers: int
    ) -> Iterator[UpdateData]:
        """Draw, mask and count each update, from what the workers send."""
        size = self.args.per_device_train_batch_size
        for update in updates:
            arrived = []
            for _ in range(num_workers):
                sent = next(refills)
                if isinstance(sent, UserError):
                    raise sent
                arrived += sent
            examples = [
                # Numbers go on from pass to pass, and with them the masks.
                block._asdict() | {"corpus": corpus, "block": number, "visit": 0}
                for corpus, number, block in lanes.draw(update, arrived)
            ]
            collator = self.train_collator(update)
            batches = [collator(examples[at : at + size]) for at in range(0, len(examples), size)]
            rows = np.concatenate([batch.pop("rows").numpy() for batch in batches])
            counts = Counts.of_rows(rows, len(self.names))
            for (_, corpus), buffer in lanes.buffers.items():
                left_out = (buffer.state.counts[name] for name in LEFT_OUT)
                counts.streams[corpus] += [*left_out, round(buffer.passes * 1e6)]
            yield UpdateData(batches, counts, lanes.snapshot())

    def training_sample(self) -> Iterator[np.ndarray]:
        shares = apportion(UNIGRAM_STREAMED_BLOCKS, self.quotas)
        for reader, wanted in zip(self.readers, shares, strict=False):
            for shard in range(reader.source.num_shards if wanted else 0):
                blocks, _, _ = reader.read_head(shard, reader.held_out.get(shard, 0), wanted)
                yield from (block.input_ids for block in blocks)
                wanted -= len(blocks)
                if wanted <= 0:
                    break
