"""The reference of the options of a script, for its `--help` and for docs/options.md."""

import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from docstring_parser import parse_from_object

from recipe.arguments.checks import rules
from recipe.arguments.corpus import CorpusArguments
from recipe.arguments.phases import PhaseArguments

# What the entries of lists are: the dataclass of their fields, and how they are written.
ENTRIES = {
    CorpusArguments: ("corpora", "corpus", "{name: ..., path: ...}"),
    PhaseArguments: ("phases", "phase", "{steps: ..., max_seq_length: ...}"),
}
MAX_HELP_CHARACTERS = 100  # of a line; longer ones are tiring to read


@dataclass(frozen=True)
class Option:
    """An option: `facts` are its type, its bounds and its default, and `group` has a title where a group begins."""

    name: str
    facts: list[str]
    is_identity: bool
    description: str
    group: str | None


def describe_type(kind: Any) -> str:
    """Name a type as a YAML file would show it; that an option may be null is said by its description."""
    parts = [part for part in get_args(kind) if part is not NoneType]
    if get_origin(kind) is Annotated:
        return describe_type(parts[0])
    if get_origin(kind) is Literal:
        return " | ".join(map(str, parts))
    if get_origin(kind) is list:
        return f"list of {describe_type(parts[0])}"
    if kind in ENTRIES:
        return ENTRIES[kind][0]
    if get_origin(kind) is dict:
        return "fields and values"
    return " or ".join(map(describe_type, parts)) if parts else kind.__name__


def describe_default(value: Any) -> str:
    """Write a default as the YAML of a config would have it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def list_options(arguments: type) -> Iterator[Option]:
    """Yield the options of a dataclass in their order."""
    documented = {option.arg_name: option.description or "" for option in parse_from_object(arguments).params}
    groups = getattr(arguments, "GROUPS", {})
    for field in fields(arguments):
        facts = [describe_type(field.type), *dict.fromkeys(map(str, rules(field.type)))]
        if field.default is not MISSING:
            facts.append(f"default: {describe_default(field.default)}")
        elif field.default_factory is not MISSING:
            facts.append(f"default: {describe_default(field.default_factory())}")
        else:
            facts.append("required")
        description = " ".join(documented[field.name].split())
        is_identity = field.metadata.get("identity", False)
        yield Option(field.name, facts, is_identity, description, groups.get(field.name))


def entry_of(kind: Any) -> type | None:
    """Return the dataclass of the entries of a list, given its annotation; None for any other."""
    return next((entry for entry in ENTRIES if kind == list[entry]), None)  # type: ignore[valid-type]


def entries_of(arguments: type) -> list[type]:
    """Return the dataclasses of the entries of its lists."""
    found = [entry_of(field.type) for field in fields(arguments)]
    return list(dict.fromkeys(entry for entry in found if entry))


def format_help(arguments: type, description: str) -> str:
    """Write what `--help` prints: the options in their groups, and those of a corpus."""
    width = min(MAX_HELP_CHARACTERS, shutil.get_terminal_size().columns)

    def wrap(text: str, indent: str) -> str:
        return textwrap.fill(
            text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )

    introduction = (
        "A value is the option's default, unless the YAML file of --config gives another, unless a flag does. Give "
        "--config again for an overlay, a file with what it changes: a later file replaces single fields of those "
        "before it, and in `model_config` single keys; a list such as `corpora` is replaced as a whole."
    )
    lines = [
        f"usage: {Path(sys.argv[0]).name} --config FILE [--config OVERLAY] [--OPTION VALUE …]",
        "",
        description.strip(),
    ]
    lines += ["", wrap(introduction, ""), "", "--config FILE", "--help", "--print_config"]
    lines += ["    Print the options with all their values, as YAML, and stop."]
    for kind in (arguments, *entries_of(arguments)):
        is_entry = kind in ENTRIES
        if is_entry:
            many, _, example = ENTRIES[kind]
            lines += ["", f"An entry of a list of {many}, as in {example}:"]
        for option in list_options(kind):
            lines += ["", f"{option.group}:"] if option.group else []
            facts = f"{'' if is_entry else '--'}{option.name}  ({'; '.join(option.facts)})"
            lines += [wrap(facts, "  "), wrap(option.description, "      ")]
    return "\n".join(lines) + "\n"
