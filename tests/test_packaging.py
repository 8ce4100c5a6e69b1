"""What pyproject.toml, requirements.txt and the files around them say agrees, and agrees with the code."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml

from testing.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OF_MODULE = packages_distributions()
SCRIPTS = [ROOT / "train_tokenizer.py", ROOT / "pretrain.py", ROOT / "finetune_glue.py"]
CODE = [*SCRIPTS, *(ROOT / "recipe").rglob("*.py")]
TESTS = [file for folder in ("tests", "testing", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
# Declared though no module of the recipe imports it, and why.
NOT_IMPORTED = {
    "pytest-xdist": "`make test` runs two workers",
    "coverage": "measures what the tests reach",
    "ruff": "`make lint`",
    "mypy": "`make lint`",
    "types-PyYAML": "mypy's types of yaml",
}

# Imported in a `try`, and why it may be missing.
NOT_NEEDED = {"triton": "torch's CUDA builds bring it; without it the plain modules run"}


def pins(lines: list[str]) -> dict[str, str]:
    """The version of each requirement; a line that is no exact pin fails."""
    found = [re.fullmatch(r"([\w-]+)==(\d[\w.]*)(; .*)?", line) for line in lines]
    assert all(found), lines
    return {match[1]: match[2] for match in found}


def requirements() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return pins([line for line in lines if line and not line.startswith("#")])


def extras() -> dict[str, dict[str, str]]:
    return {name: pins(lines) for name, lines in PROJECT["optional-dependencies"].items()}


def imports(file: Path, everywhere: bool = True) -> Iterator[str]:
    """Top-level names of the modules that a file imports, inside functions too if `everywhere`."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def distributions(files: list[Path], everywhere: bool = True) -> set[str]:
    """What has to be installed for the imports of some files: all but the standard library and ourselves."""
    ours = {"recipe", *(file.stem for file in SCRIPTS)}
    ours |= {name for file in TESTS for name in (file.stem, file.relative_to(ROOT).parts[0])}
    modules = {name for file in files for name in imports(file, everywhere)} - ours - sys.stdlib_module_names
    return {OF_MODULE.get(module, [module])[0] for module in modules}


def test_each_requirement_is_pinned_once():
    names = [name.lower() for group in (requirements(), *extras().values()) for name in group]
    assert len(names) == len(set(names)) > 20


def test_what_the_code_imports_is_declared():
    declared = requirements() | extras()["trackers"] | extras()["plots"]
    assert distributions(CODE) - set(NOT_NEEDED) <= set(declared)
    assert distributions(TESTS) <= set(declared | extras()["test"])


def test_what_is_declared_is_imported():
    unused = set(requirements() | extras()["trackers"] | extras()["plots"]) - distributions(CODE)
    unused |= set(extras()["test"]) - distributions(TESTS)
    assert unused == set(NOT_IMPORTED)


def test_extras_are_not_needed_to_import_the_code():
    optional = set().union(*extras().values())
    for file in CODE:
        assert not distributions([file], everywhere=False) & optional, file


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    latest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert PROJECT["version"] == citation["version"] == latest[1]
    assert PROJECT["license"] == citation["license"]


def test_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert "bash .ci/run" in [step.get("run") for step in steps]
    python = next(step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", ""))
    assert PROJECT["requires-python"] == f">={python}"


def test_hooks_run_what_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert [hook["name"] for hook in hooks] == re.findall(r"\$\(BIN\)/(ruff \w+|mypy)", recipe)
