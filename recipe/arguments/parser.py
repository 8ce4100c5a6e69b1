"""Read a dataclass of options from its defaults, the YAML of `--config` and the flags, in that order."""

import itertools
import logging
import re
import sys
import typing
from argparse import SUPPRESS
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from recipe.arguments.glue import GlueArguments
from recipe.arguments.pretraining import PretrainArguments
from recipe.arguments.tokenizer import TokenizerArguments
from recipe.base.errors import UserError, did_you_mean

Arguments = TypeVar("Arguments", TokenizerArguments, PretrainArguments, GlueArguments)


def known_names(cls: type) -> list[str]:
    """Return the field names of a dataclass, and of the dataclasses in its lists."""
    inner = [t for f in fields(cls) for t in typing.get_args(f.type) if isinstance(t, type) and is_dataclass(t)]
    return [f.name for f in fields(cls)] + [name for t in inner for name in known_names(t)]


def explain(error: Exception, cls: type, arguments: list[str], files: list[Any]) -> str:
    """The parser's message as ours: the field, where it was given, the value, the nearest right name."""
    text = str(error)
    where = " and ".join(str(file) for file in files) or "the command line"

    def source(name: str) -> str:
        on_line = any(a.startswith(f"--{name}") for a in arguments)
        return "on the command line" if on_line or not files else f"in {where}"

    if unknown := re.search(r"Option '([^']+)' is not accepted|[Uu]nrecognized arguments: --([^\s=]+)", text):
        name = unknown[1] or unknown[2]
        parent = re.search(r'Parser key "([^"]+)"', text)
        place = f" in `{parent[1]}`" if parent else ""
        hint = did_you_mean(name, known_names(cls))
        return f"there is no field `{name}`{place} ({source(parent[1] if parent else name)}){hint}"
    if wrong := re.search(r"given class_path '([^']+)'", text):
        return f"`corpora` ({source('corpora')}): {wrong[1]!r} is no corpus; write {{name: ..., path: {wrong[1]}}}"
    if missing := re.search(r"arguments are required: (.+)", text):
        return f"{missing[1]} must be given, as a flag or in the YAML of --config (read: {where})"
    if wrong := re.search(r'Parser key "([^"]+)":\s*(.*)', text, re.DOTALL):
        name, detail = wrong[1], re.sub(r"typing\.|<class '(\w+)'>", r"\1", " ".join(wrong[2].split()))
        return f"`{name}` ({source(name.split('.')[0])}): {detail}"
    return f"{where}: {text}"


def parse_config(cls: type[Arguments], description: str, arguments: list[str] | None = None) -> Arguments:
    """Read `cls` from the command line and the YAML of `--config`; flags win over the YAML, the YAML over defaults.

    Args:
        cls: the dataclass to fill.
        description: shown by `--help`.
        arguments: the command line without the program's name; `sys.argv[1:]` if None.

    Raises:
        UserError: unknown or misspelt field, wrong type, bad choice, missing file, or values that contradict.
    """
    logging.getLogger("jsonargparse").setLevel(logging.ERROR)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below.")
    parser.add_class_arguments(cls, as_group=False)
    # A run's config.yaml can be given to --config again; what it ran on is no option.
    parser.add_argument("--environment", type=dict, help=SUPPRESS)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # A flag that is true or false may stand alone, as in `--dry_run`.
    switches = {f"--{f.name}" for f in fields(cls) if f.type is bool}
    for i, argument in enumerate(arguments):
        if argument in switches and (arguments[i + 1 : i + 2] or ["--"])[0].startswith("--"):
            arguments[i] = f"{argument}=true"
    config_files = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    config_files += [b for a, b in itertools.pairwise(arguments) if a == "--config"]
    for file in config_files:
        if not Path(file).is_file():
            raise UserError(f"--config {file}: there is no such file")
    try:
        namespace = parser.parse_args(arguments)
    except UnicodeDecodeError as error:
        raise UserError(f"--config {' and '.join(config_files)}: not valid UTF-8 at byte {error.start}") from None
    except (ArgumentError, TypeError) as error:
        raise UserError(explain(error, cls, arguments, config_files)) from None
    values = dict(vars(parser.instantiate(namespace)))
    del values["config"], values["environment"]
    for f in fields(cls):
        # The parser lets a null of the YAML through for every type.
        if values[f.name] is None and type(None) not in typing.get_args(f.type):
            raise UserError(f"`{f.name}` is null; give a value, or leave it out for the default")
    return cls(**values)
