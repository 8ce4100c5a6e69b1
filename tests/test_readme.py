"""What the README, the pages of docs/ and the Makefile tell a newcomer to type, open and look up."""

import os
import re
import runpy
import shlex
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import recipe.show
from recipe.arguments import GlueArguments, PretrainArguments, TokenizerArguments, parse_config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MAX_README_LINES = 150
SCRIPTS = {
    "train_tokenizer.py": TokenizerArguments,
    "pretrain.py": PretrainArguments,
    "finetune_glue.py": GlueArguments,
}


def read_commands() -> list[str]:
    """Return each distinct command of the pages' bash blocks, as one line."""
    blocks = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip()))


def find_in_pages(pattern: str) -> list[tuple[str, str]]:
    """Return (page, match) for each distinct match of the pattern's only group."""
    matches = [(page, match) for page in PAGES for match in re.findall(pattern, page.read_text())]
    return list(dict.fromkeys((str(page.relative_to(ROOT)), match) for page, match in matches))


@pytest.mark.parametrize("command", read_commands())
def test_command_can_be_typed(command: str):
    words = shlex.split(command, comments=True)
    for script, cls in SCRIPTS.items():
        if script in words:
            parse_config(cls, "test", words[words.index(script) + 1 :])
    if words[:3] == ["python", "-m", "recipe.show"]:
        recipe.show.parse_options(words[3:])
    # Jobs that start pretrain.py, and how many arguments stand before its flags: the run's folder.
    for job, before in {"accelerate_configs/slurm.sbatch": 1, "accelerate_configs/slurm_prepare.sbatch": 0}.items():
        if job in words:
            parse_config(PretrainArguments, "test", words[words.index(job) + 1 + before :])
    for name in [word for word in words if re.search(r"\.(py|yaml|sbatch|txt)$", word)]:
        assert (ROOT / name).is_file(), name
    if words[:2] == ["python", "-m"]:
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), words[2]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if words[:3] == ["pip", "install", "-e"]:
        assert "project" in tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize(("page", "target"), find_in_pages(r"(?:\]\(|src=\")([^)\"#:]+)[)\"#]"))
def test_link_leads_somewhere(page: str, target: str):
    assert (ROOT / page).parent.joinpath(target).exists()


@pytest.mark.parametrize(
    ("page", "path"), find_in_pages(r"`((?:recipe|benchmarks|accelerate_configs|sample_data|tests)/[\w./-]+)`")
)
def test_file_that_a_page_names_exists(page: str, path: str):
    assert (ROOT / path).exists()


def test_code_that_the_design_names_is_where_it_says():
    design = (ROOT / "docs/design.md").read_text()
    places = re.findall(r"`(recipe/[\w/]+\.py)`: `(\w+)`", design)
    assert {"train_step", "save_checkpoint", "BlockOrder"} <= {name for _, name in places}
    for path, name in places:
        assert re.search(rf"^ *(def|class) {name}\b", (ROOT / path).read_text(), re.MULTILINE), (path, name)


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= MAX_README_LINES


def test_readme_names_every_package_and_page():
    text = README.read_text()
    packages = [f"`{path.name}/`" for path in (ROOT / "recipe").iterdir() if path.is_dir() and path.name[0] != "_"]
    modules = [f"`{path.name}`" for path in (ROOT / "recipe").glob("*.py") if path.name != "__init__.py"]
    pages = [f"(docs/{path.name})" for path in (ROOT / "docs").glob("*.md")]
    assert [name for name in packages + modules + pages if name not in text] == []


def test_options_page_is_what_the_dataclasses_say():
    build_reference = runpy.run_path(str(ROOT / "docs/generate_options.py"))["build_reference"]
    page = (ROOT / "docs/options.md").read_text()
    assert page == build_reference(), "run `python docs/generate_options.py > docs/options.md`"


def test_old_python_is_refused_before_anything_is_installed(tmp_path: Path):
    old = tmp_path / "python3.9"
    pretend = "import sys; sys.version_info = (3, 9, 1); exec(sys.argv[2])"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{pretend}' \"$@\"\n")
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    result = subprocess.run(
        ["make", "demo", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False
    )
    assert result.returncode != 0
    assert "error: Python 3.11 or newer is needed" in result.stderr
    assert "is 3.9" in result.stderr
    assert not (tmp_path / ".venv").exists()
