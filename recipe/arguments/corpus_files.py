"""Which files of a local path are the text of a corpus, and what there is beside them and is not read."""

import glob
import itertools
import os
import re
import stat
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from recipe.arguments.corpus import CorpusArguments
from recipe.arguments.splits import find_configurations, find_splits, saved_tables
from recipe.base.errors import UserError

LeftOut = dict[str, list[Path]]  # what is at a local path and is not read, by the reason

# What the name of a local file may end in; which of them are read how is decided in `recipe/data/readers.py`.
LINES, TEXTS, TABLES = (".jsonl", ".json"), (".txt",), (".parquet", ".arrow")
CODECS = {".gz": "gzip", ".zst": "zstd"}  # pyarrow's names
SUFFIXES = tuple(kind + packed for kind in LINES + TEXTS for packed in ("", *CODECS)) + TABLES
TEXTLESS_FILES = {"dataset_info.json", "state.json", "dataset_dict.json"}  # written by `save_to_disk` beside its tables
# Some of the reasons.
UNKNOWN, SECOND_NAME, UNPACKED = "of unknown kind", "under a second name", "beside it without compression"
CACHED_TABLE = re.compile(r"cache-[0-9a-f]{16}.*\.arrow")  # that `Dataset.map` and the like write beside the data
MAX_PRINTED_NAMES = 3  # of what is left out for one reason


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
        path = choose_snapshot(path, place)
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
    return leave_out_second_names(choose_split(corpus, path, files, left_out), left_out), left_out


def choose_snapshot(folder: Path, place: str) -> Path:
    """Return a folder, or the snapshot in it if it is a data set in the cache of the hub, which may hold several."""
    if folder.name == "snapshots" and (folder.parent / "blobs").is_dir():
        folder = folder.parent
    if not (folder / "snapshots").is_dir() or not any((folder / name).is_dir() for name in ("refs", "blobs")):
        return folder
    first, *others = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir()) or [folder]
    if others:
        names = ", ".join(path.name for path in (first, *others))
        raise UserError(f"{place} holds {1 + len(others)} snapshots of one data set: {names}; give the path of one")
    return first


def choose_split(corpus: CorpusArguments, path: Path, files: list[Path], left_out: LeftOut) -> list[Path]:
    """Return the files of a folder that are in the corpus's split. A file or a pattern stands for itself.

    Raises:
        UserError: it is not clear which these are, or options choose what a local path does not have.
    """
    place, split = f"corpus {corpus.name!r}: {corpus.path}", corpus.split
    for option in ("config_name", "revision"):
        if (value := getattr(corpus, option)) is not None:
            raise UserError(f"{place} is local, and `{option}` {value} is for the hub; leave it out and name the files")
    splits = find_splits(path, files) if path.is_dir() else {}
    if splits and len(names := find_configurations(path)) > 1:
        raise UserError(f"{place} has the configurations {', '.join(names)}; give the folder or the files of one")
    known = sorted(set().union(*splits.values()))
    if not known and split == "train":
        return files
    if not known:
        raise UserError(f"{place} is no folder with splits, and `split` is {split}; leave that out")
    has, remedy = ", ".join(known), f"the pattern {path / '**'} takes all files, whatever their names"
    if split not in known:
        raise UserError(f"{place} has the splits {has} by the names in it, not {split} (`split`); {remedy}")
    kept = []
    for file in files:
        if split in splits[file]:
            kept.append(file)
        else:
            left_out["of " + (" and ".join(sorted(splits[file])) or "no split")].append(file)
    if size_of(left_out["of no split"]) > size_of(files) / 2:
        some = f"the splits {has} by some names, such as {kept[0].name}, and most of its text is in none"
        raise UserError(f"{place} has {some}; {remedy}, and another pattern those that it fits")
    return kept


def size_of(files: list[Path]) -> int:
    """Return how many bytes files have together."""
    return sum(file.stat().st_size for file in files)


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
        tables = saved_tables(folder)
        if missing := sorted(name for name in tables or () if not (folder / name).exists()):
            raise UserError(f"{folder} lacks {len(missing)} of its state.json's files, {missing[0]} say; complete it")
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
            elif is_last and CACHED_TABLE.fullmatch(entry.name):
                left_out["cached by datasets"].append(path)
            elif is_last and tables is not None and entry.name not in tables | TEXTLESS_FILES:
                left_out["not named by state.json"].append(path)
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
    """Return the files that are text of a corpus, sorted.

    Raises:
        OSError: a link leads nowhere, or a folder cannot be read.
    """
    files = []
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
            files.append(path)
    return files


def leave_out_second_names(files: list[Path], left_out: LeftOut) -> list[Path]:
    """Return each real file once, by a name without links if it has one, and not compressed if it is that too."""
    names: dict[tuple[int, int], list[Path]] = defaultdict(list)  # of each file
    for path in files:
        about = path.stat()
        names[about.st_dev, about.st_ino].append(path)
    for same in names.values():
        if len(same) > 1:
            same.sort(key=lambda path: sum(part.is_symlink() for part in (path, *path.parents)))
            left_out[SECOND_NAME] += same[1:]
    found = sorted((same[0] for same in names.values()), key=str)
    known = set(map(str, found))  # `gzip -k` leaves both
    is_packed = {path: path.suffix in CODECS and str(path).removesuffix(path.suffix) in known for path in found}
    left_out[UNPACKED] += [path for path in found if is_packed[path]]
    return [path for path in found if not is_packed[path]]


def by_kind(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Group files that are text of a corpus by their kind, such as `.jsonl.gz`."""
    kinds: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        kinds[next(suffix for suffix in SUFFIXES if file.name.endswith(suffix))].append(file)
    return kinds


def describe_left_out(left_out: LeftOut) -> str:
    """Say how much is left out, why, and the first few names of it; an empty string if nothing is."""
    parts = []
    for reason, paths in left_out.items():
        names = [path.name for path in paths[:MAX_PRINTED_NAMES]] + ["…"] * (len(paths) > MAX_PRINTED_NAMES)
        parts += [f"{len(paths):,} {reason} ({', '.join(names)})"] if paths else []
    return "; ".join(parts)
