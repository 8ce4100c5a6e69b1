import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AlbertConfig,
    BertConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaPreLayerNormConfig,
)

from recipe.arguments import PretrainArguments, parse_config
from recipe.base.errors import UserError
from recipe.modeling.model import (
    ROBERTA_DEFAULTS,
    build_config,
    build_model,
    count_parameters,
    model_flops_per_token,
    usable_length,
)
from recipe.modeling.objectives import OBJECTIVES
from testing.helpers import ROOT, SMALL_MODEL


@pytest.mark.parametrize(
    ("name", "vocab_size", "millions"),
    [
        ("roberta-base", 50265, 124.7),
        ("roberta-large", 50265, 355.4),
        ("bert-base", 30522, 110.1),
        ("albert-base", 30000, 11.81),
        ("albert-large", 30000, 17.85),
    ],
)
def test_shipped_configs_have_the_papers_size(name, vocab_size, millions, tokenizer):
    path = ROOT / "recipe" / "configs" / "pretrain" / f"{name}.yaml"
    args = parse_config(PretrainArguments, "test", ["--config", str(path)])
    model_config = args.model_config | {"vocab_size": vocab_size}
    config = build_config(model_config, None, tokenizer, args.max_seq_length, args.model_type)
    with torch.device("meta"):
        model = build_model(config, None, args.predicts_pairs)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.05)


def test_tiny_config_builds(tokenizer):
    path = ROOT / "recipe" / "configs" / "pretrain" / "tiny.yaml"
    args = parse_config(PretrainArguments, "test", ["--config", str(path)])
    with torch.device("meta"):
        build_model(build_config(args.model_config, None, tokenizer, args.max_seq_length), None)


@pytest.mark.parametrize("model_type", ["roberta", "roberta-prelayernorm"])
def test_defaults_are_the_released_models(tokenizer, model_type):
    config = build_config({}, None, tokenizer, 512, model_type)
    assert config.model_type == model_type
    assert (config.max_position_embeddings, config.type_vocab_size, config.layer_norm_eps) == (514, 1, 1e-5)
    assert config.vocab_size == len(tokenizer)


def test_short_blocks_keep_514_positions(tokenizer):
    assert build_config({}, None, tokenizer, 128).max_position_embeddings == 514
    assert build_config({"max_position_embeddings": 130}, None, tokenizer, 128).max_position_embeddings == 130


@pytest.mark.parametrize(
    ("model_config", "length", "expected"),
    [
        ({"num_layers": 2}, 128, ["num_layers", "RobertaConfig", "did you mean `num_hidden_layers`?"]),
        ({3: 2}, 128, ["a field `3`"]),
        ({"vocab_size": 100}, 128, ["400 entries", "`vocab_size` is 100"]),
        ({"max_position_embeddings": 512}, 512, ["`max_seq_length` (512)", ">= 514", "got 512"]),
        ({}, 1024, ["`max_seq_length` (1024)", ">= 1026", "got 514"]),
        ({"hidden_size": 100, "num_attention_heads": 3}, 128, ["`hidden_size` (100)", "`num_attention_heads` (3)"]),
        ({"hidden_size": "wide"}, 128, ["model_config", "wide"]),
        ({"num_hidden_layers": 10**6}, 128, ["`num_hidden_layers` is 1000000", "1 to 256"]),
        ({"hidden_dropout_prob": float("nan")}, 128, ["`hidden_dropout_prob` is nan", "finite"]),
        ({"id2label": 3}, 128, ["model_config", "items"]),
        ({"pad_token_id": 0}, 128, ["pads with 1", "`pad_token_id` is 0; leave `pad_token_id` out"]),
    ],
)
def test_what_does_not_fit_is_named(tokenizer, model_config, length, expected):
    with pytest.raises(UserError) as caught:
        build_config(model_config, None, tokenizer, length)
    for part in expected:
        assert part in str(caught.value)


def test_missing_or_other_checkpoint_is_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no model there"):
        build_config({}, str(tmp_path / "nothing"), tokenizer, 128)
    for config in (BertConfig(), RobertaPreLayerNormConfig()):
        config.save_pretrained(tmp_path)
        kind = config.model_type
        with pytest.raises(UserError, match=f"is a {kind}, not a roberta; give `model_type: {kind}`"):
            build_config({}, str(tmp_path), tokenizer, 128)


def test_checkpoint_without_a_head_is_refused(tokenizer, tmp_path):
    config = RobertaConfig(**ROBERTA_DEFAULTS, **SMALL_MODEL, vocab_size=len(tokenizer))
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lacks weights of a RobertaForMaskedLM"):
        build_model(build_config({}, str(tmp_path), tokenizer, 128), str(tmp_path))


def test_checkpoint_comes_as_float32(tokenizer, tmp_path):
    config = RobertaConfig(**ROBERTA_DEFAULTS, **SMALL_MODEL, vocab_size=len(tokenizer))
    build_model(config, None).half().save_pretrained(tmp_path)
    model = build_model(build_config({}, str(tmp_path), tokenizer, 128), str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("model_type", ["roberta", "roberta-prelayernorm", "bert", "albert"])
def test_checkpoint_with_more_layers_than_its_config_is_refused(tokenizer, tmp_path, model_type):
    build_model(build_config(SMALL_MODEL, None, tokenizer, 128, model_type), None).save_pretrained(tmp_path)
    config = build_config({"num_hidden_layers": 1}, str(tmp_path), tokenizer, 128, model_type)
    if model_type == "albert":  # whose layers share their weights
        assert build_model(config, str(tmp_path)).config.num_hidden_layers == 1
        return
    with pytest.raises(UserError, match=r"no layers for, \['\w+.encoder.layer.1.*: correct `num_hidden_layers`"):
        build_model(config, str(tmp_path))


@pytest.mark.parametrize(
    ("positions", "max_seq_length", "length_before", "expected"),
    [
        (514, 128, 0, 128),  # new, with positions that were never trained
        (514, 512, 128, 512),  # of a tokenizer that cuts too much
        (130, 128, 512, 128),  # of one that cuts too little
        (130, 64, 10**30, 128),  # of one that cuts nothing
        (514, 128, 512, 512),  # trained further on short blocks
    ],
)
def test_tokenizer_cuts_to_what_the_model_can_read(positions, max_seq_length, length_before, expected):
    config = RobertaConfig(max_position_embeddings=positions)
    assert usable_length(config, max_seq_length, length_before) == expected
    assert usable_length(BertConfig(max_position_embeddings=512), 512, length_before) == 512


@pytest.mark.parametrize("objective", ["masked_lm", "next_sentence"])
@pytest.mark.parametrize(
    "config",
    [
        RobertaConfig(vocab_size=1000, **SMALL_MODEL, **ROBERTA_DEFAULTS),
        RobertaPreLayerNormConfig(vocab_size=1000, **SMALL_MODEL, **ROBERTA_DEFAULTS),
        BertConfig(vocab_size=1000, **SMALL_MODEL),
        AlbertConfig(vocab_size=1000, embedding_size=16, **SMALL_MODEL),
        AlbertConfig(vocab_size=1000, embedding_size=16, num_hidden_groups=2, inner_group_num=3, **SMALL_MODEL),
    ],
    ids=["roberta", "roberta-prelayernorm", "bert", "albert", "albert-groups"],
)
def test_flops_are_those_of_a_counter(config, objective):
    length, slots, predicts_pairs = 40, 6, objective == "next_sentence"  # 15 %
    with torch.device("meta"):
        module = OBJECTIVES[objective](build_model(config, None, predicts_pairs), slots / length)
        ids = torch.zeros(3, length, dtype=torch.long)
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):  # the counter knows matrix products
            sums, _ = module(ids, ids, ids, pair_label=ids[:, 0])
            sums.sum().backward()
    assert counter.get_total_flops() == pytest.approx(
        3 * length * model_flops_per_token(config, length, slots / length, predicts_pairs)
    )


@pytest.mark.parametrize("layers", [1, 12, 24])
def test_albert_base_has_its_size_whatever_its_depth(tokenizer, layers):
    config = build_config({"vocab_size": 30_000, "num_hidden_layers": layers}, None, tokenizer, 512, "albert")
    with torch.device("meta"):
        assert count_parameters(build_model(config, None, predicts_pairs=True)) / 1e6 == pytest.approx(11.81, abs=0.005)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"max_position_embeddings": 1026},
            r"position_embeddings.weight is 514 x 32, .* makes it 1026 x 32; a checkpoint",
        ),
        ({"intermediate_size": 128}, r"dense.bias is 64, .* makes it 128; a checkpoint keeps its sizes"),
    ],
)
def test_sizes_other_than_those_of_the_checkpoint_are_named(small_model, tokenizer, changes, expected):
    config = build_config(changes, str(small_model), tokenizer, 64)
    with pytest.raises(UserError, match=expected):
        build_model(config, str(small_model))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("hidden_act", "gelo", "`model_config` `hidden_act: gelo`: no model can be built: KeyError"),
        ("hidden_dropout_prob", 3.0, "`hidden_dropout_prob: 3.0`: no model can be built: ValueError: dropout prob"),
        ("layer_norm_eps", "a", "field 'layer_norm_eps'"),
    ],
)
def test_what_no_model_can_be_built_of_is_named_without_the_rest(name: str, value: object, expected: str):
    with pytest.raises(UserError) as caught:
        build_config({"num_hidden_layers": 2, "intermediate_size": 77, name: value}, None, None, 128)
    assert expected in str(caught.value)
    assert "intermediate_size" not in str(caught.value)
