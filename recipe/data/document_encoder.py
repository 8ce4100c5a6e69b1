"""Documents to token ids, with the places where sentences end among them."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import sentencex
from transformers import (
    PreTrainedTokenizerFast,
)

from recipe.base.model_files import count_ids
from recipe.data.corpora import group_by_size
from recipe.data.tokenizer import build_text_backend

ENCODED_CHARACTERS = 2_000_000  # encoded at once; an `Encoding` takes some 100 bytes a token
PIECE_CHARACTERS, MARGIN_CHARACTERS = 10_000, 2_000  # of a long paragraph, whose sentences are found piece by piece
UNKNOWN_LENGTH = -(2**40)  # of a token: no others make up for it in the sum of a text


def split_text(text: str, max_characters: int) -> Iterator[str]:
    """Cut a long text at spaces between two letters, where byte-level BPE never joins.

    The pieces' tokens are therefore the text's tokens. A stretch of `max_characters` without such a space is cut at its
    end all the same, which can change the tokens at the cut.
    """
    start = 0
    while len(text) - start > max_characters:
        cut = text.rfind(" ", start + 1, start + max_characters)
        while cut > start and not (text[cut - 1].isalpha() and text[cut + 1].isalpha()):
            cut = text.rfind(" ", start + 1, cut)
        end = cut if cut > start else start + max_characters
        yield text[start:end]
        start = end
    yield text[start:]


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray | None:
    """Count the UTF-8 bytes of text that each token stands for, by id.

    They are `UNKNOWN_LENGTH` for `<unk>`, and for an added token that takes white space beside it along or after which
    `add_prefix_space` puts a space into the text.

    Returns:
        (ids,) int64, or None unless the tokenizer is byte-level and no normalizer changes the bytes.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    pre_tokenizer = backend["pre_tokenizer"] or {}
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    is_marked = any(backend["model"].get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    if backend["normalizer"] or is_marked or not any(part.get("type") == "ByteLevel" for part in parts):
        return None
    # In the byte-level alphabet a character stands for a byte; added tokens are written as they are.
    vocab = tokenizer.get_vocab()
    lengths = np.zeros(count_ids(vocab), np.int64)
    for token, index in vocab.items():
        lengths[index] = len(token)
    for token in backend["added_tokens"]:
        is_known = not (token["lstrip"] or token["rstrip"] or puts_space_before(backend))
        lengths[token["id"]] = len(token["content"].encode()) if is_known else UNKNOWN_LENGTH
    if tokenizer.unk_token_id is not None:
        lengths[tokenizer.unk_token_id] = UNKNOWN_LENGTH
    return lengths


def puts_space_before(backend: dict[str, Any]) -> bool:
    """Say whether a tokenizer, given as what its tokenizer.json holds, has `add_prefix_space`."""
    pre_tokenizer = backend["pre_tokenizer"] or {}
    return any(part.get("add_prefix_space") for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]))


class DocumentEncoder:
    """An encoder of documents to token ids, which finds where their sentences end among them.

    The ids are those of the whole document with no special token added. Sentences are found in the text and their ends
    carried over to the tokens; the white space before a sentence goes with it, as in `ĠThen`. A token that reaches over
    an end belongs to the earlier sentence. Picklable, for worker processes.

    Args:
        sentence_splitter: `sentencex` or `newline`.
        language: ISO 639-1 code, for `sentencex`.
        joins_sentences: put one space before each sentence, the document's first too, in place of the white space that
            is there, so that no sentence tells by its first token where it stood; for pairs.
        max_document_characters: longer documents are encoded in pieces (see `split_text`), for flat memory.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        sentence_splitter: str,
        language: str,
        joins_sentences: bool = False,
        max_document_characters: int = 1_000_000,
    ) -> None:
        self.backend = build_text_backend(tokenizer)
        self.num_ids = count_ids(tokenizer.get_vocab())
        self.dtype = np.dtype(np.uint16 if self.num_ids <= 2**16 else np.int32)
        self.unk_token_id = tokenizer.unk_token_id
        self.byte_lengths = token_byte_lengths(tokenizer)
        self.puts_space_before = puts_space_before(json.loads(self.backend.to_str()))
        self.sentence_splitter = sentence_splitter
        self.language = language
        self.joins_sentences = joins_sentences
        self.max_document_characters = max_document_characters

    @property
    def fingerprint(self) -> tuple[str, ...]:
        """Return all that the ids and sentence ends of a text depend on."""
        joined = ("joined",) if self.joins_sentences else ()
        return self.backend.to_str(), self.sentence_splitter, self.language, version("sentencex"), *joined

    def __call__(self, texts: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Encode documents, some at a time.

        Yields the ids of each, (tokens,) uint16 (int32 for vocabularies over 65,536), and the ends of its sentences,
        (sentences,) int64 ascending, the last of which is the number of ids.
        """
        self.backend.encode_special_tokens = True  # does not survive pickling
        ids, ends, length = [], [np.empty(0, np.int64)], 0
        for batch in group_by_size(self.pieces(texts), lambda piece: len(piece[0]), ENCODED_CHARACTERS):
            texts_of_batch, ends_of_batch = zip(*(self.split_sentences(piece) for piece, _ in batch), strict=True)
            rows = self.rows(texts_of_batch, ends_of_batch)
            for (_, is_last), (piece_ids, piece_ends) in zip(batch, rows, strict=True):
                ids.append(piece_ids)
                # A piece's end is a cut, not the end of a sentence; the document's end is added below.
                ends.append(piece_ends + length)
                length += len(piece_ids)
                if is_last:
                    whole = piece_ids if len(ids) == 1 else np.concatenate(ids)
                    yield whole, np.concatenate([*ends, [length]] if length else ends).astype(np.int64, copy=False)
                    ids, ends, length = [], [np.empty(0, np.int64)], 0

    def count_unknown(self, ids: np.ndarray) -> int:
        """Count how often a text has something that the tokenizer does not know."""
        return 0 if self.unk_token_id is None else int(np.count_nonzero(ids == self.unk_token_id))

    def pieces(self, texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """Cut documents into pieces, and say which are their document's last."""
        for text in texts:
            *pieces, last = split_text(text, self.max_document_characters)
            yield from ((piece, False) for piece in pieces)
            yield last, True

    def rows(self, texts: Sequence[str], ends: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the ids of each text, and the ends of its sentences in tokens, ascending and distinct, without its own.

        All texts are worked on as one long one, since numpy's cost for a call on each alone would be most of it. Those
        whose tokens do not add up to their bytes are encoded once more, for the offsets in characters.
        """
        encode = self.backend.encode_batch if self.byte_lengths is None else self.backend.encode_batch_fast
        encodings = encode(texts, add_special_tokens=False)
        lists = [encoding.ids for encoding in encodings]
        counts = np.array([len(ids) for ids in lists])
        firsts = np.cumsum(counts) - counts
        ids = np.fromiter(itertools.chain.from_iterable(lists), self.dtype, counts.sum())
        token_ends, sizes, is_exact = self.measure(texts, ids, counts)
        rest = np.flatnonzero(~is_exact).tolist()
        if self.byte_lengths is not None:
            encodings = self.backend.encode_batch([texts[number] for number in rest], add_special_tokens=False)
        for number, encoding in zip(rest, encodings, strict=True):
            sizes[number] = len(texts[number])
            token_ends[firsts[number] :][: counts[number]] = [end for _, end in encoding.offsets]
        ends = [
            byte_positions(text, own) if exact else own for text, own, exact in zip(texts, ends, is_exact, strict=True)
        ]
        bases = np.cumsum(sizes) - sizes
        token_ends = np.maximum.accumulate(token_ends + np.repeat(bases, counts))
        text_of = np.repeat(np.arange(len(texts)), [len(own) for own in ends])
        wanted = np.concatenate(ends) + bases[text_of]
        # The first token that reaches an end, and all those after it that share its last character.
        found = np.maximum(np.searchsorted(token_ends, wanted) + 1, np.searchsorted(token_ends, wanted, side="right"))
        is_end = (np.diff(found, prepend=-1) > 0) & (found < (firsts + counts)[text_of])
        found, text_of = (found - firsts[text_of])[is_end], text_of[is_end]
        yield from zip(
            np.split(ids, firsts[1:]), np.split(found, np.searchsorted(text_of, np.arange(1, len(texts)))), strict=True
        )

    def measure(
        self, texts: Sequence[str], ids: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Add up the bytes of the tokens of each text.

        Returns:
            (tokens,) int64, where each token ends in its own text; (texts,) int64, the bytes of each text; and
            (texts,) bool, whether its tokens add up to them. Where that is False, its token ends mean nothing.
        """
        if self.byte_lengths is None:
            return np.zeros(len(ids), np.int64), np.zeros(len(texts), np.int64), np.zeros(len(texts), bool)
        sizes = np.array([len(text) if text.isascii() else len(text.encode()) for text in texts])
        sums = np.concatenate([[0], np.cumsum(self.byte_lengths[ids])])
        text_ends = sums[np.cumsum(counts)]
        # A byte of `add_prefix_space` is in front of the text: where tokens end is counted back from its end.
        added = [self.puts_space_before and not text.startswith(" ") for text in texts]
        return sums[1:] - np.repeat(text_ends - sizes, counts), sizes, np.diff(text_ends, prepend=0) == sizes + added

    def split_sentences(self, text: str) -> tuple[str, np.ndarray]:
        """Return a text as it is encoded, and where its sentences end, in characters, without white space behind."""
        ends = self.sentence_ends(text)
        if not self.joins_sentences:
            return text, ends
        sentences = [f" {text[start:end].strip()}" for start, end in itertools.pairwise([0, *ends.tolist()])]
        return "".join(sentences), np.cumsum([len(sentence) for sentence in sentences], dtype=np.int64)

    def sentence_ends(self, text: str) -> np.ndarray:
        """Find where the sentences of a text end, in characters, ascending, without the white space behind each.

        sentencex takes time quadratic in a paragraph without white space, as Chinese and Japanese are written. A text
        with a paragraph longer than `PIECE_CHARACTERS` is therefore taken in pieces of this length, each of which
        begins at an end found in the one before, `MARGIN_CHARACTERS` before its end at the latest: what stands in
        quotation marks or brackets is in one piece with both of them, if it is no longer than that.
        """
        if self.sentence_splitter == "newline":
            return find_ends(text, text.split("\n"))
        if len(text) <= PIECE_CHARACTERS or max(map(len, text.split("\n\n"))) <= PIECE_CHARACTERS:
            return find_ends(text, sentencex.segment(self.language, text))
        ends, start = [], 0
        while len(text) - start > PIECE_CHARACTERS:
            piece = text[start : start + PIECE_CHARACTERS]
            own = find_ends(piece, sentencex.segment(self.language, piece))[:-1]  # the last is the piece's own
            own = own[own <= PIECE_CHARACTERS - MARGIN_CHARACTERS]
            ends.append(own + start)
            start += int(own[-1]) if len(own) else PIECE_CHARACTERS - MARGIN_CHARACTERS
        ends.append(find_ends(text[start:], sentencex.segment(self.language, text[start:])) + start)
        return np.concatenate(ends)


def find_ends(text: str, sentences: Iterable[str]) -> np.ndarray:
    """Find where sentences of a text end in it, in characters, ascending, without the white space behind each."""
    ends, start = [], 0
    for sentence in sentences:
        # sentencex leaves out some paragraph breaks, so lengths alone do not tell where a sentence stands.
        start = text.index(sentence, start)
        if stripped := sentence.rstrip():
            ends.append(start + len(stripped))
        start += len(sentence)
    return np.array(ends, np.int64)


def byte_positions(text: str, character_positions: np.ndarray) -> np.ndarray:
    """Turn ascending character positions into positions of UTF-8 bytes."""
    if text.isascii():
        return character_positions
    starts = [0, *character_positions.tolist()]
    lengths = [len(text[a:b].encode()) for a, b in itertools.pairwise(starts)]
    return np.cumsum(np.array(lengths, np.int64))
