"""Which splits and configurations a local folder has, as the library datasets finds them."""

import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import yaml

from recipe.base.files import YAML_BYTES, check_yaml, read_json, read_text

# What a split is called in the name of a folder, and of a file, between other words.
WORDS = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}
BREAK = "[-._ 0-9]"
FOLDERS = {split: re.compile(f"(.*{BREAK})?({words})({BREAK}.*)?") for split, words in WORDS.items()}
FILES = {split: re.compile(f"(.*{BREAK})?({words}){BREAK}.*") for split, words in WORDS.items()}
NUMBERED = re.compile(r"data/(\w+(\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object; of a file that is missing or holds something else, an empty one."""
    try:
        values = read_json(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def saved_tables(folder: Path) -> set[str] | None:
    """Return the names of the files that `Dataset.save_to_disk` has noted in a folder, or None in any other folder."""
    files = read_object(folder / "state.json").get("_data_files")
    if not isinstance(files, list) or not files:
        return None
    return {str(file["filename"]) for file in files if isinstance(file, dict) and "filename" in file}


def find_splits(root: Path, files: list[Path]) -> dict[Path, set[str]]:
    """Say in which splits each file of a folder is, by the first of these rules that finds any.

    1. `dataset_dict.json`, of `DatasetDict.save_to_disk`, names the folders of splits, whatever these are called.
    2. Files are numbered: `data/train-00000-of-00002.parquet`, with any split.
    3. Folders, or else 4. files, have `train`, `validation` or `test`, or a word that stands for it, in their names.
    """
    saved = read_object(root / "dataset_dict.json").get("splits")
    folders = {name for name in saved if isinstance(name, str)} if isinstance(saved, list) else set()
    rules: list[Callable[[PurePath], set[str]]] = [
        lambda path: {*path.parts[:1]} & folders,
        lambda path: {match[1]} if (match := NUMBERED.fullmatch(path.as_posix())) else set(),
        lambda path: {split for split, form in FOLDERS.items() if any(map(form.fullmatch, path.parts[:-1]))},
        lambda path: {split for split, form in FILES.items() if form.fullmatch(path.name)},
    ]
    splits: dict[Path, set[str]] = {}
    for rule in rules:
        splits = {file: rule(file.relative_to(root)) for file in files}
        if any(splits.values()):
            break
    return splits


def find_configurations(root: Path) -> list[str]:
    """Return the names of the configurations that the README of a data set declares."""
    try:
        head = re.match(r"---\n(.*?\n)---\s", read_text(root / "README.md", YAML_BYTES), re.DOTALL)
        configs = yaml.safe_load(check_yaml(head[1]))["configs"] if head else []
        return [str(config["config_name"]) for config in configs]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return []
