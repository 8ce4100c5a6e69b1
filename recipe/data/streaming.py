"""The streaming mode: tokenise and pack while training, keep nothing on disk, and go on exactly where it stopped.

1. The shards of the corpora are dealt to lanes, anew for each pass (`LaneOrder`). A `LaneReader` reads what one lane
   has of one corpus: it encodes and packs some documents at a time and keeps what does not fill a block yet.
2. Worker processes run the readers of their lanes (`LaneDataset`). Which corpus each lane needs a block of, and when,
   is a function of the update, so that a worker sends just what each update will need, before it is asked.
3. The training process keeps the blocks in one shuffle buffer for each reader (`LaneBuffers`) and draws from those. All
   that has been received, and where each reader stood when it was sent, is therefore here: that is the checkpoint,
   whatever the workers may have read ahead.

Lanes do not know of processes or workers: a checkpoint of two processes goes on with one or four.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from recipe.arguments.pretraining import ONE_PART_PACKINGS
from recipe.base.errors import UserError
from recipe.base.hashing import hash64
from recipe.data.corpora import Part, Source
from recipe.data.hygiene import DocumentFilter
from recipe.data.packing import Block, BlockFormat
from recipe.data.sampling import LaneOrder
from recipe.data.tokenizer import DocumentEncoder

REFILL_CHARACTERS = 200_000  # read at once: some 90 blocks of 512
EMPTY_PASSES = 20  # in a row, after which a lane gives up on a corpus
DRAW = 5  # what a hash is for, as part of its key, beside those of recipe/sampling.py


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
        return cls(
            np.concatenate([np.zeros(0, dtype), *(block.input_ids for block in blocks)]),
            np.array([len(block.input_ids) for block in blocks], np.int32),
            np.concatenate([np.zeros(0, np.int32), *(block.spans for block in blocks)]),
            np.array([len(block.spans) for block in blocks], np.int32),
            np.array([block.label for block in blocks], np.int8),
            np.array([block.documents for block in blocks], np.int32),
        )

    def split(self) -> list[Block]:
        ids = np.split(self.input_ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []
        spans = np.split(self.spans, np.cumsum(self.span_counts)[:-1]) if len(self.lengths) else []
        return [Block(*parts) for parts in zip(ids, spans, self.labels.tolist(), self.documents.tolist(), strict=True)]


class Remainder(NamedTuple):
    """Encoded text that is not in a block yet: `input_ids`, and the ends of documents and sentences in it, int64."""

    input_ids: np.ndarray
    document_ends: np.ndarray
    sentence_ends: np.ndarray


@dataclass
class LaneReaderState:
    """Where a feed stands: its next record, and what it has read and not packed.

    `visit` and `ordinal`: the pass and which of its shards; `found` and `characters`: documents and characters since it
    began; `last_characters`: of the pass before; `made`: blocks in all; `passes`: read, the running one in part;
    `counts`: of the filter.
    """

    remainder: Remainder
    visit: int = 0
    ordinal: int = 0
    record: int = 0
    found: int = 0
    characters: int = 0
    last_characters: int = 0
    empty_passes: int = 0
    made: int = 0
    passes: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)


class CorpusReader(NamedTuple):
    """What all feeds of a corpus have in common.

    `held_out`: of each shard, how many records at its head are not trained on; `documents` makes a filter;
    `lane_characters`: about how many a lane reads in a pass, 0 if not known.
    """

    source: Source
    held_out: dict[int, int]
    encoder: DocumentEncoder
    documents: Callable[[], DocumentFilter]
    format: BlockFormat
    lane_characters: float = 0.0

    @property
    def nothing(self) -> Remainder:
        return Remainder(np.zeros(0, self.encoder.dtype), np.zeros(0, np.int64), np.zeros(0, np.int64))

    def pack_texts(self, texts: list[str], before: Remainder, is_last: bool = False) -> tuple[list[Block], Remainder]:
        """Blocks of what was left and these texts, and what is left now: in formats that go on from document to
        document the last block, which a next document may still fit into.
        """
        ids, documents, sentences = [before.input_ids], [before.document_ends], [before.sentence_ends]
        length = len(before.input_ids)
        for document, ends in self.encoder(texts):
            if not len(document):  # a normalizer left nothing of it
                continue
            ids.append(document)
            sentences.append(ends + length)
            length += len(document)
            documents.append(np.array([length]))
        unit = Remainder(*map(np.concatenate, (ids, documents, sentences)))
        if not length:
            return [], unit
        packed = self.format.pack(unit.document_ends, unit.sentence_ends)
        ends = packed.block_ends.tolist()
        firsts = [0, *ends[:-1]]
        rest = self.nothing
        if self.format.packing in ONE_PART_PACKINGS and not is_last:
            start = int(packed.segments["start"][firsts.pop()])
            rest = Remainder(
                unit.input_ids[start:].copy(),
                *(ends_of[ends_of > start] - start for ends_of in (unit.document_ends, unit.sentence_ends)),
            )
        blocks = []
        for first, end, label in zip(firsts, ends, packed.labels.tolist(), strict=False):
            segments = packed.segments[first:end]
            starts, lengths = segments["start"].tolist(), segments["length"].tolist()
            parts = [unit.input_ids[start : start + size] for start, size in zip(starts, lengths, strict=True)]
            blocks.append(self.format.assemble(parts, segments["ends_document"], label))
        return blocks, rest

    def read_head(self, shard: int, first: int, num_blocks: int) -> tuple[list[Block], int, bool]:
        """Blocks of the documents from record `first` of a shard on.

        Returns:
            `num_blocks` blocks, or fewer; the record after the last one read; whether the shard was at its end.
        """
        documents, blocks, rest = self.documents(), [], self.nothing
        record = first
        for index, text in self.source.read(shard, first):
            if len(blocks) >= num_blocks:
                return blocks[:num_blocks], record, False
            record = index + 1
            if documents.accepts(text):
                new, rest = self.pack_texts([text], rest)
                blocks += new
        blocks += self.pack_texts([], rest, is_last=True)[0]
        return blocks[:num_blocks], record, True


class LaneReader:
    """What one lane reads of one corpus, without end.

    Args:
        reader: of the corpus.
        order: deals the shards.
        corpus, lane: numbers.
        state: where to go on.
    """

    def __init__(self, reader: CorpusReader, order: LaneOrder, corpus: int, lane: int, state: LaneReaderState) -> None:
        self.reader = reader
        self.order = order
        self.corpus = corpus
        self.lane = lane
        self.state = state
        self.start_pass()
        self.records: Iterator[tuple[int, str | UserError]] | None = None

    def start_pass(self) -> None:
        """The limit of malformed documents is one for each lane and pass (and begins anew after a resume)."""
        self.documents = self.reader.documents()
        self.counted: Counter[str] = Counter()
        self.adapter = self.order.deal(self.corpus, self.state.visit, self.lane, self.reader.source.num_shards)

    def settle_counts(self) -> None:
        self.state.counts = self.state.counts + (self.documents.counts - self.counted)
        self.counted = self.documents.counts.copy()

    def texts(self) -> list[str]:
        """The next documents, some 200,000 characters together.

        Raises:
            UserError: pass after pass there is nothing for this lane.
        """
        state, texts, size = self.state, [], 0
        while size < REFILL_CHARACTERS:
            if self.records is None:
                shard, *part = self.adapter[state.ordinal]
                first = max(state.record, self.reader.held_out.get(shard, 0))
                self.records = self.reader.source.read(shard, first, Part(*part))
            index, text = next(self.records, (None, ""))
            if index is not None:
                state.record = index + 1
                if self.documents.accepts(text):
                    texts.append(text)
                    size += len(text)
                    state.found += 1
                    state.characters += len(text)
                continue
            self.records = None
            state.record, state.ordinal = 0, state.ordinal + 1
            if state.ordinal == len(self.adapter):
                state.empty_passes = 0 if state.found else state.empty_passes + 1
                state.last_characters = state.characters
                state.visit, state.ordinal, state.found, state.characters = state.visit + 1, 0, 0, 0
                self.settle_counts()
                self.start_pass()
                if state.empty_passes == EMPTY_PASSES:
                    raise UserError(
                        f"corpus {self.reader.source.corpus.name!r}: lane {self.lane} found no document in "
                        f"{EMPTY_PASSES} passes; it has too few for {self.order.num_lanes} `num_lanes`"
                    )
        return texts

    def refill(self) -> tuple[Blocks, LaneReaderState]:
        """Some new blocks, or none yet, and where the feed stands after them."""
        blocks, remainder = self.reader.pack_texts(self.texts(), self.state.remainder)
        self.state.remainder = remainder
        self.state.made += len(blocks)
        whole = self.state.last_characters or self.reader.lane_characters
        part = self.state.characters / whole if whole else self.state.ordinal / len(self.adapter)
        self.state.passes = self.state.visit + min(part, 0.999)
        self.settle_counts()
        return Blocks.join(blocks, self.reader.encoder.dtype), replace(self.state)


class BlockPacket(NamedTuple):
    """What a worker sends: new blocks of a feed, and where it stood after them."""

    lane: int
    corpus: int
    blocks: Blocks
    state: LaneReaderState


@dataclass
class Schedule:
    """When each feed is drawn from and refilled: the same for the worker that fills and the process that draws.

    `buffer_sizes`: blocks that a feed of each corpus holds before one is drawn; `rounds`: of an update.
    """

    order: LaneOrder
    buffer_sizes: list[int]
    rounds: int

    def draws(self, update: int, lanes: list[int]) -> Iterator[tuple[int, int]]:
        """(lane, corpus) of an update's blocks from these lanes."""
        for number in range(update * self.rounds, (update + 1) * self.rounds):
            corpora = self.order.corpora(number).tolist()
            for lane in lanes:
                yield lane, corpora[lane]


class LaneDataset(IterableDataset):
    """The feeds of some lanes: of each update, the refills that it needs. Workers share the lanes.

    Args:
        readers: of the corpora.
        schedule: says which feed needs blocks when.
        lanes: of this process.
        states: where feeds stand that have been read from, by (lane, corpus).
        held: how many blocks of theirs are in buffers.
        updates: which to fill.
    """

    def __init__(
        self,
        readers: list[CorpusReader],
        schedule: Schedule,
        lanes: list[int],
        states: dict[tuple[int, int], LaneReaderState],
        held: dict[tuple[int, int], int],
        updates: range,
    ) -> None:
        self.readers = readers
        self.schedule = schedule
        self.lanes = lanes
        self.states = states
        self.held = held
        self.updates = updates

    def __iter__(self) -> Iterator[list[BlockPacket] | UserError]:
        """
        Yields:
            the refills of an update; an error as it is, since raised in a worker it would lose its type.
        """
        worker = get_worker_info()
        lanes = self.lanes[worker.id :: worker.num_workers] if worker else self.lanes
        held = Counter(self.held)
        feeds: dict[tuple[int, int], LaneReader] = {}
        for update in self.updates:
            refills = []
            try:
                for where in self.schedule.draws(update, lanes):
                    if where not in feeds:
                        lane, corpus = where
                        reader = self.readers[corpus]
                        state = self.states.get(where) or LaneReaderState(reader.nothing)
                        feeds[where] = LaneReader(reader, self.schedule.order, corpus, lane, replace(state))
                    while held[where] < self.schedule.buffer_sizes[where[1]]:
                        refills.append(BlockPacket(*where, *feeds[where].refill()))
                        held[where] += len(refills[-1].blocks.lengths)
                    held[where] -= 1
            except UserError as error:
                yield error
                return
            yield refills


@dataclass
class Buffer:
    """The shuffle buffer of a feed: (number, block) of those received and not drawn, and where the feed stood then.
    Numbers count a feed's blocks through all passes.
    """

    state: LaneReaderState
    blocks: list[tuple[int, Block]] = field(default_factory=list)

    @property
    def drawn(self) -> int:
        return self.state.made - len(self.blocks)

    @property
    def passes(self) -> float:
        """Over the feed's part of its corpus, as far as it has been drawn."""
        return self.state.passes * self.drawn / max(1, self.state.made)

    def receive(self, refill: BlockPacket) -> None:
        first = refill.state.made - len(refill.blocks.lengths)
        # Copies, or the last block to be drawn would keep all of its refill in memory.
        new = [block._replace(input_ids=block.input_ids.copy()) for block in refill.blocks.split()]
        self.blocks += enumerate(new, start=first)
        self.state = refill.state

    def draw(self, *key: int) -> tuple[int, Block]:
        at = int(hash64(DRAW, *key, self.drawn) % np.uint64(len(self.blocks)))
        self.blocks[at], self.blocks[-1] = self.blocks[-1], self.blocks[at]
        return self.blocks.pop()

    def copy(self) -> "Buffer":
        return replace(self, blocks=self.blocks.copy())


class LaneBuffers:
    """The lanes of one process, and how far they are.

    Args:
        readers, schedule: see `LaneDataset`.
        lanes: of this process.
        buffers: of those that have been drawn from.
    """

    def __init__(
        self,
        readers: list[CorpusReader],
        schedule: Schedule,
        lanes: list[int],
        buffers: dict[tuple[int, int], Buffer],
    ) -> None:
        self.readers = readers
        self.schedule = schedule
        self.lanes = lanes
        self.buffers = buffers

    def pump(self, updates: range) -> LaneDataset:
        states = {where: buffer.state for where, buffer in self.buffers.items()}
        held = {where: len(buffer.blocks) for where, buffer in self.buffers.items()}
        return LaneDataset(self.readers, self.schedule, self.lanes, states, held, updates)

    def draw(self, update: int, refills: list[BlockPacket]) -> list[tuple[int, int, Block]]:
        """The blocks of an update from these lanes: (corpus, number, block), numbers unique in a corpus.

        Args:
            refills: all that the pump has for this update.
        """
        arrived: dict[tuple[int, int], deque[BlockPacket]] = defaultdict(deque)
        for refill in refills:
            arrived[refill.lane, refill.corpus].append(refill)
        drawn = []
        for lane, corpus in self.schedule.draws(update, self.lanes):
            buffer = self.buffers.setdefault((lane, corpus), Buffer(LaneReaderState(self.readers[corpus].nothing)))
            while len(buffer.blocks) < self.schedule.buffer_sizes[corpus]:
                buffer.receive(arrived[lane, corpus].popleft())
            number, block = buffer.draw(self.schedule.order.seed, lane, corpus)
            drawn.append((corpus, number * self.schedule.order.num_lanes + lane, block))
        return drawn

    def snapshot(self) -> dict[tuple[int, int], Buffer]:
        """All of it as it is now; later draws do not change the copy."""
        return {where: buffer.copy() for where, buffer in self.buffers.items()}


def to_arrays(buffers: dict[tuple[int, int], Buffer]) -> dict[str, Any]:
    """Buffers as arrays and plain values, to be sent to the process that writes the checkpoint."""
    return {
        f"{lane}.{corpus}": {
            "state": vars(buffer.state)
            | {"remainder": list(buffer.state.remainder), "counts": dict(buffer.state.counts)},
            "numbers": [np.array([number for number, _ in buffer.blocks], np.int64)],
            "blocks": list(Blocks.join([b for _, b in buffer.blocks], buffer.state.remainder.input_ids.dtype)),
        }
        for (lane, corpus), buffer in buffers.items()
    }


def convert(values: Any, array: type, function: Callable[[Any], Any]) -> Any:
    """The same nested dictionaries and lists with every `array` in them converted."""
    if isinstance(values, dict):
        return {name: convert(value, array, function) for name, value in values.items()}
    if isinstance(values, list):
        return [convert(value, array, function) for value in values]
    return function(values) if isinstance(values, array) else values


def to_tensors(arrays: dict[str, Any]) -> dict[str, Any]:
    """What `to_arrays` gives as a checkpoint holds it. (Tensors of uint16 can be saved, but not pickled.)"""
    return convert(arrays, np.ndarray, torch.from_numpy)


def from_tensors(saved: dict[str, Any], lanes: list[int]) -> dict[tuple[int, int], Buffer]:
    """The buffers of some lanes from a checkpoint."""
    buffers = {}
    for key, value in saved.items():
        lane, corpus = map(int, key.split("."))
        if lane in lanes:
            value = convert(value, torch.Tensor, torch.Tensor.numpy)
            state = value["state"]
            state |= {"remainder": Remainder(*state["remainder"]), "counts": Counter(state["counts"])}
            numbered = list(zip(value["numbers"][0].tolist(), Blocks(*value["blocks"]).split(), strict=True))
            buffers[lane, corpus] = Buffer(LaneReaderState(**state), numbered)
    return buffers
