"""The streaming mode: tokenise and pack while training, keep nothing on disk, and resume exactly.

1. The shards of the corpora are dealt to lanes, anew for each pass (`LaneOrder`). A `LaneReader` reads what one lane
   has of one corpus: it encodes and packs some documents at a time and keeps what does not fill a block yet.
2. Worker processes run the readers of their lanes (`LaneDataset`). Which corpus each lane needs a block of, and when,
   is a function of the update, so that a worker sends just what each update will need, before it is asked.
3. The training process keeps the blocks in one shuffle buffer for each reader (`LaneBuffers`) and draws from those. It
   therefore holds all blocks that it has received, and the state of each reader when it sent them: that is the
   checkpoint, whatever the workers may have read ahead.

Lanes do not depend on processes or workers: a checkpoint of two processes is resumed by one or four.

(`datasets` does not save what is in its shuffle buffers: after a resume it fills them anew, and other blocks come.)
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, default_convert, get_worker_info

from recipe.arguments.phases import Timeline
from recipe.arguments.pretraining import ONE_PART_PACKINGS
from recipe.base.errors import UserError
from recipe.base.hashing import Purpose, hash64
from recipe.data.corpora import Part, Record, Source, group_by_size
from recipe.data.document_encoder import DocumentEncoder
from recipe.data.hygiene import DocumentFilter
from recipe.data.packing import Block, BlockFormat, cut_out, exchange
from recipe.data.sampling import LaneOrder

REFILL_CHARACTERS = 200_000  # read at once: some 90 blocks of 512
MAX_EMPTY_PASSES = 20  # in a row, after which a lane gives up on a corpus


class Blocks(NamedTuple):
    """Blocks as flat arrays: quick to send, and what a checkpoint holds."""

    input_ids: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray
    span_counts: np.ndarray
    labels: np.ndarray
    documents: np.ndarray

    @classmethod
    def join(cls, blocks: list[Block], dtype: np.dtype) -> "Blocks":
        """Join blocks, whose ids are of `dtype`."""
        return cls(
            np.concatenate([np.zeros(0, dtype), *(block.input_ids for block in blocks)]),
            np.array([len(block.input_ids) for block in blocks], np.int32),
            np.concatenate([np.zeros(0, np.int32), *(block.spans for block in blocks)]),
            np.array([len(block.spans) for block in blocks], np.int32),
            np.array([block.label for block in blocks], np.int8),
            np.array([block.documents for block in blocks], np.int32),
        )

    def split(self) -> list[Block]:
        """Return the single blocks, which share these arrays."""
        ids = np.split(self.input_ids, np.cumsum(self.lengths))[:-1]
        spans = np.split(self.spans, np.cumsum(self.span_counts))[:-1]
        return [Block(*parts) for parts in zip(ids, spans, self.labels.tolist(), self.documents.tolist(), strict=True)]


class Remainder(NamedTuple):
    """Encoded text that is not in a block yet: `input_ids`, and the ends of documents and sentences in it, int64."""

    input_ids: np.ndarray
    document_ends: np.ndarray
    sentence_ends: np.ndarray


ReaderKey = tuple[int, int]  # of a `LaneReader`, its state or its buffer: (lane, corpus)


@dataclass
class LaneReaderState:
    """The state of a `LaneReader`, as a checkpoint holds it: its next record, and what it has read and not packed."""

    remainder: Remainder
    visit: int = 0  # the running pass over the corpus
    ordinal: int = 0  # which of the pass's shards is read
    record: int = 0  # the next one in that shard
    found: int = 0  # documents of the running pass
    characters: int = 0  # of these documents
    last_characters: int = 0  # of the documents of the pass before
    empty_passes: int = 0  # passes without a document, in a row
    made: int = 0  # blocks in all passes
    made_before: int = 0  # of these, blocks of another length than now, not all of which were drawn
    passes_before: float = 0.0  # how many were drawn in such blocks
    passes: float = 0.0  # how many were read, the running one in part
    counts: Counter[str] = field(default_factory=Counter)  # of the document filter


# What a worker sends: of each reader, each time some new blocks and its state after them.
Packets = dict[ReaderKey, list[tuple[Blocks, LaneReaderState]]]


class CorpusReader(NamedTuple):
    """What all lanes have in common that read a corpus."""

    source: Source
    held_out: dict[int, int]  # of each shard, how many records at its head are not trained on
    encoder: DocumentEncoder
    documents: Callable[[], DocumentFilter]  # makes a document filter
    format: BlockFormat
    lane_characters: float = 0.0  # about how many a lane reads in a pass; 0 if not known

    @property
    def nothing(self) -> Remainder:
        """Return an empty remainder."""
        return Remainder(np.zeros(0, self.encoder.dtype), np.zeros(0, np.int64), np.zeros(0, np.int64))

    def pack_texts(
        self, texts: list[str], before: Remainder, key: np.ndarray | int = 0, is_last: bool = False
    ) -> tuple[list[Block], Remainder]:
        """Pack texts behind what remained before, and return the blocks, in the order of the text, and what remains.

        In formats that go on from document to document that is the last block, which more text may still fit into;
        unless `is_last`, after which there is none. By the key, pairs draw with whom they exchange second parts.
        """
        encoded = [(ids, ends) for ids, ends in self.encoder(texts) if len(ids)]  # a normalizer may leave nothing
        starts = list(itertools.accumulate((len(ids) for ids, _ in encoded), initial=len(before.input_ids)))
        sentence_ends = (ends + start for (_, ends), start in zip(encoded, starts, strict=False))
        unit = Remainder(
            np.concatenate([before.input_ids, *(ids for ids, _ in encoded)]),
            np.concatenate([before.document_ends, np.array(starts[1:], np.int64)]),
            np.concatenate([before.sentence_ends, *sentence_ends]),
        )
        if not starts[-1]:
            return [], unit
        packed = self.format.pack(unit.document_ends, unit.sentence_ends)
        if self.format.exchanges:
            packed = exchange(packed, unit.document_ends, self.format.pair_room, key)
        ends = packed.block_ends.tolist()
        firsts = [0, *ends[:-1]]
        rest = self.nothing
        if self.format.packing in ONE_PART_PACKINGS and not is_last:
            start = int(packed.segments["start"][firsts.pop()])
            rest = Remainder(
                unit.input_ids[start:].copy(),
                *(ends_of[ends_of > start] - start for ends_of in (unit.document_ends, unit.sentence_ends)),
            )
        made = [packed.segments[first:end] for first, end in zip(firsts, ends, strict=False)]
        blocks = [
            self.format.assemble(cut_out(unit.input_ids, segments), label, int(segments["ends_document"].sum()))
            for segments, label in zip(made, packed.labels.tolist(), strict=False)
        ]
        order = sorted(range(len(made)), key=lambda number: made[number]["start"][0])
        return [blocks[number] for number in order], rest

    def unpack(self, blocks: list[Block], rest: Remainder) -> Remainder:
        """Return the text of blocks of one part, in order, and what follows it; their ends end sentences."""
        ids: list[np.ndarray] = []
        document_ends, sentence_ends, size = [], [], 0
        for block in blocks:
            is_end = block.input_ids[1:] == self.format.sep_token_id
            ids.append(block.input_ids[1:][~is_end])
            ends = (np.flatnonzero(is_end) - np.arange(is_end.sum()) + size).tolist()
            sentence_ends += ends
            document_ends += ends[: block.documents]  # all but the last end a document, and the last one may
            size += len(ids[-1])
        return Remainder(
            np.concatenate([*ids, rest.input_ids]),
            np.concatenate([np.array(document_ends, np.int64), rest.document_ends + size]),
            np.concatenate([np.array(sentence_ends, np.int64), rest.sentence_ends + size]),
        )

    def pack_sample(self, max_characters: int, max_document_characters: int) -> tuple[list[Block], list[str]]:
        """Pack the first documents of the corpus, each cut at its limit, up to `max_characters`; return those too."""
        shards = ((self.documents(), self.source.read(shard)) for shard in range(self.source.num_shards))
        texts = (
            text[:max_document_characters]
            for documents, records in shards
            for _, text in records
            if documents.accepts(text)
        )
        sample = next(group_by_size(texts, len, max_characters), [])
        return self.pack_texts(sample, self.nothing, is_last=True)[0], sample

    def read_head(self, shard: int, num_blocks: int) -> tuple[list[Block], int, bool]:
        """Pack the documents at the head of what is not held out of a shard.

        Returns:
            `num_blocks` blocks, or fewer; the record after the last one read; whether the shard was at its end.
        """
        documents, rest = self.documents(), self.nothing
        blocks: list[Block] = []
        texts, is_whole = [], True
        record = self.held_out.get(shard, 0)
        for index, text in self.source.read(shard, record):
            if len(blocks) >= num_blocks:
                is_whole = False
                break
            record = index + 1
            if documents.accepts(text):
                new, rest = self.pack_texts([text], rest)
                blocks += new
                texts.append(text)
        if self.format.exchanges:  # which needs the documents together
            blocks, _ = self.pack_texts(texts, self.nothing, shard)
        if is_whole:
            blocks += self.pack_texts([], rest, is_last=True)[0]
        return blocks[:num_blocks], record, is_whole


@dataclass
class LaneReader:
    """A reader of what one lane has of one corpus, without end."""

    reader: CorpusReader
    order: LaneOrder  # deals the shards
    corpus: int
    lane: int
    state: LaneReaderState  # where it resumes, and then where it is

    def __post_init__(self) -> None:
        self.start_pass()

    def start_pass(self) -> None:
        """Deal the shards of a pass, or of what is left of it. Malformed documents are counted anew."""
        self.documents = self.reader.documents()
        self.counts_before = self.state.counts
        self.parts = self.order.deal(self.corpus, self.state.visit, self.lane, self.reader.source.num_shards)
        self.records = self.read_pass()

    def read_pass(self) -> Iterator[tuple[int, Record]]:
        """Read what is left of the pass, and keep in the state which shard that is."""
        state = self.state
        while state.ordinal < len(self.parts):
            shard, *part = self.parts[state.ordinal]
            first = max(state.record, self.reader.held_out.get(shard, 0))
            yield from self.reader.source.read(shard, first, Part(*part))
            state.record, state.ordinal = 0, state.ordinal + 1

    def texts(self) -> list[str]:
        """Read the next documents, some 200,000 characters together; raise a `UserError` if no pass has any."""
        state, size = self.state, 0
        texts: list[str] = []
        while True:
            for index, text in self.records:
                state.record = index + 1
                if self.documents.accepts(text):
                    texts.append(text)
                    size += len(text)
                    state.found += 1
                    state.characters += len(text)
                    if size >= REFILL_CHARACTERS:
                        return texts
            self.end_pass()

    def end_pass(self) -> None:
        """Begin the next pass, or raise a `UserError` if too many had no document."""
        state = self.state
        state.empty_passes = 0 if state.found else state.empty_passes + 1
        state.last_characters = state.characters
        state.visit, state.ordinal, state.found, state.characters = state.visit + 1, 0, 0, 0
        state.counts = self.counts_before + self.documents.counts
        self.start_pass()
        if state.empty_passes == MAX_EMPTY_PASSES:
            raise UserError(
                f"corpus {self.reader.source.corpus.name!r}: lane {self.lane} found no document in {MAX_EMPTY_PASSES} "
                f"passes; the corpus has too few for {self.order.num_lanes} `num_lanes`, so lower that or add text"
            )

    def refill(self) -> tuple[Blocks, LaneReaderState]:
        """Make some new blocks, or none yet, and return them and the state after them."""
        state = self.state
        key = hash64(Purpose.PARTNER, self.order.seed, self.corpus, self.lane, state.made)
        blocks, state.remainder = self.reader.pack_texts(self.texts(), state.remainder, key)
        state.made += len(blocks)
        expected = state.last_characters or self.reader.lane_characters
        part = state.characters / expected if expected else state.ordinal / len(self.parts)
        state.passes = state.visit + min(part, 0.999)
        state.counts = self.counts_before + self.documents.counts
        return Blocks.join(blocks, self.reader.encoder.dtype), replace(state)


@dataclass
class Schedule:
    """When each buffer is drawn from and refilled: the same for the worker that fills and the process that draws."""

    timeline: Timeline
    order: LaneOrder
    patterns: list[np.ndarray]  # of each stretch of the run, in which corpora take their turns
    buffer_sizes: list[int]  # for each corpus, blocks that a buffer holds before one is drawn

    def draws(self, update: int, lanes: list[int]) -> Iterator[ReaderKey]:
        """Yield the buffer that each of an update's blocks from these lanes is drawn from."""
        pattern = self.patterns[self.timeline.stretch(update)]
        first, last = (self.timeline.blocks(n) // self.order.num_lanes for n in (update, update + 1))
        for number in range(first, last):
            corpora = self.order.corpora(number, pattern).tolist()
            for lane in lanes:
                yield lane, corpora[lane]


@dataclass
class LaneDataset(IterableDataset):
    """The packets of some lanes: of each update, those that it needs. Workers share the lanes."""

    readers: list[CorpusReader]  # of the corpora
    schedule: Schedule
    lanes: list[int]  # of this process
    states: dict[ReaderKey, LaneReaderState]  # of the lane readers that have been read from
    held: dict[ReaderKey, int]  # how many blocks of theirs are in buffers
    updates: range  # for which to make blocks

    def __iter__(self) -> Iterator[Packets | UserError]:
        """Yield the packets of each update, or an error as it is, since one raised in a worker would lose its type."""
        worker = get_worker_info()
        lanes = self.lanes[worker.id :: worker.num_workers] if worker else self.lanes
        held = Counter(self.held)
        lane_readers: dict[ReaderKey, LaneReader] = {}
        for update in self.updates:
            packets: Packets = defaultdict(list)
            try:
                for key in self.schedule.draws(update, lanes):
                    if key not in lane_readers:
                        lane, corpus = key
                        reader = self.readers[corpus]
                        state = self.states.get(key) or LaneReaderState(reader.nothing)
                        lane_readers[key] = LaneReader(reader, self.schedule.order, corpus, lane, replace(state))
                    while held[key] < self.schedule.buffer_sizes[key[1]]:
                        packets[key].append(lane_readers[key].refill())
                        held[key] += len(packets[key][-1][0].lengths)
                    held[key] -= 1
            except UserError as error:
                yield error
                return
            yield packets


@dataclass
class Buffer:
    """The shuffle buffer of a `LaneReader`, whose blocks are numbered through all passes."""

    state: LaneReaderState  # after the blocks that were received
    blocks: list[tuple[int, Block]] = field(default_factory=list)  # (number, block) of those not drawn yet

    @property
    def drawn(self) -> int:
        """Return how many blocks have been drawn, or packed again in another length."""
        return self.state.made - len(self.blocks)

    @property
    def passes(self) -> float:
        """Return how often the lane's part of its corpus has been drawn."""
        state = self.state
        made, drawn = state.made - state.made_before, self.drawn - state.made_before
        return state.passes_before + (state.passes - state.passes_before) * drawn / max(1, made)

    def receive(self, blocks: Blocks, state: LaneReaderState) -> None:
        """Add new blocks, after which the reader is in this state."""
        # Copies, or the last block to be drawn would keep all of its packet in memory.
        new = [block._replace(input_ids=block.input_ids.copy()) for block in blocks.split()]
        self.blocks += enumerate(new, start=state.made - len(new))
        self.state = state

    def draw(self, *key: int) -> tuple[int, Block]:
        """Take out a (number, block) that is a hash of the key and of how many were drawn before."""
        at = int(hash64(Purpose.DRAW, *key, self.drawn) % np.uint64(len(self.blocks)))
        self.blocks[at], self.blocks[-1] = self.blocks[-1], self.blocks[at]
        return self.blocks.pop()


@dataclass
class LaneBuffers:
    """The shuffle buffers of the lanes of one process."""

    readers: list[CorpusReader]  # of the corpora
    schedule: Schedule
    lanes: list[int]  # of this process
    buffers: dict[ReaderKey, Buffer]  # those that have been drawn from

    def pump(self, updates: range) -> LaneDataset:
        """Return the data set that makes what these updates will draw."""
        states = {key: buffer.state for key, buffer in self.buffers.items()}
        held = {key: len(buffer.blocks) for key, buffer in self.buffers.items()}
        return LaneDataset(self.readers, self.schedule, self.lanes, states, held, updates)

    def draw(self, update: int, packets: Packets) -> list[tuple[int, int, Block]]:
        """Draw the blocks of an update from these lanes, given all packets that `pump` has made for it.

        Returns:
            (corpus, number, block) of each; numbers are unique in a corpus.
        """
        drawn = []
        for lane, corpus in self.schedule.draws(update, self.lanes):
            buffer = self.buffers.setdefault((lane, corpus), Buffer(LaneReaderState(self.readers[corpus].nothing)))
            while len(buffer.blocks) < self.schedule.buffer_sizes[corpus]:
                buffer.receive(*packets[lane, corpus].pop(0))
            number, block = buffer.draw(self.schedule.order.seed, lane, corpus)
            drawn.append((corpus, number * self.schedule.order.num_lanes + lane, block))
        return drawn

    def unpack(self) -> None:
        """Put what is in the buffers back before the text that is read, to be packed into blocks of another length."""
        for (_, corpus), buffer in self.buffers.items():
            buffer.blocks.sort(key=lambda numbered: numbered[0])
            rest = self.readers[corpus].unpack([block for _, block in buffer.blocks], buffer.state.remainder)
            made, passes = buffer.state.made, buffer.passes
            buffer.state = replace(buffer.state, remainder=rest, made_before=made, passes_before=passes)
            buffer.blocks = []

    def snapshot(self) -> dict[ReaderKey, Buffer]:
        """Return a copy of the buffers that later draws do not change."""
        return {key: replace(buffer, blocks=buffer.blocks.copy()) for key, buffer in self.buffers.items()}


def to_arrays(buffers: dict[ReaderKey, Buffer]) -> dict[str, Any]:
    """Turn buffers into arrays and plain values, to be sent to the process that writes the checkpoint."""
    return {
        f"{lane}.{corpus}": {
            "state": vars(buffer.state)
            | {"remainder": list(buffer.state.remainder), "counts": dict(buffer.state.counts)},
            "numbers": [np.array([number for number, _ in buffer.blocks], np.int64)],
            "blocks": list(Blocks.join([b for _, b in buffer.blocks], buffer.state.remainder.input_ids.dtype)),
        }
        for (lane, corpus), buffer in buffers.items()
    }


def to_tensors(arrays: dict[str, Any]) -> dict[str, Any]:
    """Turn what `to_arrays` returns into what a checkpoint holds. Tensors of uint16 can be saved, but not pickled."""
    return default_convert(arrays)


def from_tensors(saved: dict[str, Any], lanes: list[int]) -> dict[ReaderKey, Buffer]:
    """Turn what a checkpoint holds into the buffers of some lanes."""
    buffers = {}
    for key, value in saved.items():
        lane, corpus = map(int, key.split("."))
        if lane in lanes:
            remainder = Remainder(*map(torch.Tensor.numpy, value["state"]["remainder"]))
            changed = {"remainder": remainder, "counts": Counter(value["state"]["counts"])}
            blocks = Blocks(*map(torch.Tensor.numpy, value["blocks"])).split()
            numbered = list(zip(value["numbers"][0].tolist(), blocks, strict=True))
            buffers[lane, corpus] = Buffer(LaneReaderState(**value["state"] | changed), numbered)
    return buffers
