"""Where blocks begin and end: integer work over the lengths of documents and sentences.

A packing format turns the ends of documents and sentences, in tokens of one long stream, into the ends of blocks in
that same stream. Blocks cover the stream without gap or overlap, so that nothing is lost or seen twice. Special tokens
are added when a block is read (`assemble_block`), and the formats leave room for them.
"""

import numpy as np

DOCUMENTS_IN_UNIT = 10_000  # one short block each; packing works on so many at a time


def pack_full_sentences(document_ends: np.ndarray, sentence_ends: np.ndarray, max_seq_length: int) -> np.ndarray:
    """FULL-SENTENCES (paper, section 4.2): as many whole sentences as fit, across the ends of documents.

    A block holds `<s>`, its sentences, `</s>` where a document ends inside it, and `</s>`; it is closed when the next
    sentence does not fit. A sentence longer than a block is cut into full blocks and a rest that packing goes on with.
    The last block of every 10,000 documents is closed short, so that packing works on those alone.

    Args:
        document_ends: (documents,) int64, ascending and distinct, in tokens from the start of the corpus.
        sentence_ends: (sentences,) int64, ascending and distinct; every document's end is among them.
        max_seq_length: tokens in a block, special tokens included.

    Returns:
        (blocks,) int64: the ends of the blocks.
    """
    room = max_seq_length - 2
    blocks = []
    for first in range(0, len(document_ends), DOCUMENTS_IN_UNIT):
        documents = document_ends[first : first + DOCUMENTS_IN_UNIT]
        start = document_ends[first - 1] if first else 0
        low, high = np.searchsorted(sentence_ends, [start, documents[-1]], side="right")
        ends = cut_long(start, sentence_ends[low:high], room)
        starts = np.concatenate([[start], ends[:-1]])
        # A block reaching into the next document spends one more token on the `</s>` between them: count each
        # sentence's document, and the difference of two counts is the number of separators.
        separators = np.searchsorted(documents, ends, side="left")
        following = np.searchsorted(ends + separators, starts + separators + room, side="right").tolist()
        sentence = 0
        while sentence < len(ends):
            sentence = following[sentence]
            blocks.append(ends[sentence - 1])
    return np.array(blocks, np.int64)


def cut_long(start: int, ends: np.ndarray, room: int) -> np.ndarray:
    """Add an end after every `room` tokens of a sentence that is longer."""
    starts = np.concatenate([[start], ends[:-1]])
    pieces = -((starts - ends) // room)
    if pieces.max(initial=1) == 1:
        return ends
    last = np.cumsum(pieces)
    number = np.arange(last[-1]) - np.repeat(last - pieces, pieces) + 1
    return np.minimum(np.repeat(starts, pieces) + number * room, np.repeat(ends, pieces))


def assemble_block(
    tokens: np.ndarray, start: int, document_ends: np.ndarray, cls_token_id: int, sep_token_id: int
) -> np.ndarray:
    """Put the special tokens around and between the documents of a block.

    Args:
        tokens: (length,) the block's own tokens.
        start: where they start in the corpus, in tokens.
        document_ends: the ends of documents that lie strictly inside the block, in tokens of the corpus.

    Returns:
        (length + 2 + len(document_ends),) of the dtype of `tokens`.
    """
    inside = np.insert(tokens, document_ends - start, sep_token_id)
    return np.concatenate([[cls_token_id], inside, [sep_token_id]]).astype(tokens.dtype)
