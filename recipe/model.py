"""Build the model from a config or from a checkpoint, and count what it costs."""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from recipe.config import UserError, did_you_mean

NOT_FOR_MASKED_LM = {"is_decoder", "add_cross_attention", "use_cache"}
# The released models' values where `RobertaConfig` has BERT's.
ROBERTA_DEFAULTS = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}


def build_config(
    model_config: dict[str, Any],
    model_name_or_path: str | None,
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length: int,
) -> RobertaConfig:
    """The architecture: the released defaults or a checkpoint's, then the user's fields, then the tokenizer's size.

    Raises:
        UserError: a field that `RobertaConfig` does not have or take, a checkpoint that is no RoBERTa, a tokenizer or a
            length that does not fit.
    """
    if "attn_implementation" in model_config:
        raise UserError(
            f"`model_config` has `attn_implementation: {model_config['attn_implementation']}`; leave it out: attention "
            "is torch's scaled_dot_product_attention, which takes the fastest kernel there is, flash attention too"
        )
    known = RobertaConfig().to_dict().keys() - NOT_FOR_MASKED_LM
    for name in model_config:
        if name not in known:
            raise UserError(
                f"`model_config` has a field `{name}` that RobertaConfig does not know{did_you_mean(name, known)}"
            )
    try:
        if model_name_or_path is None:
            ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "pad", "eos")}
            config = RobertaConfig(**(ROBERTA_DEFAULTS | {"vocab_size": len(tokenizer)} | ids | model_config))
        else:
            config = AutoConfig.from_pretrained(model_name_or_path, **model_config)
    except OSError as error:
        raise UserError(
            f"`model_name_or_path` {model_name_or_path}: no model there, as a folder or on the hub: {error}"
        ) from None
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"`model_config` {model_config}: {' '.join(str(error).split())}") from None
    if not isinstance(config, RobertaConfig):
        raise UserError(f"`model_name_or_path` {model_name_or_path} is a {config.model_type}, not a roberta")
    if config.vocab_size < len(tokenizer):
        raise UserError(
            f"the tokenizer has {len(tokenizer)} entries and the model's `vocab_size` is {config.vocab_size}; "
            "leave `vocab_size` out of `model_config`, or use the model's own tokenizer"
        )
    if config.pad_token_id != tokenizer.pad_token_id:
        raise UserError(
            f"the tokenizer pads with {tokenizer.pad_token_id} and the model's `pad_token_id` is {config.pad_token_id}"
        )
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "type_vocab_size"):
        if getattr(config, name) < 1:
            raise UserError(f"`model_config`: `{name}` is {getattr(config, name)}; give 1 or more")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"`model_config`: `hidden_size` ({config.hidden_size}) is not a multiple of `num_attention_heads` "
            f"({config.num_attention_heads})"
        )
    needed = max_seq_length + config.pad_token_id + 1  # positions start behind the pad token's
    if config.max_position_embeddings < needed:
        raise UserError(
            f"`max_seq_length` ({max_seq_length}) needs `max_position_embeddings` >= {needed}, "
            f"got {config.max_position_embeddings}"
        )
    try:
        with torch.device("meta"):
            RobertaForMaskedLM(config)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"`model_config` {model_config}: no model can be built: {error}") from None
    return config


def build_model(config: RobertaConfig, model_name_or_path: str | None) -> RobertaForMaskedLM:
    """New float32 weights under torch's current seed, or those of a checkpoint.

    Raises:
        UserError: the checkpoint has no weights, lacks some, or has them in another shape.
    """
    if model_name_or_path is None:
        return RobertaForMaskedLM(config)
    try:
        model, loading = RobertaForMaskedLM.from_pretrained(
            model_name_or_path, config=config, dtype="float32", output_loading_info=True
        )
    except (OSError, RuntimeError) as error:
        raise UserError(f"`model_name_or_path` {model_name_or_path} cannot be loaded: {error}") from None
    if loading["missing_keys"]:
        raise UserError(
            f"`model_name_or_path` {model_name_or_path} lacks weights of a masked language model: "
            f"{sorted(loading['missing_keys'])[:3]}"
        )
    return model


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def model_flops_per_token(config: RobertaConfig, length: int, predicted_share: float) -> float:
    """FLOPs of forward and backward for one token of a row, matrix products only (two a multiply-add).

    Args:
        config: the architecture.
        length: tokens in a row.
        predicted_share: share of the positions whose token is predicted; the head, and what only they need of the last
            layer, run nowhere else.
    """
    hidden = config.hidden_size
    key_value = 2 * hidden * hidden
    rest = 2 * hidden * hidden + 2 * hidden * config.intermediate_size + 2 * length * hidden
    layers = config.num_hidden_layers * key_value + (config.num_hidden_layers - 1 + predicted_share) * rest
    head = predicted_share * (hidden * hidden + hidden * config.vocab_size)
    return 3 * 2 * (layers + head)
