"""Open corpora: hub data sets or local files in, documents out.

Everything that reads text comes through `open_corpus`, which gives rows of one column, `text`, either memory-mapped
from a cache (`Dataset`) or as a stream (`IterableDataset`). Nothing here knows about tokens.
"""

import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from recipe.config import CorpusArguments, UserError

SUFFIXES = (".jsonl", ".json", ".txt", ".jsonl.gz", ".json.gz", ".txt.gz")
TEXT_FEATURES = Features({"text": Value("large_string")})
GZIP_RATIO = 2.6  # uncompressed bytes of English text for one compressed byte; only default weights rest on it


def local_files(corpus: CorpusArguments) -> list[Path] | None:
    """The sorted local files of a corpus, or None when its path is a hub data set id.

    Raises:
        UserError: the path is neither there nor a hub id, or holds no file that can be read.
    """
    path = Path(corpus.path).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        below = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name.endswith(SUFFIXES))
        files = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    elif glob.has_magic(corpus.path):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]
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


def read_documents(files: list[str], text_column: str) -> Iterator[dict[str, str]]:
    """The documents of local files in order, empty ones left out.

    A `.txt` file is one document; the other formats hold one JSON object a line.

    Raises:
        UserError: naming the file, and the line where there is one.
    """
    for file in files:
        try:
            with gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb") as stream:
                if file.endswith((".txt", ".txt.gz")):
                    try:
                        documents = [stream.read().decode("utf-8-sig")]
                    except UnicodeDecodeError as error:
                        raise UserError(f"{file}: not valid UTF-8 at byte {error.start}") from None
                else:
                    documents = (
                        parse_line(line, text_column, f"{file}, line {number}")
                        for number, line in enumerate(stream, start=1)
                    )
                for text in documents:
                    if text:
                        yield {"text": text}
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file}: not a complete gzip file ({error})") from None


def parse_line(line: bytes, text_column: str, place: str) -> str:
    """The text of one JSON line, "" for a blank line or a null; `place` goes into the error."""
    try:
        line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            return ""
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not valid UTF-8 at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not a JSON object: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: a {type(record).__name__} where a JSON object should be; write one object a line")
    if text_column not in record:
        raise UserError(f"{place}: no column {text_column!r} among {sorted(record)}; set the corpus's `text_column`")
    text = record[text_column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{place}: column {text_column!r} holds a {type(text).__name__}, not text")
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: a lone surrogate at character {error.start}, which UTF-8 cannot write") from None
    return text or ""


def open_corpus(corpus: CorpusArguments, streaming: bool) -> Dataset | IterableDataset:
    """The documents of a corpus as rows with the one column `text`.

    Args:
        corpus: what to open.
        streaming: give a stream that keeps nothing on disk, in place of a memory-mapped table in the `datasets` cache.

    Raises:
        UserError: the corpus cannot be opened, or (not streaming) read.
    """
    files = local_files(corpus)
    if files is None:
        return open_hub_corpus(corpus, streaming)
    arguments = {
        "generator": read_documents,
        "features": TEXT_FEATURES,
        "gen_kwargs": {"files": [str(file.resolve()) for file in files], "text_column": corpus.text_column},
    }
    if streaming:
        return IterableDataset.from_generator(**arguments)
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    fingerprint = hashlib.sha256(repr(("documents-1", corpus.text_column, stamps)).encode()).hexdigest()[:16]
    try:
        return Dataset.from_generator(**arguments, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError) else error from None
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise UserError(f"corpus {corpus.name!r}: {corpus.path} holds no text") from None


def open_hub_corpus(corpus: CorpusArguments, streaming: bool) -> Dataset | IterableDataset:
    try:
        rows = load_dataset(
            corpus.path, corpus.config_name, split=corpus.split, revision=corpus.revision, streaming=streaming
        )
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
    return rows if corpus.text_column == "text" else rows.rename_column(corpus.text_column, "text")


def check_corpus(corpus: CorpusArguments) -> None:
    """Read one document of a corpus, before anything expensive.

    Raises:
        UserError: the corpus cannot be opened or holds no text.
    """
    try:
        first = next(iter(open_corpus(corpus, streaming=True)), None)
    except UserError:
        raise
    except Exception as error:  # of whatever the hub's connection is made of
        raise UserError(f"corpus {corpus.name!r}: {corpus.path} cannot be read: {error}") from error
    if first is None:
        raise UserError(f"corpus {corpus.name!r}: {corpus.path} holds no text")


def corpus_bytes(corpus: CorpusArguments) -> float:
    """About how many bytes of text a corpus holds, without reading it: the default weight before tokenisation.

    Raises:
        UserError: a hub data set whose size is not published.
    """
    files = local_files(corpus)
    if files is not None:
        return sum(file.stat().st_size * (GZIP_RATIO if file.suffix == ".gz" else 1) for file in files)
    splits = open_hub_corpus(corpus, streaming=True).info.splits or {}
    if corpus.split not in splits or not splits[corpus.split].num_bytes:
        raise UserError(f"corpus {corpus.name!r}: {corpus.path} does not publish its size; give all corpora a `weight`")
    return splits[corpus.split].num_bytes


def take_bytes(rows: Iterable[dict[str, str]], max_bytes: int) -> Iterator[tuple[str, int]]:
    """(text, its bytes) from the head of a stream, `max_bytes` in all; the last text is cut to fit."""
    for row in rows:
        encoded = (row["text"] or "").encode()[:max_bytes]
        max_bytes -= len(encoded)
        yield encoded.decode(errors="ignore"), len(encoded)
        if not max_bytes:
            return


def sample_texts(corpora: list[CorpusArguments], max_bytes: int) -> Iterator[tuple[str, list[str], int]]:
    """A weighted sample of all corpora in at most `max_bytes`, read as a stream.

    Each corpus gets its share of the budget by weight (by default: size) and spreads it evenly over its shards, since
    the first shard of a sorted corpus looks like no other. What a short shard leaves falls to the later ones.

    Yields:
        (corpus name, whole documents of about 1 MB together, their bytes).
    """
    weights = [corpus_bytes(c) if c.weight is None else c.weight for c in corpora]
    for corpus, weight in zip(corpora, weights, strict=True):
        rows = open_corpus(corpus, streaming=True)
        left = int(max_bytes * weight / sum(weights))
        batch, batch_bytes = [], 0
        for index in range(rows.num_shards):
            shard = rows.shard(num_shards=rows.num_shards, index=index)
            for text, size in take_bytes(shard, left // (rows.num_shards - index)):
                batch.append(text)
                batch_bytes += size
                left -= size
                if batch_bytes >= 1_000_000:
                    yield corpus.name, batch, batch_bytes
                    batch, batch_bytes = [], 0
        if batch:
            yield corpus.name, batch, batch_bytes
