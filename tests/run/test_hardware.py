from pathlib import Path

import pytest
import torch

from recipe.run.hardware import git_commit, matmul_flops, power_limit


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


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_products_that_count_as_full_use_are_of_random_numbers_and_many_between_two_readings(monkeypatch, precision):
    multiply, reads, products = torch.mm, [0], []

    def spy(a, b, out):
        assert [abs(factor.float().std().item() - 1) < 0.01 for factor in (a, b)] == [True, True]
        products.append(reads[0])
        return multiply(a[:64, :64], b[:64, :64], out=out[:64, :64])

    def clock() -> float:
        reads[0] += 1
        return len(products) * 0.01 * (5 if 40 < len(products) <= 50 else 1)  # a busy machine meanwhile

    monkeypatch.setattr(torch, "mm", spy)
    monkeypatch.setattr("recipe.run.hardware.time.perf_counter", clock)
    state = torch.get_rng_state()
    assert matmul_flops(torch.device("cpu"), precision) == pytest.approx(2 * 1024**3 / 0.01)
    assert [products.count(read) for read in sorted(set(products))][2:] == [10, 10, 10]  # as many as 0.1 s hold
    assert torch.equal(torch.get_rng_state(), state)
