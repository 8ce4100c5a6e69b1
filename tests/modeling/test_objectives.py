import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from recipe.arguments.pretraining import first_position
from recipe.data.masking import DynamicMaskingCollator
from recipe.modeling.model import build_config, build_model
from recipe.modeling.objectives import OBJECTIVES, MaskedLMObjective, NextSentenceObjective, SentenceOrderObjective
from testing.helpers import SMALL_MODEL
from tests.data.test_masking import make_examples

TYPES = ["roberta", "roberta-prelayernorm", "bert", "albert"]


def make_model(tokenizer, model_type: str, predicts_pairs: bool, **fields):
    torch.manual_seed(0)
    config = build_config(SMALL_MODEL | fields, None, tokenizer, 64, model_type)
    return build_model(config, None, predicts_pairs).eval()


@pytest.fixture(params=["roberta", "roberta-prelayernorm"])
def model(request, tokenizer) -> PreTrainedModel:
    return make_model(tokenizer, request.param, False)


def make_batch(tokenizer, model_type: str, short: int, packing: str = "full_sentences") -> dict[str, torch.Tensor]:
    """Make five rows of 64 tokens and some short ones; among pairs, one row is no pair."""
    first = first_position(model_type, tokenizer.pad_token_id)
    collator = DynamicMaskingCollator(tokenizer, max_seq_length=64, packing=packing, first_position=first)
    examples = make_examples(tokenizer, 5, length=64) + make_examples(tokenizer, short, length=20)
    if packing == "segment_pair":
        for number, example in enumerate(examples):
            length = len(example["input_ids"])
            example |= {"spans": np.array([9, length - 9]), "label": number % 2}
        examples[3] |= {"spans": np.array([64]), "label": -100}
    batch = collator(examples)
    del batch["rows"]
    return batch


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    # Some gradients are zero but for rounding, as a key's bias is, which softmax does not see.
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-7 * largest, name


@pytest.mark.parametrize("short", [0, 3])
@pytest.mark.parametrize("model_type", TYPES)
def test_loss_and_gradients_are_those_of_the_stock_model(tokenizer, model_type, short):
    model = make_model(tokenizer, model_type, predicts_pairs=False)
    batch = make_batch(tokenizer, model_type, short)
    [loss_sum], [count] = MaskedLMObjective(model, 0.15)(**batch)
    assert count == (batch["labels"] != -100).sum()
    (loss_sum / count).backward()
    ours = gradients(model)
    stock = model(**batch).loss
    stock.backward()
    assert (loss_sum / count).item() == pytest.approx(stock.item(), rel=1e-5)
    assert_close(ours, gradients(model))


@pytest.mark.parametrize("short", [0, 3])
@pytest.mark.parametrize(
    ("model_type", "objective_class", "label_name"),
    [
        ("bert", NextSentenceObjective, "next_sentence_label"),
        ("albert", SentenceOrderObjective, "sentence_order_label"),
    ],
)
def test_both_losses_and_their_gradients_are_those_of_the_stock_model(
    tokenizer, model_type, objective_class, label_name, short
):
    model = make_model(tokenizer, model_type, predicts_pairs=True)
    batch = make_batch(tokenizer, model_type, short, "segment_pair")
    sums, counts = objective_class(model, 0.15)(**batch)
    means = dict(zip(objective_class.measures, sums / counts, strict=True))
    loss, pair_loss, accuracy = means.values()
    (sums / counts).sum().backward()
    ours = gradients(model)

    pair_label = batch.pop("pair_label")
    stock = model(**batch | {label_name: pair_label})
    stock.loss.backward()
    logits = stock.get("seq_relationship_logits", stock.get("sop_logits"))
    expected = torch.nn.functional.cross_entropy(logits, pair_label)
    assert pair_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx((stock.loss - expected).item(), rel=1e-5)
    is_pair = pair_label != -100
    assert counts.tolist() == [(batch["labels"] != -100).sum(), is_pair.sum(), is_pair.sum()]
    assert accuracy == (logits.argmax(1) == pair_label)[is_pair].float().mean()
    assert_close(ours, gradients(model))


@pytest.mark.parametrize("model_type", TYPES)
def test_deep_models_with_groups_and_segment_ids_are_the_stock_ones(tokenizer, model_type):
    """The masked-LM loss alone is the stock model's too."""
    fields = {"num_hidden_groups": 2, "inner_group_num": 2} if model_type == "albert" else {}
    model = make_model(tokenizer, model_type, predicts_pairs=False, num_hidden_layers=4, **fields)
    batch = make_batch(tokenizer, model_type, 2, "segment_pair")
    [loss_sum], [count] = MaskedLMObjective(model, 0.15)(**batch)
    del batch["pair_label"]
    if model.config.type_vocab_size == 1:
        del batch["token_type_ids"]
    assert (loss_sum / count).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_pair_head_of_roberta_is_trained_beside_a_plain_model(tokenizer, model):
    objective = NextSentenceObjective(model, 0.15)
    batch = make_batch(tokenizer, "roberta", 2, "segment_pair")
    sums, counts = objective(**batch)
    alone, _ = MaskedLMObjective(model, 0.15)(**batch)
    assert sums[0].item() == pytest.approx(alone.item(), rel=1e-6)
    (sums / counts).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in objective.pair_head.parameters())
    del batch["token_type_ids"]
    hidden = model.base_model(batch["input_ids"], batch["attention_mask"], position_ids=batch["position_ids"])
    logits = objective.pair_head(hidden.last_hidden_state[:, 0])
    expected = torch.nn.functional.cross_entropy(logits, batch["pair_label"], reduction="sum")
    assert sums[1].item() == pytest.approx(expected.item(), rel=1e-5)
    assert not [name for name in model.state_dict() if "pair" in name or "pooler" in name]
    assert {name.split(".")[0] for name in objective.state_dict()} == {"model", "pair_head"}
    assert {name.split(".")[0] for name in MaskedLMObjective(model, 0.15).state_dict()} == {"model"}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", TYPES)
def test_every_parameter_is_trained(tokenizer, model_type, objective):
    """Engines that wait for the gradient of every parameter would hang otherwise."""
    module = OBJECTIVES[objective](make_model(tokenizer, model_type, objective != "masked_lm"), 0.15)
    sums, counts = module(**make_batch(tokenizer, model_type, 1, "segment_pair"))
    (sums / counts).sum().backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("model_type", TYPES)
def test_recomputed_activations_give_the_same_gradients(tokenizer, model_type):
    model = make_model(tokenizer, model_type, predicts_pairs=False).train()
    found = []
    for recompute in (False, True):
        torch.manual_seed(1)
        MaskedLMObjective(model, 0.15, recompute)(**make_batch(tokenizer, model_type, 1))[0].backward()
        found.append(gradients(model))
    assert_close(*found)


def test_nothing_to_predict_gives_zero(tokenizer, model):
    collator = DynamicMaskingCollator(tokenizer, max_seq_length=32)
    batch = collator(make_examples(tokenizer, 1, length=3))
    del batch["rows"]
    batch["labels"][:] = -100
    loss_sum, count = MaskedLMObjective(model, collator.mlm_probability)(**batch)
    assert (loss_sum.item(), count.item()) == (0.0, 0)


def test_documents_that_share_a_row_are_as_if_alone(tokenizer, model):
    lengths = [20, 9, 17]
    parts = [make_examples(tokenizer, 1, length=length, seed=length)[0] for length in lengths]
    row = parts[0] | {"input_ids": np.concatenate([part["input_ids"] for part in parts]), "spans": np.array(lengths)}
    collator = DynamicMaskingCollator(tokenizer, max_seq_length=64, packing="doc_sentences")
    objective = MaskedLMObjective(model, collator.mlm_probability)
    batch = collator([row])
    del batch["rows"]
    shared = model.base_model(
        batch["input_ids"],
        attention_mask=(batch["document_ids"][:, :, None] == batch["document_ids"][:, None, :])[:, None],
        position_ids=batch["position_ids"],
    ).last_hidden_state[0]
    start, loss, count = 0, torch.zeros(()), 0
    for length in lengths:
        ids, labels = (batch[name][:, start : start + length] for name in ("input_ids", "labels"))
        alone = model.base_model(ids).last_hidden_state[0]
        assert (shared[start : start + length] - alone).abs().max() < 1e-5
        if (labels != -100).any():
            mean = model(ids, labels=labels).loss
            loss, count = loss + mean * int((labels != -100).sum()), count + int((labels != -100).sum())
        start += length
    loss.backward()
    expected = gradients(model)
    [loss_sum], [found] = objective(**batch)
    loss_sum.backward()
    assert loss_sum.item() == pytest.approx(loss.item(), rel=1e-5)
    assert found == count
    assert_close(gradients(model), expected)


def test_engines_find_what_they_look_for(model):
    objective = MaskedLMObjective(model, 0.15)
    assert objective._no_split_modules == [type(model).__name__.replace("ForMaskedLM", "Layer")]
    model.lm_head.decoder.weight = torch.nn.Parameter(model.lm_head.decoder.weight.detach().clone())
    objective.tie_weights()
    assert model.lm_head.decoder.weight is model.base_model.embeddings.word_embeddings.weight
