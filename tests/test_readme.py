"""What the README and the Makefile tell a newcomer to type."""

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.config import GlueArguments, PretrainArguments, TokenizerArguments, parse_config
from tests.conftest import ROOT


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_command_can_be_typed(command: str):
    words = shlex.split(command, comments=True)
    scripts = {
        "train_tokenizer.py": TokenizerArguments,
        "pretrain.py": PretrainArguments,
        "finetune_glue.py": GlueArguments,
    }
    for script, cls in scripts.items():
        if script in words:
            parse_config(cls, "test", words[words.index(script) + 1 :])
    for name in [word for word in words if re.search(r"\.(py|yaml)$", word)]:
        assert (ROOT / name).is_file(), name
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_readme_names_every_module():
    text = (ROOT / "README.md").read_text()
    for module in (ROOT / "recipe").glob("*.py"):
        assert module.name == "__init__.py" or module.name in text, module.name


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
