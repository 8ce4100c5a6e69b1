"""Open corpora: hub data sets or local files in, documents out.

A corpus is a `Source`: shards of numbered records, where a record is a line, a row, a paragraph or a file. Whoever
reads says at which record of a shard to begin and which part of the records it wants; records of others are passed
over without being parsed. That is all that mixing, sharing and going on after an interruption need. Nothing here knows
about tokens.
"""

import functools
import glob
import io
import itertools
import json
import lzma
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import IterableDataset, Value, load_dataset
from huggingface_hub import HfApi

from recipe.arguments import CorpusArguments
from recipe.base.errors import UserError
from recipe.base.hashing import digest
from recipe.base.workers import STOP_WAITING

LINES, TEXTS, TABLES = (".jsonl", ".json"), (".txt",), (".parquet", ".arrow")
PACKED_BY = {".gz": "gzip", ".zst": "zstd"}  # pyarrow's names
# Bytes of English text for one compressed byte, measured at the tools' default levels; only default weights rest on it.
COMPRESSION_RATIO = {".gz": 2.6, ".zst": 2.8, ".xz": 3.5}
SUFFIXES = tuple(kind + packed for kind in LINES + TEXTS for packed in ("", *COMPRESSION_RATIO)) + TABLES


# Small files that follow each other are one shard, up to this size: each ends in a short block. There are about so many
# shards of them at the most, as each keeps some files mapped into memory.
SHARD_BYTES, MAX_SHARDS = 1_000_000, 4096
NO_TEXT = {"dataset_info.json", "state.json", "dataset_dict.json"}  # what `save_to_disk` writes beside its tables
ROWS_AT_ONCE = 64  # of a table; a row may be a book
RETRY_SECONDS = (1, 5, 30, 120, 300)  # waits before a source that failed is opened again


class SourceError(UserError):
    """A source that could be opened has stopped answering, and went on so through all retries."""


class Part(NamedTuple):
    """Every `of`-th record, beginning with record `number`."""

    number: int = 0
    of: int = 1

    def has(self, index: int) -> bool:
        return index % self.of == self.number


WHOLE = Part()


class Source(ABC):
    """A corpus as shards of records.

    Attributes:
        corpus: what was opened.
        num_shards: shards, in a fixed order.
        revision: the commit of a hub data set.
        passing_errors: what may be gone at the next try.
        shard_bytes: of each shard on disk; empty if not known.
    """

    corpus: CorpusArguments
    num_shards: int
    shard_bytes: tuple[int, ...] = ()
    revision: str | None = None
    passing_errors: type[Exception] = OSError

    @abstractmethod
    def records(self, shard: int, first: int, part: Part) -> Iterator[tuple[int, str | UserError]]:
        """See `read`; without its retries."""

    def read(self, shard: int, first: int = 0, part: Part = WHOLE) -> Iterator[tuple[int, str | UserError]]:
        """The records of a shard from number `first` on that `part` has.

        A connection or disk that fails is opened again at the record that it failed at, five times, after waits of 1
        second to 5 minutes.

        Yields:
            (number, text): "" where there is none, a `UserError` in its place where the record cannot be understood.

        Raises:
            UserError: a damaged file, which would be damaged the next time too.
            SourceError: a source that goes on failing.
        """
        waits, retries = iter(RETRY_SECONDS), 0
        while True:
            try:
                for index, text in self.records(shard, first, part):
                    yield index, text
                    first, waits, retries = index + 1, iter(RETRY_SECONDS), 0
                return
            except UserError:
                raise
            except self.passing_errors as error:
                place = f"corpus {self.corpus.name!r}: {self.corpus.path}, shard {shard}, record {first}"
                if (wait := next(waits, None)) is None or STOP_WAITING.is_set():
                    raise SourceError(
                        f"{place} cannot be read, after {retries} retries: {type(error).__name__}: {error}"
                    ) from error
                print(f"{place}: {type(error).__name__}: {error}; opening it again in {wait} s", flush=True)
                STOP_WAITING.wait(wait)
                retries += 1


class LocalSource(Source):
    """Local files. A file is a shard; small ones that follow each other are one together."""

    def __init__(self, corpus: CorpusArguments, files: list[Path]) -> None:
        self.corpus = corpus
        sizes = {str(file.absolute()): file.stat().st_size for file in files}
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

    def records(self, shard: int, first: int, part: Part) -> Iterator[tuple[int, str | UserError]]:
        files = self.shards[shard]
        start = 0
        for file in files:
            # Only of a file that is a shard by itself is it known, without reading, where its numbers start.
            skip = first if len(files) == 1 else 0
            read, parse = self.reader(file)
            number = skip - 1
            try:
                for number, raw in enumerate(read(file, skip), start=skip):
                    if start + number >= first and part.has(start + number):
                        try:
                            yield start + number, parse(raw, file, number)
                        except UserError as error:
                            yield start + number, error
            except UserError:
                raise
            except (EOFError, lzma.LZMAError, pa.ArrowException, OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # of the disk; without a number it is a decompressor's
                raise damaged(file, error) from None
            start += number + 1

    def reader(self, file: str) -> tuple[Callable[[str, int], Iterator[Any]], Callable[[Any, str, int], str]]:
        """How to read the raw records of a file from a number on, and how to parse one."""
        column = self.corpus.text_column
        if file.endswith(TABLES):
            return functools.partial(read_table, column=column), parse_row
        if Path(file.removesuffix(packing_of(file))).suffix in LINES:
            return read_lines, functools.partial(parse_line, column=column)
        if self.corpus.sample_by == "paragraph":
            return read_paragraphs, parse_text
        return read_whole, parse_text


class HubSource(Source):
    """A hub data set, read as a stream: nothing of its text is kept on disk."""

    passing_errors = Exception  # the connection is made of many libraries

    def __init__(self, corpus: CorpusArguments) -> None:
        self.corpus = corpus
        self.rows, self.revision = open_hub_corpus(corpus)
        self.num_shards = self.rows.num_shards

    def records(self, shard: int, first: int, part: Part) -> Iterator[tuple[int, str | UserError]]:
        rows = self.rows.shard(num_shards=self.num_shards, index=shard)
        # By batches, since iteration by rows would notice that it runs in a worker process and leave out what it takes
        # to be the share of other workers.
        batches = (rows.skip(first) if first else rows).iter(batch_size=ROWS_AT_ONCE)
        for index, text in enumerate((text for batch in batches for text in batch["text"]), start=first):
            if part.has(index):
                if text is not None and not isinstance(text, str):
                    kind = type(text).__name__
                    yield index, UserError(f"{self.corpus.path}, shard {shard}, row {index + 1}: a {kind}, not text")
                else:
                    yield index, text or ""


def local_files(corpus: CorpusArguments) -> list[Path] | None:
    """The sorted local files of a corpus, or None when its path is a hub data set id.

    Raises:
        UserError: the path is neither there nor a hub id, or holds no file that can be read.
    """
    path = Path(corpus.path).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        # `glob` follows links to folders and leaves out what is hidden.
        below = map(Path, sorted(set(glob.glob(f"{glob.escape(str(path))}/**", recursive=True))))
        files = [f for f in below if f.is_file() and f.name.endswith(SUFFIXES) and f.name not in NO_TEXT]
    elif glob.has_magic(corpus.path):
        files = [Path(file) for file in sorted(set(glob.glob(str(path), recursive=True))) if Path(file).is_file()]
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", corpus.path) and not corpus.path.endswith(SUFFIXES):
        return None
    else:
        raise UserError(f"`path` of corpus {corpus.name!r}: {corpus.path} does not exist")
    if not files:
        raise UserError(
            f"`path` of corpus {corpus.name!r}: {corpus.path} holds no file ending in {', '.join(SUFFIXES)}"
        )
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"`path` of corpus {corpus.name!r}: {file} does not end in one of {', '.join(SUFFIXES)}")
    return files


def source_fingerprint(corpus: CorpusArguments) -> str:
    """Changes when the text does, without opening it: with the files' sizes and times, or the hub's revision. The name
    of a revision, `main` too, stands for the text that was there when it was first read.
    """
    files = local_files(corpus)
    if files is None:
        return digest(corpus.path, corpus.config_name, corpus.split, corpus.revision, corpus.text_column)
    stamps = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return digest(corpus.text_column, corpus.sample_by, SHARD_BYTES, MAX_SHARDS, stamps)


def damaged(file: str, error: Exception) -> UserError:
    return UserError(f"{file}: damaged or incomplete ({error}); replace it or leave it out")


def packing_of(file: str) -> str:
    """The suffix that says how a file is compressed, or ""."""
    return next((suffix for suffix in COMPRESSION_RATIO if file.endswith(suffix)), "")


def open_bytes(file: str) -> Any:
    """A file's bytes, decompressed. (Python's own reader of gzip is slower, and it has none of zstandard.)"""
    if file.endswith(".xz"):
        return lzma.open(file, "rb")
    if packed := packing_of(file):
        return io.BufferedReader(pa.input_stream(file, compression=PACKED_BY[packed]), 2**16)
    return open(file, "rb")


def read_lines(file: str, skip: int) -> Iterator[bytes]:
    with open_bytes(file) as stream:
        yield from itertools.islice(stream, skip, None)


def read_whole(file: str, skip: int) -> Iterator[bytes]:
    if not skip:
        with open_bytes(file) as stream:
            yield stream.read()


def read_paragraphs(file: str, skip: int) -> Iterator[bytes]:
    """What stands between blank lines."""
    with open_bytes(file) as stream:
        groups = itertools.groupby(stream, key=lambda line: not line.strip())
        yield from itertools.islice((b"".join(lines) for is_blank, lines in groups if not is_blank), skip, None)


def read_table(file: str, skip: int, column: str) -> Iterator[bytes | None]:
    """The rows of a Parquet or Arrow file, of which whole row groups or batches are skipped unread."""
    if file.endswith(".parquet"):
        table = pq.ParquetFile(file)
        check_column(table.schema_arrow, file, column)
        sizes = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]

        def rows(number: int) -> Iterator[pa.RecordBatch]:
            return table.iter_batches(ROWS_AT_ONCE, row_groups=[number], columns=[column])
    else:
        source = pa.memory_map(file)
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_stream(source)  # what `datasets` writes
        check_column(reader.schema, file, column)
        batches = reader.read_all().select([column]).to_batches()
        sizes = [len(batch) for batch in batches]

        def rows(number: int) -> Iterator[pa.RecordBatch]:
            return (batches[number].slice(start, ROWS_AT_ONCE) for start in range(0, sizes[number], ROWS_AT_ONCE))

    for number, size in enumerate(sizes):
        if skip >= size:
            skip -= size
            continue
        values = (value for batch in rows(number) for value in as_bytes(batch.column(0)).to_pylist())
        yield from itertools.islice(values, skip, None)
        skip = 0


BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


def as_bytes(texts: pa.Array) -> pa.Array:
    """Texts as bytes: not every writer checks its UTF-8, and what is passed over need not be decoded.

    Raises:
        pa.ArrowInvalid: positions outside the file, to which a damaged one would send the reader.
    """
    values = texts.view(BYTES[texts.type])
    values.validate(full=True)
    return values


def check_column(schema: pa.Schema, place: str, column: str) -> None:
    """
    Raises:
        UserError: there is no such column, or it does not hold text.
    """
    if column not in schema.names:
        raise UserError(f"{place}: no column {column!r} among {schema.names}; set the corpus's `text_column`")
    kind = schema.field(column).type
    if kind not in BYTES:
        raise UserError(f"{place}: column {column!r} is {kind}, not text; set the corpus's `text_column`")


def parse_row(value: bytes | None, file: str, number: int) -> str:
    return decode(value or b"", f"{file}, row {number + 1}")


def parse_text(raw: bytes, file: str, number: int) -> str:
    return decode(raw.removeprefix(b"\xef\xbb\xbf"), f"{file}, document {number + 1}")


def decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not valid UTF-8 at byte {error.start} of it") from None


def parse_line(line: bytes, file: str, number: int, column: str) -> str:
    """The text of one JSON line, "" for a blank line or a null."""
    place = f"{file}, line {number + 1}"
    line = line.removeprefix(b"\xef\xbb\xbf")
    if not line.strip():
        return ""
    try:
        record = json.loads(decode(line, place))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not a JSON object: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: a {type(record).__name__} where a JSON object should be; write one object a line")
    if column not in record:
        raise UserError(f"{place}: no column {column!r} among {sorted(record)}; set the corpus's `text_column`")
    text = record[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{place}: column {column!r} holds a {type(text).__name__}, not text")
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: a lone surrogate at character {error.start}, which UTF-8 cannot write") from None
    return text or ""


def open_source(corpus: CorpusArguments) -> Source:
    """
    Raises:
        UserError: there is no such corpus, on disk or on the hub.
    """
    files = local_files(corpus)
    return HubSource(corpus) if files is None else LocalSource(corpus, files)


def open_hub_corpus(corpus: CorpusArguments) -> tuple[IterableDataset, str]:
    """A hub data set as a stream of rows with the one column `text`, and the commit that it is of."""
    try:
        commit = HfApi().dataset_info(corpus.path, revision=corpus.revision).sha
        rows = load_dataset(corpus.path, corpus.config_name, split=corpus.split, revision=commit, streaming=True)
    except Exception as error:
        # Whatever `datasets` raises here, from a misspelt id to no network, the user needs to know which corpus it was.
        raise UserError(
            f"corpus {corpus.name!r}: hub data set {corpus.path} (config_name {corpus.config_name}, split "
            f"{corpus.split}, revision {corpus.revision}) cannot be opened, and no local path has that name: "
            f"{type(error).__name__}: {error}"
        ) from error
    columns = rows.column_names or []
    if columns and corpus.text_column not in columns:
        raise UserError(
            f"corpus {corpus.name!r}: {corpus.path} has no column {corpus.text_column!r} among {columns}; "
            "set the corpus's `text_column`"
        )
    kind = rows.features[corpus.text_column] if rows.features else Value("string")
    if kind not in (Value("string"), Value("large_string")):
        raise UserError(f"corpus {corpus.name!r}: column {corpus.text_column!r} of {corpus.path} is {kind}, not text")
    rows = rows.select_columns([corpus.text_column])
    return (rows if corpus.text_column == "text" else rows.rename_column(corpus.text_column, "text")), commit


def check_corpus(corpus: CorpusArguments, max_unreadable: int = 0) -> None:
    """Read one document of a corpus, before anything expensive.

    Args:
        max_unreadable: malformed ones that may stand before it.

    Raises:
        UserError: the corpus cannot be opened or read, or holds no text.
    """
    source = open_source(corpus)
    for shard in range(source.num_shards):
        try:
            for _, text in source.records(shard, 0, WHOLE):
                if isinstance(text, UserError):
                    max_unreadable -= 1
                    if max_unreadable < 0:
                        raise text
                elif text.strip():
                    return
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"corpus {corpus.name!r}: {corpus.path} cannot be read: {type(error).__name__}: {error}"
            ) from error
    raise UserError(f"corpus {corpus.name!r}: {corpus.path} holds no text")


def corpus_bytes(corpus: CorpusArguments) -> float:
    """About how many bytes of text a corpus holds, without reading it: the default weight where tokens are not counted.

    Raises:
        UserError: a hub data set whose size is not published.
    """
    files = local_files(corpus)
    if files is not None:
        return sum(file_bytes(str(file), corpus.text_column) for file in files)
    splits = open_hub_corpus(corpus)[0].info.splits or {}
    if corpus.split not in splits or not splits[corpus.split].num_bytes:
        raise UserError(f"corpus {corpus.name!r}: {corpus.path} does not publish its size; give all corpora a `weight`")
    return splits[corpus.split].num_bytes


def file_bytes(file: str, column: str) -> float:
    size = Path(file).stat().st_size
    if not file.endswith(".parquet"):
        return size * COMPRESSION_RATIO.get(packing_of(file), 1)
    try:
        metadata = pq.ParquetFile(file).metadata
        leaves = [number for number in range(metadata.num_columns) if metadata.schema.column(number).path == column]
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        # Of a damaged file a group may have fewer columns, and to ask it for one that it has not is a crash.
        return sum(g.column(leaf).total_uncompressed_size for g in groups for leaf in leaves if leaf < g.num_columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(file, error) from None


def sample_texts(corpora: list[CorpusArguments], max_bytes: int) -> Iterator[tuple[str, list[str], int]]:
    """A weighted sample of all corpora in at most `max_bytes`, read as a stream.

    Each corpus gets its share of the budget by weight (by default: size) and spreads it evenly over its shards, since
    the first shard of a sorted corpus looks like no other. What a short shard leaves falls to the later ones.

    Yields:
        (corpus name, whole documents of about 1 MB together, their bytes).
    """
    weights = [corpus_bytes(c) if c.weight is None else c.weight for c in corpora]
    for corpus, weight in zip(corpora, weights, strict=True):
        source = open_source(corpus)
        left = int(max_bytes * weight / sum(weights))
        batch, batch_bytes = [], 0
        for shard in range(source.num_shards):
            for text, size in take_bytes(source.read(shard), left // (source.num_shards - shard)):
                batch.append(text)
                batch_bytes += size
                left -= size
                if batch_bytes >= 1_000_000:
                    yield corpus.name, batch, batch_bytes
                    batch, batch_bytes = [], 0
        if batch:
            yield corpus.name, batch, batch_bytes


def take_bytes(records: Iterator[tuple[int, str | UserError]], max_bytes: int) -> Iterator[tuple[str, int]]:
    """(text, its bytes) from the head of a shard, `max_bytes` in all; the last text is cut to fit."""
    for _, text in records:
        if isinstance(text, UserError):
            raise text
        encoded = text.encode()[:max_bytes]
        max_bytes -= len(encoded)
        if encoded:
            yield encoded.decode(errors="ignore"), len(encoded)
        if not max_bytes:
            return
