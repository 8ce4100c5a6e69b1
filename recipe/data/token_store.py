"""The cached mode: tokenise each corpus once, pack it in seconds, read any block in constant time.

1. `TokenStore` encodes a corpus, shard by shard, into Arrow files: one row a document, in batches of some million
   tokens. A batch is a unit: no block reaches over its end.
2. `PackedCorpus` makes a view of it for one format and length, tables of segments and blocks with nothing copied, and
   maps both into memory.

    <token_store_dir>/books-1f6c…/
      store.json                   what it was made of and with
      shard-00000.arrow            `input_ids`, `sentence_ends`, `checksum` of the text
      shard-00000.json             documents, tokens and what was left out; written last
      full_sentences-512-9b2e…/shard-00000/{segments,block_ends,labels}.bin, counts.json

All processes on all nodes do this side by side: each takes a shard that nobody works on (a lock tells) until none is
left, then waits for those of the others. Nothing passes between them but files, so that no collective runs into its
time limit, a killed process leaves its lock and all finished shards behind, and the result depends on nobody.
"""

import errno
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from recipe.arguments import CorpusArguments
from recipe.base.errors import UserError, raising_damaged_file
from recipe.base.files import nearest_existing_parent
from recipe.base.hashing import digest
from recipe.base.progress import progress_bar
from recipe.base.workers import build_together
from recipe.data.corpora import Source, corpus_bytes, local_files, open_source, source_fingerprint
from recipe.data.encoders import Encoded, Encoders, RunEncoder, runs_of
from recipe.data.hygiene import Decontaminator, check_unreadable
from recipe.data.tokenizer import DocumentEncoder

STORE_FORMAT = 1  # part of the folder's name: raise it when the contents come out differently
UNIT_TOKENS = 4_000_000  # that a unit has at least, if its shard has; one block of it is short
LEFT_OUT = ("empty", "unreadable", "contaminated")  # documents that a store does not have, by reason
# Of a token store for each byte of text, at the least: two a token, the longest of which have some 5 bytes.
STORE_BYTES = 0.4


def write_shard(path: Path, runs: Iterator[Encoded], dtype: np.dtype) -> None:
    """Write the documents of runs, whose ids are of `dtype`, to `path`, and their counts beside it."""
    ids_type = pa.list_(pa.from_numpy_dtype(dtype))
    schema = pa.schema({"input_ids": ids_type, "sentence_ends": pa.list_(pa.int32()), "checksum": pa.uint64()})
    counts: Counter[str] = Counter(dict.fromkeys(("documents", "tokens", *LEFT_OUT), 0))
    for leftover in path.parent.glob(f".{path.name}.*"):  # of a killed process
        leftover.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            rows, size = [], 0
            for counted, documents in runs:
                counts.update(counted)
                for ids, ends, checksum in documents:
                    rows.append((ids, ends, checksum))
                    size += len(ids)
                    if size >= UNIT_TOKENS:
                        writer.write(to_batch(rows, schema))
                        counts["tokens"] += size
                        rows, size = [], 0
            if rows:
                writer.write(to_batch(rows, schema))
                counts["tokens"] += size
        sync(temporary)
        temporary.rename(path)
        write_json(path.with_suffix(".json"), dict(counts))
    finally:
        temporary.unlink(missing_ok=True)


def to_batch(rows: list[tuple[np.ndarray, np.ndarray, int]], schema: pa.Schema) -> pa.RecordBatch:
    ids, ends, checksums = zip(*rows, strict=True)
    return pa.record_batch(
        [
            list_array(ids, schema.field("input_ids").type),
            list_array(ends, schema.field("sentence_ends").type),
            pa.array(np.array(checksums, np.uint64)),
        ],
        schema=schema,
    )


def list_array(rows: tuple[np.ndarray, ...], kind: pa.ListType) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    values = np.concatenate(rows).astype(kind.value_type.to_pandas_dtype(), copy=False)
    return pa.ListArray.from_arrays(offsets, values)


def sync(path: Path) -> None:
    """Have a file reach the disk before its name does."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Under the lock of whoever writes `path`: two must not do so at once."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(values, indent=1))
    sync(temporary)
    temporary.rename(path)


class TokenStore:
    """The encoded documents of a corpus.

    Args:
        corpus: what it is of; its `path` may be the folder of a store itself.
        encoder: what it is made with.
        decontaminator: what is left out of it.
        root: folder of the stores.

    Raises:
        UserError: there is no such corpus, or the store given as its path is incomplete or was made otherwise.
    """

    def __init__(
        self, corpus: CorpusArguments, encoder: DocumentEncoder, decontaminator: Decontaminator, root: Path
    ) -> None:
        self.corpus = corpus
        self.encoder = encoder
        self.decontaminator = decontaminator
        made_with = digest(STORE_FORMAT, UNIT_TOKENS, *encoder.fingerprint, decontaminator.fingerprint)
        given = Path(corpus.path).expanduser()
        if (given / "store.json").is_file():
            self.path = given
            if read_json(given / "store.json").get("made_with") != made_with:
                raise UserError(
                    f"corpus {corpus.name!r}: the token store {given} was made with another tokenizer, "
                    "`sentence_splitter`, `language` or `decontaminate_against`; give those, or the text as `path`"
                )
            if not self.is_complete:
                missing = sum(not self.is_done(shard) for shard in range(self.num_shards))
                raise UserError(
                    f"corpus {corpus.name!r}: the token store {given} lacks {missing} of {self.num_shards} shards; "
                    "finish it with the command that began it"
                )
        else:
            fingerprint = digest(made_with, source_fingerprint(corpus))[:16]
            name = re.sub(r"[^\w.-]", "_", corpus.name)[:50]  # a file's name has 255 bytes at the most
            self.path = root / f"{name}-{fingerprint}"
        self.made_with = made_with

    @property
    def num_shards(self) -> int:
        return read_json(self.path / "store.json")["num_shards"]

    def arrow(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}.arrow"

    def is_done(self, shard: int) -> bool:
        return self.arrow(shard).with_suffix(".json").is_file()

    @property
    def is_complete(self) -> bool:
        return (self.path / "store.json").is_file() and all(map(self.is_done, range(self.num_shards)))

    def counts(self) -> Counter[str]:
        """Documents and tokens in the store, and documents that were left out, by reason."""
        total: Counter[str] = Counter()
        for shard in range(self.num_shards):
            total.update(read_json(self.arrow(shard).with_suffix(".json")))
        return total

    def checksums(self) -> list[np.ndarray]:
        """Of each shard, (documents,) uint64 of the texts."""
        tables = (open_arrow(self.arrow(shard)) for shard in range(self.num_shards))
        return [table.column("checksum").to_numpy() for table in tables]

    def begin(self) -> Source:
        """Open the corpus and write down what the store is of, once for all that will build it.

        Raises:
            UserError: the hub's data set has changed since another began.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / "store.lock"):
            about = self.path / "store.json"
            begun = read_json(about) if about.is_file() else None
            source = open_source(replace(self.corpus, revision=begun["revision"]) if begun else self.corpus)
            if begun is None:
                values = {"corpus": asdict(self.corpus), "made_with": self.made_with, "revision": source.revision}
                write_json(about, values | {"num_shards": source.num_shards})
            elif begun["num_shards"] != source.num_shards:
                raise UserError(
                    f"corpus {self.corpus.name!r}: {self.corpus.path} has {source.num_shards} shards, and "
                    f"{begun['num_shards']} when {self.path} was begun; remove that folder to begin anew"
                )
        return source

    def build(self, process_index: int, num_workers: int | None, max_unreadable: int) -> None:
        """Make what is not there yet of the store, together with all processes that do the same.

        Raises:
            UserError: the corpus cannot be read, has too many malformed documents, or does not fit on the disk.
        """
        if not self.is_complete:
            encode_run = RunEncoder(self.corpus.name, self.encoder, self.decontaminator, max_unreadable)
            with (
                naming_disk_errors(self.path),
                progress_bar(f"tokenising {self.corpus.name}", None, "documents", process_index == 0) as bar,
            ):
                source = self.begin()
                encoders = Encoders(encode_run, num_workers)

                def make(shard: int) -> None:
                    runs = encoders.map(runs_of(source.read(shard)))
                    write_shard(self.arrow(shard), self.watch(runs, max_unreadable, bar), self.encoder.dtype)

                # Two shards at once, so that nobody is idle while the last, long document of one is encoded.
                encoders.run(
                    2,
                    lambda number: build_together(
                        self.path, source.num_shards, process_index + number, self.is_done, make
                    ),
                )
        counts = self.counts()
        check_unreadable(self.corpus.name, counts["unreadable"], max_unreadable, f"counted in {self.path}")
        if not counts["tokens"]:
            raise UserError(f"corpus {self.corpus.name!r}: {self.corpus.path} holds no text")

    def watch(self, runs: Iterator[Encoded], max_unreadable: int, bar: Any) -> Iterator[Encoded]:
        """The runs of a shard, seen on the bar and ended by one malformed document too many."""
        unreadable = 0
        for counted, documents in runs:
            unreadable += counted["unreadable"]
            check_unreadable(self.corpus.name, unreadable, max_unreadable, "see above")
            bar.update(len(documents))
            yield counted, documents


@contextmanager
def naming_disk_errors(path: Path) -> Iterator[None]:
    """Turn what the system says about a full or a foreign disk into an error that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(nearest_existing_parent(path)).free / 1e9
            problem = (
                f"no space left in {path} ({free:.1f} GB free); free some, or set `token_store_dir` to a folder on"
            )
            raise UserError(f"{problem} another disk. What is finished is kept") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"{path} cannot be written ({error.strerror}); set `token_store_dir` to a folder that can, or copy the "
                "token store that is given as `path` there"
            ) from error
        raise


def check_space(root: Path, stores: list[TokenStore]) -> None:
    """
    Raises:
        UserError: what is not built yet of these stores will surely not fit.
    """
    needed = 0.0
    for store in stores:
        if not store.is_complete and local_files(store.corpus) is not None:
            there = sum(file.stat().st_size for file in store.path.glob("shard-*.arrow"))
            needed += max(0.0, corpus_bytes(store.corpus) * STORE_BYTES - there)
    free = shutil.disk_usage(nearest_existing_parent(root)).free
    if needed > free:
        raise UserError(
            f"the token stores need about {needed / 1e9:.1f} GB in {root}, and {free / 1e9:.1f} GB are free; "
            "free some, set `token_store_dir` to a folder on another disk, or `streaming: true`"
        )


def reading_store(path: Path) -> AbstractContextManager[None]:
    return raising_damaged_file(
        f"the token store's {path}", f"copy it again, or remove the folder {path.parent} to have it made again"
    )


def open_arrow(path: Path) -> pa.Table:
    """A mapped file as a table, with nothing read but its index."""
    with reading_store(path):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate()  # a damaged one would send the reader outside the file
        return table


def read_json(path: Path) -> dict[str, Any]:
    with reading_store(path):
        return json.loads(path.read_text())
