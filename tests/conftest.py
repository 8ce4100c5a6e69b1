"""Shared fixtures: a small corpus, a small tokenizer, and a run of pretrain.py."""

import os
import tempfile

# Before `datasets` is imported: a cache of our own, and no waiting for a hub that is not there.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="recipe-test-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: several threads only slow such small models down

import importlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers import PreTrainedTokenizerFast

from recipe.model import build_config, build_model
from recipe.tokenizer import load_tokenizer, save_tokenizer, train_byte_level_bpe, train_unigram, train_wordpiece

ROOT = Path(__file__).parent.parent
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
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(autouse=True)
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that fails in a test is not tried again for minutes."""
    monkeypatch.setattr("recipe.corpora.RETRY_SECONDS", ())


@pytest.fixture(scope="session")
def texts() -> list[str]:
    rng = random.Random(0)
    return [make_text(rng, rng.randint(1, 40)) for _ in range(120)]


@pytest.fixture(scope="session")
def corpus_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "text.jsonl", texts)


@pytest.fixture(scope="session")
def tokenizer_dir(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = train_byte_level_bpe([texts], 400, 2, add_prefix_space=False, max_document_characters=10_000)
    save_tokenizer(trained, folder, add_prefix_space=False, model_max_length=64)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(tokenizer_dir))


@pytest.fixture(scope="session")
def tokenizer_dirs(texts: list[str], tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tokenizer of each model type."""
    folders = {"roberta": tokenizer_dir, "bert": tmp_path_factory.mktemp("bert")}
    wordpiece = train_wordpiece([texts], 300, 2, do_lower_case=True, max_document_characters=10_000)
    save_tokenizer(wordpiece, folders["bert"], False, model_max_length=64, do_lower_case=True)
    folders["albert"] = tmp_path_factory.mktemp("albert")
    unigram = train_unigram([texts], 200, do_lower_case=False, max_document_characters=10_000)
    save_tokenizer(unigram, folders["albert"], False, model_max_length=64)
    return folders


SMALL_MODEL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def flags(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> dict[str, object]:
    """Flags of a small run into `tmp_path / "run"`."""
    return {
        "output_dir": tmp_path / "run",
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


@pytest.fixture
def echo_flags(flags: dict[str, object], tmp_path: Path) -> dict[str, object]:
    """Text whose sentences repeat one word: easy for a model that attends, hopeless for one that does not."""
    rng = random.Random(1)
    words = ["the", "was", "with", "they", "not", "had", "she", "be"]
    texts = [" ".join([rng.choice(words)] * 6).capitalize() + "." for _ in range(2000)]
    path = write_jsonl(tmp_path / "echo.jsonl", texts)
    return flags | {
        "corpora": json.dumps([{"name": "echo", "path": str(path)}]),
        "max_seq_length": 10,
        "train_batch_size": 64,
        "per_device_train_batch_size": 64,
        "max_steps": 150,
        "learning_rate": 1e-2,
        "warmup_steps": 10,
        "eval_steps": 1000,
        "save_steps": 1000,
        "eval_blocks": 64,
    }


def command_line(flags: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_in_process(monkeypatch: pytest.MonkeyPatch, script: str) -> Iterator[Callable[[dict[str, object]], None]]:
    """A function that runs a script's `main` in this process, on the CPU, as its command line would."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(flags: dict[str, object]) -> None:
        reset_accelerate()
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *command_line(flags)])
        importlib.import_module(script).main()
        reset_accelerate()

    yield run
    reset_accelerate()


@pytest.fixture
def run_pretrain(monkeypatch: pytest.MonkeyPatch):
    yield from run_in_process(monkeypatch, "pretrain")


@pytest.fixture
def run_glue(monkeypatch: pytest.MonkeyPatch):
    yield from run_in_process(monkeypatch, "finetune_glue")


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()
    yield Accelerator()
    reset_accelerate()


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
    return [json.loads(line) for line in path.read_text().splitlines()]


def learning(path: Path) -> list[dict]:
    """metrics.jsonl without what the machine decides."""
    timed = {"tokens_per_second", "mfu", "peak_memory", "data_wait_share", "seconds_per_update"}
    return [{name: value for name, value in line.items() if name not in timed} for line in read_lines(path)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="session")
def small_model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained masked language model and its tokenizer, as pretrain.py exports them."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    build_model(build_config(SMALL_MODEL, None, tokenizer, 64), None).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
