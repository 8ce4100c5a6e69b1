"""Errors that the user can put right, and how they are worded."""

import difflib
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any


class UserError(ValueError):
    """Something that the user can mend; the message names the field or file, the value and the way out."""


@contextmanager
def report_user_errors() -> Iterator[None]:
    """End the script with the message alone, on stderr and with exit status 2, when the input was at fault."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def describe_error(error: Exception) -> str:
    """What a library says, as part of a message of ours."""
    if isinstance(error, UnpicklingError):  # whose message recommends to load it all the same
        return "it holds something else than tensors and plain values, or is damaged, and is not loaded"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def raising_damaged_file(file: object, remedy: str) -> Iterator[None]:
    """Turn what the contents of a damaged file make of the code that reads it into an error that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has its own
        raise UserError(f"{file} is damaged or missing ({describe_error(error)}); {remedy}") from error


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean `x`?` for the nearest of the known names, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def require(condition: bool, name: str, value: Any, remedy: str) -> None:
    """Raise a `UserError` about the field `name` unless the condition holds."""
    if not condition:
        raise UserError(f"`{name}` is {value}; {remedy}")
