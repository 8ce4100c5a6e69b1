"""BERT, ALBERT and RoBERTa with a pair objective, from the command line to plain checkpoints."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    pipeline,
)

from recipe.base.errors import UserError
from testing.glue_data import write_rte
from testing.helpers import SMALL_MODEL, read_lines, write_jsonl
from tests.test_pretrain import assert_same_run

ROBERTA = {"model_type": "roberta", "objective": "next_sentence", "packing": "segment_pair"}
BERT = {"model_type": "bert", "objective": "next_sentence", "packing": "sentence_pair", "masking": "static"}
ALBERT = {"model_type": "albert", "objective": "sentence_order", "packing": "sentence_order"}
PRE_NORM = ROBERTA | {"model_type": "roberta-prelayernorm"}
SYSTEMS = {"roberta": ROBERTA, "roberta-prelayernorm": PRE_NORM, "bert": BERT, "albert": ALBERT}
SIZES = dict.fromkeys(SYSTEMS, SMALL_MODEL) | {"albert": SMALL_MODEL | {"embedding_size": 16}}
CLASSES = {
    "roberta": [AutoModelForMaskedLM],
    "roberta-prelayernorm": [AutoModelForMaskedLM],
    "bert": [AutoModelForPreTraining, AutoModelForMaskedLM, AutoModelForNextSentencePrediction],
    "albert": [AutoModelForPreTraining, AutoModelForMaskedLM],
}
# What a class does without of a checkpoint that holds more.
PAIR_WEIGHTS = ("bert.pooler.", "cls.seq_relationship.", "albert.pooler.", "sop_classifier.")
LM_WEIGHTS = ("cls.predictions.",)


@pytest.fixture
def flags_of(flags: dict[str, object], tokenizer_dirs: dict[str, Path]):
    """Flags of a small run of a system, with a tokenizer of its kind."""

    def make(system: str) -> dict[str, object]:
        model = {"model_config": json.dumps(SIZES[system]), "tokenizer_name": tokenizer_dirs[system]}
        return flags | SYSTEMS[system] | model

    return make


@pytest.mark.parametrize("system", SYSTEMS)
def test_run_goes_on_and_leaves_a_plain_model(flags_of, run_pretrain, run_glue, tmp_path: Path, system: str):
    flags = flags_of(system)
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
        is_whole = loader is AutoModelForPreTraining or system.startswith("roberta")
        left_out = () if is_whole else (LM_WEIGHTS if loader is AutoModelForNextSentencePrediction else PAIR_WEIGHTS)
        assert all(key.startswith(left_out) for key in loading["unexpected_keys"])
    fill_mask = pipeline("fill-mask", model=str(model))
    assert len(fill_mask(f"He {fill_mask.tokenizer.mask_token} it.")) == 5
    write_rte(tmp_path / "glue")
    flags = {"output_dir": tmp_path / "out", "model_name_or_path": model, "glue_dir": tmp_path / "glue"}
    flags |= {"tasks": "[rte]", "seeds": "[1]", "num_train_epochs": 1, "max_seq_length": 32}
    run_glue(flags)
    assert len(read_lines(tmp_path / "out" / "results.jsonl")) == 1


@pytest.mark.parametrize("model_type", ["roberta-prelayernorm", "bert", "albert"])
def test_masked_lm_alone_leaves_a_plain_model_too(flags, run_pretrain, tmp_path: Path, model_type: str):
    run_pretrain(flags | {"model_type": model_type, "model_config": json.dumps(SIZES[model_type])})
    _, loading = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("system", ["roberta", "roberta-prelayernorm"])
def test_pair_head_of_roberta_is_in_the_checkpoint(flags_of, run_pretrain, tmp_path: Path, system: str):
    """A resume that began with a new one would go another way."""
    run_pretrain(flags_of(system))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000006"
    beside = torch.load(checkpoint / "optimizer.pt", weights_only=True)["beside_model"]
    assert len(beside) == 4
    _, loading = AutoModelForMaskedLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys"))


@pytest.fixture
def pair_flags(flags: dict[str, object], tmp_path: Path) -> dict[str, object]:
    """Documents of two sentences of a word of the document's, of which the second is longer and has an exclamation
    mark. One second part of four from elsewhere has the same word and cannot be told.
    """
    rng = random.Random(1)
    sentences = [" ".join([rng.choice(["the", "was", "with", "they"])] * 3) for _ in range(3000)]
    path = write_jsonl(tmp_path / "pairs.jsonl", [f"{sentence}.\n{sentence} not!" for sentence in sentences])
    return flags | {
        "corpora": json.dumps([{"name": "pairs", "path": str(path)}]),
        "sentence_splitter": "newline",
        "max_seq_length": 16,
        "train_batch_size": 64,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 64,
        "learning_rate": 1e-2,
        "warmup_steps": 20,
        "logging_steps": 50,
        "eval_steps": 1000,
        "save_steps": 1000,
        "eval_blocks": 256,
    }


@pytest.mark.parametrize("system", SYSTEMS)
def test_pairs_are_told_apart_better_than_by_chance(pair_flags, run_pretrain, tmp_path: Path, system: str):
    sizes = SIZES[system] | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    changes = {"max_steps": 200, "model_config": json.dumps(sizes)}
    run_pretrain(pair_flags | SYSTEMS[system] | changes)
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last[f"eval_{SYSTEMS[system]['objective']}_accuracy"] > 0.7  # chance: 0.5 +- 0.03


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"objective": "next_sentence"}, "`objective` is next_sentence, which cannot use blocks of `packing` full_sen"),
        ({"objective": "next_sentence"}, "give it segment_pair or sentence_pair"),
        ({"objective": "sentence_order", "packing": "segment_pair"}, "give it sentence_order"),
        ({"masking": "static", "streaming": True, "num_lanes": 4}, "`masking` is static"),
        (ROBERTA | {"streaming": True, "num_lanes": 4}, "switch `streaming` off"),
        ({"model_type": "bert", "model_config": '{"embedding_size": 16}'}, "`embedding_size` that BertConfig does not"),
        ({"model_type": "albert", "model_config": '{"num_hidden_groups": 0}'}, "`num_hidden_groups` is 0; give 1"),
        (
            {"model_type": "albert", "model_config": '{"num_hidden_groups": 13}'},
            "more than `num_hidden_layers` (12)",
        ),
        ({"model_type": "gpt2"}, "model_type"),
    ],
)
def test_what_does_not_go_together_is_named(flags, run_pretrain, tmp_path: Path, changes, expected):
    with pytest.raises(UserError) as caught:
        run_pretrain(flags | changes)
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


# Two consecutive segments, which is all that sentence order needs, one document has.
@pytest.mark.parametrize(("system", "corpus"), [("bert", "one"), ("bert", "short"), ("albert", "short")])
def test_corpus_without_pairs_is_refused_at_once(flags_of, run_pretrain, tmp_path, texts, system, corpus):
    few = [texts[1]] if corpus == "one" else [re.split("[.?!]", text)[0] for text in texts]
    path = write_jsonl(tmp_path / "few.jsonl", few)
    stores = tmp_path / "stores"
    changes = {"corpora": json.dumps([{"name": "few", "path": str(path)}]), "token_store_dir": stores}
    with pytest.raises(UserError, match=r"documents of corpus 'few' do not make pairs of both kinds; give more"):
        run_pretrain(flags_of(system) | changes | {"max_seq_length": 128})
    assert not stores.exists()
    assert not (tmp_path / "run").exists()
