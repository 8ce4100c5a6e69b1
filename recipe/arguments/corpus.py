"""One corpus, in the same form for every script that reads text."""

import glob
import itertools
import os
import re
import stat
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from recipe.arguments.checks import PathName, PositiveFloat, check_values
from recipe.base.errors import UserError

LeftOut = dict[str, list[Path]]  # what is at a local path and is not read, by the reason

# What the name of a local file may end in; which of them are read how is decided in `recipe/data/corpora.py`.
LINES, TEXTS, TABLES = (".jsonl", ".json"), (".txt",), (".parquet", ".arrow")
CODECS = {".gz": "gzip", ".zst": "zstd"}  # pyarrow's names
SUFFIXES = tuple(kind + packed for kind in LINES + TEXTS for packed in ("", *CODECS)) + TABLES
TEXTLESS_FILES = {"dataset_info.json", "state.json", "dataset_dict.json"}  # written by `save_to_disk` beside its tables
UNKNOWN, SECOND_NAME = "of unknown kind", "under a second name"  # two of the reasons
MAX_PRINTED_NAMES = 3  # of what is left out for one reason


@dataclass(kw_only=True)
class CorpusArguments:
    """One entry of `corpora` or `eval_corpora`."""

    name: str
    """Logs, counters and the model card call the corpus by this name."""
    path: PathName
    """Id of a data set on the hub; or a local file, folder or glob of `.jsonl`, `.json` (one object a line) or `.txt`,
    plain or `.gz`, `.zst`, or of `.parquet` or `.arrow`; or the folder of a token store."""
    config_name: str | None = None
    """Configuration of the hub's data set, such as `20231101.en`."""
    split: str = "train"
    """Split of the hub's data set."""
    revision: str | None = None
    """Revision of the hub's data set; `refs/convert/parquet` opens one that is still a loading script."""
    text_column: str = "text"
    """Name of the column that holds the documents."""
    sample_by: Literal["document", "paragraph"] = "document"
    """What counts as one document of a `.txt`: the whole file, or each paragraph between blank lines."""
    weight: PositiveFloat | None = None
    """Share of this corpus in training, relative to the weights of others; all have one or none. Null: its size."""

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError(f"`path` of corpus {self.name!r} is empty; name a data set, a file, a folder or a glob")
        check_values(self, f" of corpus {self.name!r}")


def check_corpora(name: str, corpora: list[CorpusArguments]) -> None:
    """Raise a `UserError` unless the corpora have different names, and weights for all of them or for none."""
    names = [corpus.name for corpus in corpora]
    if doubled := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"`{name}` holds two corpora named {doubled[0]!r}; give each a name of its own")
    unweighted = [corpus.name for corpus in corpora if corpus.weight is None]
    if 0 < len(unweighted) < len(corpora):
        raise UserError(
            f"`{name}`: {', '.join(unweighted)} has no `weight` while others have; "
            "a default weight is a size and cannot be mixed with given ones: give all or none"
        )


def local_files(corpus: CorpusArguments) -> list[Path] | None:
    """List the local files of a corpus as `find_files` does, or return None for a hub id."""
    return find_files(corpus)[0]


def find_files(corpus: CorpusArguments) -> tuple[list[Path] | None, LeftOut]:
    """List the local files of a corpus, sorted, and what there is beside them and is not read.

    There is no file of a token store, and None takes the place of the files of a hub data set.

    Raises:
        UserError: the path is nothing of these, has no file to read, or holds a link that leads nowhere.
    """
    path = Path(corpus.path).expanduser()
    place = f"`path` of corpus {corpus.name!r}: {corpus.path}"
    left_out: LeftOut = defaultdict(list)
    found: Iterable[Path] = [path]
    if is_token_store(path):
        return [], left_out
    if path.is_dir():
        found = walk(path, ["**", "*"], left_out)
    elif os.path.lexists(path):
        pass
    elif glob.has_magic(corpus.path):
        fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        root, pattern = Path(*fixed), [*path.parts[len(fixed) :]]
        found = walk(root, pattern + ["*"] * (pattern[-1] == "**"), left_out) if root.is_dir() else []
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", corpus.path) and not corpus.path.endswith(SUFFIXES):
        return None, left_out
    else:
        raise UserError(f"{place} does not exist; give a file, a folder, a pattern or the id of a hub data set")
    try:
        files = sort_out(found, left_out)
    except OSError as error:
        link = f" links to {os.readlink(error.filename)} and" if os.path.islink(error.filename) else ""
        problem = f"{error.filename}{link} cannot be read ({error.strerror})"
        raise UserError(f"{place}: {problem}; correct or remove it") from error
    wrong = [] if path.is_dir() else left_out[UNKNOWN]
    if wrong or not files:
        problem = f"holds {wrong[0]}, which does not end" if wrong else "holds no file that ends"
        rest = describe_left_out(left_out)
        raise UserError(f"{place} {problem} in one of {', '.join(SUFFIXES)}{rest and f'; left out: {rest}'}")
    return files, left_out


def walk(root: Path, pattern: list[str], left_out: LeftOut) -> Iterator[Path]:
    """Yield all below a folder that is no folder and matches a pattern, such as `["**", "*.txt"]`, as `glob` does.

    A folder is looked at once for each part of the pattern, whatever links lead to it, so that circles have an end.
    """
    folders, links = [(root, 0)], deque[tuple[Path, int]]()
    seen: set[tuple[int, int, int]] = set()
    while folders or links:  # links are followed last: what can be reached without one is
        folder, place = folders.pop() if folders else links.popleft()
        about = folder.stat()
        if (key := (about.st_dev, about.st_ino, place)) in seen:
            left_out[SECOND_NAME] += [folder] if folder.is_symlink() else []
            continue
        seen.add(key)
        if is_token_store(folder) or is_run(folder):
            reason = "token store" if is_token_store(folder) else "folder of a run"
            left_out[reason] += [folder] if folder not in left_out[reason] else []
            continue
        part, is_last = pattern[place], place == len(pattern) - 1
        if part == "**":
            folders.append((folder, place + 1))
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            is_hidden = entry.name.startswith(".") and not part.startswith(".")
            if is_hidden or not fnmatchcase(entry.name, "*" if part == "**" else part):
                continue
            path = folder / entry.name
            if path.is_dir() if entry.is_symlink() else entry.is_dir():
                if part == "**" or not is_last:
                    (links if entry.is_symlink() else folders).append((path, place + (part != "**")))
            elif is_last:
                yield path


def is_token_store(folder: Path) -> bool:
    """Say whether a folder is a token store, complete or begun."""
    is_begun = (folder / "locks").is_dir() or (folder / "shard-00000.arrow").is_file()
    return is_begun and (folder / "store.json").is_file()


def is_run(folder: Path) -> bool:
    """Say whether a folder is what a run has left."""
    return (folder / "status.json").is_file() and (folder / "config.yaml").is_file()


def sort_out(paths: Iterable[Path], left_out: LeftOut) -> list[Path]:
    """Return the files that are text of a corpus, sorted, each once and by a name without links if it has one.

    Raises:
        OSError: a link leads nowhere, or a folder cannot be read.
    """
    names: dict[tuple[int, int], list[Path]] = defaultdict(list)  # of each file
    for path in sorted(paths, key=str):
        about = path.stat()
        if path.name in TEXTLESS_FILES:
            continue
        if not path.name.endswith(SUFFIXES):
            left_out[UNKNOWN].append(path)
        elif not stat.S_ISREG(about.st_mode):
            left_out["no regular file"].append(path)
        elif not about.st_size:
            left_out["empty"].append(path)
        else:
            names[about.st_dev, about.st_ino].append(path)
    for same in names.values():
        if len(same) > 1:
            same.sort(key=lambda path: sum(part.is_symlink() for part in (path, *path.parents)))
            left_out[SECOND_NAME] += same[1:]
    return sorted((same[0] for same in names.values()), key=str)


def describe_left_out(left_out: LeftOut) -> str:
    """Say how much is left out, why, and the first few names of it; an empty string if nothing is."""
    parts = []
    for reason, paths in left_out.items():
        names = [path.name for path in paths[:MAX_PRINTED_NAMES]] + ["…"] * (len(paths) > MAX_PRINTED_NAMES)
        parts += [f"{len(paths):,} {reason} ({', '.join(names)})"] if paths else []
    return "; ".join(parts)
