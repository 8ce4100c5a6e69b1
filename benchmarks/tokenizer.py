"""Time and memory of train_tokenizer.py against the bare `tokenizers` trainer on the same files, side by side.

python benchmarks/tokenizer.py --files 'corpus/*.jsonl.gz' --rounds 5

Every round runs both in turn, each in a process of its own. `training_seconds` is reading and training,
`script_seconds` adds our checks and saving, `process_seconds` the imports too. `training_mib` is what training adds to
the process's peak memory, `process_mib` the peak: ours has torch and datasets loaded, whatever the size of the text.
The median of the ratios, round by round, is what counts.
"""

import argparse
import datetime
import glob
import gzip
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent


def train_bare(files: list[str], output: str) -> None:
    """What a user would write without us: stream the files into the trainer and save."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    def texts():
        for file in files:
            with (gzip.open if file.endswith(".gz") else open)(file, "rt", encoding="utf-8") as lines:
                for line in lines:
                    yield json.loads(line)["text"]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=50264,
        min_frequency=2,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    before, started = peak_mib(), time.perf_counter()
    tokenizer.train_from_iterator(texts(), trainer)
    seconds, mib = time.perf_counter() - started, peak_mib() - before
    tokenizer.save(output)
    report(training_seconds=seconds, training_mib=mib, script_seconds=time.perf_counter() - started)


def train_ours(files: list[str], output: str) -> None:
    sys.path.insert(0, str(ROOT))
    import train_tokenizer
    from recipe.data import vocabulary

    train = vocabulary.train_byte_level_bpe
    measured = {}

    def train_measured(*arguments, **options):
        before, started = peak_mib(), time.perf_counter()
        result = train(*arguments, **options)
        measured.update(training_seconds=time.perf_counter() - started, training_mib=peak_mib() - before)
        return result

    vocabulary.train_byte_level_bpe = train_measured
    corpora = [{"name": f"part{number}", "path": file} for number, file in enumerate(files)]
    sys.argv = ["train_tokenizer.py", f"--corpora={json.dumps(corpora)}", f"--output_dir={output}"]
    started = time.perf_counter()
    train_tokenizer.main()
    report(**measured, script_seconds=time.perf_counter() - started)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def report(**figures: float) -> None:
    print("RESULT " + json.dumps(figures | {"process_mib": peak_mib()}))


def measure(side: str, files: list[str]) -> dict[str, float]:
    folder = tempfile.mkdtemp()
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, __file__, "--side", side, "--output", f"{folder}/out", "--files", *files],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT "))
    return {"process_seconds": seconds} | json.loads(line.removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=["bare", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    args = parser.parse_args()
    files = sorted(file for pattern in args.files for file in glob.glob(pattern))
    if args.side == "ours":
        return train_ours(files, args.output)
    if args.side == "bare":
        return train_bare(files, args.output)

    rounds = []
    for number in range(args.rounds):
        rounds.append({side: measure(side, files) for side in ("bare", "ours")})
        print(f"round {number + 1}: {rounds[-1]}", flush=True)
    ratios = {name: statistics.median(r["ours"][name] / r["bare"][name] for r in rounds) for name in rounds[0]["ours"]}
    print("ours / bare, median:", {name: round(ratio, 3) for name, ratio in ratios.items()})
    result = {
        "command": f"python benchmarks/tokenizer.py --files ... ({len(files)} files) --rounds {args.rounds}",
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "datasets")},
        "compressed_bytes": sum(os.path.getsize(file) for file in files),
        "median_ratio_ours_to_bare": ratios,
        "rounds": rounds,
    }
    (ROOT / "benchmarks" / "results" / "tokenizer.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return None


if __name__ == "__main__":
    main()
