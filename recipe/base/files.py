"""Files and folders that are complete or absent, YAML, JSON and free disk space. All text is UTF-8."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from recipe.base.errors import UserError, raising_damaged_file
from recipe.base.formatting import format_bytes

YAML_BYTES, YAML_DEPTH = 2**20, 50  # of a file, and of lists and mappings in each other
JSON_BYTES = 2**24  # of a file that is no vocabulary


def read_text(file: Path, limit: int) -> str:
    """Read a file; raise a ValueError, without reading it, if it has more bytes than the limit."""
    if (size := file.stat().st_size) > limit:
        raise ValueError(f"{format_bytes(size)}, and no more than {format_bytes(limit)} is read")
    return file.read_text("utf-8")


def read_json(file: Path) -> Any:
    """Read a JSON file, of at most 16 MB; raise a ValueError, OSError or RecursionError if that fails."""
    return json.loads(read_text(file, JSON_BYTES))


def check_yaml(text: str) -> str:
    """Return a YAML text that takes no more memory than itself and no deep stack to load.

    Raises:
        ValueError: it nests more than 50 lists and mappings in each other, which crashes the loader, or repeats a part
            by an alias, which is how a small text stands for a huge one. What is no YAML at all is a `YAMLError`.
    """
    depth = 0
    # Events come one at a time, from a parser that keeps its depth in a list.
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > YAML_DEPTH:
            raise ValueError(f"more than {YAML_DEPTH} lists and mappings in each other; write it flatter")
        if depth and isinstance(event, yaml.AliasEvent):
            raise ValueError(f"the alias *{event.anchor}; write out what it stands for, or put it in quotes")
    return text


def read_yaml_text(file: Path) -> str:
    """Read a YAML file, of at most 1 MB, that `check_yaml` lets pass; raise a ValueError, OSError or YAMLError."""
    return check_yaml(read_text(file, YAML_BYTES))


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML file of names and values; raise a `UserError` if it is missing or holds something else."""
    with raising_damaged_file(file, "correct it, or name another folder"):
        values = yaml.safe_load(read_yaml_text(file))
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise ValueError("not names with values")
    return values


class PlainDumper(yaml.SafeDumper):
    """A dumper that writes a value as often as it occurs, since aliases are not read."""

    def ignore_aliases(self, data: Any) -> bool:
        """Say that no value gets an alias."""
        return True


def to_yaml(values: dict[str, Any]) -> str:
    """Write names and values as YAML, in their order."""
    return yaml.dump(values, Dumper=PlainDumper, sort_keys=False, allow_unicode=True, width=120)


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


def check_output_dir(path: Path, option: str = "output_dir") -> None:
    """Raise a `UserError` about an option unless its folder exists or can be created, and this user may write there.

    It is tried in a hidden folder, which is removed again. Several processes may try at the same time.
    """
    try:
        for link in [path.absolute(), *path.absolute().parents]:
            if link.is_symlink() and not link.exists():
                problem = f"{link} is a link to {os.readlink(link)}, which does not exist; create that, mount its disk"
                raise UserError(f"`{option}` {path}: {problem} or name another folder")
        folder = nearest_existing_parent(path)
        if not folder.is_dir():
            raise UserError(f"`{option}` {path}: {folder} is a file; name another folder")
        with tempfile.TemporaryDirectory(prefix=".trying-", dir=folder) as trial:
            (Path(trial) / "file").write_bytes(bytes(4096))
            sync(Path(trial) / "file")  # some disks tell only now that they are full
    except OSError as error:
        raise UserError(
            f"`{option}` {path} cannot be written: {error}; put that right or name another folder"
        ) from None


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
