"""Open corpora: hub data sets or local files in, documents out.

A corpus is a `Source`: shards of numbered records, where a record is a line, a row, a paragraph or a file. A reader
says at which record of a shard to begin and which part of the records it takes; the others are passed over without
being parsed. That is all that mixing, sharing and resuming need. Nothing in this module knows about tokens.

How the records of a file are read is in `recipe/data/readers.py`.
"""

import hashlib
import io
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import IterableDataset, load_dataset
from huggingface_hub import HfApi

from recipe.arguments import CorpusArguments
from recipe.arguments.corpus_files import LINES, TABLES, by_kind, local_files
from recipe.base.errors import UserError, describe_error
from recipe.base.hashing import digest, hash64
from recipe.base.workers import STOP_WAITING
from recipe.data.readers import (
    BATCH_ROWS,
    check_column,
    check_table,
    choose_reader,
    damaged_file,
    is_too_large,
    open_table,
    packing_of,
    too_large,
)

# Bytes of English text for one compressed byte, measured at the tools' default levels; only default weights use it.
COMPRESSION_RATIO = {".gz": 2.6, ".zst": 2.8}

# Small files that follow each other are one shard, up to this size, since the last block of each shard is short. They
# make at most about MAX_SHARDS shards, since each shard keeps some files mapped into memory.
SHARD_BYTES, MAX_SHARDS = 1_000_000, 4096
# Of the files, read to see whether they are the same: so many pieces in all, and of each.
SAMPLED_PIECES, PIECES_PER_FILE, PIECE_BYTES = 2048, 16, 4096
SHARE_FILES, SHARE_BYTES = 8, 300_000  # of which, and of whose heads, the share of text in JSON lines is measured
SAMPLE_BATCH_BYTES = 1_000_000  # of texts that a sample yields together
RETRY_SECONDS = (1, 5, 30, 120, 300)  # waits before a source that failed is opened again

Record = str | UserError  # a text, or why a record has none
Item = TypeVar("Item")


class SourceError(UserError):
    """The error of a source that could be opened, has stopped answering, and did not recover in all retries."""


class Part(NamedTuple):
    """Every `of`-th record, beginning with record `number`."""

    number: int = 0
    of: int = 1

    def has(self, index: int) -> bool:
        """Say whether the record at an index is in this part."""
        return index % self.of == self.number


WHOLE = Part()


class Source(ABC):
    """A corpus as shards of records."""

    corpus: CorpusArguments
    num_shards: int  # in a fixed order
    shard_bytes: tuple[int, ...] = ()  # on disk; empty if not known
    revision: str | None = None  # the commit of a hub data set
    stamp: str | None = None  # what differs after most changes of the text, and in a copy of it too
    passing_errors: type[Exception] = OSError  # that may be gone at the next try

    @abstractmethod
    def records(self, shard: int, first: int, part: Part) -> Iterator[tuple[int, Record]]:
        """Yield what `read` does, without its retries."""

    def sample_contents(self) -> str:
        """Return a digest of the sizes of files, in their order, and of pieces of them; empty for a hub data set."""
        return ""

    def read(self, shard: int, first: int = 0, part: Part = WHOLE) -> Iterator[tuple[int, Record]]:
        """Read the records of a shard from number `first` on that `part` has.

        A source whose connection or disk fails is opened again at the record that it failed at, five times, after waits
        of 1 second to 5 minutes.

        Yields:
            (number, text): "" where there is none, a `UserError` in its place where the record cannot be understood.

        Raises:
            UserError: a file is damaged, and would be the next time too.
            SourceError: the source goes on failing.
        """
        retries = 0
        while True:
            try:
                for index, text in self.records(shard, first, part):
                    yield index, text
                    first, retries = index + 1, 0
                return
            except UserError:
                raise
            except self.passing_errors as error:
                place = f"corpus {self.corpus.name!r}: {self.corpus.path}, shard {shard}, record {first}"
                problem = describe_error(error)
                if retries == len(RETRY_SECONDS) or STOP_WAITING.is_set():
                    raise SourceError(f"{place} cannot be read, after {retries} retries: {problem}") from error
                seconds = RETRY_SECONDS[retries]
                print(f"{place} cannot be read: {problem}; opening it again in {seconds} s", flush=True)
                STOP_WAITING.wait(seconds)
                retries += 1


class LocalSource(Source):
    """A corpus of local files. A file is a shard; small ones that follow each other are one together."""

    def __init__(self, corpus: CorpusArguments, files: list[Path]) -> None:
        self.corpus = corpus
        abouts = {str(file.absolute()): file.stat() for file in files}
        sizes = {file: about.st_size for file, about in abouts.items()}
        self.stamp = digest(*(about.st_mtime_ns for about in abouts.values()))
        limit = max(SHARD_BYTES, sum(sizes.values()) / MAX_SHARDS)
        self.shards: list[list[str]] = []
        filled = limit
        for file, size in sizes.items():
            if filled >= limit or size >= limit:
                self.shards.append([])
                filled = 0
            self.shards[-1].append(file)
            filled += size
        self.num_shards = len(self.shards)
        self.shard_bytes = tuple(sum(sizes[file] for file in shard) for shard in self.shards)

    def records(self, shard: int, first: int, part: Part) -> Iterator[tuple[int, Record]]:
        """Yield what `read` does, without its retries."""
        files, start = self.shards[shard], 0
        for file in files:
            # Only a file that is a shard by itself can skip records: where another's numbers start is known by reading.
            skip = first if len(files) == 1 else 0
            read, unit, parse = choose_reader(file, self.corpus)
            number = skip - 1
            try:
                for number, raw in enumerate(read(file, skip), start=skip):
                    if is_too_large(raw):
                        raise too_large(f"{file}, {unit} {number + 1}")
                    if start + number >= first and part.has(start + number):
                        try:
                            yield start + number, parse(raw, f"{file}, {unit} {number + 1}")
                        except UserError as error:
                            yield start + number, error
            except MemoryError:
                raise too_large(f"{file}, {unit} {number + 1} or {number + 2}") from None
            except (EOFError, pa.ArrowException, OSError, ValueError) as error:
                if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno is not None):
                    raise  # the disk's error; a decompressor's has no number
                raise damaged_file(file, error) from None
            start += number + 1

    def sample_contents(self) -> str:
        """Return a digest of the sizes of files, in their order, and of pieces of them."""
        files = [file for shard in self.shards for file in shard]
        hashed = hashlib.sha256()
        for number in np.unique(np.linspace(0, len(files) - 1, SAMPLED_PIECES, dtype=int)).tolist():
            with open(files[number], "rb", buffering=0) as stream:
                size = stream.seek(0, io.SEEK_END)
                pieces = np.arange(max(1, min(PIECES_PER_FILE, SAMPLED_PIECES // len(files))))
                for place in (hash64(number, pieces) % np.uint64(max(1, size - PIECE_BYTES))).tolist():
                    stream.seek(place)
                    hashed.update(stream.read(PIECE_BYTES))
                hashed.update(str(size).encode())
        return hashed.hexdigest()


class HubSource(Source):
    """A corpus on the hub, read as a stream: nothing of its text is kept on disk."""

    passing_errors = Exception  # each of the many libraries of a connection has its own

    def __init__(self, corpus: CorpusArguments) -> None:
        self.corpus = corpus
        self.rows, self.revision = open_hub_corpus(corpus)
        self.stamp = self.revision
        self.num_shards = self.rows.num_shards

    def records(self, shard: int, first: int, part: Part) -> Iterator[tuple[int, Record]]:
        """Yield what `read` does, without its retries."""
        rows = self.rows.shard(num_shards=self.num_shards, index=shard)
        # By batches, since iteration by rows would notice that it runs in a worker process and leave out what it takes
        # to be the share of other workers.
        batches = (rows.skip(first) if first else rows).iter(batch_size=BATCH_ROWS)
        for index, text in enumerate((text for batch in batches for text in batch["text"]), start=first):
            if part.has(index):
                is_text = text is None or isinstance(text, str)
                problem = f"{self.corpus.path}, shard {shard}, row {index + 1} holds a {type(text).__name__}, not text"
                yield index, (text or "") if is_text else UserError(problem)


def source_fingerprint(corpus: CorpusArguments) -> str:
    """Return what changes when the text does, without opening it: by the files' sizes and times, or the hub's revision.

    The name of a revision, `main` too, stands for the text that it named when it was first read.
    """
    files = local_files(corpus)
    if files is None:
        return digest(corpus.path, corpus.config_name, corpus.split, corpus.revision, corpus.text_column)
    stamps = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return digest(corpus.text_column, corpus.sample_by, SHARD_BYTES, MAX_SHARDS, stamps)


def open_source(corpus: CorpusArguments) -> Source:
    """Open a corpus, or raise a `UserError` if there is none of that path, on disk or on the hub."""
    files = local_files(corpus)
    if files == []:
        raise UserError(f"corpus {corpus.name!r}: {corpus.path} is a token store; give the folder of its text")
    return HubSource(corpus) if files is None else LocalSource(corpus, files)


def open_hub_corpus(corpus: CorpusArguments) -> tuple[IterableDataset, str | None]:
    """Open a hub data set as a stream of rows with the one column `text`, and return the commit that it is of too."""
    try:
        commit = HfApi().dataset_info(corpus.path, revision=corpus.revision).sha
        rows = load_dataset(
            corpus.path,
            corpus.config_name,
            split=corpus.split,
            revision=commit,
            streaming=True,
            trust_remote_code=False,
        )
    except Exception as error:
        # Whatever `datasets` raises, from a misspelt id to no network, the user needs to know which corpus it was.
        raise UserError(
            f"corpus {corpus.name!r}: hub data set {corpus.path} (config_name {corpus.config_name}, split "
            f"{corpus.split}, revision {corpus.revision}) cannot be opened, and no local path has that name: "
            f"{describe_error(error)}"
        ) from error
    if rows.features:
        check_column(rows.features.arrow_schema, f"corpus {corpus.name!r}: {corpus.path}", corpus.text_column)
    rows = rows.select_columns([corpus.text_column])
    return (rows if corpus.text_column == "text" else rows.rename_column(corpus.text_column, "text")), commit


def check_corpus(corpus: CorpusArguments, max_unreadable: int = 0) -> None:
    """Raise a `UserError` if a corpus cannot be read, as far as one document of each kind of file tells.

    Malformed documents before it are passed over, at most `max_unreadable`. Every table is asked for its column.
    """
    place = f"corpus {corpus.name!r}: {corpus.path}"
    files = local_files(corpus)
    for file in files or []:
        if file.name.endswith(TABLES):
            check_table(str(file), corpus.text_column)
    sources = [LocalSource(corpus, same) for same in by_kind(files).values()] if files else [open_source(corpus)]
    if not any([has_text(source, max_unreadable, place) for source in sources]):  # noqa: C419  all are tried
        raise UserError(f"{place} holds no text; give documents that are not empty")


def has_text(source: Source, max_unreadable: int, place: str) -> bool:
    """Read to the first document of a source that is not empty, and say whether there is one."""
    try:
        for _, text in itertools.chain.from_iterable(source.records(n, 0, WHOLE) for n in range(source.num_shards)):
            if isinstance(text, UserError):
                max_unreadable -= 1
                if max_unreadable < 0:
                    raise text
            elif text.strip():
                return True
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place} cannot be read: {describe_error(error)}") from error
    return False


def corpus_bytes(corpus: CorpusArguments) -> float:
    """Estimate a corpus's bytes of text without reading it: the default weight where tokens are not counted.

    A hub data set that does not publish its size raises a `UserError`.
    """
    if (files := local_files(corpus)) is not None:
        lines = [str(file) for file in files if is_of_lines(str(file))]
        share = text_share(lines, corpus)
        rest = [str(file) for file in files if not is_of_lines(str(file))]
        return share * sum(map(unpacked_bytes, lines)) + sum(file_bytes(file, corpus.text_column) for file in rest)
    splits = open_hub_corpus(corpus)[0].info.splits or {}
    if corpus.split not in splits or not splits[corpus.split].num_bytes:
        raise UserError(f"corpus {corpus.name!r}: {corpus.path} does not publish its size; give all corpora a `weight`")
    return splits[corpus.split].num_bytes


def is_of_lines(file: str) -> bool:
    """Say whether a file holds JSON lines."""
    return Path(file.removesuffix(packing_of(file))).suffix in LINES


def unpacked_bytes(file: str) -> float:
    """Estimate how many bytes a file has without its compression."""
    return Path(file).stat().st_size * COMPRESSION_RATIO.get(packing_of(file), 1)


def text_share(files: list[str], corpus: CorpusArguments) -> float:
    """Measure which share of JSON lines is text at the heads of some files; the rest is other columns and escapes."""
    lines_bytes = text_bytes = 0
    for number in sorted({round(place) for place in np.linspace(0, len(files) - 1, min(len(files), SHARE_FILES))}):
        read, _, parse = choose_reader(files[number], corpus)
        head = 0
        with suppress(EOFError, pa.ArrowException, OSError, ValueError):  # reading it says what is wrong
            for raw in read(files[number], 0):
                text_bytes += len(parse(raw, files[number]).encode())
                head += len(raw)
                lines_bytes += len(raw)
                if head > SHARE_BYTES:
                    break
    return text_bytes / lines_bytes if text_bytes else 1.0


def file_bytes(file: str, column: str) -> float:
    """Estimate how many bytes of text a file that is no JSON holds."""
    if not file.endswith(TABLES):
        return unpacked_bytes(file)
    try:
        if file.endswith(".arrow"):
            schema, table = open_table(file)
            check_column(schema, file, column)
            # Of its buffers, whose contents may be damaged and are not looked at.
            return float(table.read_all().column(column).get_total_buffer_size())
        metadata = pq.ParquetFile(file).metadata
        leaves = [number for number in range(metadata.num_columns) if metadata.schema.column(number).path == column]
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        # A group of a damaged file may have fewer columns; pyarrow crashes if asked for one that it does not have.
        return sum(g.column(leaf).total_uncompressed_size for g in groups for leaf in leaves if leaf < g.num_columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged_file(file, error) from None


def sample_texts(corpora: list[CorpusArguments], max_bytes: int) -> Iterator[tuple[str, list[str], int]]:
    """Read a weighted sample of all corpora, of at most `max_bytes`, as a stream.

    Each corpus gets its share of the budget by weight (by default: size) and spreads it evenly over its shards, since
    the first shard of a sorted corpus looks like no other. What a short shard leaves of its share goes to later ones.

    Yields:
        (corpus name, whole documents of about 1 MB together, their bytes).
    """
    weights = [corpus_bytes(c) if c.weight is None else c.weight for c in corpora]
    for corpus, weight in zip(corpora, weights, strict=True):
        texts = take_bytes(open_source(corpus), int(max_bytes * weight / sum(weights)))
        for batch in group_by_size(texts, lambda text: text[1], SAMPLE_BATCH_BYTES):
            yield corpus.name, [text for text, _ in batch], sum(size for _, size in batch)


def take_bytes(source: Source, max_bytes: int) -> Iterator[tuple[str, int]]:
    """Yield (text, its bytes) from the heads of all shards, `max_bytes` in all; a shard's last text is cut to fit."""
    for shard in range(source.num_shards):
        share = max_bytes // (source.num_shards - shard)
        for _, text in source.read(shard):
            if isinstance(text, UserError):
                raise text
            encoded = text.encode()[:share]
            share -= len(encoded)
            max_bytes -= len(encoded)
            if encoded:
                yield encoded.decode(errors="ignore"), len(encoded)
            if not share:
                break


def group_by_size(items: Iterable[Item], size_of: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Group items that follow each other; a group ends once their sizes reach the limit."""
    group, size = [], 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= limit:
            yield group
            group, size = [], 0
    if group:
        yield group
