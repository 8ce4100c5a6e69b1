"""The rows that `recipe.show` shows are those that training reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import recipe.training
from recipe.arguments import PretrainArguments, parse_config
from recipe.data.preprocessor import Preprocessor
from recipe.data.rows import collate, has_update, read_heads, read_update
from testing.helpers import command_line, write_jsonl

PHASES = "[{steps: 2, max_seq_length: 32, train_batch_size: [4, 8]}, {steps: 1, mlm_probability: 0.3}]"
STREAMED = {"streaming": True, "num_lanes": 2, "shuffle_buffer_size": 16, "eval_blocks": 4}


def prepared(flags: dict[str, object], tokenizer) -> Preprocessor:
    return Preprocessor(parse_config(PretrainArguments, "test", command_line(flags)), tokenizer)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        STREAMED,
        {"packing": "doc_sentences"},
        {"packing": "segment_pair"},
        {"phases": PHASES},
        STREAMED | {"phases": PHASES},
    ],
    ids=["cached", "streaming", "doc_sentences", "segment_pair", "phases", "streamed phases"],
)
def test_update_is_what_training_reads(
    flags, run_pretrain, tokenizer, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
):
    """Two updates of a run in micro-batches of 4, against rows made of its config.yaml."""
    flags = flags | {"max_seq_length": 64, "max_steps": 3} | changes
    read, train_step = [], recipe.training.train_step

    def recorded(accelerator, objective, optimizer, micro_batches, *rest):
        read.append({name: torch.cat([batch[name] for batch in micro_batches]) for name in ("input_ids", "labels")})
        return train_step(accelerator, objective, optimizer, micro_batches, *rest)

    monkeypatch.setattr(recipe.training, "train_step", recorded)
    run_pretrain(flags)
    saved = parse_config(PretrainArguments, "test", ["--config", str(Path(flags["output_dir"]) / "config.yaml")])
    assert len(read) == 3
    for update in (0, 2):
        batch, origins = read_update(Preprocessor(saved, tokenizer), update)
        assert len(origins) == len(batch["input_ids"])
        for name, tensor in read[update].items():
            assert batch[name].tolist() == tensor.tolist()


@pytest.mark.parametrize("mode", [{}, STREAMED], ids=["cached", "streaming"])
def test_rows_say_where_they_are_from(flags, tokenizer, tmp_path: Path, mode: dict[str, object]):
    """Two corpora of one word each, the second of twice the weight."""
    words = {"one": "the", "two": "with"}
    corpora = [
        {"name": name, "path": str(write_jsonl(tmp_path / f"{name}.jsonl", [f"{word} " * 200] * 100)), "weight": n}
        for n, (name, word) in enumerate(words.items(), start=1)
    ]
    preprocessor = prepared(flags | {"corpora": json.dumps(corpora), "sentence_splitter": "newline"} | mode, tokenizer)
    found = []
    for update in range(3):
        batch, origins = read_update(preprocessor, update)
        ids = np.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
        for row, origin in zip(ids, origins, strict=True):
            name, place, *_ = origin.split(", ")
            assert set(tokenizer.decode(row, skip_special_tokens=True).split()) == {words[name]}
            assert place.startswith("lane " if mode else "block ")
            found.append(name)
    assert found.count("two") == 16


def test_large_corpora_are_not_tokenised_for_a_look(flags, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    preprocessor = prepared(flags | {"token_store_dir": tmp_path / "stores"}, tokenizer)
    assert has_update(preprocessor)
    monkeypatch.setattr("recipe.data.rows.SMALL_BYTES", 1000)
    assert not has_update(preprocessor)
    assert not (tmp_path / "stores").exists()
    read_update(preprocessor, 0)  # makes them
    assert has_update(preprocessor)
    preprocessor = prepared(flags | STREAMED, tokenizer)
    assert has_update(preprocessor)


def test_heads_have_the_first_text_of_each_corpus_in_turn(flags, tokenizer, tmp_path: Path, texts: list[str]):
    files = {"one": texts[:20], "two": texts[20:40]}
    corpora = [{"name": name, "path": str(write_jsonl(tmp_path / f"{name}.jsonl", own))} for name, own in files.items()]
    preprocessor = prepared(flags | {"corpora": json.dumps(corpora)}, tokenizer)
    examples, origins = read_heads(preprocessor, 2, 300, 100)
    assert [origin.split(",")[0] for origin in origins[:4]] == ["one", "two", "one", "two"]
    batch = collate(preprocessor.collator, examples)
    ids = np.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    for name, first in (("one", 0), ("two", 1)):
        start = tokenizer.decode(ids[first], skip_special_tokens=True)
        assert files[name][0].startswith(start[:30])


def test_comparisons_say_that_there_is_no_text(flags, tokenizer, tmp_path: Path):
    path = write_jsonl(tmp_path / "empty.jsonl", [""])
    preprocessor = prepared(flags | {"corpora": json.dumps([{"name": "empty", "path": str(path)}])}, tokenizer)
    with pytest.raises(ValueError, match="no text"):
        read_heads(preprocessor, 1, 300, 100)
