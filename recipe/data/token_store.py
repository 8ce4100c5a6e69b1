"""The cached mode: tokenise each corpus once, pack it in seconds, read any block in constant time.

1. `TokenStore` encodes a corpus, shard by shard, into Arrow files: one row a document, in batches of some million
   tokens. A batch is a unit: no block reaches over its end.
2. `PackedCorpus` makes a view of it for one format and length, tables of segments and blocks with nothing copied, and
   maps both into memory.

    <token_store_dir>/books-1f6c…/
      store.json                   what it was made of and with
      shard-00000.arrow            `input_ids`, `sentence_ends`, `checksum` of the text
      shard-00000.json             counts of documents, tokens, unknown tokens and of what was left out, size and
                                   SHA-256 of the Arrow file, and a digest of its texts; written last
      full_sentences-512-9b2e…/shard-00000/{segments,block_ends,labels}.bin, counts.json

All processes on all nodes do this side by side: each takes a shard whose lock nobody holds until none is left, then
waits for those of the others. Nothing passes between them but files, so that no collective runs into its time limit, a
killed process leaves its lock and all finished shards behind, and the result does not depend on who did what.
(`datasets.map` would be shorter; it does not share a corpus among the processes of several nodes.)
"""

import errno
import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from recipe.arguments import CorpusArguments
from recipe.arguments.corpus_files import is_token_store, local_files
from recipe.base.errors import UserError
from recipe.base.files import check_free_space, free_bytes, replace_file
from recipe.base.formatting import format_bytes, format_duration
from recipe.base.hashing import digest
from recipe.base.progress import describe_progress, print_line, progress_bar
from recipe.base.workers import build_together
from recipe.data.corpora import Source, corpus_bytes, group_by_size, open_source, source_fingerprint
from recipe.data.document_encoder import DocumentEncoder
from recipe.data.encoders import Encoded, EncodedDocument, Encoders, RunEncoder, runs_of
from recipe.data.hygiene import Decontaminator, check_unreadable, nothing_left
from recipe.data.integrity import StoredFile, note_file, raising_damaged_store, read_json, write_json

STORE_FORMAT = 3  # part of the folder's name: raise it when the contents come out differently
UNIT_TOKENS = 4_000_000  # that a unit has at least, if its shard has; one block of it is short
LEFT_OUT = ("empty", "unreadable", "contaminated")  # why documents are left out of a store
COUNTED = ("documents", "tokens", "unknown", *LEFT_OUT)
LOOK_SECONDS, LOG_SECONDS = 10, 60  # between two looks at what other processes have finished, and lines in a log file
STORE_BYTES_PER_TEXT_BYTE = 0.4  # at the least: two bytes a token, and a token has about 5 bytes of text at the most


def write_shard(path: Path, runs: Iterator[Encoded], dtype: np.dtype) -> None:
    """Write the documents of runs, whose ids are of `dtype`, to `path`, and then their counts beside it."""
    ids_type = pa.list_(pa.from_numpy_dtype(dtype))
    schema = pa.schema({"input_ids": ids_type, "sentence_ends": pa.list_(pa.int32()), "checksum": pa.uint64()})
    counts, texts = Counter(dict.fromkeys(COUNTED, 0)), hashlib.sha256()

    def documents() -> Iterator[EncodedDocument]:
        for counted, rows in runs:
            counts.update(counted, tokens=sum(len(ids) for ids, _, _ in rows))
            yield from rows

    for leftover in path.parent.glob(f".{path.stem}.*"):  # of a killed process
        leftover.unlink()
    with (
        replace_file(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for rows in group_by_size(documents(), lambda row: len(row[0]), UNIT_TOKENS):
            writer.write(to_batch(rows, schema))
            texts.update(np.array([checksum for _, _, checksum in rows], "<u8").tobytes())
    write_json(path.with_suffix(".json"), dict(counts) | note_file(path) | {"texts": texts.hexdigest()})


def to_batch(rows: list[EncodedDocument], schema: pa.Schema) -> pa.RecordBatch:
    """Turn encoded documents into a batch of an Arrow file."""
    columns = zip(schema.types, zip(*rows, strict=True), strict=True)
    return pa.record_batch([pa.array(values, kind) for kind, values in columns], schema=schema)


class TokenStore:
    """The encoded documents of a corpus, in a folder below `root`, or in `corpus.path` if that is itself a store.

    Raises:
        UserError: there is no such corpus, or the store given as its path is incomplete or was made otherwise.
    """

    def __init__(
        self, corpus: CorpusArguments, encoder: DocumentEncoder, decontaminator: Decontaminator, root: Path
    ) -> None:
        self.corpus = corpus
        self.encoder = encoder
        self.decontaminator = decontaminator
        self.made_with = digest(STORE_FORMAT, UNIT_TOKENS, *encoder.fingerprint, decontaminator.fingerprint)
        self.written: set[int] = set()  # the shards that this process has made
        self.path = Path(corpus.path).expanduser()
        if not is_token_store(self.path):
            name = re.sub(r"[^\w.-]", "_", corpus.name)[:50]  # a file's name has 255 bytes at the most
            self.path = root / f"{name}-{digest(self.made_with, source_fingerprint(corpus))[:16]}"
            return
        place = f"corpus {corpus.name!r}: the token store {self.path}"
        if read_json(self.path / "store.json").get("made_with") != self.made_with:
            raise UserError(
                f"{place} was made with another tokenizer, `sentence_splitter`, `language` or `decontaminate_against`, "
                "or `packing` (pairs and others have different stores); give those, or the text as `path`"
            )
        if missing := sum(not self.is_done(shard) for shard in range(self.num_shards)):
            raise UserError(
                f"{place} lacks {missing} of {self.num_shards} shards; finish it with the command that began it"
            )

    @property
    def num_shards(self) -> int:
        """Return how many shards the store has when it is complete."""
        return read_json(self.path / "store.json")["num_shards"]

    def arrow(self, shard: int) -> Path:
        """Return the file of a shard's documents."""
        return self.path / f"shard-{shard:05d}.arrow"

    def is_done(self, shard: int) -> bool:
        """Say whether a shard is in the store."""
        return self.arrow(shard).with_suffix(".json").is_file()

    @property
    def is_complete(self) -> bool:
        """Say whether all shards are in the store."""
        return (self.path / "store.json").is_file() and all(map(self.is_done, range(self.num_shards)))

    def note(self, shard: int) -> dict[str, Any]:
        """Read what is noted of a shard; raise a `UserError` if its Arrow file has another size."""
        note = read_json(self.arrow(shard).with_suffix(".json"))
        StoredFile.of_note(self.arrow(shard), note)
        return note

    def notes(self) -> list[dict[str, Any]]:
        """Read what is noted of each shard, as `note` does."""
        return [self.note(shard) for shard in range(self.num_shards)]

    def counts(self) -> Counter[str]:
        """Count the documents, tokens and unknown tokens in the store, and the documents left out, by reason."""
        return sum((Counter({name: note[name] for name in COUNTED}) for note in self.notes()), Counter())

    def checksums(self) -> list[np.ndarray]:
        """Return the checksums of the texts of each shard, (documents,) uint64."""
        return [open_arrow(self.arrow(shard))["checksum"].to_numpy() for shard in range(self.num_shards)]

    def begin(self) -> Source:
        """Open the corpus and record its revision and shards, once for all processes; refuse other shards later."""
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
                    f"corpus {self.corpus.name!r}: {self.corpus.path} has {source.num_shards} shards, and had "
                    f"{begun['num_shards']} when {self.path} was begun; remove that folder to begin anew"
                )
        return source

    def build(self, process_index: int, num_workers: int | None, max_unreadable: int) -> None:
        """Add the missing shards, together with all processes that do the same.

        A corpus that cannot be read, has too many malformed documents or does not fit on the disk is a `UserError`.
        """
        if not self.is_complete:
            encode_run = RunEncoder(self.corpus.name, self.encoder, self.decontaminator, max_unreadable)
            preparation = Preparation(self, process_index == 0)
            with naming_disk_errors(self.path), preparation.bar:
                source = self.begin()
                encoders = Encoders(encode_run, num_workers)

                def make(shard: int) -> None:
                    runs = encoders.map(runs_of(source.read(shard)))
                    progress = partial(preparation.update, shard)
                    write_shard(self.arrow(shard), self.watch(runs, max_unreadable, progress), self.encoder.dtype)
                    self.written.add(shard)

                def build_shards(number: int) -> None:
                    first = process_index + number
                    is_ending = encoders.ending.is_set
                    build_together(self.path, source.num_shards, first, self.is_done, make, is_ending)

                # Two shards at once, so that nobody is idle while the last, long document of one is encoded.
                encoders.run(2, build_shards)
            preparation.end()
        counts = self.counts()
        check_unreadable(self.corpus.name, counts["unreadable"], max_unreadable, f"counted in {self.path}")
        if not counts["tokens"]:
            left_out = ", ".join(f"{counts[reason]:,} {reason}" for reason in LEFT_OUT if counts[reason])
            raise nothing_left(self.corpus, f"of its documents, {left_out or 'none'} are left out")

    def watch(self, runs: Iterator[Encoded], max_unreadable: int, show: Callable[[int], None]) -> Iterator[Encoded]:
        """Yield the runs of a shard, show the bytes of their text, and end at one malformed document too many."""
        unreadable = 0
        for counted, documents in runs:
            unreadable += counted["unreadable"]
            check_unreadable(self.corpus.name, unreadable, max_unreadable, "see above")
            show(counted["text_bytes"])
            yield counted, documents


class Preparation:
    """The progress of a token store, in bytes of text: a bar in a terminal, a line a minute in a log file.

    Shards that other processes finish are counted a little later.
    """

    def __init__(self, store: TokenStore, is_shown: bool) -> None:
        self.store, self.is_shown = store, is_shown
        self.finished: dict[Path, int] = {}  # bytes of text of shards, whoever has made them
        self.running: Counter[Path] = Counter()  # of those that this process has worked on
        self.lock = threading.Lock()
        total = None
        with suppress(UserError):  # not every hub data set has its size published
            total = round(corpus_bytes(store.corpus))
        self.initial = self.count()
        self.phase = f"tokenising {store.corpus.name}"
        self.bar = progress_bar(self.phase, total, "B", is_shown, self.initial)
        self.total, self.started = total, time.monotonic()
        self.next_look = self.started + LOOK_SECONDS

    def count(self) -> int:
        """Look for finished shards, and count the bytes of text that are done."""
        for note in self.store.path.glob("shard-*.json"):
            if note not in self.finished:
                self.finished[note] = read_json(note)["text_bytes"]
        return sum((self.finished | {n: size for n, size in self.running.items() if n not in self.finished}).values())

    def update(self, shard: int, text_bytes: int) -> None:
        """Count what has been encoded of a shard."""
        with self.lock:
            self.running[self.store.arrow(shard).with_suffix(".json")] += text_bytes
            self.bar.update(text_bytes)
            if not self.is_shown or time.monotonic() < self.next_look:
                return
            done, elapsed = self.count(), time.monotonic() - self.started
            self.bar.update(done - self.bar.n)
            if self.bar.disable:
                print_line(describe_progress(self.phase, done, self.total, self.initial, elapsed))
            self.next_look = time.monotonic() + (LOG_SECONDS if self.bar.disable else LOOK_SECONDS)

    def end(self) -> None:
        """Say how long the store took, and where it lies."""
        if self.is_shown:
            size, elapsed = self.count() - self.initial, time.monotonic() - self.started
            made = (
                f"{format_bytes(size)} of text in {format_duration(elapsed)}, {format_bytes(size / elapsed)} a second"
            )
            print_line(f"tokenised {self.store.corpus.name}: {made}; the token store is {self.store.path}")


@contextmanager
def naming_disk_errors(path: Path) -> Iterator[None]:
    """Turn what the system says about a full or a read-only disk into an error that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space is left in {path} ({format_bytes(free_bytes(path))} free); free some, or set "
                "`token_store_dir` to a folder on another disk. What is finished is kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise UserError(
                f"{path} cannot be written ({error.strerror}); set `token_store_dir` to a folder that can, or copy the "
                "token store that is given as `path` there"
            ) from error
        raise


def check_space(root: Path, stores: list[TokenStore]) -> None:
    """Raise a `UserError` if what is not built yet of the stores will surely not fit on the disk."""
    needed = 0.0
    for store in stores:
        if not store.is_complete and local_files(store.corpus) is not None:
            built = sum(file.stat().st_size for file in store.path.glob("shard-*.arrow"))
            needed += max(0.0, corpus_bytes(store.corpus) * STORE_BYTES_PER_TEXT_BYTE - built)
    remedy = "free some, set `token_store_dir` to a folder on another disk, or `streaming: true`"
    check_free_space(root, needed, f"token stores of about {format_bytes(needed)}", remedy)


def open_arrow(path: Path) -> pa.Table:
    """Map a file into memory as a table, with nothing read but its index."""
    with raising_damaged_store(path):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate()  # a damaged one would send the reader outside the file
        return table
