"""Batches without padding: what the layers see of them, and that all that is learnt is the same."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.arguments.pretraining import PAIR_PACKINGS, first_position
from recipe.data.masking import DynamicMaskingCollator
from recipe.modeling.model import build_config, build_model
from recipe.modeling.objectives import OBJECTIVES, MaskedLMObjective, compile_in_place
from recipe.modeling.unpadding import Unpadding
from testing.helpers import SMALL_MODEL
from tests.data.test_masking import make_examples
from tests.modeling.test_objectives import TYPES, assert_close, gradients, make_model

LENGTH = 64
PACKINGS = ["full_sentences", "doc_sentences", "segment_pair", "contiguous"]
PAIR_OBJECTIVES = dict.fromkeys(TYPES, "next_sentence") | {"albert": "sentence_order"}


def collate(tokenizer, lengths: list[int], packing: str, model_type: str = "roberta", share: float = 0.15):
    """Make rows of these lengths; among documents, rows of two, and among pairs one that is none."""
    first = first_position(model_type, tokenizer.pad_token_id)
    collator = DynamicMaskingCollator(tokenizer, share, max_seq_length=LENGTH, packing=packing, first_position=first)
    examples = []
    for seed, length in enumerate(lengths):
        [example] = make_examples(tokenizer, 1, length=length, seed=seed)
        length = len(example["input_ids"])
        if packing == "doc_sentences" or packing in PAIR_PACKINGS:
            example |= {"spans": np.array([length // 3, length - length // 3]), "label": seed % 2}
        examples.append(example)
    if packing in PAIR_PACKINGS:
        examples[0] |= {"spans": np.array([len(examples[0]["input_ids"])]), "label": -100}
    batch = collator(examples)
    del batch["rows"]
    return batch


def unpad(objective: MaskedLMObjective) -> None:
    objective.unpadding = Unpadding("loop", LENGTH, objective.masked_share, objective.reads_first)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("model_type", TYPES)
def test_loss_and_gradients_are_those_of_padded_rows(tokenizer, model_type, packing):
    predicts_pairs = packing in PAIR_PACKINGS
    model = make_model(tokenizer, model_type, predicts_pairs)
    name = PAIR_OBJECTIVES[model_type] if predicts_pairs else "masked_lm"
    objective = OBJECTIVES[name](model, 0.15)
    batch = collate(tokenizer, [64, 20, 64, 41, 7], packing, model_type)
    sums, counts = objective(**objective.arrange(batch))
    (sums / counts).sum().backward()
    expected = gradients(objective)
    unpad(objective)
    found, found_counts = objective(**objective.arrange(batch))
    (found / found_counts).sum().backward()
    assert found_counts.equal(counts)
    assert torch.allclose(found, sums, rtol=1e-5)
    assert_close(gradients(objective), expected)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(3, LENGTH), min_size=1, max_size=12),
    packing=st.sampled_from(PACKINGS),
    share=st.sampled_from([0.05, 0.15, 0.4]),
)
def test_every_token_is_there_once_and_in_its_sequence(tokenizer, lengths, packing, share):
    batch = collate(tokenizer, lengths, packing, share=share)
    reads_first = packing in PAIR_PACKINGS
    made = Unpadding("loop", LENGTH, 0.4, reads_first)(batch)
    numbers = batch.get("document_ids", batch.get("attention_mask", torch.ones_like(batch["input_ids"])))
    is_real = numbers > 0
    real, slots = int(is_real.sum()), made["slots"]
    for name in ("input_ids", "position_ids", "token_type_ids"):
        if name in batch:
            assert made[name][:real].equal(batch[name][is_real])
    is_target = made["labels"] != -100
    assert slots[is_target].equal((batch["labels"][is_real] != -100).nonzero().flatten())
    assert made["labels"][is_target].equal(batch["labels"][batch["labels"] != -100])
    # A sequence is a row, or a document of it; slots lie in the sequence of their position.
    keys, queries = made["key_bounds"], made["query_bounds"]
    row_keys = (torch.arange(len(lengths))[:, None] * LENGTH + numbers)[is_real]
    changes = (torch.diff(row_keys) != 0).nonzero().flatten() + 1
    ends = [*changes.tolist(), real]
    assert keys[: len(ends) + 1].tolist() == [0, *ends]
    assert (keys[-1], queries[-1]) == (len(made["input_ids"]), len(slots))
    sequence = torch.bucketize(slots, keys, right=True)
    assert sequence.equal(torch.bucketize(torch.arange(len(slots)), queries, right=True))
    for bounds in (keys, queries):
        assert bounds.dtype == torch.int32
        assert 0 <= torch.diff(bounds).min() <= torch.diff(bounds).max() <= LENGTH
    assert all(torch.diff(keys)[torch.diff(queries) > 0] > 0)  # no query without a key
    if reads_first:
        starts = made["key_bounds"][: len(lengths)]
        assert slots[made["first_slots"]].equal(starts.long())


def test_sizes_are_few_and_hardly_padded(tokenizer):
    """Of micro-batches as they come, at the size of a real one."""
    generator = np.random.default_rng(0)
    unpadding, sizes, real = Unpadding("loop", 512, 0.15), [], 0
    for _ in range(30):
        lengths = 512 - np.minimum(generator.exponential(25, 64).astype(int), 500)
        mask = torch.from_numpy((np.arange(512) < lengths[:, None]).astype(np.int64))
        labels = torch.where((torch.rand(mask.shape) < 0.14) & mask.bool(), 5, -100)
        made = unpadding({"input_ids": mask, "position_ids": mask, "labels": labels, "attention_mask": mask})
        sizes.append(tuple(tensor.shape for tensor in made.values()))
        real += lengths.sum()
    assert len(set(sizes)) <= 4
    assert 1 - real / sum(size[0][0] for size in sizes) < 0.012


@pytest.mark.parametrize("model_type", TYPES)
def test_recomputed_activations_drop_the_same(tokenizer, model_type):
    model = make_model(tokenizer, model_type, predicts_pairs=False).train()
    batch, found = collate(tokenizer, [64, 20, 64], "full_sentences", model_type), []
    for recompute in (False, True):
        objective = MaskedLMObjective(model, 0.15, recompute)
        unpad(objective)
        torch.manual_seed(1)
        objective(**objective.arrange(batch))[0].backward()
        found.append(gradients(model))
    assert_close(*found)


# Embeddings, a layer, the last one, the head; of a pre-norm model the first layer, which has nothing to add, too.
@pytest.mark.parametrize(("model_type", "graphs"), [("roberta", 4), ("roberta-prelayernorm", 5)])
def test_a_compiled_layer_serves_all_and_each_size_once(tokenizer, model_type: str, graphs: int):
    """As many graphs for a deep model as for a flat one, and none anew for a micro-batch of a known size."""
    config = build_config(SMALL_MODEL | {"num_hidden_layers": 5}, None, tokenizer, LENGTH, model_type)
    objective = MaskedLMObjective(build_model(config, None).eval(), 0.15)
    unpad(objective)
    batches = [objective.arrange(collate(tokenizer, lengths, "full_sentences")) for lengths in ([64, 20], [19, 64])]
    expected = [objective(**batch)[0].item() for batch in batches]
    torch._dynamo.reset()
    assert compile_in_place(objective, torch.device("cpu")) == []
    torch._dynamo.utils.counters.clear()
    for batch, loss in zip(batches, expected, strict=True):
        sums, _ = objective(**batch)
        sums.backward()
        assert sums.item() == pytest.approx(loss, rel=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
