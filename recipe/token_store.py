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

import bisect
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from recipe.config import PAIR_PACKINGS, CorpusArguments, UserError, existing, reading
from recipe.corpora import (
    STOP_WAITING,
    Source,
    corpus_bytes,
    digest,
    local_files,
    open_source,
    source_fingerprint,
)
from recipe.hygiene import Decontaminator, DocumentFilter, check_unreadable, text_checksum
from recipe.packing import SEGMENT, Block, BlockFormat, Packed
from recipe.progress import progress_bar
from recipe.tokenizer import DocumentEncoder

STORE_FORMAT, BLOCKS_FORMAT = 1, 2  # parts of the folders' names: raise them when the contents come out differently
UNIT_TOKENS = 4_000_000  # that a unit has at least, if its shard has; one block of it is short
LEFT_OUT = ("empty", "unreadable", "contaminated")  # documents that a store does not have, by reason
RUN_CHARACTERS, RUN_RECORDS = 500_000, 1000  # that a worker encodes and sends together; either is enough
# Of the arrays of a view, which are files without a head.
DTYPES = {"segments": SEGMENT, "block_ends": np.dtype(np.int64), "labels": np.dtype(np.int8)}
# Of a token store for each byte of text, at the least: two a token, the longest of which have some 5 bytes.
STORE_BYTES = 0.4


# Of a run of records what was counted, and of each document its ids, sentence ends and the checksum of its text.
Encoded = tuple[Counter[str], list[tuple[np.ndarray, np.ndarray, int]]]
Record = str | UserError


@dataclass(frozen=True)
class RunEncoder:
    """Filters and encodes a run of records; sent to each worker process once."""

    name: str  # of the corpus
    encoder: DocumentEncoder
    decontaminator: Decontaminator
    max_unreadable: int

    def __call__(self, records: list[Record]) -> Encoded:
        documents = DocumentFilter(self.name, self.max_unreadable, self.decontaminator)
        texts = [text for text in records if documents.lets_through(text)]
        rows = [(ids, ends, text_checksum(text)) for text, (ids, ends) in zip(texts, self.encoder(texts), strict=True)]
        rows = [row for row in rows if len(row[0])]
        # A normalizer may leave nothing of a text.
        documents.counts["empty"] += len(texts) - len(rows)
        documents.counts["documents"] = len(rows)
        return documents.counts, rows


class Encoders:
    """Runs of records to tokens, several at a time, in their order.

    Whoever is free takes the next run: documents are of very different lengths, and there may be few in a shard.

    Args:
        encode_run: what is done.
        num_workers: processes to do it with; None: two threads of this one, so that while the tokenizer's own threads
            work on one run the sentences of another are found.
    """

    def __init__(self, encode_run: RunEncoder, num_workers: int | None) -> None:
        self.ahead = 2 * (num_workers or 1)
        if num_workers is None:
            self.encode, self.pool = encode_run, ThreadPoolExecutor(2)
        else:
            self.encode = encode_in_worker
            self.pool = ProcessPoolExecutor(num_workers, initializer=start_encoder, initargs=(encode_run,))
            self.pool.submit(os.getpid).result()  # has them forked now, before there are threads

    def run(self, times: int, function: Callable[[int], None]) -> None:
        """`function(0)`, `function(1)` and so on, all at once; what one of them raises ends the others too."""
        with ThreadPoolExecutor(times) as threads:
            futures = [threads.submit(function, number) for number in range(times)]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:
                self.pool.shutdown(cancel_futures=True)

    def map(self, runs: Iterator[list[Record]]) -> Iterator[Encoded]:
        """
        Raises:
            UserError: a worker process was killed.
        """
        pending: deque[Future] = deque()
        try:
            for run in runs:
                pending.append(self.pool.submit(self.encode, run))
                if len(pending) > self.ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a preprocessing worker was killed, as the system does when memory runs out; lower "
                "`preprocessing_num_workers` and start again: finished shards are kept"
            ) from error


def runs_of(records: Iterable[tuple[int, Record]]) -> Iterator[list[Record]]:
    """Records that follow each other, as many as have some hundred thousand characters."""
    run, size = [], 0
    for _, record in records:
        run.append(record)
        size += len(record) if isinstance(record, str) else 0
        if size >= RUN_CHARACTERS or len(run) >= RUN_RECORDS:
            yield run
            run, size = [], 0
    if run:
        yield run


def start_encoder(encode_run: RunEncoder) -> None:
    """Prepare a worker process; what it encodes with is kept there rather than sent with every run."""
    global worker_encoder
    worker_encoder = encode_run
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that it works for tells it
    start_worker()


def encode_in_worker(run: list[Record]) -> Encoded:
    return worker_encoder(run)


def start_worker(_: int = 0) -> None:
    """In a worker process: one thread, since the processes are the parallelism; and no end by the SIGTERM that
    launchers send to whole groups of processes, which is for the process that trains, but only by that process's own.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if sys.platform == "linux":  # others cannot tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=heed_parent, args=(os.getppid(),), daemon=True).start()


def heed_parent(parent: int) -> None:
    """End with the parent, which may have been killed, or when it says so."""
    while os.getppid() == parent:
        sent = signal.sigtimedwait({signal.SIGTERM}, 5)
        if sent and sent.si_pid == parent:
            break
        if sent:
            STOP_WAITING.set()
    os._exit(0)


def as_it_is(item: Any) -> Any:
    return item


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


def share(folder: Path, num_shards: int, process_index: int, is_done: Callable, make: Callable) -> None:
    """Have `make(shard)` done for every shard for which `is_done(shard)` is false, together with whoever else is at it.

    Args:
        folder: where the locks lie.
        process_index: where to begin, so that processes do not all begin with the same shard.
    """
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    busy = []
    for number in range(num_shards):
        shard = (number + process_index) % num_shards
        lock = FileLock(folder / "locks" / f"{shard:05d}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            busy.append(shard)
            continue
        try:
            if not is_done(shard):
                make(shard)
        finally:
            lock.release()
    for shard in busy:
        with FileLock(folder / "locks" / f"{shard:05d}"):
            if not is_done(shard):  # its maker has died
                make(shard)


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
                    2, lambda number: share(self.path, source.num_shards, process_index + number, self.is_done, make)
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
            free = shutil.disk_usage(existing(path)).free / 1e9
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
    free = shutil.disk_usage(existing(root)).free
    if needed > free:
        raise UserError(
            f"the token stores need about {needed / 1e9:.1f} GB in {root}, and {free / 1e9:.1f} GB are free; "
            "free some, set `token_store_dir` to a folder on another disk, or `streaming: true`"
        )


def reading_store(path: Path) -> AbstractContextManager[None]:
    return reading(
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


def map_array(path: Path, dtype: np.dtype) -> np.ndarray:
    """A mapped file as an array. (`np.memmap` keeps the file open, and there may be thousands.)"""
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.frombuffer(pa.memory_map(str(path)).read_buffer(), dtype)


def flatten(chunk: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """The values of a list array, not copied, and (rows + 1,) their offsets."""
    offsets = chunk.offsets.to_numpy()
    return chunk.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]], offsets - offsets[0]


def pack_unit(ids: pa.ListArray, ends: pa.ListArray, is_kept: np.ndarray, make: Callable[..., Packed]) -> Packed:
    """Pack the kept documents of a unit; starts of segments are in tokens of the whole unit."""
    _, id_offsets = flatten(ids)
    values, end_offsets = flatten(ends)
    lengths = np.diff(id_offsets).astype(np.int64)
    kept_lengths = lengths[is_kept]
    document_ends = np.cumsum(kept_lengths)
    sentences = np.diff(end_offsets)
    sentence_ends = values[np.repeat(is_kept, sentences)] + np.repeat(document_ends - kept_lengths, sentences[is_kept])
    packed = make(document_ends, sentence_ends)
    # Documents that are left out stand between others.
    shift = id_offsets[:-1][is_kept] - (document_ends - kept_lengths)
    document = np.searchsorted(document_ends, packed.segments["start"], side="right")
    packed.segments["start"] += shift[np.minimum(document, len(shift) - 1)]
    return packed


class PackedCorpus:
    """A token store seen as blocks of one format and length.

    Args:
        store: the encoded corpus, complete.
        block_format: of the view.
        copies: of each shard, which of its documents are left out as copies of others; None: none.
    """

    def __init__(self, store: TokenStore, block_format: BlockFormat, copies: list[np.ndarray] | None = None) -> None:
        self.store = store
        self.format = block_format
        self.copies = copies
        made_with: list[Any] = [BLOCKS_FORMAT]
        if block_format.packing in PAIR_PACKINGS:
            made_with += [block_format.pair_special_tokens, block_format.seed]
        made_with += [hashlib.sha256(np.concatenate(copies)).hexdigest()] if copies else []
        name = f"{block_format.packing}-{block_format.max_seq_length}"
        self.path = store.path / f"{name}-{digest(*made_with)[:8]}"

    def folder(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}"

    def build(self, process_index: int) -> None:
        """Make what is not there yet of the view, together with all processes that do the same; then open it."""
        num_shards = self.store.num_shards
        if not all(self.folder(shard).is_dir() for shard in range(num_shards)):
            with (
                naming_disk_errors(self.path),
                progress_bar(f"packing {self.store.corpus.name}", num_shards, "shards", process_index == 0) as bar,
            ):

                def make(shard: int) -> None:
                    self.pack_shard(shard)
                    bar.update()

                share(self.path, num_shards, process_index, lambda shard: self.folder(shard).is_dir(), make)
        self.copies = None  # are not needed any more, nor sent to workers
        self.open()

    def pack_shard(self, shard: int) -> None:
        table = open_arrow(self.store.arrow(shard))
        is_kept = ~self.copies[shard] if self.copies else np.ones(len(table), bool)
        units = [Packed(*(np.zeros(0, dtype) for dtype in DTYPES.values()))]
        tokens = documents = num_segments = 0
        for batch in table.to_batches():
            kept = is_kept[documents : documents + len(batch)]
            if kept.any():
                unit = pack_unit(batch["input_ids"], batch["sentence_ends"], kept, self.format.pack)
                unit.segments["start"] += tokens
                units.append(unit._replace(block_ends=unit.block_ends + num_segments))
                num_segments += len(unit.segments)
            documents += len(batch)
            tokens += len(flatten(batch["input_ids"])[0])
        packed = Packed(*map(np.concatenate, zip(*units, strict=True)))
        for leftover in self.path.glob(f".{self.folder(shard).name}.*"):  # of a killed process
            shutil.rmtree(leftover)
        temporary = self.path / f".{self.folder(shard).name}.{os.getpid()}"
        temporary.mkdir()
        for name, array in packed._asdict().items():
            array.astype(DTYPES[name], copy=False).tofile(temporary / f"{name}.bin")
            sync(temporary / f"{name}.bin")
        kept_tokens = int(packed.segments["length"].sum(dtype=np.int64))
        counts = {"documents": int(is_kept.sum()), "tokens": kept_tokens, "copies": int((~is_kept).sum())}
        write_json(temporary / "counts.json", counts)
        temporary.rename(self.folder(shard))

    def open(self) -> None:
        folders = [self.folder(shard) for shard in range(self.store.num_shards)]
        self.shards = [ShardBlocks(self.store.arrow(shard), folder) for shard, folder in enumerate(folders)]
        self.first_blocks = [0, *itertools.accumulate(len(shard.block_ends) for shard in self.shards)]
        self.counts: Counter[str] = Counter()
        for folder in folders:
            self.counts.update(read_json(folder / "counts.json"))
        stored = self.store.counts()
        self.left_out = {name: stored[name] for name in LEFT_OUT} | {"copies": self.counts["copies"]}

    def __getstate__(self) -> dict[str, Any]:
        # A worker process that is not forked opens the mapped files itself rather than being sent their contents.
        return {name: value for name, value in vars(self).items() if name != "shards"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.open()

    def __len__(self) -> int:
        return self.first_blocks[-1]

    def count_labels(self) -> Counter[int]:
        """How many blocks have which label."""
        labels, counts = np.unique(np.concatenate([shard.labels for shard in self.shards]), return_counts=True)
        return Counter(dict(zip(labels.tolist(), counts.tolist(), strict=True)))

    def block(self, number: int) -> Block:
        shard = bisect.bisect_right(self.first_blocks, number) - 1
        return self.format.assemble(*self.shards[shard].read(number - self.first_blocks[shard]))


class ShardBlocks:
    """The mapped tables of one shard."""

    def __init__(self, arrow: Path, folder: Path) -> None:
        batches = open_arrow(arrow).to_batches()
        self.units = [flatten(batch["input_ids"])[0] for batch in batches]
        self.unit_starts = [0, *itertools.accumulate(map(len, self.units))]
        self.segments, self.block_ends, self.labels = (
            map_array(folder / f"{name}.bin", dtype) for name, dtype in DTYPES.items()
        )

    def read(self, number: int) -> tuple[list[np.ndarray], np.ndarray, int]:
        """Ids of each segment of a block, which of them end a document, and the block's label."""
        first = int(self.block_ends[number - 1]) if number else 0
        segments = self.segments[first : int(self.block_ends[number])]
        starts, lengths = segments["start"].tolist(), segments["length"].tolist()
        unit = bisect.bisect_right(self.unit_starts, starts[0]) - 1
        base = self.unit_starts[unit]
        ids = [
            self.units[unit][start - base : start - base + length]
            for start, length in zip(starts, lengths, strict=True)
        ]
        return ids, segments["ends_document"], int(self.labels[number])
