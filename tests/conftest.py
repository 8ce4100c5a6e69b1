"""Shared fixtures: a small corpus, a small tokenizer, and a run of pretrain.py."""

# First: it sets the environment that the libraries read.
from testing.helpers import SMALL_MODEL, command_line, make_text, reset_accelerate, small_flags, write_jsonl

# isort: split
import importlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerFast

from recipe.data.tokenizer import load_tokenizer
from recipe.data.trainers import save_tokenizer, train_byte_level_bpe, train_unigram, train_wordpiece
from recipe.modeling.model import build_config, build_model


@pytest.fixture(autouse=True)
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that fails in a test is not tried again for minutes."""
    monkeypatch.setattr("recipe.data.corpora.RETRY_SECONDS", ())


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
    folders["roberta-prelayernorm"] = tokenizer_dir
    folders["albert"] = tmp_path_factory.mktemp("albert")
    unigram = train_unigram([texts], 200, do_lower_case=False, max_document_characters=10_000)
    save_tokenizer(unigram, folders["albert"], False, model_max_length=64)
    return folders


@pytest.fixture(scope="session")
def common_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of a session have in common."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture
def flags(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> dict[str, object]:
    """Flags of a small run into `tmp_path / "run"`."""
    return small_flags(tmp_path / "run", corpus_file, tokenizer_dir)


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


@pytest.fixture(scope="session")
def finished_run_of_session(corpus_file: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `flags`, made once; tests take a copy of it, `finished_run`."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        for pretrain in run_in_process(monkeypatch, "pretrain"):
            pretrain(small_flags(run, corpus_file, tokenizer_dir))
    return run


@pytest.fixture
def finished_run(finished_run_of_session: Path, tmp_path: Path) -> Path:
    """The run of `flags`, finished, in `tmp_path / "run"`: as if `run_pretrain(flags)` had been called."""
    return Path(shutil.copytree(finished_run_of_session, tmp_path / "run"))


@pytest.fixture
def run_glue(monkeypatch: pytest.MonkeyPatch):
    yield from run_in_process(monkeypatch, "finetune_glue")


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()
    yield Accelerator()
    reset_accelerate()


@pytest.fixture(scope="session")
def small_model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained masked language model and its tokenizer, as pretrain.py exports them."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    build_model(build_config(SMALL_MODEL, None, tokenizer, 64), None).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
