"""Read a dataclass of options from its defaults, the YAML of `--config` and the flags, in that order."""

import argparse
import difflib
import logging
import re
import typing
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_parsing_settings

from recipe.arguments.checks import rules
from recipe.arguments.reference import ENTRIES, describe_type, entry_of, format_help
from recipe.base.errors import UserError, describe_error, did_you_mean
from recipe.base.files import check_yaml, is_path, read_yaml_text

Arguments = TypeVar("Arguments", bound=Any)
SHIPPED_CONFIGS = Path(__file__).parents[1] / "configs"


def read_configs(cls: type, files: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge YAML files: a later one wins, field by field, and in `model_config` key by key.

    Returns:
        The values of the fields that are given, and the file that each of them is from.

    Raises:
        UserError: a file cannot be read, has an unknown field, or gives nothing that the files after it do not replace.
    """
    known = [f.name for f in fields(cls)]
    values: dict[str, Any] = {}
    owners: dict[str, int] = {}  # by field or `model_config.key` the number of the file: a file may be given twice
    for number, file in enumerate(files):
        if not is_path(file) or not Path(file).is_file():
            raise UserError(f"--config {file:.300}: there is no such file{nearest_config(file)}")
        try:
            given = get_loader("yaml")(read_yaml_text(Path(file)))
        except Exception as error:  # of the parser, and of Python for text and numbers beyond its limits
            raise UserError(f"--config {file} cannot be read as YAML in UTF-8 ({describe_error(error)})") from None
        if not given or not isinstance(given, dict):
            content = "nothing" if not given else "a list" if isinstance(given, list) else "a single value"
            raise UserError(f"--config {file} holds {content}; write fields with their values, as in `seed: 42`")
        # A run's config.yaml can be given to --config again; what it ran on is no option.
        given.pop("environment", None)
        for name, value in given.items():
            if name not in known:
                raise UserError(f"there is no field `{name}` (in {file}){did_you_mean(str(name), known)}")
            owners[name] = number
            if isinstance(value, dict):
                owners |= {f"{name}.{key}": number for key in value}
                if isinstance(values.get(name), dict):
                    value = values[name] | value
            values[name] = value
    for number, file in enumerate(files):
        if number not in owners.values():
            raise UserError(
                f"--config {file} has no effect, because the files after it give all of its fields again; give the "
                "complete file first and its overlays after it, each once"
            )
    return values, {name: files[number] for name, number in owners.items()}


def nearest_config(file: str) -> str:
    """Return `; did you mean …?` for a file of nearly this name beside it, or among the configs that are shipped."""
    folder = Path(file).parent if is_path(file) else Path()
    found = {path.stem: path for place in [*SHIPPED_CONFIGS.glob("*/**"), folder] for path in place.glob("*.yaml")}
    near = difflib.get_close_matches(Path(file).stem, found, n=1)
    return f"; did you mean `{found[near[0]]}`?" if near else ""


def check_flags(flags: list[str]) -> None:
    """Refuse values that would crash the parser, or fill the memory: it reads each as YAML, whatever its type."""
    for number, flag in enumerate(flags):
        name, _, value = flag.partition("=") if flag.startswith("--") else (flags[number - 1], "", flag)
        try:
            with suppress(yaml.YAMLError, UnicodeError):  # which the parser takes as text, or words better
                check_yaml(value)
        except ValueError as error:
            raise UserError(f"{name:.300}: {value[:50]!r}… has {error}") from None


def explain(error: Exception, cls: type, flags: list[str], sources: dict[str, str]) -> str:
    """Reword the parser's message: the field, where it was given, the value, and what it takes or the nearest name."""
    text = " ".join(str(error).split())
    files = " and ".join(dict.fromkeys(sources.values()))

    def source(name: str) -> str:
        on_line = name not in sources or any(flag.startswith(f"--{name}") for flag in flags)
        return "on the command line" if on_line else f"in {sources[name]}"

    keys = re.findall(r'Parser key "([^"]+)"', text)  # with that of a field of an entry after that of the list
    owner, place = cls, f" ({source(keys[0].split('.')[0])})" if keys else ""
    entry = next((entry_of(f.type) for f in fields(cls) if keys and f.name == keys[0]), None)
    if entry and (len(keys) > 1 or "given class_path 'recipe." in text):
        owner, place = entry, f" in `{keys[0]}`{place}"
    if unknown := re.search(r"Option '([^']+)' is not accepted|[Uu]nrecognized arguments: --([^\s=]+)", text):
        name = unknown[1] or unknown[2]
        known = [f.name for f in fields(owner)]
        hint = did_you_mean(name, known)
        if name == "resume_from_checkpoint" and "model_name_or_path" in known:  # fine-tuning
            hint = "; the same command resumes, and a checkpoint to start from is given as `model_name_or_path`"
        return f"there is no field `{name}`{place or f' ({source(name)})'}{hint}"
    if missing := re.search(r"arguments are required: (.+)", text):
        read = f" (read: {files}; an overlay comes after the file it changes, each by a --config)" if files else ""
        where = (
            f"{place}, for each {ENTRIES[owner][1]}"
            if owner in ENTRIES
            else f", as a flag or in the YAML of --config{read}"
        )
        return f"{missing[1]} must be given{where}"
    wrong = re.search(r"given class_path '([^']+)'(?! *: Parser)|dot import path string: (.*)", text)
    if entry and wrong:
        path, (_, one, example) = wrong[1] or wrong[2], ENTRIES[entry]
        return f"`{keys[0]}`{place}: {path!r} is no {one}; write {example.replace('path: ...', f'path: {path}')}"
    if keys and (wrong := re.search(r"(?:Got|Given) value: (.*?)(?: Subclass types| - Expected|$)", text)):
        return f"`{keys[-1]}`{place} is {wrong[1]}; {describe_values(owner, keys[-1], wrong[1])}"
    if alone := re.search(r"argument (--\S+): expected one argument|unrecognized arguments: (.*)", text):
        return f"{alone[1]} has no value after it" if alone[1] else f"{alone[2]}: an option is written --name value"
    return text


def describe_values(owner: type, name: str, value: str) -> str:
    """Say which values an option of the dataclass `owner` takes, and which of its words is near to this one."""
    field = next((f for f in fields(owner) if f.name == name), None)
    if field is None:
        return "it takes another kind of value"
    if entry := entry_of(field.type):
        many, _, example = ENTRIES[entry]
        path = value if re.fullmatch(r"[^\[{,:\s]+", value) else "..."
        return f"it takes a list of {many}: write '[{example.replace('path: ...', f'path: {path}')}]'"
    kind = describe_type(field.type)
    null = "null or " if NoneType in typing.get_args(field.type) else ""
    bounds = dict.fromkeys(map(str, rules(field.type)))
    return f"it takes {null}{', '.join([kind, *bounds])}{did_you_mean(value, kind.split(' | '))}"


def parse_config(cls: type[Arguments], description: str, arguments: list[str] | None = None) -> Arguments:
    """Read `cls` from `sys.argv[1:]`, or the arguments given instead, and from the YAMLs of `--config`.

    Flags win over the YAMLs, a later YAML over an earlier one, all of them over defaults.

    Raises:
        UserError: unknown or misspelt field, wrong type, bad choice, missing file, or values that contradict.
    """
    logging.getLogger("jsonargparse").setLevel(logging.ERROR)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    # In groups, which the parser's own does not know.
    parser.format_help = lambda *_: format_help(cls, description)  # type: ignore[method-assign]
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(cls, as_group=False)
    configs = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    configs.add_argument("--config", action="append", default=[])
    sources: dict[str, str] = {}
    flags: list[str] = []
    try:
        found, flags = configs.parse_known_args(arguments)
        # A flag that is true or false may stand alone, as in `--dry_run`.
        switches = {f"--{f.name}" for f in fields(cls) if f.type is bool}
        for i, flag in enumerate(flags):
            if flag in switches and (flags[i + 1 : i + 2] or ["--"])[0].startswith("--"):
                flags[i] = f"{flag}=true"
        values, sources = read_configs(cls, found.config)
        check_flags(flags)
        # The parser would leave to an entry of a flag's list the fields that the file's entry at its place has.
        given = {flag[2:].partition("=")[0] for flag in flags if flag.startswith("--")}
        values = {name: value for name, value in values.items() if not (name in given and isinstance(value, list))}
        # The parser would replace a `model_config` as a whole. With quotes and types, what is read stays what it is.
        merged = [f"--config={yaml.safe_dump(values, default_style=chr(34), sort_keys=False)}"] if values else []
        namespace = parser.parse_args(merged + flags)
    except (ArgumentError, TypeError, RecursionError) as error:
        raise UserError(explain(error, cls, flags, sources)) from None
    values = {name: value for name, value in vars(parser.instantiate(namespace)).items() if name != "config"}
    for f in fields(cls):
        # The parser lets a null of the YAML through for every type.
        if values[f.name] is None and type(None) not in typing.get_args(f.type):
            place = f" (in {sources[f.name]})" if f.name in sources else ""
            raise UserError(f"`{f.name}`{place} is null; give a value, or leave it out for the default")
    return cls(**values)
