"""Build the model from a config or from a checkpoint, and count what it costs."""

import math
from typing import Any

import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForPreTraining,
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from recipe.arguments.checks import NUMBER_LIMIT
from recipe.arguments.pretraining import first_position
from recipe.base.errors import UserError, describe_error, did_you_mean

NOT_FOR_MASKED_LM = {"is_decoder", "add_cross_attention", "use_cache"}
MOST_LAYERS = 256  # a model is built, without contents, before anything else is done


# The released base models' values where the config class has others: BERT's in `RobertaConfig`, those of the largest
# ALBERT in `AlbertConfig`.
ROBERTA_DEFAULTS = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
ALBERT_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
CONFIGS = {"roberta": RobertaConfig, "bert": BertConfig, "albert": AlbertConfig}
DEFAULTS = {"roberta": ROBERTA_DEFAULTS, "bert": {}, "albert": ALBERT_DEFAULTS}
# Without and with a pair head; what RoBERTa does not have the objective adds.
MODELS = {
    "roberta": (RobertaForMaskedLM, RobertaForMaskedLM),
    "bert": (BertForMaskedLM, BertForPreTraining),
    "albert": (AlbertForMaskedLM, AlbertForPreTraining),
}


def build_config(
    model_config: dict[str, Any],
    model_name_or_path: str | None,
    tokenizer: PreTrainedTokenizerFast | None,
    max_seq_length: int,
    model_type: str = "roberta",
) -> PreTrainedConfig:
    """The architecture: the released defaults or a checkpoint's, then the user's fields, then the tokenizer's size.

    Args:
        tokenizer: None for a plan made before there is one, with the released vocabulary's size.

    Raises:
        UserError: a field that the config class does not have or take, a checkpoint of another type, a tokenizer or a
            length that does not fit.
    """
    config_class = CONFIGS[model_type]
    if "attn_implementation" in model_config:
        raise UserError(
            f"`model_config` has `attn_implementation: {model_config['attn_implementation']}`; leave it out: attention "
            "is torch's scaled_dot_product_attention, which takes the fastest kernel there is, flash attention too"
        )
    known = config_class().to_dict().keys() - NOT_FOR_MASKED_LM
    for name in model_config:
        if name not in known:
            raise UserError(
                f"`model_config` has a field `{name}` that {config_class.__name__} does not know"
                f"{did_you_mean(str(name), known)}"
            )
        if isinstance(model_config[name], float) and not math.isfinite(model_config[name]):
            raise UserError(f"`model_config`: `{name}` is {model_config[name]}; give a finite number")
    try:
        if model_name_or_path is None:
            fitting = {}
            if tokenizer is not None:
                fitting = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "pad", "eos")}
                fitting["vocab_size"] = len(tokenizer)
            config = config_class(**(DEFAULTS[model_type] | fitting | model_config))
        else:
            config = AutoConfig.from_pretrained(model_name_or_path, **model_config)
    except OSError as error:
        raise UserError(
            f"`model_name_or_path` {model_name_or_path}: no model there, as a folder or on the hub: {error}"
        ) from None
    except Exception as error:  # of one library or another
        raise UserError(f"`model_config` {model_config}: {describe_error(error)}") from error
    if config.model_type != model_type:
        remedy = f"; give `model_type: {config.model_type}`" if config.model_type in CONFIGS else ""
        raise UserError(
            f"`model_name_or_path` {model_name_or_path} is a {config.model_type}, not a {model_type}{remedy}"
        )
    if tokenizer is not None and config.vocab_size < len(tokenizer):
        raise UserError(
            f"the tokenizer has {len(tokenizer)} entries and the model's `vocab_size` is {config.vocab_size}; "
            "leave `vocab_size` out of `model_config`, or use the model's own tokenizer"
        )
    if tokenizer is not None and config.pad_token_id != tokenizer.pad_token_id:
        raise UserError(
            f"the tokenizer pads with {tokenizer.pad_token_id} and the model's `pad_token_id` is {config.pad_token_id}"
        )
    sizes = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "type_vocab_size"]
    if model_type == "albert":
        sizes += ["embedding_size", "num_hidden_groups", "inner_group_num"]
        if config.num_hidden_groups > config.num_hidden_layers:
            raise UserError(
                f"`model_config`: `num_hidden_groups` ({config.num_hidden_groups}) is more than `num_hidden_layers` "
                f"({config.num_hidden_layers}); some would never be used"
            )
    for name in sizes:
        most = MOST_LAYERS if name.endswith(("_layers", "_groups", "_num")) else NUMBER_LIMIT
        if not 1 <= getattr(config, name) <= most:
            raise UserError(f"`model_config`: `{name}` is {getattr(config, name)}; give 1 to {most}")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"`model_config`: `hidden_size` ({config.hidden_size}) is not a multiple of `num_attention_heads` "
            f"({config.num_attention_heads})"
        )
    needed = max_seq_length + first_position(model_type, config.pad_token_id)
    if config.max_position_embeddings < needed:
        raise UserError(
            f"`max_seq_length` ({max_seq_length}) needs `max_position_embeddings` >= {needed}, "
            f"got {config.max_position_embeddings}"
        )
    try:
        with torch.device("meta"):
            MODELS[model_type][1](config)
    except Exception as error:
        raise UserError(f"`model_config` {model_config}: no model can be built: {describe_error(error)}") from error
    return config


def build_model(
    config: PreTrainedConfig, model_name_or_path: str | None, predicts_pairs: bool = False
) -> PreTrainedModel:
    """New float32 weights under torch's current seed, or those of a checkpoint.

    Args:
        predicts_pairs: whether a BERT or ALBERT has its pair head.

    Raises:
        UserError: the checkpoint has no weights, lacks some, or has them in another shape.
    """
    model_class = MODELS[config.model_type][predicts_pairs]
    if model_name_or_path is None:
        return model_class(config)
    try:
        model, loading = model_class.from_pretrained(
            model_name_or_path, config=config, dtype="float32", output_loading_info=True
        )
    except Exception as error:  # of one library or another
        problem = f"cannot be loaded: {describe_error(error)}"
        raise UserError(f"`model_name_or_path` {model_name_or_path} {problem}") from error
    if loading["missing_keys"]:
        raise UserError(
            f"`model_name_or_path` {model_name_or_path} lacks weights of a {model_class.__name__}: "
            f"{sorted(loading['missing_keys'])[:3]}"
        )
    return model


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def model_flops_per_token(
    config: PreTrainedConfig, length: int, predicted_share: float, predicts_pairs: bool = False
) -> float:
    """FLOPs of forward and backward for one token of a row, matrix products only (two a multiply-add).

    Args:
        config: the architecture.
        length: tokens in a row.
        predicted_share: share of the positions whose token is predicted; the head, and what only they need of the last
            layer, run nowhere else.
        predicts_pairs: whether the first position of a row is read, too, by a pooler and a pair head.
    """
    hidden, embedding, layers, to_hidden = config.hidden_size, config.hidden_size, config.num_hidden_layers, 0
    if isinstance(config, AlbertConfig):
        embedding, layers = config.embedding_size, layers * config.inner_group_num
        to_hidden = embedding * hidden
    rows = predicts_pairs / length  # a token's share of what is done once a row
    key_value = 2 * hidden * hidden
    rest = 2 * hidden * hidden + 2 * hidden * config.intermediate_size + 2 * length * hidden
    encoder = to_hidden + layers * key_value + (layers - 1 + predicted_share + rows) * rest
    head = predicted_share * (hidden * embedding + embedding * config.vocab_size)
    pair_head = rows * (hidden * hidden + 2 * hidden)
    return 3 * 2 * (encoder + head + pair_head)
