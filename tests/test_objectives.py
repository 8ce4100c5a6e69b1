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
    empty = {"input_ids": torch.tensor([0, 2]), "corpus": 0, "block": 0, "visit": 0}
    loss_sum, count = MaskedLMObjective(model, collator.max_masked)(**collator([empty]))
    assert (loss_sum.item(), count.item()) == (0.0, 0)


def test_engines_find_what_they_look_for(model):
    objective = MaskedLMObjective(model, 5)
    assert "RobertaLayer" in objective._no_split_modules
    model.lm_head.decoder.weight = torch.nn.Parameter(model.lm_head.decoder.weight.detach().clone())
    objective.tie_weights()
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
