"""The tokenizer of a run: loaded from a folder or the hub, and what of it encodes text."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from recipe.base.errors import UserError, describe_error
from recipe.base.model_files import LARGEST, check_model_files, count_ids

ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # `<mask>` comes after the merges
MASK_TOKEN = AddedToken("<mask>", lstrip=True, rstrip=False, normalized=False, special=True)
UNWRITTEN = "\U0010ffff" * 8  # no character, and in no text
NAME_CLASS = "load it by its class and `save_pretrained` it, for the tokenizer_config.json that is missing"


def load_tokenizer(name_or_path: str, option: str = "tokenizer_name") -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from a folder or the hub; raise a `UserError` if it cannot serve masked language modelling.

    RoBERTa's needs no more than its `tokenizer.json`, or `vocab.json` and `merges.txt`. `option` named it.
    """
    field = f"`{option}` is {name_or_path}"
    folder = check_model_files(option, name_or_path, "tokenizer")
    try:
        if any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json")):
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        else:
            tokenizer = load_bare_tokenizer(folder)
    except UserError as error:
        raise UserError(f"{field}, {error}") from None
    except Exception as error:  # of one library or another
        problem = f"no tokenizer can be loaded from there; make one by train_tokenizer.py ({describe_error(error)})"
        raise UserError(f"{field}, and {problem}") from None
    if len(tokenizer) == len(tokenizer.all_special_ids):
        # What transformers makes of a folder with a config and no vocabulary.
        raise UserError(f"{field}, and no vocabulary is there, only {len(tokenizer)} special tokens")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{field}, which is not a fast tokenizer; save it with a tokenizer.json")
    check_ids(field, tokenizer.get_vocab())
    for name in ("cls_token", "sep_token", "pad_token", "mask_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"{field}, and it has no `{name}`, which the blocks need; add it or take another tokenizer")
    check_roles(field, tokenizer)
    tokenizer.backend_tokenizer.no_truncation()  # some tokenizers come with truncation or padding switched on
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def load_bare_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer whose files do not name its class, if it is RoBERTa's.

    Raises:
        UserError: it is another, or there is none.
    """
    file = folder / "tokenizer.json"
    if not file.is_file() and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        problem = "and no tokenizer.json is there, nor vocab.json with merges.txt; make one by train_tokenizer.py, or"
        raise UserError(f"{problem} {NAME_CLASS}")
    options: dict[str, Any] = {"mask_token": MASK_TOKEN}
    tokenizer = RobertaTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    loaded = json.loads(tokenizer.backend_tokenizer.to_str())
    saved = json.loads(Tokenizer.from_file(str(file)).to_str()) if file.is_file() else loaded
    is_alike = all(saved[part] == loaded[part] for part in ("normalizer", "pre_tokenizer"))
    if not is_alike or saved["model"]["type"] != "BPE" or set(ROBERTA_TOKENS) - saved["model"]["vocab"].keys():
        tokens = ", ".join(ROBERTA_TOKENS)
        raise UserError(f"and is no byte-level BPE with {tokens}, as RoBERTa's without a class's name is; {NAME_CLASS}")
    return tokenizer


def check_ids(field: str, vocab: dict[str, int]) -> None:
    """Raise a `UserError` if two tokens have one id, or if ids are so high that no table of embeddings has them."""
    if (num_ids := count_ids(vocab)) > LARGEST[""]:
        raise UserError(f"{field}, whose ids go up to {num_ids - 1:,}; renumber them below {LARGEST['']:,}")
    tokens = {index: token for token, index in vocab.items()}
    for token, index in vocab.items():
        if tokens[index] != token:
            raise UserError(
                f"{field}, in which {token} and {tokens[index]} have one id, {index}: the library numbers added tokens "
                "from the size of the vocabulary on, which has gaps here; write each added token, with its id, into "
                "`model.vocab` of tokenizer.json too"
            )


def check_roles(field: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer with which a model would be used on other rows than those that it is trained on.

    Raises:
        UserError: padding or the mask is also another token with a role, so that models take that for padding; or what
            the tokenizer itself puts around a text is not its `cls_token` and `sep_token`, as in a block.
    """
    ids = {name: getattr(tokenizer, f"{name}_id") for name in ("pad_token", "mask_token", "cls_token", "sep_token")}
    for name in ("pad_token", "mask_token"):
        if twins := [other for other in ids if other != name and ids[other] == ids[name]]:
            raise UserError(
                f"{field}, whose `{name}` {getattr(tokenizer, name)} is its `{twins[0]}` too; give it another"
            )
    row = tokenizer("a", verbose=False)["input_ids"]
    around = tokenizer.num_special_tokens_to_add(), tokenizer.num_special_tokens_to_add(pair=True)
    if [*row[:1], *row[-1:]] != [ids["cls_token"], ids["sep_token"]] or around not in ((2, 3), (2, 4)):
        written, wanted = (
            " ".join(tokenizer.convert_ids_to_tokens(row)),
            f"{tokenizer.cls_token} … {tokenizer.sep_token}",
        )
        raise UserError(
            f"{field}, which makes {written!r} of 'a' and not {wanted}, as blocks are: give it a post-processor "
            "(`TemplateProcessing` of the library tokenizers, for one text and for two), and save it again"
        )


def role_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the tokens with a role: bos, cls, sep, eos, pad, unk, mask. These alone are never predicted."""
    roles = {getattr(tokenizer, f"{name}_id") for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    return sorted(index for index in roles if index is not None)


def build_text_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Copy what encodes text so that a token with a role stays text where a document spells it.

    All others, also special tokens that users have added (`<url>`), keep their ids. `encode_special_tokens`, which is
    to be set on the copy, spares special tokens. Models other than BPE find what is in their vocabulary in the text
    nevertheless, so that tokens with a role have names there that no text has. Nothing is cut or padded, though a call
    of the tokenizer leaves that switched on.
    """
    state, roles = json.loads(tokenizer.backend_tokenizer.to_str()), role_ids(tokenizer)
    state["truncation"] = state["padding"] = None
    model, names = state["model"], {}
    if model["type"] != "BPE" or model["ignore_merges"]:
        names = {tokenizer.convert_ids_to_tokens(index): f"{UNWRITTEN}{index}" for index in roles}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [(names.get(token, token), score) for token, score in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    for token in state["added_tokens"]:
        token["special"] = token["id"] in roles
        token["content"] = names.get(token["content"], token["content"])
    return Tokenizer.from_str(json.dumps(state))


def tokenizer_checksum(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of everything that decides a text's ids."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
