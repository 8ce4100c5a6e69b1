"""How blocks are made: integer work over the lengths of documents and sentences.

1. `BlockFormat.pack` takes one unit of a corpus, some millions of tokens, and cuts it into segments, each of one
   document. A block is a few segments; every token of the unit is in exactly one of them.
2. `draw_partners` has pairs exchange their second parts, anew in each pass: a function of hashes, with no table.
3. `BlockFormat.assemble` puts the special tokens around a block's parts, and `BlockFormat.swap` changes their order.

The formats are those of the paper's section 4.2, and `contiguous`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from recipe.arguments.pretraining import EXCHANGED_PACKINGS, ONE_PART_PACKINGS, PAIR_PACKINGS
from recipe.base.hashing import hash64

SEGMENT = np.dtype([("start", np.int64), ("length", np.int32), ("ends_document", np.bool_)])
# Labels of blocks: the second part of a pair follows the first, is from elsewhere, or the two are swapped; or the block
# has one part and nothing to predict of it.
CONTINUES, RANDOM, SWAPPED, SINGLE = 0, 1, 1, -100
# Pairs of neighbouring numbers, and so of nearly the same length of the second part, that exchange among themselves.
WINDOW_BLOCKS = 64


class Packed(NamedTuple):
    """The blocks of a unit."""

    segments: np.ndarray  # (segments,) of `SEGMENT`, starts in tokens of the unit, in the order of their blocks
    block_ends: np.ndarray  # (blocks,) int64 ends of the blocks among the segments
    labels: np.ndarray  # (blocks,) int8, of pairs before any exchange; 0 otherwise


class Pairs(NamedTuple):
    """What decides which blocks can exchange their second parts."""

    sizes: np.ndarray  # (blocks, 2) tokens of the two parts
    documents: np.ndarray  # (blocks, 2) numbers of their documents
    can_exchange: np.ndarray  # (blocks,) bool

    @classmethod
    def of(cls, segments: np.ndarray, block_ends: np.ndarray, number_documents: Callable) -> "Pairs":
        """Describe blocks, given the ends of each among the segments and what numbers the documents of positions."""
        both = segments[np.stack([starts_of(block_ends), block_ends - 1], 1)]
        return cls(both["length"], number_documents(both["start"]), np.diff(block_ends, prepend=0) == 2)


class Block(NamedTuple):
    """A block with its special tokens."""

    input_ids: np.ndarray  # (length,) integers, special tokens included
    spans: np.ndarray  # (parts,) int32 lengths of its parts, which fill it
    label: int  # of a pair
    documents: int  # how many documents end in it


@dataclass(frozen=True)
class BlockFormat:
    """The format of blocks, and how they are made in it."""

    packing: str  # `full_sentences`, `doc_sentences`, `contiguous`, `segment_pair`, `sentence_pair` or `sentence_order`
    max_seq_length: int  # tokens in a block, special tokens included
    cls_token_id: int  # stands at a block's start
    sep_token_id: int  # stands at a block's end and between documents
    pair_special_tokens: int  # special tokens of a pair: 4 for RoBERTa (`<s> A </s></s> B </s>`), 3 for BERT
    seed: int  # of what is random about pairs

    def pack(self, document_ends: np.ndarray, sentence_ends: np.ndarray) -> Packed:
        """Cut a unit into blocks, given the ends of its documents and sentences in tokens.

        Both are (n,) int64, ascending and distinct; every document's end is a sentence's too.
        """
        if self.packing == "full_sentences":
            block_ends = pack_full_sentences(document_ends, sentence_ends, self.max_seq_length - 2)
            return cut_at_documents(block_ends, document_ends)
        if self.packing == "contiguous":
            return pack_contiguous(document_ends, self.max_seq_length - 2)
        if self.packing == "doc_sentences":
            ends = group_sentences(document_ends, sentence_ends, self.max_seq_length - 2)
            return share_blocks(ends, document_ends, self.max_seq_length)
        make = pair_sentences if self.packing == "sentence_pair" else pair_segments
        middles, ends = make(document_ends, sentence_ends, self.pair_room, self.seed)
        return lay_out_pairs(middles, ends, document_ends, self.seed, self.exchanges)

    @property
    def exchanges(self) -> bool:
        """Whether pairs exchange their second parts."""
        return self.packing in EXCHANGED_PACKINGS

    @property
    def pair_room(self) -> int:
        """Tokens that the two parts of a pair have together at the most."""
        return self.max_seq_length - self.pair_special_tokens

    def assemble(self, parts: Sequence[np.ndarray], label: int, documents: int) -> Block:
        """Put the special tokens around and between the parts of a block, (tokens,) integers each."""
        cls, sep = [self.cls_token_id], [self.sep_token_id]
        is_one_part = self.packing in ONE_PART_PACKINGS
        # The second part of a pair begins with the second `</s>` of RoBERTa, or with nothing.
        before = [] if is_one_part else sep * (self.pair_special_tokens - 3) if self.packing in PAIR_PACKINGS else cls
        pieces: list[tuple[np.ndarray | list[int], ...]]
        pieces = [(before if number else cls, part, sep) for number, part in enumerate(parts)]
        input_ids = np.concatenate([p for piece in pieces for p in piece], dtype=parts[0].dtype, casting="unsafe")
        spans = [len(input_ids)] if is_one_part else [sum(map(len, piece)) for piece in pieces]
        return Block(input_ids, np.array(spans, np.int32), label, documents)

    def swap(self, block: Block) -> Block:
        """Swap the two parts of a pair (ALBERT, section 3.1)."""
        size = int(block.spans[0])
        first, second = block.input_ids[1 : size - 1], block.input_ids[size + self.pair_special_tokens - 3 : -1]
        return self.assemble([second, first], SWAPPED, block.documents)


def cut_out(tokens: np.ndarray, segments: np.ndarray, first: int = 0) -> list[np.ndarray]:
    """Return the tokens of segments, given those of their unit and where it starts in the positions of the segments."""
    bounds = zip((segments["start"] - first).tolist(), segments["length"].tolist(), strict=True)
    return [tokens[start : start + size] for start, size in bounds]


def starts_of(ends: np.ndarray) -> np.ndarray:
    """Return where each part starts, given where each ends."""
    return np.concatenate([[0], ends[:-1]])


def pack_full_sentences(document_ends: np.ndarray, sentence_ends: np.ndarray, room: int) -> np.ndarray:
    """Pack FULL-SENTENCES: as many whole sentences as fit, across the ends of documents.

    A block is closed when the next sentence does not fit; a document's end inside it costs one `</s>`. A sentence
    longer than a block is cut into full blocks and a rest that packing goes on with. Returns the ends of the blocks in
    tokens, (blocks,) int64.
    """
    ends = cut_long(sentence_ends, room)
    # A block reaching into the next document spends one more token on the `</s>` between them: count each sentence's
    # document, and the difference of two counts is the number of separators.
    separators = np.searchsorted(document_ends, ends, side="left")
    return ends[follow(np.searchsorted(ends + separators, starts_of(ends) + separators + room, side="right"))]


def group_sentences(document_ends: np.ndarray, sentence_ends: np.ndarray, room: int) -> np.ndarray:
    """Return the ends of segments of as many whole sentences of one document as fit."""
    ends = cut_long(sentence_ends, room)
    document = np.searchsorted(document_ends, ends, side="left")
    last_of_document = np.searchsorted(ends, document_ends[document], side="right")
    following = np.searchsorted(ends, starts_of(ends) + room, side="right")
    return ends[follow(np.minimum(following, last_of_document))]


def follow(following: np.ndarray) -> np.ndarray:
    """Return the last sentence of each group, where `following[s]` is the first after a group that begins with `s`."""
    jumps, sentence, last = following.tolist(), 0, []
    while sentence < len(jumps):
        sentence = jumps[sentence]
        last.append(sentence - 1)
    return np.array(last, np.int64)


def cut_long(ends: np.ndarray, room: int) -> np.ndarray:
    """Add an end after every `room` tokens of a sentence that is longer."""
    starts = starts_of(ends)
    pieces = -((starts - ends) // room)
    if pieces.max(initial=1) == 1:
        return ends
    last = np.cumsum(pieces)
    number = np.arange(last[-1]) - np.repeat(last - pieces, pieces) + 1
    return np.minimum(np.repeat(starts, pieces) + number * room, np.repeat(ends, pieces))


def make_segments(starts: np.ndarray, ends: np.ndarray, document_ends: np.ndarray) -> np.ndarray:
    """Make a table of segments, and say which of them end a document."""
    segments = np.empty(len(ends), SEGMENT)
    segments["start"], segments["length"] = starts, ends - starts
    at = np.minimum(np.searchsorted(document_ends, ends), len(document_ends) - 1)
    segments["ends_document"] = (document_ends[at] == ends) & (segments["length"] > 0)
    return segments


def cut_at_documents(block_ends: np.ndarray, document_ends: np.ndarray) -> Packed:
    """Cut blocks that follow each other into segments of one document each."""
    ends = np.union1d(block_ends, document_ends)
    segments = make_segments(starts_of(ends), ends, document_ends)
    return Packed(segments, np.searchsorted(ends, block_ends) + 1, np.zeros(len(block_ends), np.int8))


def pack_contiguous(document_ends: np.ndarray, room: int) -> Packed:
    """Fill every block to the last position, whatever is cut, with `</s>` between documents."""
    ends: list[int] = []
    block_ends: list[int] = []
    position, left = 0, room
    for document_end in document_ends.tolist():
        while position < document_end:
            end = min(document_end, position + left)
            left -= end - position
            position = end
            ends.append(end)
            if not left:
                block_ends.append(len(ends))
                left = room
        if left < room:
            left -= 1
            if not left:
                # One position was left and the separator takes it: an empty segment follows it.
                ends.append(position)
                block_ends.append(len(ends))
                left = room
    if left < room:
        block_ends.append(len(ends))
    all_ends = np.array(ends, np.int64)
    segments = make_segments(starts_of(all_ends), all_ends, document_ends)
    return Packed(segments, np.array(block_ends, np.int64), np.zeros(len(block_ends), np.int8))


def share_blocks(ends: np.ndarray, document_ends: np.ndarray, max_seq_length: int) -> Packed:
    """Pack DOC-SENTENCES: several segments share a block, each with its own `<s>` and `</s>`, best fit first.

    The paper lets short blocks be short and enlarges the batch; sharing keeps the number of tokens in an update.
    """
    starts = starts_of(ends)
    costs = ends - starts + 2
    # Blocks by the room that they have left, and, as the bits of a number, for which rooms there are any.
    blocks_with: list[list[int]] = [[] for _ in range(max_seq_length + 1)]
    rooms, blocks = 0, 0
    block_of = np.empty(len(ends), np.int64)
    order = np.argsort(-costs, kind="stable")
    for segment, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        if fitting := rooms >> cost:
            room = cost + (fitting & -fitting).bit_length() - 1
            block = blocks_with[room].pop()
            if not blocks_with[room]:
                rooms ^= 1 << room
        else:
            room, block = max_seq_length, blocks
            blocks += 1
        block_of[segment] = block
        blocks_with[room - cost].append(block)
        rooms |= 1 << (room - cost)
    by_block = np.argsort(block_of, kind="stable")
    block_ends = np.cumsum(np.bincount(block_of, minlength=blocks))
    segments = make_segments(starts, ends, document_ends)[by_block]
    return Packed(segments, block_ends, np.zeros(blocks, np.int8))


def pair_segments(
    document_ends: np.ndarray, sentence_ends: np.ndarray, room: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut SEGMENT-PAIRs: whole sentences of one document up to a block's room, parted at a random one of their ends.

    Half of the documents are packed from their end: a sentence that no longer fitted is longer than most, so that first
    parts would be the longer ones if it always began a block.

    Returns where the first and the second parts end, (pairs,) each. A single short sentence has no second part (its two
    ends are the same); a single long one is parted in the middle.
    """
    is_mirrored = hash64(seed, document_ends, 0) % np.uint64(2) == 0

    def from_both_sides(cut: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        found = [cut(document_ends, sentence_ends), mirror(cut(mirror(document_ends), mirror(sentence_ends)))]
        sides = (is_mirrored[np.searchsorted(document_ends, ends)] == side for side, ends in enumerate(found))
        return np.sort(np.concatenate([ends[is_own] for ends, is_own in zip(found, sides, strict=True)]))

    ends = from_both_sides(lambda documents, sentences: group_sentences(documents, sentences, room))
    inner = from_both_sides(lambda _, sentences: cut_long(sentences, room))
    starts = starts_of(ends)
    low, high = np.searchsorted(inner, starts, side="right"), np.searchsorted(inner, ends, side="left")
    choice = low + (hash64(seed, starts) % np.maximum(high - low, 1).astype(np.uint64)).astype(np.int64)
    # Were odd lengths always rounded down, the shorter part would be the first.
    halves = (starts + ends + (hash64(seed, starts, 1) % np.uint64(2)).astype(np.int64)) // 2
    middle = np.where(ends - starts > room // 2, halves, ends)
    return np.where(high > low, inner[np.minimum(choice, len(inner) - 1)], middle), ends


def mirror(ends: np.ndarray) -> np.ndarray:
    """Return the ends of the same parts seen from the other side."""
    return ends[-1] - starts_of(ends)[::-1]


def pair_sentences(
    document_ends: np.ndarray, sentence_ends: np.ndarray, room: int, _: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut SENTENCE-PAIRs: two sentences of one document that follow each other; the last of an odd number is single.

    Blocks come out much shorter than their room, so give short ones and many (the paper enlarges the batch). Returns
    what `pair_segments` returns.
    """
    ends = cut_long(sentence_ends, room // 2)
    document = np.searchsorted(document_ends, ends, side="left")
    is_first = (np.arange(len(ends)) - np.searchsorted(document, document)) % 2 == 0
    first = np.flatnonzero(is_first)
    second = np.minimum(first + 1, len(ends) - 1)
    second = np.where(is_first[second], first, second)
    return ends[first], ends[second]


def lay_out_pairs(
    middles: np.ndarray, ends: np.ndarray, document_ends: np.ndarray, seed: int, exchanges: bool
) -> Packed:
    """Make blocks of pairs whose parts end at `middles` and `ends`, (pairs,) each; nothing is exchanged or swapped.

    Where pairs will exchange their second parts, they are laid out in the order of the length of these, and what has no
    second part is paired with another such of another document. Otherwise it stays alone.
    """
    starts = starts_of(ends)
    labels = np.where(middles == ends, SINGLE, CONTINUES)
    bounds = np.stack([starts, middles, middles, ends], 1)  # start and end of the first part and of the second
    if exchanges:
        single = np.flatnonzero(middles == ends)
        half = len(single) // 2
        one, two = single[:half], single[half : 2 * half]
        document = np.searchsorted(document_ends, ends, side="left")
        is_apart = document[one] != document[two]
        one, two = one[is_apart], two[is_apart]
        labels[one], bounds[one, 2:] = RANDOM, bounds[two, :2]
        bounds, labels = np.delete(bounds, two, 0), np.delete(labels, two)
        # Those of one length in a random order, or neighbours would be of the same document.
        order = np.lexsort((hash64(seed, bounds[:, 0], 2), bounds[:, 3] - bounds[:, 2]))
        bounds, labels = bounds[order], labels[order]
    segment_starts, segment_ends = bounds[:, ::2], bounds[:, 1::2]
    has_tokens = segment_ends > segment_starts
    segments = make_segments(segment_starts[has_tokens], segment_ends[has_tokens], document_ends)
    return Packed(segments, np.cumsum(has_tokens.sum(1)), labels.astype(np.int8))


def is_drawn(hashes: np.ndarray) -> np.ndarray:
    """Say which pairs exchange, if they can."""
    return hashes % np.uint64(2) == 0


def draw_partners(pairs: Pairs, room: int, hashes: np.ndarray) -> np.ndarray:
    """Draw whose second part each pair of a window has in a pass: (blocks,) int64 places in the window.

    Half of the pairs (BERT, section 3.1), by their (blocks,) uint64 hashes, exchange second parts with the next of that
    half, so that every part is used exactly once and nothing is cut off. Where that does not fit or two parts of one
    document would meet, both stay as they are.
    """
    partners = np.arange(len(hashes))
    drawn = np.flatnonzero(pairs.can_exchange & is_drawn(hashes))
    one, two = drawn[: len(drawn) // 2 * 2 : 2], drawn[1::2]
    fits = np.ones(len(one), bool)
    for a, b in ((one, two), (two, one)):
        fits &= pairs.sizes[a, 0] + pairs.sizes[b, 1] <= room
        fits &= pairs.documents[a, 0] != pairs.documents[b, 1]
    partners[one[fits]], partners[two[fits]] = two[fits], one[fits]
    return partners


def exchange(packed: Packed, document_ends: np.ndarray, room: int, key: np.ndarray | int) -> Packed:
    """Have the pairs of a unit exchange second parts, window by window; the key is of the unit and the pass."""
    pairs = Pairs.of(packed.segments, packed.block_ends, partial(np.searchsorted, document_ends, side="right"))
    numbers = np.arange(len(packed.block_ends))
    hashes = hash64(key, numbers)
    partners = numbers.copy()
    for first in range(0, len(numbers), WINDOW_BLOCKS):
        window = slice(first, first + WINDOW_BLOCKS)
        partners[window] = first + draw_partners(Pairs(*(array[window] for array in pairs)), room, hashes[window])
    segments = packed.segments.copy()
    segments[packed.block_ends - 1] = packed.segments[packed.block_ends[partners] - 1]
    return packed._replace(segments=segments, labels=np.where(partners == numbers, packed.labels, RANDOM))
