"""The streaming mode of training data: blocks that are tokenised and packed as they are needed."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.base.errors import UserError
from recipe.base.hashing import digest
from recipe.base.workers import identity_collate, one_ahead, start_worker
from recipe.data.batches import COUNTED, HEADS, Counts, Data, UpdateData
from recipe.data.corpora import corpus_bytes, open_source
from recipe.data.hygiene import DocumentFilter
from recipe.data.packing import Block
from recipe.data.sampling import LaneOrder, apportion, permute
from recipe.data.streaming import BlockPacket, CorpusReader, LaneBuffers, Schedule, from_tensors
from recipe.data.token_store import LEFT_OUT

UNIGRAM_STREAMED_BLOCKS = 2_000  # the same where they have to be tokenised first
HELD_OUT_SHARDS = 8  # of a streamed corpus, whose heads are held out, if those are long enough


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
        lanes = LaneBuffers(self.readers, self.schedule, own, from_tensors(saved, own))
        updates = range(first_update - left_out, last_update)
        workers = self.args.dataloader_num_workers
        # Here and not in the generator, which runs in a thread: worker processes are forked from this one.
        refills = iter(
            DataLoader(
                lanes.pump(updates),
                batch_size=None,
                num_workers=workers,
                collate_fn=identity_collate,
                worker_init_fn=start_worker,
                generator=torch.Generator(),
            )
        )
        made = self.collate(lanes, refills, updates, max(1, workers))
        return one_ahead(itertools.islice(made, left_out, None), is_stopping)

    def collate(
        self, lanes: LaneBuffers, refills: Iterator[list[BlockPacket] | UserError], updates: range, num_workers: int
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
