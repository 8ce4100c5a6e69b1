import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from recipe.data.masking import ROW, DynamicMaskingCollator
from recipe.data.tokenizer import load_tokenizer

LENGTH = 128


@pytest.fixture(scope="module")
def collator(tokenizer) -> DynamicMaskingCollator:
    return DynamicMaskingCollator(tokenizer, max_seq_length=LENGTH, seed=3)


def make_examples(tokenizer, rows: int, visit: int = 0, length: int = LENGTH, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, len(tokenizer) - 1, (rows, length)).astype(np.uint16)
    ids[:, 0], ids[:, -1], ids[:, length // 2] = 0, 2, 2
    alike = {"corpus": 0, "visit": visit, "spans": np.array([length]), "label": 0, "documents": 1}
    return [{"input_ids": row, "block": n, **alike} for n, row in enumerate(ids)]


def fates(original: np.ndarray, batch: dict[str, torch.Tensor], mask_token_id: int) -> np.ndarray:
    """Shares of all tokens: masked, replaced at random, kept; predicted."""
    ids, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
    chosen = labels != -100
    assert (labels[chosen] == original[chosen]).all()
    assert (ids[~chosen] == original[~chosen]).all()
    masked, kept = chosen & (ids == mask_token_id), chosen & (ids == original)
    return np.array([masked.sum(), (chosen & ~masked & ~kept).sum(), kept.sum(), chosen.sum()]) / original.size


def test_rates_are_those_of_the_stock_collator(tokenizer, collator):
    rows = 8000  # 10^6 tokens
    examples = make_examples(tokenizer, rows)
    original = np.stack([example["input_ids"] for example in examples]).astype(np.int64)
    ours = fates(original, collator(examples), tokenizer.mask_token_id)
    stock = DataCollatorForLanguageModeling(tokenizer, seed=0)
    theirs = fates(original, stock([{"input_ids": row} for row in original.tolist()]), tokenizer.mask_token_id)
    maskable = (LENGTH - 3) / LENGTH
    # A random replacement is now and then the token itself, and then counts as kept.
    same = 0.1 / len(collator.ordinary_ids)
    expected = 0.15 * maskable * np.array([0.8, 0.1 - same, 0.1 + same, 1])
    error = 4 * np.sqrt(expected * (1 - expected) / original.size)
    assert (np.abs(ours - expected) < error).all()
    assert (np.abs(ours - theirs) < 2 * error).all()


def test_every_row_masks_its_share_to_within_one(tokenizer, collator):
    counts = (collator(make_examples(tokenizer, 2000))["labels"] != -100).sum(1)
    exact = 0.15 * (LENGTH - 3)
    assert set(counts.tolist()) == {int(exact), int(exact) + 1}
    assert counts.float().mean().item() == pytest.approx(exact, abs=0.05)
    assert counts.max() <= math.ceil(0.15 * LENGTH)


def test_special_tokens_are_neither_masked_nor_inserted(tokenizer, collator):
    examples = make_examples(tokenizer, 3000)
    batch = collator(examples)
    original = np.stack([example["input_ids"] for example in examples])
    special = np.isin(original, tokenizer.all_special_ids)
    assert (batch["labels"].numpy()[special] == -100).all()
    inserted = batch["input_ids"].numpy()[~special]
    assert set(inserted.tolist()) & set(tokenizer.all_special_ids) == {tokenizer.mask_token_id}


def test_masks_of_40_visits(tokenizer, collator):
    """None repeats, but on a rerun."""
    seen = Counter()
    for visit in range(40):
        examples = make_examples(tokenizer, 1, visit)
        batch, again = collator(examples), collator(examples)
        assert all(torch.equal(batch[name], again[name]) for name in batch)
        seen[str([batch[name].tolist() for name in ("input_ids", "labels")])] += 1
    assert list(seen.values()) == [1] * 40


def test_masks_do_not_depend_on_the_rest_of_the_batch(tokenizer, collator):
    examples = make_examples(tokenizer, 8)
    together = collator(examples)
    for row, example in enumerate(examples):
        alone = collator([example])
        assert torch.equal(alone["input_ids"][0], together["input_ids"][row])
        assert torch.equal(alone["labels"][0], together["labels"][row])


@pytest.mark.parametrize("field", ["corpus", "block", "visit"])
def test_masks_differ_by_corpus_block_visit_and_seed(tokenizer, collator, field):
    example = make_examples(tokenizer, 1)[0]
    labels = collator([example])["labels"]
    assert not torch.equal(labels, collator([example | {field: 7}])["labels"])
    other = DynamicMaskingCollator(tokenizer, max_seq_length=LENGTH, seed=4)
    assert not torch.equal(labels, other([example])["labels"])


def test_short_blocks_are_padded_and_positions_given(tokenizer, collator):
    examples = make_examples(tokenizer, 1) + make_examples(tokenizer, 1, length=50)
    batch = collator(examples)
    assert batch["input_ids"].shape == (2, LENGTH)
    assert batch["attention_mask"].sum(1).tolist() == [LENGTH, 50]
    assert (batch["input_ids"][1, 50:] == tokenizer.pad_token_id).all()
    assert batch["position_ids"][0].tolist() == list(range(2, LENGTH + 2))
    assert batch["position_ids"][1].tolist() == [*range(2, 52), *[1] * (LENGTH - 50)]
    assert (batch["labels"][1, 50:] == -100).all()
    assert "attention_mask" not in collator(make_examples(tokenizer, 2))


def test_empty_block_has_nothing_to_predict(tokenizer, collator):
    empty = make_examples(tokenizer, 1)[0] | {"input_ids": np.array([0, 2]), "spans": np.array([2])}
    assert (collator([empty])["labels"] == -100).all()


def test_shared_rows_say_which_document_and_position(tokenizer):
    collator = DynamicMaskingCollator(tokenizer, max_seq_length=10, packing="doc_sentences")
    example = make_examples(tokenizer, 1, length=8)[0] | {"spans": np.array([5, 3])}
    batch = collator([example])
    assert batch["document_ids"].tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]]
    assert batch["position_ids"].tolist() == [[2, 3, 4, 5, 6, 2, 3, 4, 1, 1]]
    assert "attention_mask" not in batch


def test_pairs_have_segment_ids_and_a_label(tokenizer):
    collator = DynamicMaskingCollator(tokenizer, max_seq_length=10, packing="segment_pair")
    example = make_examples(tokenizer, 1, length=8)[0] | {"spans": np.array([5, 3]), "label": 1}
    batch = collator([example])
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 0, 0]]
    assert batch["pair_label"].tolist() == [1]
    assert batch["position_ids"].tolist() == [[2, 3, 4, 5, 6, 7, 8, 9, 1, 1]]
    assert batch["rows"][0, ROW.index("pairs")] == 1
    single = collator([example | {"spans": np.array([8]), "label": -100}])
    assert single["rows"][0, ROW.index("pairs")] == 0


def test_positions_of_bert_begin_at_0(tokenizer):
    collator = DynamicMaskingCollator(tokenizer, max_seq_length=6, first_position=0)
    assert collator(make_examples(tokenizer, 1, length=4))["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0]]


def test_rows_count_and_tell_masks_apart(tokenizer, collator):
    examples = make_examples(tokenizer, 50)
    rows, labels = (collator(examples)[name] for name in ("rows", "labels"))
    assert rows.dtype == torch.int64
    assert rows[:, 1].tolist() == [LENGTH] * 50
    assert rows[:, 3].tolist() == (labels != -100).sum(1).tolist()
    again = collator(examples)["rows"]
    assert torch.equal(rows, again)
    other_visit = collator(make_examples(tokenizer, 50, visit=1))["rows"]
    assert (rows[:, -1] != other_visit[:, -1]).all()
    assert len(set(rows[:, -1].tolist())) == 50


def test_checks_of_the_stock_collator_hold(tokenizer):
    with pytest.raises(ValueError, match="mlm_probability"):
        DynamicMaskingCollator(tokenizer, mlm_probability=2.0)
    with pytest.raises(ValueError, match="should not exceed 1"):
        DynamicMaskingCollator(tokenizer, mask_replace_prob=0.9, random_replace_prob=0.2)


def test_other_replacement_shares_are_kept_to(tokenizer):
    collator = DynamicMaskingCollator(
        tokenizer, max_seq_length=LENGTH, mlm_probability=0.4, mask_replace_prob=1.0, random_replace_prob=0.0
    )
    examples = make_examples(tokenizer, 500)
    batch = collator(examples)
    assert (batch["input_ids"][batch["labels"] != -100] == tokenizer.mask_token_id).all()


def test_own_special_tokens_are_masked_and_drawn_and_ids_of_no_token_are_not(tokenizer_dir, tmp_path):
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["model"]["vocab"] |= {"<mask>": 500, "<url>": 501}
    state["added_tokens"].append(state["added_tokens"][-1] | {"id": 501, "content": "<url>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.mask_token_id, loaded.convert_tokens_to_ids("<url>"), len(loaded)) == (500, 501, 401)
    collator = DynamicMaskingCollator(loaded, max_seq_length=LENGTH, mask_replace_prob=0.0, random_replace_prob=1.0)
    examples = make_examples(loaded, 2000)
    for example in examples:
        example["input_ids"][5:60] = 501
    batch = collator(examples)
    assert (batch["labels"] == 501).sum() > 10_000
    drawn = set(batch["input_ids"][batch["labels"] != -100].tolist())
    assert drawn == set(loaded.get_vocab().values()) - {0, 1, 2, 3, 500}
