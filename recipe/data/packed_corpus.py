"""A token store seen as blocks of one format and length: tables of boundaries, mapped into memory."""

import bisect
import hashlib
import itertools
import operator
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recipe.arguments.pretraining import PAIR_PACKINGS
from recipe.base.files import replace_folder
from recipe.base.hashing import digest, hash64
from recipe.base.progress import progress_bar
from recipe.base.workers import build_together
from recipe.data.integrity import StoredFile, damaged_store, note_file, raising_damaged_store, read_json, write_json
from recipe.data.packing import (
    CONTINUES,
    RANDOM,
    SEGMENT,
    SINGLE,
    SWAPPED,
    WINDOW_BLOCKS,
    Block,
    BlockFormat,
    Packed,
    Pairs,
    cut_out,
    draw_partners,
    is_drawn,
)
from recipe.data.token_store import LEFT_OUT, TokenStore, naming_disk_errors, open_arrow

BLOCKS_FORMAT = 3  # part of the folder's name: raise it when the contents come out differently
# The arrays of a view, which are files without a header.
DTYPES = {"segments": SEGMENT, "block_ends": np.dtype(np.int64), "labels": np.dtype(np.int8)}
LABELS = {CONTINUES, RANDOM, SWAPPED, SINGLE}


def map_array(file: StoredFile, dtype: np.dtype) -> np.ndarray:
    """Map a file into memory as an array. `np.memmap` would keep the file open, and there may be thousands."""
    if not file.size:
        return np.zeros(0, dtype)
    return np.frombuffer(pa.memory_map(str(file.path)).read_buffer(), dtype)


def unpack_list(chunk: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a list array, not copied, and (rows + 1,) their offsets."""
    offsets = chunk.offsets.to_numpy()
    return chunk.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]], offsets - offsets[0]


def pack_unit(ids: pa.ListArray, ends: pa.ListArray, is_kept: np.ndarray, make: Callable[..., Packed]) -> Packed:
    """Pack the kept documents of a unit; segments start at tokens of the whole unit."""
    _, id_offsets = unpack_list(ids)
    values, end_offsets = unpack_list(ends)
    lengths = np.diff(id_offsets).astype(np.int64)
    kept_lengths = lengths[is_kept]
    document_ends = np.cumsum(kept_lengths)
    sentences = np.diff(end_offsets)
    sentence_ends = values[np.repeat(is_kept, sentences)] + np.repeat(document_ends - kept_lengths, sentences[is_kept])
    packed = make(document_ends, sentence_ends)
    # Documents that are left out stand between others, whose tokens they shift.
    shift = id_offsets[:-1][is_kept] - (document_ends - kept_lengths)
    document = np.searchsorted(document_ends, packed.segments["start"], side="right")
    packed.segments["start"] += shift[np.minimum(document, len(shift) - 1)]
    return packed


class PackedCorpus:
    """A complete token store seen as blocks of one format and length.

    Args:
        copies: for each shard, which of its documents are left out as copies of others; None for no document.
    """

    def __init__(self, store: TokenStore, block_format: BlockFormat, copies: list[np.ndarray] | None = None) -> None:
        self.store = store
        self.format = block_format
        self.copies = copies
        self.written: set[int] = set()  # the shards whose arrays this process has made
        self.held_places: dict[int, int] = {}  # of each held-out block, its place among these
        made_with: list[Any] = [BLOCKS_FORMAT]
        if block_format.packing in PAIR_PACKINGS:
            made_with += [block_format.pair_special_tokens, block_format.seed]
        made_with += [hashlib.sha256(np.concatenate(copies).tobytes()).hexdigest()] if copies else []
        name = f"{block_format.packing}-{block_format.max_seq_length}"
        self.path = store.path / f"{name}-{digest(*made_with)[:8]}"

    def folder(self, shard: int) -> Path:
        """Return the folder of a shard's arrays."""
        return self.path / f"shard-{shard:05d}"

    @property
    def is_complete(self) -> bool:
        """Say whether store and view have all shards."""
        return self.store.is_complete and all(self.folder(n).is_dir() for n in range(self.store.num_shards))

    def build(self, process_index: int) -> None:
        """Add the shards that are missing, together with all processes that do the same; then open the view."""
        num_shards = self.store.num_shards
        if not self.is_complete:
            with (
                naming_disk_errors(self.path),
                progress_bar(f"packing {self.store.corpus.name}", num_shards, "shards", process_index == 0) as bar,
            ):

                def make(shard: int) -> None:
                    with raising_damaged_store(self.store.arrow(shard)):
                        self.pack_shard(shard)
                    self.written.add(shard)
                    bar.update()

                build_together(self.path, num_shards, process_index, lambda shard: self.folder(shard).is_dir(), make)
        self.copies = None  # no longer needed, and not to be sent to workers
        self.open()

    def pack_shard(self, shard: int) -> None:
        """Pack a shard and write its arrays."""
        table = open_arrow(self.store.arrow(shard))
        is_kept = ~self.copies[shard] if self.copies else np.ones(len(table), bool)
        units = [Packed(*(np.zeros(0, dtype) for dtype in DTYPES.values()))]
        tokens = documents = num_segments = 0
        for batch in table.to_batches():
            kept = is_kept[documents : documents + len(batch)]
            if kept.any():
                unit = pack_unit(batch["input_ids"], batch["sentence_ends"], kept, self.format.pack)
                unit.segments["start"] += tokens
                units.append(unit._replace(block_ends=unit.block_ends + num_segments))
                num_segments += len(unit.segments)
            documents += len(batch)
            tokens += len(unpack_list(batch["input_ids"])[0])
        packed = Packed(*map(np.concatenate, zip(*units, strict=True)))
        kept_tokens = int(packed.segments["length"].sum(dtype=np.int64))
        counts = {"documents": int(is_kept.sum()), "tokens": kept_tokens, "copies": int((~is_kept).sum())}
        with replace_folder(self.folder(shard)) as temporary:
            for name, array in packed._asdict().items():
                array.astype(DTYPES[name], copy=False).tofile(temporary / f"{name}.bin")
            tables = {name: note_file(temporary / f"{name}.bin") for name in DTYPES}
            made_of = self.store.note(shard)["sha256"]
            write_json(temporary / "counts.json", counts | {"tables": tables, "made_of": made_of})

    def open(self) -> None:
        """Map the arrays of all shards into memory; raise a `UserError` if a file is not as long as it was."""
        notes = self.store.notes()
        self.texts = digest(*(note["texts"] for note in notes))  # of the whole corpus, in its order
        self.shards = [
            ShardBlocks(self.store.arrow(shard), note, self.folder(shard)) for shard, note in enumerate(notes)
        ]
        self.first_blocks = [0, *itertools.accumulate(len(shard.block_ends) for shard in self.shards)]
        self.counts: Counter[str] = Counter()
        for blocks in self.shards:
            self.counts.update(blocks.counts)
        left_out = {name: sum(note[name] for note in notes) for name in LEFT_OUT}
        self.left_out = left_out | {"copies": self.counts["copies"]}

    def files_of_others(self) -> list[StoredFile]:
        """List all files that a run reads, but those that this process has just made."""
        arrows = [shard.files[0] for n, shard in enumerate(self.shards) if n not in self.store.written]
        tables = [file for n, shard in enumerate(self.shards) if n not in self.written for file in shard.files[1:]]
        return arrows + tables

    def __getstate__(self) -> dict[str, Any]:
        # A worker process that is not forked opens the mapped files itself rather than being sent their contents.
        return {name: value for name, value in vars(self).items() if name != "shards"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.open()

    def __len__(self) -> int:
        return self.first_blocks[-1]

    def hold_out(self, numbers: np.ndarray) -> None:
        """Hold blocks out: in formats whose pairs exchange parts, these do so among themselves alone."""
        if not self.format.exchanges or not len(numbers):
            return
        found = []
        for shard, own in map(self.find, numbers.tolist()):
            pairs = self.shards[shard].pairs(own, own + 1)
            found.append(pairs._replace(documents=pairs.documents + (shard << 40)))  # which number those of the shard
        pairs = Pairs(*map(np.concatenate, zip(*found, strict=True)))
        order = np.lexsort((numbers, pairs.sizes[:, 1]))
        self.held_numbers, self.held_pairs = numbers[order], Pairs(*(array[order] for array in pairs))
        self.held_places = {number: place for place, number in enumerate(self.held_numbers.tolist())}

    def sharing_text(self, other: "PackedCorpus", numbers: np.ndarray) -> np.ndarray:
        """Return the blocks, ascending, that have a token of some blocks of another view of the same store."""
        found: list[np.ndarray] = [np.zeros(0, np.int64)]
        of_shard: dict[int, list[np.ndarray]] = {}
        for shard, own in map(other.find, numbers.tolist()):
            of_shard.setdefault(shard, []).append(other.shards[shard].segments_of(own))
        for shard, segments in of_shard.items():
            found.append(self.first_blocks[shard] + self.shards[shard].blocks_in(np.concatenate(segments)))
        return np.sort(np.concatenate(found))

    def find(self, number: int) -> tuple[int, int]:
        """Return the shard of a block, and its number there."""
        shard = bisect.bisect_right(self.first_blocks, number) - 1
        return shard, number - self.first_blocks[shard]

    def block(self, number: int, key: np.ndarray | int = 0) -> Block:
        """Read a block, in constant time.

        Args:
            key: of the pass, from which pairs that exchange their second parts draw with whom.

        Raises:
            UserError: what is stored of it cannot be a block.
        """
        shard, own = self.find(number)
        parts, documents, label = self.shards[shard].read(own)
        if self.format.exchanges and (partner := self.partner(number, key)) != number:
            shard, other = self.find(partner)
            seconds, documents_of_partner, _ = self.shards[shard].read(other)
            if min(len(parts), len(seconds)) < 2:
                raise damaged_store(self.shards[shard].files[3].path, "it calls a block of one part a pair")
            parts, documents, label = [parts[0], seconds[1]], [documents[0], documents_of_partner[1]], RANDOM
        return self.checked(self.format.assemble(parts, label, sum(documents)), self.shards[shard])

    def checked(self, block: Block, shard: "ShardBlocks") -> Block:
        """Return a block; raise a `UserError` if it has ids, a label or a length that no model of the run can have."""
        arrow, segments, _, labels = shard.files
        ids, num_ids, length = block.input_ids, self.store.encoder.num_ids, self.format.max_seq_length
        if ids.max() >= num_ids or (ids.dtype != np.uint16 and ids.min() < 0):
            raise damaged_store(arrow.path, f"it holds ids from {ids.min()} to {ids.max()}, and there are {num_ids}")
        if len(ids) > length:
            raise damaged_store(segments.path, f"it makes a block of {len(ids)} tokens, not of {length} at the most")
        if block.label not in LABELS:
            raise damaged_store(labels.path, f"it holds the label {block.label}")
        return block

    def partner(self, number: int, key: np.ndarray | int) -> int:
        """Return the block whose second part a block has: its own, or that of one in its window."""
        if not is_drawn(hash64(key, number)):
            return number
        shard, place = self.find(number)
        is_held_out = number in self.held_places
        place = self.held_places.get(number, place)
        first = place - place % WINDOW_BLOCKS
        window = slice(first, first + WINDOW_BLOCKS)
        if is_held_out:
            numbers, pairs = self.held_numbers[window], Pairs(*(array[window] for array in self.held_pairs))
        else:
            pairs = self.shards[shard].pairs(first, first + WINDOW_BLOCKS)
            numbers = np.arange(len(pairs.sizes)) + (number - place + first)
            are_held_out = np.array([one in self.held_places for one in numbers.tolist()])
            pairs = pairs._replace(can_exchange=pairs.can_exchange & ~are_held_out)
        partners = draw_partners(pairs, self.format.pair_room, hash64(key, numbers))
        return int(numbers[partners[place - first]])


class ShardBlocks:
    """The arrays of one shard, mapped into memory, given what the store notes of it.

    Raises:
        UserError: a file is not as long as it was, or the arrays were made of another shard or do not fit together.
    """

    def __init__(self, arrow: Path, note: dict[str, Any], folder: Path) -> None:
        about = read_json(folder / "counts.json")
        self.counts = {name: about[name] for name in ("documents", "tokens", "copies")}
        tables = [StoredFile.of_note(folder / f"{name}.bin", about["tables"][name]) for name in DTYPES]
        self.files = StoredFile.of_note(arrow, note), *tables
        columns = [batch["input_ids"] for batch in open_arrow(arrow).to_batches()]
        self.units = [unpack_list(column)[0] for column in columns]
        self.unit_starts = [0, *itertools.accumulate(map(len, self.units))]
        self.offsets = [column.offsets.to_numpy() for column in columns]  # of the documents of each unit, not copied
        self.first_documents = [0, *itertools.accumulate(map(len, columns))]
        self.segments, self.block_ends, self.labels = map(map_array, tables, DTYPES.values())
        if about["made_of"] != note["sha256"]:
            raise damaged_store(folder / "counts.json", f"it is of another {arrow}")
        num_segments = int(self.block_ends[-1]) if len(self.block_ends) else 0
        if (len(self.segments), len(self.labels)) != (num_segments, len(self.block_ends)):
            raise damaged_store(folder / "block_ends.bin", f"it ends at {num_segments:,} of {len(self.segments):,}")

    def check_sizes(self) -> None:
        """Raise a `UserError` if a file has lost something since it was mapped: to read that would end the process."""
        for file in self.files:
            file.check_size()

    def read(self, number: int) -> tuple[list[np.ndarray], list[bool], int]:
        """Return the parts of a block, (tokens,) ids each, whether a document ends in each, and the block's label."""
        segments = self.segments_of(number)
        unit = bisect.bisect_right(self.unit_starts, int(segments["start"][0])) - 1
        parts = cut_out(self.units[unit], segments, self.unit_starts[unit])
        return parts, segments["ends_document"].tolist(), int(self.labels[number])

    def segments_of(self, number: int) -> np.ndarray:
        """Return the segments of a block; raise a `UserError` if reading it would leave its files or its unit."""
        self.check_sizes()
        first, end = int(self.block_ends[number - 1]) if number else 0, int(self.block_ends[number])
        if not 0 <= first < end <= len(self.segments):
            raise damaged_store(self.files[2].path, f"block {number} has the segments from {first} to {end}")
        segments = self.segments[first:end]
        starts, lengths = segments["start"].tolist(), segments["length"].tolist()  # a few: faster than by numpy
        unit = max(0, bisect.bisect_right(self.unit_starts, starts[0]) - 1)
        low, high = self.unit_starts[unit], self.unit_starts[min(unit + 1, len(self.units))]
        if min(starts) < low or min(lengths) < 0 or max(map(operator.add, starts, lengths)) > high:
            raise damaged_store(self.files[1].path, f"block {number} reaches beyond the tokens from {low} to {high}")
        return segments

    def blocks_in(self, segments: np.ndarray) -> np.ndarray:
        """Return the blocks that have a token in segments of `SEGMENT`, which do not overlap; ascending."""
        segments = np.sort(segments, order="start")
        starts, found = self.segments["start"], []
        for unit in set((np.searchsorted(self.unit_starts, segments["start"], side="right") - 1).tolist()):
            # Within a unit, segments are in the order of their blocks, which need not be that of the text.
            first, last = np.searchsorted(starts, self.unit_starts[unit : unit + 2])
            own = self.segments[first:last]
            before = np.searchsorted(segments["start"], own["start"] + own["length"]) - 1  # the last that starts before
            reached = segments["start"][before] + segments["length"][before]
            hit = first + np.flatnonzero((before >= 0) & (reached > own["start"]))
            found.append(np.searchsorted(self.block_ends, hit, side="right"))
        return np.unique(np.concatenate(found))

    def pairs(self, first: int, last: int) -> Pairs:
        """Describe the blocks from `first` to before `last`, or to the end of the shard."""
        self.check_sizes()
        with raising_damaged_store(self.files[1].path):
            begin = int(self.block_ends[first - 1]) if first else 0
            ends = self.block_ends[first:last]
            return Pairs.of(self.segments[begin : int(ends[-1])], ends - begin, self.number_documents)

    def number_documents(self, positions: np.ndarray) -> np.ndarray:
        """Return the numbers of the shard's documents that positions are in, in their shape."""
        units = np.searchsorted(self.unit_starts, positions, side="right") - 1
        numbers = np.empty_like(positions)
        for unit in set(units.flat):
            offsets, own = self.offsets[unit], units == unit
            within = (positions[own] - self.unit_starts[unit] + offsets[0]).astype(offsets.dtype)
            numbers[own] = np.searchsorted(offsets, within, side="right") - 1 + self.first_documents[unit]
        return numbers
