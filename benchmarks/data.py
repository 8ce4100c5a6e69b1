"""The data path against the bare libraries on the same text, side by side in one run.

python benchmarks/data.py --tokenizer runs/tokenizer --corpora corpora/books corpora/wikipedia --output results.json

Sections (`--sections` takes some of them):

tokenise    text to token store and blocks, against `encode_batch` of the same tokenizer with the same threads
workers     the same with two worker processes against one, beside what two bare tokenizers make of the machine in the
            same rounds
load        masked batches from a store, against the stock way: `group_texts` blocks and the stock collator
stream      text to masked batches with nothing on disk, against `encode_batch`, both on one thread
memory      peak memory while streaming `--stream_megabytes` of text, and of one document of 100 MB in both modes
resume      time to the first update at block 10 and at block 5,000,000, and near the end of one large streamed shard
exact       runs killed at random moments and resumed until done, against an uninterrupted one
counts      documents and tokens of each corpus through both modes, against a plain pass over the files

Rates are in MB of text (UTF-8) or millions of tokens a second: medians of `--rounds`, in which both sides take turns,
and the median of the ratios, round by round.
"""

import argparse
import contextlib
import gzip
import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import harness
import numpy as np
import torch
from harness import in_child, resident_megabytes
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.base.errors import run_script
from recipe.data.batches import Rank, Resume
from recipe.data.cached import CachedData
from recipe.data.corpora import Part, open_source
from recipe.data.modes import open_data
from recipe.data.preprocessor import Preprocessor
from recipe.data.readers import read_lines
from recipe.data.sampling import BlockOrder
from recipe.data.streamed import StreamedData
from recipe.data.tokenizer import load_tokenizer
from testing.faults.storm import family, kill, start

ROOT = Path(__file__).parent.parent
LENGTH = 512


def settings(args: argparse.Namespace, **changes: Any) -> PretrainArguments:
    corpora = [CorpusArguments(name=Path(path).name, path=path) for path in args.corpora]
    given = {
        "output_dir": "unused",
        "corpora": corpora,
        "tokenizer_name": args.tokenizer,
        "max_seq_length": LENGTH,
        "eval_blocks": 0,
        "train_batch_size": 256,
        "per_device_train_batch_size": 32,
        "dataloader_num_workers": 0,
        "num_lanes": 8,
        "shuffle_buffer_size": 4096,
    }
    return PretrainArguments(**(given | changes))


def documents(args: argparse.Namespace) -> list[str]:
    """All documents of the corpora."""
    found = []
    for path in args.corpora:
        source = open_source(CorpusArguments(name="c", path=path))
        found += [text for shard in range(source.num_shards) for _, text in source.read(shard)]
    return found


def megabytes(texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def never() -> bool:
    """Nobody asks the process to stop."""
    return False


@contextlib.contextmanager
def tokenizer_threads(parallel: bool) -> Iterator[None]:
    os.environ["TOKENIZERS_PARALLELISM"] = str(parallel).lower()
    yield
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turn(rounds: int, sides: dict[str, Callable[[], float]], *pairs: tuple[str, str]) -> dict[str, Any]:
    """Median rate of each side, and of each pair the median ratio, round by round, and its range."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            rates[name].append(side())
    result: dict[str, Any] = {name: round(statistics.median(values), 3) for name, values in rates.items()}
    for over, under in pairs:
        ratios = [a / b for a, b in zip(rates[over], rates[under], strict=True)]
        result[f"{over} / {under}"] = round(statistics.median(ratios), 3)
        result[f"{over} / {under}, range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return result


def bare_rate(args: argparse.Namespace, texts: list[str], size: float, parallel: bool) -> float:
    """MB/s of `encode_batch` alone."""
    backend = load_tokenizer(args.tokenizer).backend_tokenizer
    with tokenizer_threads(parallel):
        batches = [texts[at : at + 100] for at in range(0, len(texts), 100)]
        return size / seconds(lambda: [backend.encode_batch(b, add_special_tokens=False) for b in batches])


def bare_processes_rate(args: argparse.Namespace, size: float, number: int) -> float:
    """MB/s of `encode_batch` on one thread in each of `number` processes that share the texts: the machine's limit."""
    texts = documents(args)
    with multiprocessing.get_context("fork").Pool(number) as pool:
        shares = [(args, texts[i::number], size / number, False) for i in range(number)]
        return number * statistics.harmonic_mean(pool.starmap(bare_rate, shares, chunksize=1))


def cached_data(args: PretrainArguments, tokenizer: PreTrainedTokenizerFast) -> CachedData:
    """Without a progress bar, which is the first process's."""
    return CachedData(args, Preprocessor(args, tokenizer), process_index=1)


def streamed_data(args: PretrainArguments, tokenizer: PreTrainedTokenizerFast) -> StreamedData:
    return StreamedData(args, Preprocessor(args, tokenizer))


def ours_rate(args: argparse.Namespace, size: float, parallel: bool, num_workers: int | None) -> float:
    """MB/s from files to a token store and its blocks."""
    tokenizer = load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder, tokenizer_threads(parallel):
        given = settings(args, token_store_dir=folder, preprocessing_num_workers=num_workers)
        preprocessor = Preprocessor(given, tokenizer)
        return size / seconds(lambda: open_data(given, preprocessor, process_index=1))


def workers_rate(args: argparse.Namespace, size: float, num_workers: int) -> float:
    """`ours_rate` in a fresh process, as a user's command has it."""
    multiprocessing.set_start_method("fork", force=True)  # as on Linux; a spawned process would have its own spawned
    return ours_rate(args, size, False, num_workers)


def tokenise(args: argparse.Namespace) -> dict[str, Any]:
    texts = documents(args)
    size = megabytes(texts)
    sides = {
        "encode_batch": lambda: bare_rate(args, texts, size, parallel=True),
        "ours": lambda: ours_rate(args, size, parallel=True, num_workers=None),
    }
    return {"megabytes": round(size, 1)} | in_turn(args.rounds, sides, ("ours", "encode_batch"))


def workers(args: argparse.Namespace) -> dict[str, Any]:
    size = megabytes(documents(args))
    sides = {
        "one": lambda: in_child(workers_rate, args, size, 1),
        "two": lambda: in_child(workers_rate, args, size, 2),
        "one encode_batch": lambda: in_child(bare_processes_rate, args, size, 1),
        "two encode_batch": lambda: in_child(bare_processes_rate, args, size, 2),
    }
    return in_turn(args.rounds, sides, ("two", "one"), ("two encode_batch", "one encode_batch"))


def load(args: argparse.Namespace) -> dict[str, Any]:
    tokenizer = load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        data = cached_data(settings(args, token_store_dir=folder, train_batch_size=2048), tokenizer)
        stock = stock_blocks(data, folder)
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)

        def ours(num_workers: int) -> float:
            data.args.dataloader_num_workers = num_workers
            updates = data.train_updates(Rank(), Resume(), 12, never)
            next(updates)
            started = time.perf_counter()
            tokens = sum(batch["input_ids"].numel() for share in updates for batch in share.micro_batches)
            return tokens / (time.perf_counter() - started) / 1e6

        def theirs(num_workers: int) -> float:
            batches = iter(DataLoader(stock, batch_size=32, shuffle=True, collate_fn=collator, num_workers=num_workers))
            next(batches)
            started = time.perf_counter()
            tokens = sum(batch["input_ids"].numel() for batch in itertools.islice(batches, 96))
            return tokens / (time.perf_counter() - started) / 1e6

        return {
            f"{workers} workers": in_turn(
                args.rounds,
                {"stock": lambda w=workers: theirs(w), "ours": lambda w=workers: ours(w)},
                ("ours", "stock"),
            )
            for workers in (0, 1)
        }


def stock_blocks(data: CachedData, folder: str) -> datasets.Dataset:
    """Blocks as run_mlm.py's `group_texts` leaves them: lists of ids in an Arrow table, cut at every 512."""
    ids = np.concatenate([unit for packed in data.packed for shard in packed.shards for unit in shard.units])
    ids = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)[:20_000]
    rows = {"input_ids": list(ids.astype(np.int32)), "attention_mask": list(np.ones(ids.shape, np.int8))}
    rows["special_tokens_mask"] = list(np.zeros(ids.shape, np.int8))
    datasets.Dataset.from_dict(rows).save_to_disk(f"{folder}/stock")
    return datasets.load_from_disk(f"{folder}/stock")


def stream(args: argparse.Namespace) -> dict[str, Any]:
    texts = documents(args)
    size = megabytes(texts)
    tokenizer = load_tokenizer(args.tokenizer)
    tokens = sum(len(e) for e in tokenizer.backend_tokenizer.encode_batch(texts[::7], add_special_tokens=False))
    bytes_per_token = megabytes(texts[::7]) * 1e6 / tokens

    def ours() -> float:
        """From one full buffer to the next, so that as much is read as is drawn."""
        data = streamed_data(settings(args, streaming=True), tokenizer)
        updates = data.train_updates(Rank(), Resume(), 100, never)
        next(updates)
        started, drawn = time.perf_counter(), 0
        for share in updates:
            drawn += int(share.counts.corpora[:, 1].sum()) - 2 * int(share.counts.corpora[:, 0].sum())
        return drawn * bytes_per_token / 1e6 / (time.perf_counter() - started)

    return in_turn(
        args.rounds,
        {"encode_batch": lambda: bare_rate(args, texts, size, parallel=False), "ours": ours},
        ("ours", "encode_batch"),
    )


def stream_curve(args: argparse.Namespace) -> list[tuple[float, float]]:
    """(MB of text, MB resident) on the way through `--stream_megabytes`."""
    data = streamed_data(settings(args, streaming=True), load_tokenizer(args.tokenizer))
    curve, drawn, step = [], 0.0, args.stream_megabytes / 20
    for share in data.train_updates(Rank(), Resume(), 10**9, never):
        drawn += int(share.counts.corpora[:, 1].sum()) * 4.3 / 1e6
        if drawn >= step * len(curve):
            curve.append((round(drawn), round(resident_megabytes())))
        if drawn >= args.stream_megabytes:
            return curve
    return curve


def long_document(args: argparse.Namespace, path: str, streaming: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        corpus = CorpusArguments(name="long", path=path)
        changes = {"streaming": True, "num_lanes": 1, "shuffle_buffer_size": 256} if streaming else {}
        given = settings(args, corpora=[corpus], token_store_dir=folder, **changes)
        before = resident_megabytes()
        data = open_data(given, Preprocessor(given, load_tokenizer(args.tokenizer)))
        share = next(data.train_updates(Rank(), Resume(), 1, never))
        tokens = share.lanes[0, 0].state.made * LENGTH if streaming else data.packed[0].counts["tokens"]
        peak = harness.peak_resident_megabytes()
        return {"peak_megabytes_beyond_start": round(peak - before), "tokens": tokens}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    texts = documents(args)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.jsonl"
        text = "\n\n".join(itertools.islice(itertools.cycle(texts), int(100 / megabytes(texts) * len(texts)) + 1))
        path.write_text(json.dumps({"text": text}) + "\n", "utf-8")
        long = {mode: in_child(long_document, args, str(path), mode == "streaming") for mode in ("cached", "streaming")}
        long["megabytes"] = round(path.stat().st_size / 1e6)
    curve = in_child(stream_curve, args)
    tail = [resident for _, resident in curve[len(curve) // 4 :]]
    return {
        "streaming": {"text_and_resident_megabytes": curve, "growth_after_a_quarter": tail[-1] - tail[0]},
        "one long document": long,
    }


def resume(args: argparse.Namespace) -> dict[str, Any]:
    tokenizer = load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        data = cached_data(settings(args, token_store_dir=folder), tokenizer)
        # As many blocks as five large corpora have, each standing for one that is there.
        sizes = [len(packed) for packed in data.packed]
        fabricated = BlockOrder([size * 1000 for size in sizes], [np.zeros(0, np.int64)] * len(sizes), None, seed=42)

        def located(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            corpora, visits, blocks = fabricated.locate(positions)
            return corpora, visits, blocks % np.array(sizes)[corpora]

        data.stretches[0].order.locate = located

        def first_update(block: int) -> float:
            update = block // data.args.train_batch_size
            return seconds(lambda: next(data.train_updates(Rank(), Resume(update), update + 1, never)))

        first_update(0)
        cached = in_turn(
            max(9, args.rounds),
            {"block 10": lambda: first_update(10), "block 5,000,000": lambda: first_update(5_000_000)},
            ("block 5,000,000", "block 10"),
        )
        texts = documents(args)
        path = Path(folder) / "large.jsonl.gz"
        count = 0
        with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as file:
            for text in itertools.islice(itertools.cycle(texts), 3 * len(texts)):
                file.write(json.dumps({"text": text}) + "\n")
                count += 1
        source = open_source(CorpusArguments(name="large", path=str(path)))
        streamed = {
            name: round(statistics.median(seconds(lambda f=first: next(source.read(0, f))) for _ in range(3)), 3)
            for name, first in (("first record", 0), ("last record", count - 1))
        }
        streamed |= {"megabytes of text": round(3 * megabytes(texts)), "records": count}
        streamed["megabytes on disk"] = round(path.stat().st_size / 1e6, 1)  # the bound that the log prints
    return {"cached, seconds to the first update": cached, "streaming, seconds to a record of one shard": streamed}


def exact(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs of pretrain.py, killed until done, and the digest of all their blocks and masks."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "corpora": json.dumps([{"name": Path(path).name, "path": path} for path in args.corpora]),
            "tokenizer_name": args.tokenizer,
            "token_store_dir": f"{folder}/stores",
            "model_config": '{"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 1, '
            '"intermediate_size": 16}',
            "max_seq_length": 64,
            "eval_blocks": 8,
            "train_batch_size": 16,
            "per_device_train_batch_size": 8,
            "max_steps": 60,
            "warmup_steps": 1,
            "logging_steps": 1,
            "save_steps": 3,
            "num_lanes": 4,
            "shuffle_buffer_size": 128,
            "resume_from_checkpoint": "latest",
        }
        for streaming, workers in itertools.product((False, True), (0, 2)):
            flags = given | {"streaming": str(streaming).lower(), "dataloader_num_workers": workers}
            name = f"{'streaming' if streaming else 'cached'}, {workers} workers"
            whole, _ = run_until_done(flags | {"output_dir": f"{folder}/{name}/whole"}, [1], kills=0)
            for processes, kills in (([1], args.kills), ([2, 1, 2], 2)):
                output = f"{folder}/{name}/{processes}"
                killed, done = run_until_done(flags | {"output_dir": output}, processes, kills)
                line = {"mode": name, "processes": processes, "killed": done, "updates": len(whole)}
                line["same_updates"] = sum(a == b for a, b in zip(whole, killed, strict=True))
                print(json.dumps(line), flush=True)
                results.append(line)
    return results


def run_until_done(flags: dict[str, Any], processes: list[int], kills: int) -> tuple[list[str], int]:
    """Start, kill at a random moment, start again, with each number of processes in turn, at last to the end.

    Returns:
        the digest after each update, and how often the run was killed.
    """
    rng = random.Random(f"{flags['streaming']}{flags['dataloader_num_workers']}{processes}")
    output = Path(flags["output_dir"])
    log = output.with_name(f"{output.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    done, ready = 0, 0
    for number in itertools.count():
        process = start(flags, processes[number % len(processes)], dict(os.environ), log)
        if done < kills:
            # A moment after it has begun to train, or in the middle of preparing.
            began = ready
            while process.poll() is None and rng.random() > 0.02 and count_lines(output) <= began:
                time.sleep(0.1)
            time.sleep(rng.random() * 0.8)
            members = family(process)
            kill(members)
            done += bool(members)
            process.wait()
            ready = count_lines(output)
        elif process.wait():
            raise RuntimeError(log.read_text("utf-8")[-3000:])
        status = output / "status.json"
        if status.exists() and json.loads(status.read_text("utf-8"))["state"] == "complete":
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
            return [line["data_digest"] for line in lines if "data_digest" in line], done
    raise AssertionError


def count_lines(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return len(metrics.read_text("utf-8").splitlines()) if metrics.exists() else 0


def counts(args: argparse.Namespace) -> dict[str, Any]:
    """Documents and tokens of each corpus: a plain pass, the store, and one pass of all lanes of a stream."""
    tokenizer = load_tokenizer(args.tokenizer)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        cached = cached_data(settings(args, token_store_dir=folder), tokenizer)
        streamed = streamed_data(settings(args, streaming=True), tokenizer)
        for number, path in enumerate(args.corpora):
            files = [Path(path)] if Path(path).is_file() else sorted(Path(path).glob("*.jsonl.gz"))
            texts = [json.loads(line)["text"] for file in files for line in read_lines(str(file), 0)]
            texts = [text for text in texts if text.strip()]
            plain = sum(len(e) for e in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
            lanes = [one_pass(streamed, number, lane) for lane in range(streamed.args.num_lanes)]
            results[Path(path).name] = {
                "plain": [len(texts), plain],
                "cached": [cached.packed[number].counts[name] for name in ("documents", "tokens")],
                "streaming": [sum(column) for column in zip(*lanes, strict=True)],
            }
    return results


def one_pass(data: StreamedData, corpus: int, lane: int) -> list[int]:
    """Documents and tokens that a lane reads in its first pass."""
    reader, found = data.readers[corpus], [0, 0]
    for shard, *part in data.schedule.order.deal(corpus, 0, lane, reader.source.num_shards):
        texts = [text for _, text in reader.source.read(shard, 0, Part(*part)) if text.strip()]
        for ids, _ in reader.encoder(texts):
            found = [found[0] + 1, found[1] + len(ids)]
    return found


SECTIONS = {f.__name__: f for f in (tokenise, workers, load, stream, memory, resume, exact, counts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--corpora", nargs="+", required=True)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=5, help="of each of the four ways that `exact` runs")
    parser.add_argument("--stream_megabytes", type=float, default=1000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.tokenizer, *args.corpora = harness.resolve([args.tokenizer, *args.corpora])
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
    report: dict[str, Any] = harness.header(args.corpora)
    if args.output and args.output.exists():
        report = json.loads(args.output.read_text("utf-8"))
    torch.set_num_threads(1)
    for name in args.sections:
        report[name] = SECTIONS[name](args)
        print(harness.to_json({name: report[name]}), flush=True)
        if args.output:
            args.output.write_text(harness.to_json(report) + "\n", "utf-8")
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


if __name__ == "__main__":
    run_script(main)
