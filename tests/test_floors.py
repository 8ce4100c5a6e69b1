"""The layout of the code: a floor imports only lower floors, and modules of a floor do not import each other."""

import ast
from pathlib import Path

from tests.conftest import ROOT

FLOORS = [
    {"config", "hashing", "progress"},
    {
        "tokenizer",
        "corpora",
        "hygiene",
        "packing",
        "sampling",
        "masking",
        "objectives",
        "model",
        "optimizer",
        "memory",
        "metrics",
        "environment",
        "run_directory",
        "stopping",
        "watchdog",
        "trackers",
        "glue_tasks",
        "jobs",
    },
    {"token_store", "streaming", "plots", "finetuning", "glue_report", "hub", "checkpoint"},
    {"loader", "glue", "card"},
    {"training", "plan", "glue_card"},
    {"demo"},
]


def imported_modules(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("recipe"):
            found.add(node.module.removeprefix("recipe").removeprefix("."))
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("recipe.") for alias in node.names if alias.name.startswith("recipe.")}
    return found


def test_every_module_has_a_floor():
    modules = {path.stem for path in (ROOT / "recipe").glob("*.py")} - {"__init__"}
    assert modules == set().union(*FLOORS)


def test_floors_import_only_lower_floors():
    for number, floor in enumerate(FLOORS):
        below = set().union(*FLOORS[:number])
        for module in floor:
            upward = imported_modules(ROOT / "recipe" / f"{module}.py") - below
            assert not upward, f"recipe/{module}.py imports {upward}, which is not below it"


def test_scripts_are_tables_of_contents():
    for script in ("train_tokenizer.py", "pretrain.py", "finetune_glue.py"):
        lines = len((ROOT / script).read_text().splitlines())
        assert lines < 100, f"{script} has {lines} lines"
