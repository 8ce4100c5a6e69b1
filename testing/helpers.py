"""What tests, benchmarks and the fault tools share: paths, small inputs, and reading what a run leaves.

Import this first: it sets the environment that the libraries read when they are imported.
"""

import os
import tempfile

# Before `datasets` is imported: a cache of our own, and no waiting for a hub that is not there.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="recipe-test-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: several threads only slow such small models down

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

ROOT = Path(__file__).parent.parent
# Of processes that tests start: what was there before stays, since packages may lie beside the interpreter's own.
PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


SAMPLE = ROOT / "sample_data"


def make_text(rng: random.Random, sentences: int) -> str:
    words = "the of a to and in that was he it his is with as had for she not at but be on they".split()  # noqa: SIM905
    names = [f"{a}{b}" for a in ("bel", "mor", "tan", "ri") for b in ("da", "ko", "lin", "su", "ve")]
    out = []
    for _ in range(sentences):
        sentence = " ".join(rng.choice(words + names) for _ in range(rng.randint(3, 14)))
        out.append(sentence.capitalize() + rng.choice(".?!"))
    return " ".join(out)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


SMALL_MODEL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


def command_line(flags: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Evil:
    """Whoever unpickles one runs code, which leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable, tuple[str, str]]:
        return open, (str(self.file), "w")


def never() -> bool:
    """Nobody asks the process to stop."""
    return False


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def learning(path: Path) -> list[dict]:
    """metrics.jsonl without what the machine decides, or where the run was resumed."""
    timed = {"resumed_from", "tokens_per_second", "mfu", "peak_memory", "data_wait_share"}
    timed |= {"seconds_to_first_update", "seconds_per_update", "train_seconds"}
    return [{name: value for name, value in line.items() if name not in timed} for line in read_lines(path)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


# What a test waits for another process: ten times what the slowest takes on a quiet machine, or more.
PATIENCE_SECONDS = 600


def small_flags(output_dir: Path, corpus_file: Path, tokenizer_dir: Path) -> dict[str, object]:
    return {
        "output_dir": output_dir,
        "corpora": json.dumps([{"name": "sample", "path": str(corpus_file)}]),
        "tokenizer_name": tokenizer_dir,
        "model_config": json.dumps(SMALL_MODEL),
        "max_seq_length": 32,
        "eval_blocks": 10,
        "train_batch_size": 8,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "dataloader_num_workers": 0,
        "learning_rate": 1e-3,
        "max_steps": 6,
        "warmup_steps": 2,
        "logging_steps": 2,
        "eval_steps": 3,
        "save_steps": 3,
    }


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def wait_for_training(run: Path) -> None:
    """Wait until a run has logged an update, beyond the evaluation before the first one."""
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"tokens_per_second"' in metrics.read_text("utf-8"))
