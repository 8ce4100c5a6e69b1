"""From blocks to an update's micro-batches.

1. Blocks come from token stores on disk (`CachedData`) or from the corpora as they are read (`StreamedData`); some are
   held out for evaluation.
2. An order says which block stands at which position of the run. Update `t` holds the same blocks with the same masks,
   whatever the number of processes, workers or micro-batches.
3. `train_updates` gives a process's share of each update, from any update on, with what there is to count in it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.arguments.pretraining import first_position
from recipe.base.errors import UserError
from recipe.base.workers import start_worker
from recipe.data.corpora import check_corpus, open_source
from recipe.data.hygiene import Decontaminator, DocumentFilter
from recipe.data.masking import DynamicMaskingCollator
from recipe.data.packing import Block, BlockFormat
from recipe.data.sampling import apportion
from recipe.data.streaming import Buffer, CorpusReader
from recipe.data.token_store import LEFT_OUT
from recipe.data.tokenizer import DocumentEncoder

Batch = dict[str, torch.Tensor]


EVAL_VISIT = -1  # held-out blocks have the masks of this visit, every time
EMPTY = -1  # what fills the last evaluation micro-batches up
UNIGRAM_BLOCKS = 20_000  # blocks of training text that the unigram baseline is counted on
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
    def without_data(cls, num_corpora: int, reason: str) -> "Counts":
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
        for text in filter(documents.accepts, records):
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
