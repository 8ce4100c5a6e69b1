"""BERT, ALBERT and RoBERTa with a pair objective, from the command line to plain checkpoints."""

import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    pipeline,
)

from tests.conftest import SMALL_MODEL, read_lines, write_jsonl
from tests.test_pretrain import assert_same_run

ROBERTA = {"model_type": "roberta", "objective": "next_sentence", "packing": "segment_pair"}
BERT = {"model_type": "bert", "objective": "next_sentence", "packing": "sentence_pair", "masking": "static"}
ALBERT = {"model_type": "albert", "objective": "sentence_order", "packing": "sentence_order"}
SYSTEMS = {"roberta": ROBERTA, "bert": BERT, "albert": ALBERT}
SIZES = {"roberta": SMALL_MODEL, "bert": SMALL_MODEL, "albert": SMALL_MODEL | {"embedding_size": 16}}
CLASSES = {
    "roberta": [AutoModelForMaskedLM],
    "bert": [AutoModelForPreTraining, AutoModelForMaskedLM, AutoModelForNextSentencePrediction],
    "albert": [AutoModelForPreTraining, AutoModelForMaskedLM],
}
# What a class does without of a checkpoint that holds more.
PAIR_WEIGHTS = ("bert.pooler.", "cls.seq_relationship.", "albert.pooler.", "sop_classifier.")
LM_WEIGHTS = ("cls.predictions.",)


def flags_of(flags: dict[str, object], system: str) -> dict[str, object]:
    return flags | SYSTEMS[system] | {"model_config": json.dumps(SIZES[system])}


@pytest.mark.parametrize("system", SYSTEMS)
def test_run_goes_on_and_leaves_a_plain_model(flags, run_pretrain, tmp_path: Path, system: str):
    flags = flags_of(flags, system)
    run_pretrain(flags)
    stopped = flags | {"output_dir": tmp_path / "stopped", "resume_from_checkpoint": "latest"}
    run_pretrain(stopped)
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000006")
    run_pretrain(stopped)
    assert_same_run(tmp_path / "run", tmp_path / "stopped")

    name = flags["objective"]
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all(0 < line[f"{name}_loss"] < 1 for line in records if "loss" in line)
    assert all(0 < line[f"eval_{name}_accuracy"] < 1 for line in records if "eval_loss" in line)

    model = tmp_path / "run" / "model"
    assert AutoConfig.from_pretrained(model).model_type == system
    for loader in CLASSES[system]:
        _, loading = loader.from_pretrained(model, output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["mismatched_keys"]
        is_whole = loader is AutoModelForPreTraining or system == "roberta"
        left_out = () if is_whole else (LM_WEIGHTS if loader is AutoModelForNextSentencePrediction else PAIR_WEIGHTS)
        assert all(key.startswith(left_out) for key in loading["unexpected_keys"])
    assert len(pipeline("fill-mask", model=str(model))("He<mask> it.")) == 5
    _, loading = AutoModelForSequenceClassification.from_pretrained(model, output_loading_info=True)
    assert all(key.startswith("classifier") for key in loading["missing_keys"])


@pytest.mark.parametrize("model_type", ["bert", "albert"])
def test_masked_lm_alone_leaves_a_plain_model_too(flags, run_pretrain, tmp_path: Path, model_type: str):
    run_pretrain(flags | {"model_type": model_type, "model_config": json.dumps(SIZES[model_type])})
    _, loading = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_pair_head_of_roberta_is_in_the_checkpoint(flags, run_pretrain, tmp_path: Path):
    """A resume that began with a new one would go another way."""
    import torch

    run_pretrain(flags_of(flags, "roberta"))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000006"
    beside = torch.load(checkpoint / "optimizer.pt", weights_only=True)["beside_model"]
    assert len(beside) == 4
    _, loading = AutoModelForMaskedLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys"))


@pytest.fixture
def pair_flags(flags: dict[str, object], tmp_path: Path) -> dict[str, object]:
    """Documents of two sentences that both repeat one word of the document's, the second in lower case."""
    rng = random.Random(1)
    words = ["the", "was", "with", "they", "not", "had", "she", "be"]
    themes = [rng.choice(words) for _ in range(3000)]
    texts = [f"{' '.join([word] * 3).upper()}.\n{' '.join([word] * 3)}." for word in themes]
    path = write_jsonl(tmp_path / "pairs.jsonl", texts)
    return flags | {
        "corpora": json.dumps([{"name": "pairs", "path": str(path)}]),
        "sentence_splitter": "newline",
        "max_seq_length": 40,
        "train_batch_size": 64,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 64,
        "max_steps": 250,
        "learning_rate": 3e-3,
        "warmup_steps": 20,
        "eval_steps": 1000,
        "save_steps": 1000,
        "eval_blocks": 256,
    }


@pytest.mark.parametrize("system", SYSTEMS)
def test_pairs_are_told_apart_better_than_by_chance(pair_flags, run_pretrain, tmp_path: Path, system: str):
    run_pretrain(flags_of(pair_flags, system))
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last[f"eval_{SYSTEMS[system]['objective']}_accuracy"] > 0.65
