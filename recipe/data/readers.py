"""Readers of local files: bytes in, raw records out, and what makes a text of a record.

A reader yields the records of a file but the first `skip`: lines, paragraphs, rows of a table, or the whole file. A new
file format needs its suffix in `recipe/arguments/corpus_files.py`, and in `choose_reader` how its raw records are read
and how one of them is parsed.
"""

import functools
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from recipe.arguments import CorpusArguments
from recipe.arguments.corpus_files import CODECS, LINES, TABLES
from recipe.base.errors import UserError
from recipe.base.formatting import format_bytes

BYTES_TYPES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
    pa.null(): pa.null(),
}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # that some editors write at the beginning of a file
MAX_RECORD_BYTES = 1_000_000_000  # of a line, row, paragraph or whole `.txt`: more is no document, or a bomb
BATCH_ROWS = 64  # of a table, read at once; a row may be a book


Reader = Callable[[str, int], Iterator[bytes]]  # of a file, its raw records but the first few
Parser = Callable[[bytes, str], str]  # of a raw record and its place, its text


def choose_reader(file: str, corpus: CorpusArguments) -> tuple[Reader, str, Parser]:
    """Choose how the raw records of a file are read, what one is called, and how it is parsed."""
    column = corpus.text_column
    if file.endswith(TABLES):
        return functools.partial(read_table, column=column), "row", decode
    if Path(file.removesuffix(packing_of(file))).suffix in LINES:
        return read_lines, "line", functools.partial(parse_line, column=column)
    if corpus.sample_by == "line":
        return read_text_lines, "line", decode
    return (read_paragraphs if corpus.sample_by == "paragraph" else read_whole), "document", decode


def damaged_file(file: str, error: Exception) -> UserError:
    """Word the error about a file that cannot be read to its end."""
    return UserError(f"{file} is damaged or incomplete ({error}); replace it or leave it out")


def is_too_large(raw: bytes) -> bool:
    """Say whether a raw record is too large to be a document."""
    return len(raw) > MAX_RECORD_BYTES


def too_large(place: str) -> UserError:
    """Word the error about a record that is too large to be a document."""
    limit = f"has more than {format_bytes(MAX_RECORD_BYTES)}, or than fits into memory"
    return UserError(f"{place} {limit}; part it into documents, of a .txt by `sample_by`, or remove it")


def packing_of(file: str) -> str:
    """Return the suffix that says how a file is compressed, or ""."""
    return next((suffix for suffix in CODECS if file.endswith(suffix)), "")


def open_bytes(file: str) -> IO[bytes]:
    """Open a file's bytes, decompressed by pyarrow. Python's reader of gzip is slower, and it has none of zstandard."""
    if packed := packing_of(file):
        return io.BufferedReader(pa.input_stream(file, compression=CODECS[packed]), 2**16)
    return open(file, "rb")


def lines_of(stream: IO[bytes]) -> Iterator[bytes]:
    """Return the lines of a stream; what is longer than a record may be comes in parts, each of them too long."""
    return iter(functools.partial(stream.readline, MAX_RECORD_BYTES + 1), b"")


def text_lines_of(stream: IO[bytes]) -> Iterator[bytes]:
    """Return the lines of a text, which end in a line feed, a carriage return or both, as in Python's text files."""
    return itertools.chain.from_iterable(line.splitlines(keepends=True) for line in lines_of(stream))


def join(pieces: Iterable[bytes]) -> bytes:
    """Join the pieces of a text, and no more of them than are too long for a record; line feeds alone end its lines."""
    joined, size = [], 0
    for piece in pieces:
        joined.append(piece)
        size += len(piece)
        if size > MAX_RECORD_BYTES:
            break
    return b"".join(joined).removeprefix(BYTE_ORDER_MARK).replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def read_lines(file: str, skip: int) -> Iterator[bytes]:
    """Yield the lines of JSON, which may end in a carriage return: a space to JSON."""
    with open_bytes(file) as stream:
        yield from itertools.islice(lines_of(stream), skip, None)


def read_text_lines(file: str, skip: int) -> Iterator[bytes]:
    """Yield the lines of a text, without their ends."""
    with open_bytes(file) as stream:
        for line in itertools.islice(text_lines_of(stream), skip, None):
            yield join([line.rstrip(b"\r\n")])


def read_whole(file: str, skip: int) -> Iterator[bytes]:
    """Yield a whole file as its only record, unless that is skipped."""
    if not skip:
        with open_bytes(file) as stream:
            yield join(iter(functools.partial(stream.read, 2**20), b""))


def read_paragraphs(file: str, skip: int) -> Iterator[bytes]:
    """Yield what stands between blank lines."""
    with open_bytes(file) as stream:
        groups = itertools.groupby(text_lines_of(stream), key=lambda line: not line.strip())
        yield from itertools.islice((join(lines) for is_blank, lines in groups if not is_blank), skip, None)


def open_table(file: str) -> tuple[pa.Schema, pq.ParquetFile | pa.ipc.RecordBatchFileReader]:
    """Open a Parquet or Arrow file, and return its schema and a reader of it."""
    if file.endswith(".parquet"):
        table = pq.ParquetFile(file)
        return table.schema_arrow, table
    source = pa.memory_map(file)
    try:
        reader = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        reader = pa.ipc.open_stream(source)  # what `datasets` writes
    return reader.schema, reader


def read_table(file: str, skip: int, column: str) -> Iterator[bytes]:
    """Yield the rows of a Parquet or Arrow file, of which row groups that are skipped are not even read."""
    groups: list[tuple[int, Callable[[], Iterable[pa.RecordBatch]]]]  # rows of each, and how to read them
    schema, table = open_table(file)
    check_column(schema, file, column)
    if isinstance(table, pq.ParquetFile):
        abouts = [table.metadata.row_group(n) for n in range(table.num_row_groups)]
        for n, about in enumerate(abouts):  # of all columns: pyarrow crashes where the size of one is damaged
            if about.total_byte_size > max(1, about.num_rows) * MAX_RECORD_BYTES:
                raise too_large(f"{file}, a row of row group {n + 1}")
        groups = [
            (about.num_rows, functools.partial(table.iter_batches, BATCH_ROWS, [n], [column]))
            for n, about in enumerate(abouts)
        ]
    else:
        batches = table.read_all().select([column]).to_batches()
        tables = [pa.Table.from_batches([batch]) for batch in batches]
        groups = [(len(table), functools.partial(table.to_batches, BATCH_ROWS)) for table in tables]
    for size, read in groups:
        if skip < size:
            # By its name, since Parquet also reads the field of a struct whose path is the column's name.
            values = (value or b"" for batch in read() for value in as_bytes(batch.column(column)).to_pylist())
            yield from itertools.islice(values, skip, None)
        skip = max(0, skip - size)


def as_bytes(texts: pa.Array) -> pa.Array:
    """View texts as bytes, since not every writer checks its UTF-8; raise an Arrow error where the file is damaged."""
    if pa.types.is_dictionary(texts.type):  # whose indices are checked here
        words = as_bytes(texts.dictionary).cast(pa.large_binary())  # views cannot be decoded
        return pa.DictionaryArray.from_arrays(texts.indices, words).dictionary_decode()
    values = texts.view(BYTES_TYPES[texts.type])
    values.validate(full=True)
    return values


def check_table(file: str, column: str) -> None:
    """Raise a `UserError` if a Parquet or Arrow file cannot be opened or does not have the column, as text."""
    try:
        check_column(open_table(file)[0], file, column)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise error if isinstance(error, UserError) else damaged_file(file, error) from None


def check_column(schema: pa.Schema, place: str, column: str) -> None:
    """Raise a `UserError` unless a table has one such column, of text, of categories that are text, or of nulls."""
    if column not in schema.names:
        raise UserError(f"{place} has no column {column!r} among {schema.names}; set the corpus's `text_column`")
    if (count := schema.names.count(column)) > 1:
        raise UserError(f"{place} has {count} columns {column!r}; rename all but one, or set `text_column`")
    kind = schema.field(column).type
    if (kind.value_type if pa.types.is_dictionary(kind) else kind) not in BYTES_TYPES:
        raise UserError(f"{place}: column {column!r} is {kind}, not text; set the corpus's `text_column`")


def decode(raw: bytes, place: str) -> str:
    """Decode UTF-8, or raise a `UserError` that names the place."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not valid UTF-8 at byte {error.start} of it; correct or remove it") from None


def parse_line(line: bytes, place: str, column: str) -> str:
    """Return the text of one JSON line, "" for a blank line or a null."""
    line = line.removeprefix(BYTE_ORDER_MARK)
    if not line.strip():
        return ""
    decoded = decode(line, place)
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not a JSON object ({error}); write one object a line") from None
    if not isinstance(record, dict):
        raise UserError(f"{place} is a {type(record).__name__}, not a JSON object; write one object a line")
    if column not in record:
        raise UserError(f"{place} has no column {column!r} among {sorted(record)}; set the corpus's `text_column`")
    text = "" if record[column] is None else record[column]
    if not isinstance(text, str):
        raise UserError(f"{place}: column {column!r} holds a {type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place} has a lone surrogate at character {error.start}, which UTF-8 cannot write") from None
    return text
