"""Models that others may bring: what is loaded of them, how long their rows may be, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from recipe.arguments import GlueArguments
from recipe.base.errors import UserError
from recipe.finetune.classifier import check_classifier, load_classifier, load_glue_tokenizer
from recipe.finetune.finetuning import Finetuner, encode_splits
from recipe.finetune.jobs import Job
from recipe.finetune.tasks.glue import TASKS
from recipe.finetune.tasks.loading import load_task
from testing.glue_data import write_rte

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2}
OPT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32, "word_embed_proj_dim": 32}
XLNET = {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 1}
# Of each family its pretraining class, sizes, and how many tokens it reads; 30 is no multiple of 8.
FAMILIES = {
    "roberta": ("RobertaForMaskedLM", SIZES | {"max_position_embeddings": 32}, 30),
    "roberta-prelayernorm": ("RobertaPreLayerNormForMaskedLM", SIZES | {"max_position_embeddings": 32}, 30),
    "xlm-roberta": ("XLMRobertaForMaskedLM", SIZES | {"max_position_embeddings": 32}, 30),
    "camembert": ("CamembertForMaskedLM", SIZES | {"max_position_embeddings": 32}, 30),
    "mpnet": ("MPNetForMaskedLM", SIZES | {"max_position_embeddings": 32}, 30),
    "bert": ("BertForMaskedLM", SIZES | {"max_position_embeddings": 30}, 30),
    "electra": ("ElectraForMaskedLM", SIZES | {"max_position_embeddings": 30}, 30),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 30},
        30,
    ),
    "bart": ("BartForConditionalGeneration", BART | {"max_position_embeddings": 30}, 30),
    "opt": ("OPTForCausalLM", OPT | {"max_position_embeddings": 30}, 30),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 30}, 30),
    "llama": ("LlamaForCausalLM", SIZES | {"max_position_embeddings": 30}, 30),
    "modernbert": ("ModernBertForMaskedLM", SIZES | {"max_position_embeddings": 64}, 64),
    "xlnet": ("XLNetLMHeadModel", XLNET, None),
    "t5": ("T5ForConditionalGeneration", T5, None),
}
PADLESS = ("gpt2", "llama")


def save_family(folder: Path, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Save an untrained model of a family and a tokenizer as its own would be: without a pad token, or to the left."""
    tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "cls", "sep")}
    tokens["pad_token_id"] = None if name in PADLESS else tokenizer.pad_token_id
    class_name, sizes, _ = FAMILIES[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(vocab_size=len(tokenizer), **tokens, **sizes))
    for parameter in model.parameters():  # differences that are large enough to be seen
        parameter.data.mul_(3)
    model.save_pretrained(folder)
    own = {"eos_token": "</s>"} if name in PADLESS else dict(tokenizer.special_tokens_map)
    side = "left" if name == "xlnet" else "right"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, padding_side=side, **own).save_pretrained(
        folder
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_fine_tuned_up_to_its_length(name: str, tokenizer, accelerator, tmp_path: Path):
    write_rte(tmp_path)
    save_family(tmp_path / name, name, tokenizer)
    source, task, longest = str(tmp_path / name), TASKS["rte"], FAMILIES[name][2]
    length = longest or 30
    loaded = load_glue_tokenizer(source, length)
    check_classifier(source, task, loaded, length)
    if longest:
        assert loaded.model_max_length == longest
        with pytest.raises(UserError, match=f"`max_seq_length` is {longest + 1}; the model reads {longest} tokens"):
            load_glue_tokenizer(source, longest + 1)
    else:
        load_glue_tokenizer(source, 100_000)
    splits = encode_splits(load_task("rte", str(tmp_path))[0], task, loaded, length)
    args = GlueArguments(output_dir="out", model_name_or_path=source, num_train_epochs=2, max_seq_length=length)
    model = load_classifier(source, task, None, loaded.pad_token_id)
    finetuner = Finetuner(accelerator, args, loaded, is_shared=False)
    outcome = finetuner.run(Job("rte", "pretrained", 1e-3, 8, 1), splits, model, keeps_weights=False)
    assert outcome.epochs[1]["loss"] < 5
    # Padding changes no answer.
    rows, model = splits["train"], model.eval()
    with torch.no_grad():
        together = finetuner.logits(model, rows, list(range(12)))
        alone = [model(**{k: torch.tensor([v]) for k, v in rows.rows[i].items()}).logits[0] for i in range(12)]
    assert len(set(rows.lengths[:12])) > 1
    assert torch.allclose(together, torch.stack(alone), atol=1e-4)


def test_what_a_model_cannot_do_is_said_before_any_job(tokenizer, tmp_path: Path):
    """Segments that a RoBERTa lacks are an error of the device in the midst of a job."""
    save_family(tmp_path, "camembert", tokenizer)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer_config = config | {"model_input_names": names, "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    text = json.loads((tmp_path / "tokenizer.json").read_text())
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 2}}]
    text["post_processor"] = {"type": "TemplateProcessing", "single": pair[:1], "pair": pair, "special_tokens": {}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    loaded = load_glue_tokenizer(str(tmp_path), 30)
    check_classifier(str(tmp_path), TASKS["cola"], loaded, 30)
    with pytest.raises(UserError, match=r"a camembert with this tokenizer cannot classify RTE .*: IndexError"):
        check_classifier(str(tmp_path), TASKS["rte"], loaded, 30)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("", "no model there, in the run .*/run, which is running and has .*/step-00000003, .*/step-00000006; name"),
        ("model", "no model there, in the run .*/run, which is running and has .*/step-00000003, .*/step-00000006;"),
        ("checkpoints/step-00000001", "no model there, in the run .*/run, which is running and has .*/step-00000003,"),
        ("checkpoints/step-00000003", "no tokenizer beside the model; give `tokenizer_name`"),
    ],
)
def test_run_under_way_and_removed_checkpoint_are_called_what_they_are(finished_run: Path, place: str, expected: str):
    shutil.rmtree(finished_run / "model")
    status = json.loads((finished_run / "status.json").read_text())
    (finished_run / "status.json").write_text(json.dumps(status | {"state": "running"}))
    with pytest.raises(UserError, match=expected):
        load_glue_tokenizer(str(finished_run / place), 32)


def test_tokenizer_may_lie_elsewhere(small_model: Path, tokenizer_dir: Path, tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(small_model / name, tmp_path / name)
    with pytest.raises(UserError, match="no tokenizer beside the model; give `tokenizer_name`"):
        load_glue_tokenizer(str(tmp_path), 32)
    assert len(load_glue_tokenizer(str(tmp_path), 32, str(tokenizer_dir))) == 400


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "t5"])
def test_model_without_a_tokenizer_is_not_given_an_empty_one(name: str, tokenizer, tmp_path: Path):
    """The library makes one of a few special tokens, which reads every word as unknown, and whose pad token may fit."""
    save_family(tmp_path, name, tokenizer)
    for file in tmp_path.glob("token*"):
        file.unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    for pad in (0, 1):
        (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
        with pytest.raises(UserError, match="no tokenizer beside the model"):
            load_glue_tokenizer(str(tmp_path), 16)


def test_model_and_tokenizer_without_a_token_to_pad_with_are_refused(tokenizer, tmp_path: Path):
    save_family(tmp_path, "gpt2", tokenizer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="neither a pad token nor an end token"):
        load_glue_tokenizer(str(tmp_path), 30)


@pytest.mark.parametrize("model_type", ["roberta", "roberta-prelayernorm", "bert", "albert"])
def test_dropout_of_the_head_is_as_given(tmp_path: Path, model_type: str):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    config = AutoConfig.for_model(model_type, vocab_size=100, **sizes)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    for dropout, expected in ((None, 0.1), (0.0, 0.0), (0.3, 0.3)):
        model = load_classifier(str(tmp_path), TASKS["rte"], dropout)
        head = [module for name, module in model.named_modules() if not name.startswith(model.base_model_prefix)]
        assert [module.p for module in head if isinstance(module, torch.nn.Dropout)] == [expected]


def test_head_without_such_a_dropout_is_named(tmp_path: Path):
    config = AutoConfig.for_model("distilbert", vocab_size=100, dim=16, n_heads=2, n_layers=1, hidden_dim=16)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"`classifier_dropout` is 0.0; a distilbert has no dropout"):
        load_classifier(str(tmp_path), TASKS["rte"], 0.0)


def test_head_of_another_task_is_left_out_by_name(small_model: Path, tmp_path: Path):
    torch.manual_seed(0)
    mnli = load_classifier(str(small_model), TASKS["mnli"])
    with torch.no_grad():
        for name, parameter in mnli.named_parameters():
            parameter.fill_(7.0 if name.startswith("classifier.") else 0.25)
    mnli.save_pretrained(tmp_path / "mnli")
    for name in ("mnli", "rte", "stsb"):  # even where the head would fit
        model = load_classifier(str(tmp_path / "mnli"), TASKS[name])
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.startswith("classifier."):
                assert not (parameter == 7.0).any(), parameter_name
            else:
                assert (parameter == 0.25).all(), parameter_name
    assert model.config.num_labels == 1
    assert load_classifier(str(tmp_path / "mnli"), TASKS["rte"]).config.id2label == {
        0: "entailment",
        1: "not_entailment",
    }


def test_model_without_encoder_weights_is_refused(small_model: Path, tmp_path: Path):
    config = RobertaConfig.from_pretrained(small_model)
    model = RobertaForMaskedLM(config)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layer.1." not in name}
    model.save_pretrained(tmp_path / "half", state_dict=weights)
    with pytest.raises(UserError, match=r"lacks weights of the encoder, .*: roberta\.encoder\.layer\.1"):
        load_classifier(str(tmp_path / "half"), TASKS["rte"])


def test_part_of_a_model_that_a_classifier_does_not_have_is_no_layer_too_many(tmp_path: Path):
    sizes = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16, "block_sizes": [1, 1], "vocab_size": 50}
    transformers.FunnelModel(transformers.FunnelConfig(**sizes, num_decoder_layers=1)).save_pretrained(tmp_path)
    assert load_classifier(str(tmp_path), TASKS["rte"]).config.model_type == "funnel"


def test_model_with_more_layers_than_its_config_is_refused(small_model: Path, tmp_path: Path):
    folder = shutil.copytree(small_model, tmp_path / "deep")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), "utf-8")
    with pytest.raises(UserError, match=r"has weights that its config has no layers for: roberta\.encoder\.layer\.1"):
        load_classifier(str(folder), TASKS["rte"])


def test_weights_of_another_shape_than_the_config_says_are_refused(small_model: Path, tmp_path: Path):
    folder = shutil.copytree(small_model, tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 401}))
    with pytest.raises(UserError, match=r"another shape than its config says: roberta\.embeddings\.word_embeddings"):
        load_classifier(str(folder), TASKS["rte"])


def test_checksum_of_a_model_without_pooler_is_always_the_same(tokenizer, tmp_path: Path):
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    checksums = {check_classifier(str(tmp_path), TASKS[name], tokenizer, 32) for name in ("rte", "rte", "mnli")}
    assert len(checksums) == 1


def test_what_is_no_model_and_what_does_not_match_is_refused(small_model: Path, tokenizer_dir: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no model there"):
        load_glue_tokenizer(str(tmp_path), 32)
    with pytest.raises(UserError, match="`max_seq_length` is 600; the model reads 512 tokens at the most"):
        load_glue_tokenizer(str(small_model), 600)
    RobertaConfig(vocab_size=300).save_pretrained(tmp_path / "other")
    for file in tokenizer_dir.iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="its tokenizer is another model's: 400 entries"):
        load_glue_tokenizer(str(tmp_path / "other"), 32)
