"""Files that are complete or absent, YAML, and what the disk has room for."""

import os
from pathlib import Path
from typing import Any

import yaml

from recipe.base.errors import UserError, raising_damaged_file


def read_yaml(file: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: no file of names and values.
    """
    with raising_damaged_file(file, "mend it, or take another folder"):
        values = yaml.safe_load(file.read_text())
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise ValueError("not names with values")
    return values


def is_path(name: str) -> bool:
    """Whether the system takes it."""
    try:
        parts = [os.fsencode(part) for part in name.split("/")]
    except UnicodeEncodeError:
        return False
    return "\0" not in name and max(map(len, parts)) < 256 and len(os.fsencode(name)) < 4096


def nearest_existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in [path, *path.absolute().parents] if folder.exists())


def check_output_dir(path: Path) -> None:
    """
    Raises:
        UserError: there is a file of that name, or no right to write.
    """
    there = nearest_existing_parent(path)
    if not there.is_dir():
        raise UserError(f"`output_dir` {path}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise UserError(f"`output_dir` {path}: {there} cannot be written")


def to_yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have a file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
