"""What it costs to compare token stores with their checksums: while training runs, and at each block.

python benchmarks/verification.py --output benchmarks/results/verification.json

checksum    seconds for a file of `--megabytes`, in memory and, as far as the system lets go of it, from the disk
training    updates a second of a small model without and with the comparison beside it, in turn, on all cores and on
            all but one
block       microseconds to read a block, and what of that is the check of sizes, bounds and ids
opening     milliseconds to open one shard of a store and its view
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from harness import header, to_json
from transformers import RobertaConfig, RobertaForMaskedLM

from recipe.arguments import CorpusArguments
from recipe.base.hashing import file_checksum
from recipe.data import corpora
from recipe.data.document_encoder import DocumentEncoder
from recipe.data.hygiene import Decontaminator
from recipe.data.integrity import StoredFile, Verification, note_file
from recipe.data.packed_corpus import PackedCorpus, ShardBlocks
from recipe.data.packing import BlockFormat
from recipe.data.token_store import TokenStore
from recipe.data.tokenizer import load_tokenizer
from recipe.data.trainers import save_tokenizer, train_byte_level_bpe
from testing.helpers import make_text, write_jsonl

STORE_GIGABYTES = 0.6 * 160  # of 160 GB of text


def seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def write_file(path: Path, megabytes: int) -> StoredFile:
    piece = np.random.default_rng(0).bytes(1_000_000)
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(piece)
        os.fsync(file.fileno())
    return StoredFile.of_note(path, note_file(path))


def drop_from_memory(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def checksum(file: StoredFile, rounds: int) -> dict[str, Any]:
    taken: dict[str, list[float]] = {"in memory": [], "from the disk": []}
    for _ in range(rounds):
        taken["in memory"].append(seconds(lambda: file_checksum(file.path)))
        drop_from_memory(file.path)
        taken["from the disk"].append(seconds(lambda: file_checksum(file.path)))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    hours = {name: value / file.size * 1e9 * STORE_GIGABYTES / 3600 for name, value in medians.items()}
    return {"bytes": file.size, "median_seconds": medians, "hours_for_160_gb_of_text": hours, "seconds": taken}


def updates_per_second(file: StoredFile | None, seconds_measured: float = 3) -> float:
    """Of a small model; with a file, while that is compared again and again."""
    torch.manual_seed(0)
    model = RobertaForMaskedLM(
        RobertaConfig(vocab_size=1000, num_hidden_layers=4, hidden_size=128, num_attention_heads=4)
    )
    ids = torch.randint(5, 1000, (8, 128))
    model(ids, labels=ids).loss.backward()
    verification = Verification([file] * 100 if file else [])
    verification.is_reported = True
    with verification.running():
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < seconds_measured:
            model(ids, labels=ids).loss.backward()
            done += 1
        return done / (time.perf_counter() - started)


def training(file: StoredFile, rounds: int) -> dict[str, Any]:
    results = {}
    cores = len(os.sched_getaffinity(0))
    for threads in sorted({cores, max(1, cores - 1)}):
        torch.set_num_threads(threads)
        rates: dict[str, list[float]] = {"without": [], "with": []}
        for _ in range(rounds):
            rates["without"].append(updates_per_second(None))
            rates["with"].append(updates_per_second(file))
        ratios = [b / a for a, b in zip(rates["without"], rates["with"], strict=True)]
        results[f"{threads} of {cores} cores"] = {
            "median_ratio": statistics.median(ratios),
            "updates_per_second": rates,
        }
    return results


def build_view(folder: Path) -> PackedCorpus:
    """Some hundred shards of text without meaning."""
    rng = random.Random(0)
    texts = [make_text(rng, rng.randint(1, 200)) for _ in range(2000)]
    (folder / "text").mkdir()
    for number in range(200):
        write_jsonl(folder / "text" / f"{number:03}.jsonl", texts[number * 10 : number * 10 + 10])
    trained = train_byte_level_bpe([texts], 1000, 2, add_prefix_space=False, max_document_characters=10_000)
    save_tokenizer(trained, folder / "tokenizer", add_prefix_space=False, model_max_length=512)
    encoder = DocumentEncoder(load_tokenizer(str(folder / "tokenizer")), "newline", "en")
    corpus = CorpusArguments(name="c", path=str(folder / "text"))
    with mock.patch.object(corpora, "SHARD_BYTES", 1):
        store = TokenStore(corpus, encoder, Decontaminator([]), folder / "stores")
        store.build(0, None, 0)
    packed = PackedCorpus(store, BlockFormat("full_sentences", 512, 0, 2, pair_special_tokens=4, seed=1))
    packed.build(0)
    return packed


def block(packed: PackedCorpus, rounds: int) -> dict[str, Any]:
    numbers = np.random.default_rng(0).permutation(len(packed)).tolist()

    def unchecked(blocks: ShardBlocks, number: int) -> np.ndarray:
        return blocks.segments[int(blocks.block_ends[number - 1]) if number else 0 : int(blocks.block_ends[number])]

    taken: dict[str, list[float]] = {"unchecked": [], "checked": []}
    for _ in range(rounds):
        with (
            mock.patch.object(ShardBlocks, "segments_of", unchecked),
            mock.patch.object(PackedCorpus, "checked", lambda self, block, shard: block),
        ):
            taken["unchecked"].append(seconds(lambda: [packed.block(number) for number in numbers]))
        taken["checked"].append(seconds(lambda: [packed.block(number) for number in numbers]))
    return {name: statistics.median(values) / len(numbers) * 1e6 for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = write_file(Path(folder) / "store", args.megabytes)
        report = header([]) | {"checksum": checksum(file, args.rounds), "training": training(file, args.rounds)}
        packed = build_view(Path(folder))
        report["block, microseconds"] = block(packed, args.rounds)
        opened = statistics.median(seconds(packed.open) for _ in range(args.rounds))
        report["opening a shard, milliseconds"] = opened / len(packed.shards) * 1e3
    print(to_json(report))
    if args.output:
        args.output.write_text(to_json(report) + "\n", "utf-8")


if __name__ == "__main__":
    main()
