"""Encode runs of documents, several at a time, in threads of this process or in worker processes."""

import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from recipe.base.errors import UserError
from recipe.base.workers import start_worker, starting_workers
from recipe.data.corpora import Record, group_by_size
from recipe.data.document_encoder import DocumentEncoder
from recipe.data.hygiene import Decontaminator, DocumentFilter, text_checksum

RUN_CHARACTERS = 500_000  # that a worker encodes and sends together
RECORD_CHARACTERS = 500  # that each record of a run counts in addition to its own

EncodedDocument = tuple[np.ndarray, np.ndarray, int]  # its ids, sentence ends and the checksum of its text
Encoded = tuple[Counter[str], list[EncodedDocument]]  # a run of records: what was counted, and the documents


@dataclass(frozen=True)
class RunEncoder:
    """A function that filters and encodes runs of records; sent to each worker process once."""

    name: str  # of the corpus
    encoder: DocumentEncoder
    decontaminator: Decontaminator
    max_unreadable: int

    def __call__(self, records: list[Record]) -> Encoded:
        """Filter and encode a run of records."""
        documents = DocumentFilter(self.name, self.max_unreadable, self.decontaminator)
        texts = [text for text in records if documents.accepts(text)]
        rows = [(ids, ends, text_checksum(text)) for text, (ids, ends) in zip(texts, self.encoder(texts), strict=True)]
        rows = [row for row in rows if len(row[0])]
        # A normalizer may leave nothing of a text.
        documents.counts["empty"] += len(texts) - len(rows)
        documents.counts["documents"] = len(rows)
        documents.counts["unknown"] = sum(self.encoder.count_unknown(ids) for ids, _, _ in rows)
        documents.counts["text_bytes"] = sum(len(text.encode()) for text in records if isinstance(text, str))
        return documents.counts, rows


class Encoders:
    """A pool that turns runs of records into tokens, several at a time, in their order.

    Whoever is free takes the next run: documents are of very different lengths, and there may be few in a shard. With
    `num_workers` None, two threads of this process do it: while the tokenizer's own threads work on one run, the
    sentences of another are found.
    """

    def __init__(self, encode_run: RunEncoder, num_workers: int | None) -> None:
        self.ahead = 2 * (num_workers or 1)
        self.ending = threading.Event()  # set when a function of `run` has failed, or it was interrupted
        self.encode: Callable[[list[Record]], Encoded] = encode_run
        self.pool: Executor
        if num_workers is None:
            self.pool = ThreadPoolExecutor(2)
        else:
            self.encode = encode_in_worker
            with starting_workers("preprocessing_num_workers"):
                self.pool = ProcessPoolExecutor(num_workers, initializer=start_encoder, initargs=(encode_run,))
                self.pool.submit(os.getpid).result()  # has them forked now, before there are threads

    def run(self, times: int, function: Callable[[int], None]) -> None:
        """Call `function(0)`, `function(1)` and so on, all at once; an error in one of them ends the others too."""
        with ThreadPoolExecutor(times) as threads:
            futures = [threads.submit(function, number) for number in range(times)]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:
                self.ending.set()
                self.pool.shutdown(cancel_futures=True)

    def map(self, runs: Iterator[list[Record]]) -> Iterator[Encoded]:
        """Encode runs, and yield them in their order; raise a `UserError` if a worker process was killed."""
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
    """Group records that follow each other until they have some hundred thousand characters."""
    return group_by_size(
        (record for _, record in records),
        lambda record: RECORD_CHARACTERS + (len(record) if isinstance(record, str) else 0),
        RUN_CHARACTERS,
    )


def start_encoder(encode_run: RunEncoder) -> None:
    """Prepare a worker process, which keeps what it encodes with rather than being sent it with every run."""
    global worker_encoder
    worker_encoder = encode_run
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too, but its parent is who ends it
    start_worker()


worker_encoder: RunEncoder  # of a worker process


def encode_in_worker(run: list[Record]) -> Encoded:
    """Encode a run with what this worker process was prepared with."""
    return worker_encoder(run)
