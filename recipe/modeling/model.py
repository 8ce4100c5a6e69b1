"""The model: built from a config or from a checkpoint, with its parameters and FLOPs counted."""

import os
import re
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    AlbertConfig,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from recipe.arguments.pretraining import first_position
from recipe.base.errors import UserError, describe_error, did_you_mean
from recipe.base.formatting import format_bytes
from recipe.base.model_files import check_model_files, check_numbers, count_ids

DECODER_FIELDS = {"is_decoder", "add_cross_attention", "use_cache"}  # of the config classes, and of no use here

# The released base models' values where the config class has others: BERT's in `RobertaConfig` and its pre-norm twin,
# those of the largest ALBERT in `AlbertConfig`.
ROBERTA_DEFAULTS = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
ALBERT_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
# Nothing in a file of weights may run: it is safetensors, or tensors and plain values alone.
LOADING: dict[str, Any] = {"dtype": "float32", "trust_remote_code": False, "weights_only": True}
DEFAULTS: dict[str, dict[str, Any]] = {
    "roberta": ROBERTA_DEFAULTS,
    "roberta-prelayernorm": ROBERTA_DEFAULTS,
    "bert": {},
    "albert": ALBERT_DEFAULTS,
}


def build_config(
    model_config: dict[str, Any],
    model_name_or_path: str | None,
    tokenizer: PreTrainedTokenizerFast | None,
    max_seq_length: int,
    model_type: str = "roberta",
) -> PreTrainedConfig:
    """Build the architecture from the released defaults or a checkpoint, the user's fields and the tokenizer's size.

    The user's fields go over the others. A plan made before there is a tokenizer has the released vocabulary's size.
    A `UserError` names what does not fit: a field, the type of the checkpoint, the tokenizer or the length.
    """
    check_fields(model_config, CONFIG_MAPPING[model_type])
    config = load_config(model_config, model_name_or_path, tokenizer, model_type)
    if config.model_type != model_type:
        remedy = f"; give `model_type: {config.model_type}`" if config.model_type in DEFAULTS else ""
        problem = f"is a {config.model_type}, not a {model_type}"
        raise UserError(f"`model_name_or_path` {model_name_or_path} {problem}{remedy}")
    if tokenizer is not None:
        check_tokenizer(config, tokenizer)
    check_sizes(config, model_name_or_path, max_seq_length)
    try:
        with torch.device("meta"):
            build_model(config, None, predicts_pairs=True)
    except Exception as error:  # of a library, which tells the value at the most
        problem = describe_error(error)
        named = [
            f" `{name}: {value}`"
            for name, value in model_config.items()
            if re.search(rf"\b{re.escape(str(value))}\b", problem)
        ]
        raise UserError(f"`model_config`{','.join(named)}: no model can be built: {problem}") from error
    return config


def check_fields(model_config: dict[str, Any], config_class: type[PreTrainedConfig]) -> None:
    """Refuse fields of `model_config` that the config class does not have, and numbers beyond all bounds."""
    if chosen := model_config.get("attn_implementation"):
        remedy = "leave it out: torch's scaled_dot_product_attention chooses the fastest kernel, flash attention too"
        raise UserError(f"`model_config` has `attn_implementation: {chosen}`; {remedy}")
    known = config_class().to_dict().keys() - DECODER_FIELDS
    for name in model_config:
        if name not in known:
            problem = f"a field `{name}` that {config_class.__name__} does not know"
            raise UserError(f"`model_config` has {problem}{did_you_mean(str(name), known)}")
    check_numbers("`model_config`", model_config)


def load_config(
    model_config: dict[str, Any], source: str | None, tokenizer: PreTrainedTokenizerFast | None, model_type: str
) -> PreTrainedConfig:
    """Read the config of the checkpoint `source`, or make one of the released defaults, under the user's fields."""
    if source is not None:
        check_model_files("model_name_or_path", source, "model")
    try:
        if source is not None:
            return AutoConfig.from_pretrained(source, trust_remote_code=False, **model_config)
        fitting: dict[str, Any] = {}
        if tokenizer is not None:
            fitting = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "pad", "eos")}
            fitting["vocab_size"] = count_ids(tokenizer.get_vocab())
        return CONFIG_MAPPING[model_type](**(DEFAULTS[model_type] | fitting | model_config))
    except OSError as error:
        raise UserError(f"`model_name_or_path` {source}: no model there, as a folder or on the hub: {error}") from None
    except Exception as error:  # of one library or another
        raise UserError(f"`model_config`: {describe_error(error)}") from error


def check_tokenizer(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer with higher ids than the model has rows for, or with another padding token."""
    num_ids = count_ids(tokenizer.get_vocab())
    gaps = f", with ids up to {num_ids - 1}" if num_ids > len(tokenizer) else ""
    for name, is_wrong, fact in (
        ("vocab_size", config.vocab_size < num_ids, f"has {len(tokenizer)} entries{gaps}"),
        ("pad_token_id", config.pad_token_id != tokenizer.pad_token_id, f"pads with {tokenizer.pad_token_id}"),
    ):
        if is_wrong:
            problem = f"the tokenizer {fact} and the model's `{name}` is {getattr(config, name)}"
            remedy = f"leave `{name}` out of `model_config`, or use the model's own tokenizer"
            raise UserError(f"{problem}; {remedy}")


def check_sizes(config: PreTrainedConfig, source: str | None, max_seq_length: int) -> None:
    """Refuse sizes of which no model can be made, and a sequence length for which it lacks positions."""
    if isinstance(config, AlbertConfig):
        groups, layers = config.num_hidden_groups, config.num_hidden_layers
        if groups > layers:
            problem = f"`num_hidden_groups` ({groups}) is more than `num_hidden_layers` ({layers})"
            raise UserError(f"`model_config`: {problem}; some groups would never be used")
    if config.type_vocab_size < 1:
        raise UserError(f"`model_config`: `type_vocab_size` is {config.type_vocab_size}; give 1 or more")
    width, heads, positions = config.hidden_size, config.num_attention_heads, config.max_position_embeddings
    if width % heads:
        raise UserError(f"`model_config`: `hidden_size` ({width}) is not a multiple of `num_attention_heads` ({heads})")
    if longest_sequence(config) < max_seq_length:
        if source:
            remedy = f"the model of `model_name_or_path` reads {longest_sequence(config)} tokens at the most: give that"
            raise UserError(f"`max_seq_length` is {max_seq_length}; {remedy} or less")
        needed = max_seq_length + positions - longest_sequence(config)
        problem = f"needs `max_position_embeddings` >= {needed}, got {positions}"
        raise UserError(f"`max_seq_length` ({max_seq_length}) {problem}")


def longest_sequence(config: PreTrainedConfig) -> int:
    """Return how many tokens a model has positions for."""
    return config.max_position_embeddings - first_position(config.model_type, config.pad_token_id)


def usable_length(config: PreTrainedConfig, max_seq_length: int, length_before: int = 0) -> int:
    """Return how many tokens a model can be given after training, which its tokenizer cuts longer texts to.

    Args:
        max_seq_length: of training; further positions of a new model are untrained.
        length_before: what the tokenizer of a pretrained model cut to; a number beyond all bounds if it did not.
    """
    return max(max_seq_length, min(length_before, longest_sequence(config)))


def build_model(
    config: PreTrainedConfig, model_name_or_path: str | None, predicts_pairs: bool = False
) -> PreTrainedModel:
    """Build a model with new float32 weights, drawn under torch's current seed, or with those of a checkpoint.

    A BERT or ALBERT has its pair head if it predicts pairs; a RoBERTa has none, and the objective adds it.
    A `UserError` says which weights the checkpoint lacks, or has in another shape.
    """
    classes = MODEL_FOR_PRETRAINING_MAPPING if predicts_pairs else MODEL_FOR_MASKED_LM_MAPPING
    model_class: Any = classes[type(config)]
    source = model_name_or_path
    if source is None:
        return model_class(config)
    try:
        model, loading = model_class.from_pretrained(
            source,
            config=config,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
            **LOADING,
        )
    except Exception as error:  # of one library or another
        raise UserError(f"`model_name_or_path` {source} cannot be loaded: {describe_error(error)}") from error
    if mismatched := sorted(loading["mismatched_keys"]):
        name, saved, wanted = mismatched[0]
        problem = f"{name} is {' x '.join(map(str, saved))}, and its config with `model_config` over it makes it "
        remedy = "a checkpoint keeps its sizes, that of its table of positions too: leave them out of `model_config`"
        raise UserError(f"`model_name_or_path` {source}: {problem}{' x '.join(map(str, wanted))}; {remedy}")
    if missing := sorted(loading["missing_keys"]):
        problem = f"lacks weights of a {model_class.__name__}: {missing[:3]}"
        raise UserError(f"`model_name_or_path` {source} {problem}")
    if unused := sorted(name for name in loading["unexpected_keys"] if ".encoder." in f".{name}"):
        problem = f"has weights that its config has no layers for, {unused[:3]}: correct `num_hidden_layers`"
        raise UserError(f"`model_name_or_path` {source} {problem}, or save the model without them")
    return model


def check_host_memory(model: nn.Module, name: str) -> None:
    """Refuse a model, built without contents, whose float32 weights this machine could not hold; `name` is the option.

    It says nothing of what training takes; it keeps a config from filling the memory before anything can be computed.
    """
    needed, memory = 4 * count_parameters(model), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        problem = f"the weights take {format_bytes(needed)}, and this machine has {format_bytes(memory)} of memory"
        raise UserError(f"`{name}`: {problem}; take a smaller model or a larger machine")


def count_parameters(model: nn.Module) -> int:
    """Count the parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def model_flops_per_token(
    config: PreTrainedConfig, length: int, predicted_share: float, predicts_pairs: bool = False
) -> float:
    """Count the FLOPs of forward and backward for one token of a row, in matrix products only (two a multiply-add).

    Args:
        config: the architecture.
        length: tokens in a row.
        predicted_share: share of the positions whose token is predicted; the head, and what only they need of the last
            layer, run nowhere else.
        predicts_pairs: whether a pooler and a pair head read the first position of a row too.
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
