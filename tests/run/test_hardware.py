from pathlib import Path

import pytest

from recipe.run.hardware import git_commit, power_limit


def test_commit_is_none_without_git(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


def test_commit_is_a_commit():
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


@pytest.mark.parametrize(("printed", "expected"), [("700.00\n700.00\n", 700.0), ("[N/A]\n", None)])
def test_power_limit_is_the_drivers(monkeypatch, tmp_path: Path, printed, expected):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{printed}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert power_limit() == expected


def test_power_limit_is_unknown_without_a_driver(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert power_limit() is None
