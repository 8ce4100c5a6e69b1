import numpy as np
import pytest
import torch
from transformers import RobertaConfig, RobertaForMaskedLM

from recipe.masking import DynamicMaskingCollator
from recipe.model import ROBERTA_DEFAULTS
from recipe.objectives import MaskedLMObjective
from tests.conftest import SMALL_MODEL
from tests.test_masking import make_examples


@pytest.fixture
def model(tokenizer) -> RobertaForMaskedLM:
    torch.manual_seed(0)
    config = RobertaConfig(**ROBERTA_DEFAULTS, **SMALL_MODEL, vocab_size=len(tokenizer))
    return RobertaForMaskedLM(config).eval()


@pytest.mark.parametrize("short", [0, 3])
def test_loss_and_gradients_are_those_of_the_stock_model(tokenizer, model, short):
    collator = DynamicMaskingCollator(tokenizer, max_seq_length=64)
    examples = make_examples(tokenizer, 5, length=64) + make_examples(tokenizer, short, length=20)
    batch = collator(examples)
    del batch["rows"]
    objective = MaskedLMObjective(model, collator.max_masked)
    loss_sum, count = objective(**batch)
    assert count == (batch["labels"] != -100).sum()
    (loss_sum / count).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    stock = model(**batch).loss
    stock.backward()
    assert (loss_sum / count).item() == pytest.approx(stock.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max()
        assert (ours[name] - parameter.grad).abs().max() <= 1e-5 * scale + 1e-9, name


def test_nothing_to_predict_gives_zero(tokenizer, model):
    collator = DynamicMaskingCollator(tokenizer, max_seq_length=32)
    batch = collator(make_examples(tokenizer, 1, length=3))
    del batch["rows"]
    batch["labels"][:] = -100
    loss_sum, count = MaskedLMObjective(model, collator.max_masked)(**batch)
    assert (loss_sum.item(), count.item()) == (0.0, 0)


def test_documents_that_share_a_row_are_as_if_alone(tokenizer, model):
    lengths = [20, 9, 17]
    parts = [make_examples(tokenizer, 1, length=length, seed=length)[0] for length in lengths]
    row = parts[0] | {"input_ids": np.concatenate([part["input_ids"] for part in parts]), "spans": np.array(lengths)}
    collator = DynamicMaskingCollator(tokenizer, max_seq_length=64, packing="doc_sentences")
    objective = MaskedLMObjective(model, collator.max_masked)
    batch = collator([row])
    del batch["rows"]
    shared = model.roberta(
        batch["input_ids"],
        attention_mask=(batch["document_ids"][:, :, None] == batch["document_ids"][:, None, :])[:, None],
        position_ids=batch["position_ids"],
    ).last_hidden_state[0]
    start, loss, count = 0, 0.0, 0
    for length in lengths:
        ids, labels = (batch[name][:, start : start + length] for name in ("input_ids", "labels"))
        alone = model.roberta(ids).last_hidden_state[0]
        assert (shared[start : start + length] - alone).abs().max() < 1e-5
        if (labels != -100).any():
            mean = model(ids, labels=labels).loss.item()
            loss, count = loss + mean * int((labels != -100).sum()), count + int((labels != -100).sum())
        start += length
    assert objective(**batch)[0].item() == pytest.approx(loss, rel=1e-5)
    assert objective(**batch)[1] == count


def test_engines_find_what_they_look_for(model):
    objective = MaskedLMObjective(model, 5)
    assert "RobertaLayer" in objective._no_split_modules
    model.lm_head.decoder.weight = torch.nn.Parameter(model.lm_head.decoder.weight.detach().clone())
    objective.tie_weights()
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
