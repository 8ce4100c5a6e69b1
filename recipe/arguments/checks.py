"""What the dataclasses have in common: fields that define the experiment, and checks of single values."""

import math
from dataclasses import asdict, field, fields
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from recipe.base.errors import UserError, require
from recipe.base.files import is_path


def identity(**kwargs: Any) -> Any:
    """A dataclass field that must not change between a checkpoint and its resume."""
    return field(metadata={"identity": True}, **kwargs)


# Fields that name a file or folder, or may.
PATHS = {"output_dir", "path", "tokenizer_name", "model_name_or_path", "token_store_dir", "resume_from_checkpoint"}
PATHS |= {"glue_dir", "decontaminate_against"}
LARGEST = 2**48  # that a number may be, to be reckoned with in no time and without overflow


def check_values(arguments: Any) -> None:
    """
    Raises:
        UserError: a number that is not finite, or larger than anything that is meant; a path that none can be.
    """
    for f in fields(arguments):
        value = getattr(arguments, f.name)
        if isinstance(value, int | float) and f.name != "seed":
            require(abs(value) < LARGEST, f.name, value, "give a number below 2**48")
        if f.name in PATHS:
            for path in value if isinstance(value, list) else [value]:
                require(path is None or is_path(path), f.name, f"{path!r:.100}", "no path can be that; name another")


def divisors(number: int) -> list[int]:
    """Ascending; of 0 none."""
    small = [n for n in range(1, math.isqrt(number) + 1) if not number % n]
    return sorted({*small, *(number // n for n in small)})


def check_repo_id(name: str, repo_id: str) -> None:
    """
    Raises:
        UserError: no name that a repository on the hub can have.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"`{name}` is {repo_id!r}; write user/name or organisation/name. {error}") from None


def identity_of(arguments: Any) -> dict[str, Any]:
    """The values of the fields that define the experiment."""
    values = asdict(arguments)
    return {f.name: values[f.name] for f in fields(arguments) if f.metadata.get("identity")}
