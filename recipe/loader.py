"""From corpora to an update's micro-batches.

1. Each corpus is tokenised once into its token store: a memory-mapped Arrow table with a row a document, made by
   `datasets.map` and found again by its fingerprint (`build_token_store`).
2. The store is packed into blocks: a table of block ends, nothing copied (`PackedCorpus`).
3. `BlockOrder` says which block stands at which position of the run; some blocks are held out.
4. `MicroBatches` gives micro-batch `k` of this process: its blocks, masked and collated. Update `t` holds the positions
   `t * train_batch_size` and up, whatever the number of processes or the accumulation.
5. `iterate` runs that through worker processes, from any update on.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from filelock import FileLock
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from recipe.config import CorpusArguments, PretrainArguments, UserError
from recipe.corpora import open_corpus
from recipe.masking import DynamicMaskingCollator
from recipe.packing import assemble_block, pack_full_sentences
from recipe.sampling import BlockOrder, apportion
from recipe.tokenizer import DocumentEncoder

STORE_FORMAT = 1  # part of every store's fingerprint: raise it when the rows come out differently
EVAL_VISIT = -1  # held-out blocks have the masks of this visit, every time
EMPTY = -1  # what fills the last evaluation micro-batches up
UNIGRAM_BLOCKS = 20_000  # blocks of training text that the unigram baseline is counted on


def build_token_store(corpus: CorpusArguments, encoder: DocumentEncoder, num_proc: int | None) -> Dataset:
    """The token store of a corpus, from the `datasets` cache if it is there.

    Rows do not depend on `num_proc`. One process builds; others that ask for the same store meanwhile wait on its lock.

    Raises:
        UserError: the corpus cannot be read or holds no token.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    lock = hashlib.sha256(repr(sorted(asdict(corpus).items())).encode()).hexdigest()[:16]
    with FileLock(cache / f"token-store-{lock}.lock"):
        documents = open_corpus(corpus, streaming=False)
        recipe = (
            STORE_FORMAT,
            documents._fingerprint,
            encoder.backend.to_str(),
            encoder.sentence_splitter,
            encoder.language,
            version("sentencex"),
        )
        store = documents.map(
            encoder,
            batched=True,
            batch_size=100,  # whole books are documents too
            num_proc=num_proc,
            remove_columns=["text"],
            features=Features(
                {"input_ids": List(Value(encoder.dtype.__name__)), "sentence_ends": List(Value("int32"))}
            ),
            new_fingerprint=hashlib.sha256(repr(recipe).encode()).hexdigest()[:16],
            desc=f"tokenising {corpus.name}",
        )
    if not len(store):
        raise UserError(f"corpus {corpus.name!r}: {corpus.path} holds no text")
    return store


def flatten(column: Any) -> tuple[list[np.ndarray], np.ndarray]:
    """A chunked Arrow list column as flat arrays.

    Returns:
        the values of each chunk, not copied, and (rows,) int64 lengths of the rows.
    """
    values, lengths = [], [np.empty(0, np.int64)]
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        values.append(chunk.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]])
        lengths.append(np.diff(offsets).astype(np.int64))
    return values, np.concatenate(lengths)


class PackedCorpus:
    """A view of a token store as FULL-SENTENCES blocks.

    Args:
        store: rows of `input_ids` and `sentence_ends`.
        max_seq_length: tokens in a block, special tokens included.
        cls_token_id, sep_token_id: what stands at a block's start, and at its end and between documents.
    """

    def __init__(self, store: Dataset, max_seq_length: int, cls_token_id: int, sep_token_id: int) -> None:
        self.arguments = (store, max_seq_length, cls_token_id, sep_token_id)
        self.special = (cls_token_id, sep_token_id)
        self.chunks, lengths = flatten(store.data.column("input_ids"))
        self.chunk_starts = np.cumsum([0, *map(len, self.chunks)])
        self.document_ends = np.cumsum(lengths)
        ends, counts = flatten(store.data.column("sentence_ends"))
        sentence_ends = np.concatenate(ends).astype(np.int64) + np.repeat(self.document_ends - lengths, counts)
        self.block_ends = pack_full_sentences(self.document_ends, sentence_ends, max_seq_length)

    def __reduce__(self) -> tuple:
        # A worker process that is not forked opens the mapped files itself rather than being sent their contents.
        return PackedCorpus, self.arguments

    def __len__(self) -> int:
        return len(self.block_ends)

    @property
    def num_tokens(self) -> int:
        return int(self.document_ends[-1])

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Tokens `start` to `end` of the corpus."""
        chunk = int(np.searchsorted(self.chunk_starts, start, side="right")) - 1
        parts = []
        while start < end:
            first = int(self.chunk_starts[chunk])
            parts.append(self.chunks[chunk][start - first : end - first])
            start = int(self.chunk_starts[chunk + 1])
            chunk += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def block(self, number: int) -> np.ndarray:
        """(length,) ids of a block, special tokens included."""
        start = int(self.block_ends[number - 1]) if number else 0
        end = int(self.block_ends[number])
        low = np.searchsorted(self.document_ends, start, side="right")
        high = np.searchsorted(self.document_ends, end, side="left")
        return assemble_block(self.tokens(start, end), start, self.document_ends[low:high], *self.special)


@dataclass
class MicroBatches(torch.utils.data.Dataset):
    """Micro-batch `k` of one process, counted from the start of the run.

    Args:
        locate: positions (n,) -> corpus, visit and block of each, (n,) integers.
        example: corpus, visit, block -> example for the collator.
        collator: examples -> batch.
        batch_size: blocks in an update.
        micro_batch_size: blocks in a micro-batch of one process.
        process_index, num_processes: which share of an update is this process's.
    """

    locate: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
    example: Callable[[int, int, int], dict[str, Any]]
    collator: DynamicMaskingCollator
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

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        update, number = divmod(k, self.per_update)
        if update != self.update:
            positions = np.arange(update * self.batch_size, (update + 1) * self.batch_size)
            self.located = list(zip(*(array.tolist() for array in self.locate(positions)), strict=True))
            self.update = update
        first = (number * self.num_processes + self.process_index) * self.micro_batch_size
        return self.collator([self.example(*where) for where in self.located[first : first + self.micro_batch_size]])

    def iterate(self, first_update: int, last_update: int, num_workers: int) -> Iterator[list[dict[str, torch.Tensor]]]:
        """The micro-batches of each update from `first_update` to before `last_update`, an update at a time.

        Workers stay one update ahead.
        """
        # The tokenizer's threads have been used by now, and each forked worker would warn about that.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        loader = iter(
            DataLoader(
                self,
                sampler=range(first_update * self.per_update, last_update * self.per_update),
                batch_size=None,
                collate_fn=to_numpy,
                num_workers=num_workers,
                prefetch_factor=max(2, -(-self.per_update // num_workers)) if num_workers else None,
                # DataLoader draws a seed for its workers; not from the generator that dropout uses.
                generator=torch.Generator(),
            )
        )
        for _ in range(first_update, last_update):
            arrays = [next(loader) for _ in range(self.per_update)]
            yield [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in arrays]


def to_numpy(batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What a worker sends by value. A tensor would hold an open file and shared memory until it is freed, and an update
    of 8,192 rows on one device is more of them than most systems allow.
    """
    return {name: tensor.numpy() for name, tensor in batch.items()}


class CachedData:
    """Training and held-out blocks of a run, from token stores on disk.

    Args:
        args: of the run.
        tokenizer: what the corpora are encoded with.

    Raises:
        UserError: a corpus that cannot be read, is too small, or has too few blocks to hold some out.
    """

    def __init__(self, args: PretrainArguments, tokenizer: PreTrainedTokenizerFast) -> None:
        self.args = args
        self.collator = DynamicMaskingCollator(
            tokenizer,
            mlm_probability=args.mlm_probability,
            max_seq_length=args.max_seq_length,
            seed=args.seed,
        )
        encoder = DocumentEncoder(tokenizer, args.sentence_splitter, args.language)
        special = (tokenizer.cls_token_id, tokenizer.sep_token_id)

        def pack(corpus: CorpusArguments) -> PackedCorpus:
            store = build_token_store(corpus, encoder, args.preprocessing_num_workers)
            packed = PackedCorpus(store, args.max_seq_length, *special)
            if packed.num_tokens < args.max_seq_length - 2:
                raise UserError(
                    f"corpus {corpus.name!r} has {packed.num_tokens} tokens, too few for a single block of "
                    f"`max_seq_length` ({args.max_seq_length}); give more text or shorter blocks"
                )
            return packed

        # Corpora to train on, then those to evaluate on; a block's masks depend on its corpus's place here.
        self.names = [c.name for c in args.corpora] + [f"eval {c.name}" for c in args.eval_corpora]
        self.packed = [pack(corpus) for corpus in [*args.corpora, *args.eval_corpora]]
        self.empty_block = np.array(special)

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
        if args.eval_corpora:
            eval_sizes = [len(packed) for packed in self.packed[len(sizes) :]]
            eval_held_out = [
                min(pair) for pair in zip(self.shares(args.eval_corpora, eval_sizes), eval_sizes, strict=True)
            ]
            corpora, self.eval_blocks = BlockOrder(eval_sizes, eval_held_out, None, args.seed).held_out()
            self.eval_corpora = corpora + len(sizes)
        else:
            self.eval_corpora, self.eval_blocks = self.order.held_out()

    def shares(self, corpora: list[CorpusArguments], sizes: list[int]) -> list[int]:
        """`eval_blocks` by weight, by default by size."""
        weights = [corpus.weight for corpus in corpora]
        return apportion(self.args.eval_blocks, sizes if None in weights else weights)

    @property
    def blocks_per_epoch(self) -> int:
        """Training blocks of all corpora together."""
        return int(self.order.num_train.sum())

    def identity(self) -> dict[str, list[int]]:
        """Documents, tokens and blocks of each corpus, by which a resume recognises its data."""
        sizes = [[len(packed.document_ends), packed.num_tokens, len(packed)] for packed in self.packed]
        return dict(zip(self.names, sizes, strict=True))

    def describe(self) -> list[str]:
        """A line a corpus for the log."""
        lines = []
        for name, (documents, tokens, blocks) in self.identity().items():
            positions = blocks * self.args.max_seq_length
            padding = 1 - (tokens + 2 * blocks) / positions
            lines.append(
                f"corpus {name}: {documents:,} documents, {tokens:,} tokens, {blocks:,} blocks "
                f"({padding:.1%} of the positions are padding or between documents)"
            )
        return lines

    def example(self, corpus: int, visit: int, block: int) -> dict[str, Any]:
        """A block as the collator takes it; `EMPTY` in place of its number gives one with nothing to predict."""
        ids = self.empty_block if block == EMPTY else self.packed[corpus].block(block)
        return {"input_ids": ids, "corpus": corpus, "block": block, "visit": visit}

    def locate_eval(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Corpus, visit and block of held-out blocks; behind the last one `EMPTY` blocks."""
        missing = max(0, int(positions[-1]) + 1 - len(self.eval_blocks))
        corpora = np.pad(self.eval_corpora, (0, missing))[positions]
        blocks = np.pad(self.eval_blocks, (0, missing), constant_values=EMPTY)[positions]
        return corpora, np.full_like(blocks, EVAL_VISIT), blocks

    def train_batches(self, process_index: int, num_processes: int) -> MicroBatches:
        return MicroBatches(
            locate=self.order.locate,
            example=self.example,
            collator=self.collator,
            batch_size=self.args.train_batch_size,
            micro_batch_size=self.args.per_device_train_batch_size,
            process_index=process_index,
            num_processes=num_processes,
        )

    def eval_batches(self, process_index: int, num_processes: int) -> MicroBatches:
        """All held-out blocks as one update, with as many micro-batches in every process."""
        rows = self.args.per_device_eval_batch_size * num_processes
        return MicroBatches(
            locate=self.locate_eval,
            example=self.example,
            collator=self.collator,
            batch_size=-(-len(self.eval_blocks) // rows) * rows,
            micro_batch_size=self.args.per_device_eval_batch_size,
            process_index=process_index,
            num_processes=num_processes,
        )

    def unigram_loss(self) -> float:
        """Cross-entropy, in nats, of the held-out targets under the frequencies of (up to 20,000) training blocks.

        Add-one smoothing over the vocabulary. What a model without context would reach.
        """
        counts = np.ones(len(self.collator.tokenizer))
        positions = np.arange(min(UNIGRAM_BLOCKS, self.blocks_per_epoch))
        for corpus, _, block in zip(*self.order.locate(positions), strict=True):
            counts += np.bincount(self.packed[corpus].block(block), minlength=len(counts))
        counts[self.collator.tokenizer.all_special_ids] = 0
        nats = -np.log(counts / counts.sum(), where=counts > 0, out=np.zeros_like(counts))
        total, targets = 0.0, 0
        for batch in next(self.eval_batches(0, 1).iterate(0, 1, num_workers=0)):
            labels = batch["labels"].numpy()
            labels = labels[labels != -100]
            total += float(nats[labels].sum())
            targets += len(labels)
        return total / max(1, targets)
