"""How blocks are made: integer work over the lengths of documents and sentences.

1. `BlockFormat.pack` takes one unit of a corpus, some millions of tokens, and cuts it into segments, each of one
   document. A block is a few segments; every token of the unit is in exactly one of them.
2. `BlockFormat.assemble` puts the special tokens around a block's segments.

The formats are those of the paper's section 4.2, and `contiguous`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recipe.arguments.pretraining import ONE_PART_PACKINGS, PAIR_PACKINGS
from recipe.base.hashing import hash64

SEGMENT = np.dtype([("start", np.int64), ("length", np.int32), ("ends_document", np.bool_)])
# Labels of blocks: the second part of a pair follows the first, is from elsewhere, or the two are swapped; or the block
# has one part and nothing to predict of it.
CONTINUES, RANDOM, SWAPPED, SINGLE = 0, 1, 1, -100


class Packed(NamedTuple):
    """The blocks of a unit."""

    segments: np.ndarray  # (segments,) of `SEGMENT`, starts in tokens of the unit, in the order of their blocks
    block_ends: np.ndarray  # (blocks,) int64 ends of the blocks among the segments
    labels: np.ndarray  # (blocks,) int8, of pairs; 0 otherwise


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
        room = self.max_seq_length - self.pair_special_tokens
        make = pair_sentences if self.packing == "sentence_pair" else pair_segments
        middles, ends = make(document_ends, sentence_ends, room, self.seed)
        if self.packing == "sentence_order":
            return swap(middles, ends, document_ends, self.seed)
        return pair_up(middles, ends, document_ends, room, self.seed)

    def assemble(self, tokens: np.ndarray, segments: np.ndarray, label: int, first: int = 0) -> Block:
        """Put the special tokens around and between the segments of a block, given the tokens of its unit.

        Args:
            first: where the unit starts, in the positions of the segments.
        """
        cls, sep = [self.cls_token_id], [self.sep_token_id]
        is_one_part = self.packing in ONE_PART_PACKINGS
        # The second part of a pair begins with the second `</s>` of RoBERTa, or with nothing.
        before = [] if is_one_part else sep * (self.pair_special_tokens - 3) if self.packing in PAIR_PACKINGS else cls
        bounds = zip((segments["start"] - first).tolist(), segments["length"].tolist(), strict=True)
        parts: list[tuple[np.ndarray | list[int], ...]]
        parts = [(before if n else cls, tokens[start : start + size], sep) for n, (start, size) in enumerate(bounds)]
        input_ids = np.concatenate([piece for part in parts for piece in part], dtype=tokens.dtype, casting="unsafe")
        spans = [len(input_ids)] if is_one_part else [sum(map(len, part)) for part in parts]
        return Block(input_ids, np.array(spans, np.int32), label, int(np.count_nonzero(segments["ends_document"])))


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

    Returns where the first and the second parts end, (pairs,) each. A single short sentence has no second part (its two
    ends are the same); a single long one is parted in the middle.
    """
    ends = group_sentences(document_ends, sentence_ends, room)
    starts = starts_of(ends)
    inner = cut_long(sentence_ends, room)
    low, high = np.searchsorted(inner, starts, side="right"), np.searchsorted(inner, ends, side="left")
    choice = low + (hash64(seed, starts) % np.maximum(high - low, 1).astype(np.uint64)).astype(np.int64)
    middle = np.where(ends - starts > room // 2, (starts + ends) // 2, ends)
    return np.where(high > low, inner[np.minimum(choice, len(inner) - 1)], middle), ends


def pair_sentences(
    document_ends: np.ndarray, sentence_ends: np.ndarray, room: int, seed: int
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


def pair_up(middles: np.ndarray, ends: np.ndarray, document_ends: np.ndarray, room: int, seed: int) -> Packed:
    """Give half of the pairs the second part of a pair of another document (BERT, section 3.1).

    Two pairs exchange second parts of nearly the same length, so that every part is used exactly once and nothing is
    cut off; where that does not fit, both stay as they are. What has no second part is paired with another such of
    another document.
    """
    starts = starts_of(ends)
    document = np.searchsorted(document_ends, ends, side="left")
    second_of = np.arange(len(ends))  # whose second part a pair has
    labels = np.full(len(ends), CONTINUES, np.int8)
    is_single = middles == ends

    drawn = np.flatnonzero(~is_single & (hash64(seed, starts, 1) % np.uint64(2) == 0))
    # In the order of length; those of one length in a random order, or neighbours would be of the same document.
    drawn = drawn[np.lexsort((hash64(seed, starts[drawn], 2), (ends - middles)[drawn]))]
    one, two = drawn[: len(drawn) // 2 * 2 : 2], drawn[1::2]
    fits = (middles - starts)[one] + (ends - middles)[two] <= room
    fits &= (middles - starts)[two] + (ends - middles)[one] <= room
    fits &= document[one] != document[two]
    one, two = one[fits], two[fits]
    second_of[one], second_of[two] = two, one
    labels[one] = labels[two] = RANDOM

    single = np.flatnonzero(is_single)
    labels[single] = SINGLE
    half = len(single) // 2
    one, two = single[:half], single[half : 2 * half]
    one, two = one[document[one] != document[two]], two[document[one] != document[two]]
    labels[one] = RANDOM

    # Each pair has two places; those that stay empty, or whose segment went to another pair, are left out.
    segment_starts, segment_ends = np.stack([starts, middles[second_of]], 1), np.stack([middles, ends[second_of]], 1)
    segment_starts[one, 1], segment_ends[one, 1] = starts[two], ends[two]
    segment_starts, segment_ends, labels = (
        np.delete(array, two, 0) for array in (segment_starts, segment_ends, labels)
    )
    return lay_out(segment_starts, segment_ends, labels, document_ends)


def swap(middles: np.ndarray, ends: np.ndarray, document_ends: np.ndarray, seed: int) -> Packed:
    """Swap the two parts of half of the pairs (ALBERT, section 3.1). What has no second part stays alone."""
    starts = starts_of(ends)
    is_single = middles == ends
    is_swapped = ~is_single & (hash64(seed, starts, 1) % np.uint64(2) == 0)
    order = np.where(is_swapped[:, None], [1, 0], [0, 1])
    segment_starts = np.take_along_axis(np.stack([starts, middles], 1), order, 1)
    segment_ends = np.take_along_axis(np.stack([middles, ends], 1), order, 1)
    labels = np.where(is_single, SINGLE, np.where(is_swapped, SWAPPED, CONTINUES)).astype(np.int8)
    return lay_out(segment_starts, segment_ends, labels, document_ends)


def lay_out(starts: np.ndarray, ends: np.ndarray, labels: np.ndarray, document_ends: np.ndarray) -> Packed:
    """Make blocks of the two segments (blocks, 2) of each, or of one where the other is empty."""
    has_tokens = ends > starts
    segments = make_segments(starts[has_tokens], ends[has_tokens], document_ends)
    return Packed(segments, np.cumsum(has_tokens.sum(1)), labels)
