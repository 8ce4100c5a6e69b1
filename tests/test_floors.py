"""The layout of the code: which package may import which, also where an arrow is not an import."""

import ast
import re
from pathlib import Path

import pytest

from testing.helpers import ROOT

SISTERS = {"data", "modeling", "run"}
BELOW = {  # what the modules of each package may import of the recipe, beside their own package
    "base": set(),
    "arguments": {"base"},
    **{sister: {"base", "arguments"} for sister in SISTERS},
    "finetune": {"base", "arguments", "modeling", "run"},
    "publish": {"base", "arguments", "data", "modeling", "run", "finetune"},
}
PACKAGES = set(BELOW)
# Beside the packages: the top floor, lowest first.
MODULES = ["demo", "show", "checks", "plan", "session", "monitoring", "training", "average"]
HEAVY = {"torch", "transformers", "datasets", "evaluate", "accelerate"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if node.module == "recipe"}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def rooms(path: Path) -> set[str]:
    """The packages and top modules of the recipe that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("recipe.")}


def test_every_module_has_a_place():
    here = ROOT / "recipe"
    assert {path.name for path in here.iterdir() if (path / "__init__.py").exists()} == PACKAGES
    assert sorted(path.stem for path in here.glob("*.py") if path.stem != "__init__") == sorted(MODULES)


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_import_only_what_is_below(package):
    for path in sources(f"recipe/{package}"):
        upward = rooms(path) - BELOW[package] - {package}
        assert not upward, f"{path.relative_to(ROOT)} imports {upward}, which is not below it"


def test_top_modules_import_only_those_below_them():
    for number, module in enumerate(MODULES):
        upward = rooms(ROOT / "recipe" / f"{module}.py") - PACKAGES - set(MODULES[:number])
        assert not upward, f"recipe/{module}.py imports {upward}, which is not below it"


def test_packages_say_what_may_be_imported_there():
    for package in PACKAGES:
        text = ast.get_docstring(ast.parse((ROOT / "recipe" / package / "__init__.py").read_text()))
        assert "mports" in text, f"recipe/{package}/__init__.py does not say what may be imported there"


def test_base_and_arguments_load_no_heavy_library():
    for path in sources("recipe/base", "recipe/arguments"):
        assert not {name.split(".")[0] for name in imports(path)} & HEAVY, path


def test_recipe_reaches_for_nothing_outside_itself():
    """Neither for files of benchmarks or tests, nor for a working folder: it could not be installed then."""
    for path in sources("recipe"):
        text = path.read_text()
        assert not re.search(r"""["'/](benchmarks|tests|testing)["'/]""", text), path
        assert "parent.parent" not in text, path
        assert not {name.split(".")[0] for name in imports(path)} & {"tests", "testing", "benchmarks"}, path


def test_only_tests_import_tests():
    for path in sources("benchmarks", "testing"):
        assert "tests" not in {name.split(".")[0] for name in imports(path)}, path


def test_scripts_are_tables_of_contents():
    for script in ("train_tokenizer.py", "pretrain.py", "finetune_glue.py"):
        lines = len((ROOT / script).read_text().splitlines())
        assert lines <= 100, f"{script} has {lines} lines"


def lacks_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the encoding of the user's locale."""
    keywords = {keyword.arg for keyword in call.keywords}
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    if name == "open":
        owner = getattr(getattr(call.func, "value", None), "id", None)
        mode = next((word.value for word in call.args if isinstance(word, ast.Constant)), "r")
        is_text = owner not in ("os", "self", "view") and "b" not in str(mode)
    else:
        is_process = name in ("run", "Popen", "check_output")
        is_text = (is_process and "text" in keywords) or (name, len(call.args)) in {("read_text", 0), ("write_text", 1)}
    return is_text and "encoding" not in keywords


def test_all_text_is_read_and_written_in_a_named_encoding():
    for path in [*sources("recipe", "benchmarks", "testing", "docs"), *ROOT.glob("*.py")]:
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            place = f"{path.relative_to(ROOT)}:{getattr(call, 'lineno', 0)}"
            assert not isinstance(call, ast.Call) or not lacks_encoding(call), f"{place} names no encoding"
