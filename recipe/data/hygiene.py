"""What is not trained on: empty and malformed documents, copies, and text of the test sets."""

import glob
import hashlib
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import numpy as np

from recipe.arguments import CorpusArguments
from recipe.base.errors import UserError
from recipe.base.progress import print_line

TREEBANK_SPLITS = ("can not", "gim me", "gon na", "got ta", "lem me", "wan na", "'t is", "'t was")
OVERLAP_WORDS, MIN_OVERLAP_WORDS = 13, 8  # words in a row that count as an overlap (GPT-3, appendix C)
PIECE_CHARACTERS, PIECE_OVERLAP_CHARACTERS = 1_000_000, 2_000  # characters of a document looked at together, and twice
MAX_PRINTED_DOCUMENTS = 5  # malformed documents that each filter prints
PRINTED: set[str] = set()  # about malformed documents, by this process
WORDS_VERSION = "2"  # raise it when `words_of` splits otherwise
# What the tokenizers of the Penn Treebank and of Moses put apart or write otherwise. (`it 's` has the words of `it's`.)
JOINED = (
    *((apostrophe, "'") for apostrophe in "\u2019\u2018\u02bc"),  # the last one would count as a letter
    ("&apos;", "'"),
    (" n't", "n't"),
    *((f"{first} {second} ", f"{first}{second} ") for first, second in (w.split() for w in TREEBANK_SPLITS)),
    *((f"-{side}{kind}b-", " ") for side in "lr" for kind in "rsc"),
)
TABLE_BITS = 24  # of the table that tells most text apart from the test sets without looking closer


def words_of(text: str) -> list[str]:
    """Split a text into lower-cased words without punctuation, in one spelling where Unicode has several.

    What tokenised text has apart is joined, as in `do n't`; such places hardly occur in other text.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    for spelling, joined in JOINED:
        text = text.replace(spelling, joined)
    return re.findall(r"\w+", text)


class Decontaminator:
    """A finder of documents that share 13 words in a row with a sentence of a test set (GPT-3, appendix C).

    A sentence of 8 to 12 words counts if all of it occurs; shorter ones occur everywhere and do not count. Departures
    from GPT-3: the whole document is dropped, not the surroundings of the overlap, and no overlap is forgiven for
    occurring often.

    Args:
        patterns: files or globs; each line and each of its tab-separated fields is a sentence. Words are what stands
            between spaces and punctuation: languages without spaces are not served.

    Raises:
        UserError: a pattern matches no file, a file is not UTF-8 text, or no sentence in them has 8 words.
    """

    def __init__(self, patterns: list[str]) -> None:
        self.vocabulary: dict[str, int] = {}
        self.overlaps: set[tuple[int, ...]] = set()
        self.fingerprint: list[str] = []
        for pattern in patterns:
            path = Path(pattern).expanduser()
            found = [path] if path.is_file() else map(Path, sorted(glob.glob(str(path), recursive=True)))
            files = [file for file in found if file.is_file()]
            if not files:
                raise UserError(f"`decontaminate_against`: {pattern} matches no file; correct it or leave it out")
            for file in files:
                self.add_file(file)
        if not patterns:
            return
        self.fingerprint.append(WORDS_VERSION)
        if not self.overlaps:
            raise UserError(
                f"`decontaminate_against`: no sentence in {', '.join(patterns)} has {MIN_OVERLAP_WORDS} words or more; "
                "give files that hold the test sets' sentences"
            )
        self.table = np.zeros(2**TABLE_BITS, bool)
        beginnings = {overlap[:MIN_OVERLAP_WORDS] for overlap in self.overlaps}
        self.table[self.hash(*np.array(sorted(beginnings), np.uint64).T)] = True

    def add_file(self, file: Path) -> None:
        """Add the sentences of a file of a test set."""
        raw = file.read_bytes()
        self.fingerprint.append(hashlib.sha256(raw).hexdigest())
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"`decontaminate_against`: {file} is not plain UTF-8 text (byte {error.start}); unpack it, or save it "
                "as .tsv or .txt"
            ) from None
        for sentence in re.split(r"[\t\r\n]+", text):
            ids = [self.vocabulary.setdefault(word, len(self.vocabulary) + 1) for word in words_of(sentence)]
            if len(ids) >= MIN_OVERLAP_WORDS:
                length = min(len(ids), OVERLAP_WORDS)
                self.overlaps.update(tuple(ids[at : at + length]) for at in range(len(ids) - length + 1))

    @staticmethod
    def hash(*columns: np.ndarray) -> np.ndarray:
        """Say where in the table runs of words are, of which each column holds one word."""
        state = np.zeros((), np.uint64)
        with np.errstate(over="ignore"):
            for column in columns:
                state = (state + column) * np.uint64(0x9E3779B97F4A7C15)
        return state >> np.uint64(64 - TABLE_BITS)

    def is_contaminated(self, text: str) -> bool:
        """Say whether a document holds a sentence of a test set, looking at one piece of it at a time."""
        if not self.overlaps:
            return False
        step = PIECE_CHARACTERS - PIECE_OVERLAP_CHARACTERS
        starts = range(0, max(1, len(text) - PIECE_OVERLAP_CHARACTERS), step)
        return any(self.has_overlap(text[start : start + PIECE_CHARACTERS]) for start in starts)

    def has_overlap(self, text: str) -> bool:
        """Say whether a piece of text holds a sentence of a test set."""
        get = self.vocabulary.get
        ids = np.array([get(word, 0) for word in words_of(text)], np.uint64)  # 0: in no test set
        if len(ids) < MIN_OVERLAP_WORDS:
            return False
        windows = [ids[at : len(ids) - MIN_OVERLAP_WORDS + 1 + at] for at in range(MIN_OVERLAP_WORDS)]
        return any(
            tuple(ids[at : at + length].tolist()) in self.overlaps
            for at in np.flatnonzero(self.table[self.hash(*windows)]).tolist()
            for length in range(MIN_OVERLAP_WORDS, OVERLAP_WORDS + 1)
        )


@dataclass
class DocumentFilter:
    """A filter that accepts what can be trained on, and counts what it sees."""

    name: str  # of the corpus
    max_unreadable: int  # malformed documents that may be passed over
    decontaminator: Decontaminator
    counts: Counter[str] = field(default_factory=Counter)  # `documents`, `empty`, `unreadable`, `contaminated`
    is_quiet: bool = False  # where another process reads the same documents

    def accepts(self, text: str | UserError) -> TypeGuard[str]:
        """Say whether a document can be trained on, and count it; raise a `UserError` at one malformed too many."""
        if isinstance(text, UserError):
            self.counts["unreadable"] += 1
            problem = str(text)
            if self.counts["unreadable"] <= MAX_PRINTED_DOCUMENTS and not self.is_quiet and problem not in PRINTED:
                PRINTED.add(problem)
                print_line(f"passed over a malformed document: {problem}")
            check_unreadable(self.name, self.counts["unreadable"], self.max_unreadable, str(text))
            return False
        is_empty = not text or text.isspace()
        kind = "empty" if is_empty else "contaminated" if self.decontaminator.is_contaminated(text) else "documents"
        self.counts[kind] += 1
        return kind == "documents"


def check_unreadable(name: str, count: int, limit: int, problem: str) -> None:
    """Raise a `UserError` if a corpus has more malformed documents than the limit."""
    if count > limit:
        raise UserError(
            f"corpus {name!r} has {count} unreadable documents, more than `max_unreadable_documents` ({limit}) allows: "
            f"{problem}; correct the text, or raise the limit to pass over such documents"
        )


def nothing_left(corpus: CorpusArguments, left_out: str) -> UserError:
    """Word the error about a corpus of which nothing can be trained on, given what is left out of it."""
    return UserError(
        f"corpus {corpus.name!r}: {corpus.path} holds no text that can be trained on: {left_out}. A document with "
        "words of `decontaminate_against` is left out whole; a .txt is one, or more by `sample_by: line` or `paragraph`"
    )


def text_checksum(text: str) -> int:
    """Hash a text to 64 bits: among 50 million documents two different ones collide with a chance of one in 15,000."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def find_copies(checksums: np.ndarray) -> np.ndarray:
    """Say which documents, (documents,) bool, have the checksum of an earlier one, with 24 bytes each of memory."""
    order = np.argsort(checksums, kind="stable")
    ordered = checksums[order]
    is_copy = np.zeros(len(checksums), bool)
    is_copy[order[1:][ordered[1:] == ordered[:-1]]] = True
    return is_copy
