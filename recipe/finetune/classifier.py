"""The model that is fine-tuned, and its tokenizer: any classifier of transformers, checked and tried before a job.

1. `load_glue_tokenizer` finds how many tokens the model reads, and what rows are padded with.
2. `load_classifier` loads the model with a new head; each job starts there.
3. `check_classifier` has it read two rows: what it cannot do is said before any job.
"""

import hashlib
import re

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recipe.base.errors import UserError, describe_error, require
from recipe.base.model_files import check_model_files, count_ids
from recipe.finetune.tasks.glue import Task
from recipe.modeling.model import LOADING, check_host_memory


def load_glue_tokenizer(
    name_or_path: str, max_seq_length: int, tokenizer_name: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; its `model_max_length` is what the model reads, and it has a token to pad with.

    Args:
        tokenizer_name: folder or hub id of the tokenizer; None if it lies beside the model.

    Raises:
        UserError: there is no model or no tokenizer, they do not match, the model reads fewer tokens, or is larger than
            this machine.
    """
    check_model_files("model_name_or_path", name_or_path, "model")
    if tokenizer_name:
        check_model_files("tokenizer_name", tokenizer_name, "tokenizer")
    place, lacking = f"`model_name_or_path` {name_or_path}", "no model there, or none that can be built"
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        lacking = "no tokenizer beside the model; give `tokenizer_name`"
        if tokenizer_name:
            place, lacking = f"`tokenizer_name` {tokenizer_name}", "no tokenizer there"
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or name_or_path, trust_remote_code=False)
        # Of no files the library makes a tokenizer of special tokens and, for some classes, the sign of a space.
        if len(tokenizer.get_vocab().keys() - tokenizer.all_special_tokens) < 2:
            raise FileNotFoundError("a vocabulary is in none of its files")
    except Exception as error:  # of one library or another
        raise UserError(f"{place}: {lacking}: {describe_error(error)}") from None
    check_host_memory(model, "model_name_or_path")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"{place}: its tokenizer has neither a pad token nor an end token to pad with; set one")
        tokenizer.pad_token = tokenizer.eos_token  # the usual choice for GPT-2 and its like, which see no padding
    num_ids = max(len(tokenizer), count_ids(tokenizer.get_vocab()))
    pads = {tokenizer.pad_token_id} if config.pad_token_id is None else {config.pad_token_id}
    if num_ids > config.vocab_size or tokenizer.pad_token_id not in pads:
        raise UserError(
            f"{place}: its tokenizer is another model's: {num_ids} entries, pad token {tokenizer.pad_token_id}; the "
            f"model has {config.vocab_size} and {config.pad_token_id}"
        )
    if (longest := longest_input(model)) is not None:
        remedy = f"the model reads {longest} tokens at the most: give that or less"
        require(max_seq_length <= longest, "max_seq_length", max_seq_length, remedy)
        # Of what is saved: a model that was trained on 128 of its 512 positions stays one of 128, if that is enough.
        tokenizer.model_max_length = max(max_seq_length, min(tokenizer.model_max_length, longest))
    return tokenizer


def longest_input(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model reads at the most; None if nothing limits them, as in T5 and XLNet.

    That is what its table of positions holds. RoBERTa and its descendants count positions from behind that of the pad
    token on, and some tables have rows that are of no use.
    """
    tables = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and re.fullmatch(r"wpe|.*position.*", name.rpartition(".")[2])
    ]
    # Some configs have no such field, and XLNet's says -1.
    stated = getattr(model.config, "max_position_embeddings", None) or 0
    return min([*tables, *([stated] if stated > 0 else [])], default=None)


def pad_rows(rows: BatchEncoding | dict[str, list[list[int]]], tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """Pad rows of ids to a multiple of 8 tokens, but to no more than the model reads: (rows, tokens) tensors."""
    longest = max(map(len, rows["input_ids"]))
    length = max(longest, min(-(-longest // 8) * 8, tokenizer.model_max_length))
    return tokenizer.pad(rows, padding="max_length", max_length=length, return_tensors="pt")


def load_classifier(
    name_or_path: str, task: Task, classifier_dropout: float | None = None, pad_token_id: int | None = None
) -> PreTrainedModel:
    """Load the model with a new head for the task, under torch's current seed.

    A head that is already in the checkpoint (an MNLI model's) is replaced, whatever its shape.

    Args:
        classifier_dropout: of the head; None for the model's own.
        pad_token_id: what rows are padded with, for a model whose config does not say it.

    Raises:
        UserError: the checkpoint cannot be loaded, or lacks weights of the encoder, or the head has no such dropout.
    """
    labels = task.labels or (f"similarity / {task.scale:g}",)
    config = AutoConfig.from_pretrained(
        name_or_path,
        trust_remote_code=False,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type="regression" if task.is_regression else "single_label_classification",
    )
    if classifier_dropout is not None:
        option = "classifier_dropout_prob" if config.model_type == "albert" else "classifier_dropout"
        remedy = f"a {config.model_type} has no dropout of that name in its head: leave it out"
        require(option in config.to_dict(), "classifier_dropout", classifier_dropout, remedy)
        setattr(config, option, classifier_dropout)
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name_or_path,
            config=config,
            ignore_mismatched_sizes=True,  # of a head that is replaced below
            output_loading_info=True,
            **LOADING,
        )
    except Exception as error:  # of one library or another
        raise UserError(f"`model_name_or_path` {name_or_path} cannot be loaded: {describe_error(error)}") from error
    prefix = f"{model.base_model_prefix}."
    # A masked language model has no pooler; one whose shape is wrong is an error.
    unusable = {name for name in loading["missing_keys"] if not name.startswith(f"{prefix}pooler")}
    unusable |= {name for name, *_ in loading["mismatched_keys"]}
    if lacking := sorted(name for name in unusable if name.startswith(prefix)):
        raise UserError(
            f"`model_name_or_path` {name_or_path} lacks weights of the encoder, or has them in another shape than its "
            f"config says: {', '.join(lacking[:3])}"
        )
    stacks = {match[0] for name in model.state_dict() if (match := re.match(r".*?\.layers?\.(?=\d)", name))}
    if unused := sorted(name for name in loading["unexpected_keys"] if name.startswith(tuple(stacks))):
        raise UserError(
            f"`model_name_or_path` {name_or_path} has weights that its config has no layers for: "
            f"{', '.join(unused[:3])}"
        )
    if any(not name.startswith(prefix) for name in model.state_dict().keys() - loading["missing_keys"]):
        new = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        for name, module in model.named_children():
            if module is not model.base_model:
                module.load_state_dict(new.get_submodule(name).state_dict())
    if config.pad_token_id is None:  # by it GPT-2's classifier finds the last token of a row
        model.config.pad_token_id = pad_token_id
    return model


def check_classifier(name_or_path: str, task: Task, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> str:
    """Try a model on a short and a long row of the tokenizer, and return the SHA-256 of its encoder's weights.

    Raises:
        UserError: as `load_classifier` does, or the model has no finite answer for such rows.
    """
    torch.manual_seed(0)  # for weights that the checkpoint does not have: a pooler's
    model = load_classifier(name_or_path, task, pad_token_id=tokenizer.pad_token_id).eval()
    texts = ["one", "one two " * max_seq_length]
    try:
        rows = tokenizer(*[texts] * len(task.columns), truncation=True, max_length=max_seq_length)
        with torch.no_grad():
            logits = model(**pad_rows(rows, tokenizer)).logits
        if logits.shape != (len(texts), model.config.num_labels) or not logits.isfinite().all():
            raise ValueError(f"its answer to {len(texts)} rows has the shape {list(logits.shape)}, or is not finite")
    except Exception as error:  # each model has its own
        raise UserError(
            f"`model_name_or_path` {name_or_path}: a {model.config.model_type} with this tokenizer cannot classify "
            f"{task.title} in rows of up to {max_seq_length} tokens: {describe_error(error)}; take another model"
        ) from error
    checksum = hashlib.sha256()
    for name, tensor in sorted(model.base_model.state_dict().items()):
        checksum.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return checksum.hexdigest()
