"""The streaming mode of training data: blocks that are tokenised and packed as they are needed."""

import itertools
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import accumulate, groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.arguments.pretraining import PAIR_PACKINGS
from recipe.base.errors import UserError
from recipe.base.hashing import Purpose, digest
from recipe.base.workers import identity_collate, one_ahead, start_worker, starting_workers
from recipe.data.batches import (
    COUNTED,
    Counts,
    Rank,
    Resume,
    Row,
    TrainingData,
    UpdateData,
    apportion_eval_blocks,
    as_it_is,
    given_weights,
)
from recipe.data.corpora import corpus_bytes, open_source
from recipe.data.hygiene import nothing_left
from recipe.data.packing import Block
from recipe.data.preprocessor import Preprocessor
from recipe.data.sampling import LaneOrder, apportion, interleave, permute, quotas_by_weight
from recipe.data.streaming import (
    REFILL_CHARACTERS,
    Buffer,
    CorpusReader,
    LaneBuffers,
    Packets,
    ReaderKey,
    Schedule,
    from_tensors,
)
from recipe.data.token_store import LEFT_OUT

# Of training text, that the unigram baseline is counted on, and that are tokenised for it: 0.03 nats more than on 23M,
# with 50,265 entries.
UNIGRAM_TOKENS = 1_000_000
# Of a pass over a corpus, that the buffers hold at the most: with larger ones, blocks of the next pass come before many
# of this one have been seen.
MAX_BUFFER_SHARE = 1 / 8
MAX_HELD_OUT_SHARDS = 8  # of a corpus, whose heads are held out, if those are long enough


class StreamedData(TrainingData):
    """Training and held-out blocks of a run, tokenised and packed as they are needed.

    Whole documents at the heads of some shards are held out; every process finds the same.
    """

    def __init__(self, args: PretrainArguments, preprocessor: Preprocessor) -> None:
        super().__init__(args, preprocessor)
        self.quotas = given_weights(args.corpora) or list(map(corpus_bytes, args.corpora))
        self.readers = [self.open_reader(corpus) for corpus in self.corpora]
        buffer_sizes = self.buffer_sizes()
        eval_corpora = args.eval_corpora or args.corpora
        sizes = list(map(corpus_bytes, eval_corpora)) if args.eval_corpora else self.quotas
        eval_shares = apportion_eval_blocks(args.eval_blocks, eval_corpora, sizes)
        shares = [0] * (len(self.corpora) - len(eval_shares)) + eval_shares
        self.held = [self.read_heads(corpus, num_blocks) for corpus, num_blocks in enumerate(shares)]
        self.hold_out(
            np.repeat(np.arange(len(self.held)), [len(blocks) for blocks in self.held]),
            np.concatenate([np.arange(len(blocks)) for blocks in self.held]),
        )
        patterns = [interleave(quotas_by_weight(shares.tolist())) for shares in self.shares]
        self.schedule = Schedule(args.timeline, LaneOrder(args.num_lanes, args.seed), patterns, buffer_sizes)

    @property
    def shares(self) -> np.ndarray:
        """(stretches, corpora) shares of the blocks that are trained on, in sum 1 in each stretch of the run."""
        shares = np.array([stretch.weights or self.quotas for stretch in self.args.timeline.stretches])
        return shares / shares.sum(axis=1, keepdims=True)

    def buffer_sizes(self) -> list[int]:
        """Return, for each corpus, how many blocks each lane holds back, from a sample of the corpus."""
        sizes = []
        for reader, share in zip(self.readers, self.shares.max(axis=0), strict=False):
            blocks, texts = reader.pack_sample(REFILL_CHARACTERS, REFILL_CHARACTERS)
            if not texts:
                raise nothing_left(reader.source.corpus, "all documents are empty, malformed or contaminated")
            if self.args.packing in PAIR_PACKINGS:
                self.pair_labels.append(self.preprocessor.count_labels(blocks))
            wanted = math.ceil(self.args.shuffle_buffer_size * share / self.args.num_lanes)
            of_a_pass = reader.lane_characters * len(blocks) / max(1, sum(map(len, texts)))
            sizes.append(max(1, min(wanted, int(of_a_pass * MAX_BUFFER_SHARE))) if of_a_pass else wanted)
        return sizes

    def open_reader(self, corpus: CorpusArguments) -> CorpusReader:
        """Open a corpus, with nothing of it held out yet."""
        preprocessor, source = self.preprocessor, open_source(corpus)
        documents = partial(preprocessor.document_filter, corpus)
        lane_characters = 0.0
        with suppress(UserError):  # not every hub data set has its size published
            lane_characters = corpus_bytes(corpus) / self.args.num_lanes
        return CorpusReader(source, {}, preprocessor.encoder, documents, preprocessor.format, lane_characters)

    def read_heads(self, corpus: int, num_blocks: int) -> list[Block]:
        """Return blocks from the heads of some shards to hold out, and have training begin behind them.

        Raises:
            UserError: they take all that there is of a corpus to train on.
        """
        reader = self.readers[corpus]
        num_shards, num_whole = reader.source.num_shards, 0
        held: list[Block] = []
        shards = permute(np.arange(num_shards), num_shards, Purpose.HELD_OUT_HEAD, self.args.seed, corpus).tolist()
        for number, shard in enumerate(shards):
            missing = num_blocks - len(held)
            if missing <= 0:
                break
            # Shared evenly with the shards to come; all of it, once there have been so many.
            share = -(-missing // max(1, min(num_shards, MAX_HELD_OUT_SHARDS) - number))
            blocks, reader.held_out[shard], is_whole = reader.read_head(shard, share)
            held += blocks
            num_whole += is_whole
        if corpus < len(self.names) and num_whole == num_shards:
            raise UserError(
                f"`eval_blocks` ({self.args.eval_blocks}) takes all of corpus {reader.source.corpus.name!r}, of which "
                "whole documents are held out; lower it, give `eval_corpora`, or more documents: a .txt is one, or by "
                "`sample_by: line` or `paragraph` several"
            )
        return held

    def block(self, row: Row) -> Block:
        """Return a held-out block; those that are trained on have no number here."""
        return self.held[row.corpus][row.block]

    def identity(self) -> dict[str, list[Any]]:
        """Return the shards of each corpus, and digests of its held-out blocks and of pieces of its files."""
        return self.name_corpora(
            [
                reader.source.num_shards,
                digest(*(block.input_ids.tobytes() for block in held))[:16],
                reader.source.sample_contents()[:16],
            ]
            for reader, held in zip(self.readers, self.held, strict=True)
        )

    def stamps(self) -> dict[str, list[Any]]:
        """Return what tells that a corpus may have changed: its files' times, or its commit on the hub."""
        return self.name_corpora([reader.source.stamp] for reader in self.readers)

    def describe(self) -> list[str]:
        """Return lines for the log: shards of each corpus, what sharing them costs, and how far a resume reads."""
        lines, lanes = [], self.args.num_lanes
        for number, (reader, shares) in enumerate(zip(self.readers, self.shares.T.tolist(), strict=False)):
            source, share = reader.source, ", then ".join(f"{share:.1%}" for share, _ in groupby(shares))
            line = f"corpus {source.corpus.name}: {share} of the blocks, {source.num_shards:,} shards"
            if source.num_shards < lanes:
                line += (
                    f" for {lanes} lanes: each is read by {lanes / source.num_shards:.3g} of them, which take turns at "
                    "its documents and read past those of the others"
                )
            lines.append(line + self.describe_pairs(number))
        sizes = [size for reader in self.readers for size in reader.source.shard_bytes]
        is_known = all(reader.source.shard_bytes for reader in self.readers)
        size = f"the largest has {max(sizes) / 1e6:.3g} MB" if is_known else "not all sizes are known"
        held_back, asked = sum(self.schedule.buffer_sizes) * lanes, self.args.shuffle_buffer_size
        fewer = f" (not {asked:,}: at most {MAX_BUFFER_SHARE:.1%} of a pass over a corpus)" if held_back < asked else ""
        lines.append(
            f"streaming: {lanes} lanes, {held_back:,} blocks held back for shuffling{fewer}; a resume reads past what "
            f"was read of one shard ({size}) for each lane and corpus"
        )
        return lines

    def corpora_record(self, counts: list[list[int]], streams: np.ndarray) -> dict[str, dict[str, float]]:
        """Return per-corpus totals so far; passes and dropped documents are as the lanes report them."""
        return {
            name: dict(zip(COUNTED, seen, strict=True))
            | {"passes": round(int(stream[-1]) / 1e6 / self.args.num_lanes, 4)}
            | dict(zip(LEFT_OUT, stream[:-1].tolist(), strict=True))
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
        """Return a generator over what a process has of each update, the next of which is made ahead.

        It is none itself: worker processes are forked from the thread that asks, not from the one that makes updates.
        Where the length of blocks changes, new ones begin.
        """
        own = list(range(rank.index, self.args.num_lanes, rank.world_size))
        first = resume.first_update - resume.skipped_updates
        changes = [update for update in self.args.timeline.length_changes if first < update < last_update]
        parts = [range(*bounds) for bounds in pairwise([first, *changes, last_update])]
        opened = self.open_part(parts[0], own, from_tensors(resume.lanes, own))

        def go_on() -> Generator[UpdateData]:
            (lanes, made), skipped = opened, resume.skipped_updates
            for number, updates in enumerate(parts):
                if number:
                    lanes, made = self.open_part(updates, own, lanes.buffers)
                with closing(one_ahead(map(prepare, itertools.islice(made, skipped, None)), is_stopping)) as ahead:
                    yield from ahead
                skipped = max(0, skipped - len(updates))

        return go_on()

    def open_part(
        self, updates: range, own: list[int], buffers: dict[ReaderKey, Buffer]
    ) -> tuple[LaneBuffers, Iterator[UpdateData]]:
        """Return the lanes of a process, and an iterator over updates in a row whose blocks have one length."""
        args = self.args
        block_format = self.preprocessor.format_of(args.timeline.at(updates.start).max_seq_length)
        readers = [reader._replace(format=block_format) for reader in self.readers]
        lanes = LaneBuffers(readers, self.schedule, own, buffers)
        if updates.start in args.timeline.length_changes:
            lanes.unpack()
        loader = DataLoader(
            lanes.pump(updates),
            batch_size=None,
            num_workers=args.dataloader_num_workers,
            collate_fn=identity_collate,
            worker_init_fn=start_worker,
            generator=torch.Generator(),
        )
        with starting_workers("dataloader_num_workers"):
            packets = iter(loader)
        return lanes, self.collate(lanes, packets, updates)

    def collate(
        self, lanes: LaneBuffers, packets: Iterator[Packets | UserError], updates: range
    ) -> Iterator[UpdateData]:
        """Draw, mask and count each update, from what the workers send."""
        preprocessor, num_processes = self.preprocessor, self.args.num_lanes // len(lanes.lanes)
        for update in updates:
            arrived: Packets = {}
            for _ in range(max(1, self.args.dataloader_num_workers)):
                sent = next(packets)
                if isinstance(sent, UserError):
                    raise sent
                arrived |= sent
            examples = [
                # Numbers go on from pass to pass, and with them the masks.
                preprocessor.example(block, corpus, 0, number)
                for corpus, number, block in lanes.draw(update, arrived)
            ]
            collator = preprocessor.train_collator(update)
            sizes = self.args.micro_batch_sizes(num_processes, update)
            batches = [collator(examples[end - size : end]) for size, end in zip(sizes, accumulate(sizes), strict=True)]
            rows = np.concatenate([batch.pop("rows").numpy() for batch in batches])
            counts = Counts.of_rows(rows, len(self.names))
            for (_, corpus), buffer in lanes.buffers.items():
                left_out = (buffer.state.counts[name] for name in LEFT_OUT)
                counts.streams[corpus] += [*left_out, round(buffer.passes * 1e6)]
            yield UpdateData(batches, counts, lanes.snapshot())

    def name_rows(self, update: int) -> list[str]:
        """Say of each row of an update, in their order on one process, from which corpus and lane it is."""
        lanes = list(range(self.args.num_lanes))
        return [f"{self.names[corpus]}, lane {lane}" for lane, corpus in self.schedule.draws(update, lanes)]

    def sample_blocks(self) -> Iterator[np.ndarray]:
        """Yield the ids of blocks at the heads of what is trained on of each corpus."""
        shares = apportion(UNIGRAM_TOKENS // self.args.max_seq_length, self.quotas)
        for reader, wanted in zip(self.readers, shares, strict=False):
            for shard in range(reader.source.num_shards if wanted else 0):
                blocks, _, _ = reader.read_head(shard, wanted)
                yield from (block.input_ids for block in blocks)
                wanted -= len(blocks)
                if wanted <= 0:
                    break
