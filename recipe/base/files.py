"""Files and folders that are complete or absent, YAML, and free disk space. All text is UTF-8, whatever the locale."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from recipe.base.errors import UserError, raising_damaged_file
from recipe.base.formatting import format_bytes


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML file of names and values; raise a `UserError` if it is missing or holds something else."""
    with raising_damaged_file(file, "correct it, or name another folder"):
        values = yaml.safe_load(file.read_text("utf-8"))
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise ValueError("not names with values")
    return values


def to_yaml(values: dict[str, Any]) -> str:
    """Write names and values as YAML, in their order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def is_path(name: str) -> bool:
    """Tell whether the operating system accepts the name as a path."""
    try:
        path = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return b"\0" not in path and len(path) < 4096 and max(map(len, path.split(b"/"))) < 256


def nearest_existing_parent(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(folder for folder in [path, *path.absolute().parents] if folder.exists())


def check_output_dir(path: Path) -> None:
    """Raise a `UserError` unless the output folder exists or can be created, and this user may write there."""
    folder = nearest_existing_parent(path)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        problem = "cannot be written" if folder.is_dir() else "is a file"
        raise UserError(f"`output_dir` {path}: {folder} {problem}; name another folder")


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds the path, or will hold it once it exists."""
    return shutil.disk_usage(nearest_existing_parent(path)).free


def check_free_space(folder: Path, needed_bytes: float, contents: str, remedy: str) -> str:
    """Describe what will be written to a folder beside its free space, such as `2 files in runs/x, 3 GB free`.

    The folder need not exist yet. The needed bytes are those that the contents take in addition to what is there.

    Raises:
        UserError: the contents do not fit; it ends with the remedy.
    """
    free = free_bytes(folder)
    text = f"{contents} in {folder}, {format_bytes(free)} free"
    if needed_bytes > free:
        raise UserError(f"{text}; {remedy}")
    return text


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, from the cache of the operating system to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file written there replaces `path` at the end of the block.

    Readers see the old file or the new one, never half of it, even after a power cut. If the block raises, the old file
    stays and the temporary one is removed. Processes of one machine may replace the same file at the same time.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by one with this text; readers see the old file or the new one, never half of it."""
    with replace_file(path) as temporary:
        temporary.write_text(text, "utf-8")


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`, which takes its place at the end of the block.

    The folder is complete or absent, even after a power cut: a process that is killed leaves at most a hidden folder,
    `.name`, that the next call removes. If the block raises, the old folder stays and the temporary one is removed.
    Only one process may replace a folder at a time.
    """
    temporary, old = (folder.with_name(f".{folder.name}{suffix}") for suffix in ("", ".old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if folder.exists():
            folder.rename(old)  # takes no time, unlike the removal
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
