"""What others are told of where a run has its data from: ids of the hub and, of local paths, the name alone.

The folders on the way to a file name people, customers and projects. config.yaml in the folder of a run keeps them; the
card, and the config.yaml that is pushed with it, do not.
"""

import os
from pathlib import Path
from typing import Any

from recipe.arguments import PretrainArguments
from recipe.arguments.corpus_files import local_files

PATHS = ("output_dir", "tokenizer_name", "token_store_dir", "model_name_or_path", "resume_from_checkpoint")
CORPORA = ("corpora", "eval_corpora")


def hub_sources(args: PretrainArguments) -> list[str]:
    """List the ids of what a run reads from the hub; config.yaml keeps them, since later a path may be gone."""
    corpora = [corpus.path for corpus in [*args.corpora, *args.eval_corpora] if local_files(corpus) is None]
    return sorted({*corpora, *hub_models(args.model_name_or_path, args.tokenizer_name)})


def hub_models(*names: str | None) -> list[str]:
    """List which of these models and tokenizers are no local path."""
    return [name for name in names if name and not Path(name).exists()]


def public_name(place: str, sources: list[str]) -> str:
    """Return an id among the sources as it is, and of a path the last part: of a model in a run, from the run's on."""
    if place in sources:
        return place
    path = Path(os.path.abspath(Path(place).expanduser()))
    kept = 3 if path.parent.name == "averages" else 2 if path.name == "model" else 1
    return str(Path(*path.parts[-kept:]))


def public_config(config: dict[str, Any], sources: list[str]) -> dict[str, Any]:
    """Return the fields of a config.yaml, or some of them, with names in place of local paths."""

    def name(corpus: dict[str, Any]) -> dict[str, Any]:
        return corpus | {"path": public_name(corpus["path"], sources)}

    public: dict[str, Any] = {field: public_name(config[field], sources) for field in PATHS if config.get(field)}
    public |= {field: [name(corpus) for corpus in config[field]] for field in CORPORA if field in config}
    if tests := config.get("decontaminate_against"):
        public["decontaminate_against"] = [public_name(path, sources) for path in tests]
    return config | public


def local_corpora(config: dict[str, Any], sources: list[str]) -> list[str]:
    """List the names of the corpora that are no data sets of the hub."""
    return [corpus["name"] for field in CORPORA for corpus in config[field] if corpus["path"] not in sources]


def wants_private(config: dict[str, Any], sources: list[str]) -> bool | None:
    """Tell whether a new repository is private; None leaves it to what the user has chosen on the hub."""
    return True if config["hub_private_repo"] is None and local_corpora(config, sources) else config["hub_private_repo"]
