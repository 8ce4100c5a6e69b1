"""Files of a model or a tokenizer that somebody else may have made, checked before a library loads them.

The libraries do as these files say: import code that lies beside them, fetch another repository or a kernel, and build
as many layers as a number asks for.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe.base.errors import UserError, describe_error, raising_damaged_file
from recipe.base.files import JSON_BYTES, read_json
from recipe.base.formatting import format_bytes

VOCABULARY_BYTES = 2**28  # a vocabulary of 256,000 entries takes 34 MB
FILE_BYTES = {"config.json": JSON_BYTES, "tokenizer_config.json": JSON_BYTES, "adapter_config.json": JSON_BYTES}
FILE_BYTES |= dict.fromkeys(("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"), VOCABULARY_BYTES)
# The largest whole number for the first of these patterns that a field's name has. What is built one by one, in Python,
# takes time and memory before anything has a size; other numbers are sizes of tensors, or ids.
LARGEST = {r"group_num$": 4, r"(layers?|groups?|blocks?)$": 256, r"(experts|labels)$": 2**12, "": 2**24}
# Without these a model has no layer, or none with a number in it.
POSITIVE = {"num_hidden_layers", "num_hidden_groups", "inner_group_num", "num_attention_heads"}
POSITIVE |= {"hidden_size", "intermediate_size", "embedding_size", "vocab_size"}
# Fields of a config, and why a model that has them is refused.
REFUSED = {
    "auto_map": "names code of its repository, which is never run; take a model or tokenizer of a class in "
    "transformers, or remove the field if it is one",
    "quantization_config": "has quantized weights, which cannot be trained; take the model that was quantized",
}
# Other implementations than torch's can be kernels that are fetched from the hub and run.
IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation(_internal)?")


def count_ids(vocab: Mapping[str, int]) -> int:
    """Return how many rows a table has that is indexed by the ids of a vocabulary, also one with gaps among its ids."""
    return 1 + max(vocab.values())


def check_model_files(field: str, name_or_path: str, kind: str) -> Path:
    """Refuse a model or tokenizer that would run code, load another repository, or be larger than any machine.

    Args:
        field: option that names it.
        name_or_path: folder, or id on the hub, of which only the files checked here are downloaded.
        kind: `model` or `tokenizer`.

    Returns:
        the folder where the files are.

    Raises:
        UserError: it is refused, a file is damaged, or nothing is there.
    """
    place = f"`{field}` is {name_or_path}"
    folder = find_folder(place, name_or_path, kind)
    if kind == "model" and not (folder / "config.json").is_file():
        where = describe_run_path(folder) or "in a folder without a config.json"
        raise UserError(f"{place}: no model there, {where}; name another")
    for name, limit in FILE_BYTES.items():
        file = folder / name
        if not file.is_file():
            continue
        if (size := file.stat().st_size) > limit:
            raise UserError(
                f"`{field}`: {file} has {format_bytes(size)}, and no more than {format_bytes(limit)} is read"
            )
        if name == "adapter_config.json":
            remedy = "merge it into the model that it adapts, and give that"
            raise UserError(f"`{field}`: {file} makes {name_or_path} an adapter, which is not loaded; {remedy}")
        if name.endswith("config.json"):
            with raising_damaged_file(f"`{field}`: {file}", f"take another {kind}"):
                values = read_json(file)
                if not isinstance(values, dict):
                    raise ValueError("not names with values")
                check_fields(f"`{field}`: {file}", values)
                if name == "config.json":
                    check_numbers(f"`{field}`: {file}", values)
    return folder


def find_folder(place: str, name_or_path: str, kind: str) -> Path:
    """Return the folder of a model or tokenizer: that of its path, or that of the hub's cache."""
    path = Path(name_or_path)
    remedy = "make one by train_tokenizer.py" if kind == "tokenizer" else "name another"
    if path.is_dir():
        return path
    if where := describe_run_path(path):
        raise UserError(f"{place}: no {kind} there, {where}; name another")
    if path.is_file() or path.is_absolute() or len(path.parts) > 2 or (path.parent.is_dir() and len(path.parts) == 2):
        # No id of a repository, or one of a user whose name a folder here has: asking the hub takes its time.
        problem = (
            "it is a file; name its folder" if path.is_file() else f"there is no such folder; correct it, or {remedy}"
        )
        raise UserError(f"{place}: no {kind} there: {problem}")
    from huggingface_hub import constants, snapshot_download  # takes longer than answering `--help`

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=list(FILE_BYTES)))
    except Exception as error:  # of the network, the hub, the cache or for a name that no repository has
        if constants.HF_HUB_OFFLINE:
            remedy = f"HF_HUB_OFFLINE is set: unset it, name a folder, or {remedy}"
        problem = f"no {kind} there, as a folder or on the hub; {remedy} ({describe_error(error)})"
        raise UserError(f"{place}: {problem}") from None


def describe_run_path(path: Path) -> str:
    """Say of which run a path is, and where its models are; an empty string for a path that is of none."""
    run = next((folder for folder in [path, *path.parents[:2]] if (folder / "status.json").is_file()), None)
    if run is None:
        return ""
    with raising_damaged_file(run / "status.json", "name another folder"):
        state = read_json(run / "status.json")["state"]
    found = [*sorted(run.glob("checkpoints/step-*")), *sorted(run.glob("averages/step-*")), run / "model"]
    models = [folder for folder in found if folder.is_dir()]
    return f"in the run {run}, which is {state} and has {', '.join(map(str, models)) or 'no checkpoint yet'}"


def check_fields(place: str, values: dict[str, Any]) -> None:
    """Refuse fields of a config, or of a part of it, by which the library would run or fetch something else."""
    for name, value in values.items():
        if isinstance(value, dict):
            check_fields(place, value)
        if name in REFUSED and value:
            raise UserError(f"{place} {REFUSED[name].replace(' ', f' (`{name}`) ', 1)}")
        if IMPLEMENTATIONS.fullmatch(name) and value not in (None, "eager", "sdpa"):
            problem = f"has `{name}: {value!r:.100}`, which may be a kernel that is fetched and run"
            raise UserError(f"{place} {problem}; remove the field")


def check_numbers(place: str, values: Any, name: str = "") -> None:
    """Refuse numbers of a config, or of a part of it, that are not finite or with which nothing could be built."""
    parts = values.items() if isinstance(values, dict) else [(name, part) for part in values]
    for field, value in parts:
        if isinstance(value, dict | list):
            check_numbers(place, value, field)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{place}: `{field}` is {value}; give a finite number")
        elif isinstance(value, int):
            most = next(most for pattern, most in LARGEST.items() if re.search(pattern, str(field)))
            least = int(field in POSITIVE)
            # A negative one stands for none in some fields of the library, and -100 for a label that is ignored.
            if not (least or -100) <= value <= most:
                raise UserError(f"{place}: `{field}` is {value!r:.100}; give {least} to {most:,}")
