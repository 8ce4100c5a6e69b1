"""A short form of `python -m testing.faults.fuzz`; what the long one found is in the test files of the modules."""

import random
import time

import pytest

from testing.faults import fuzz as fuzzing
from testing.faults.fuzz import TARGETS, fuzz, mutate, mutate_bytes


@pytest.mark.long
def test_damage_ends_in_success_or_an_error_of_ours(capsys):
    found = fuzz(cases=150, seed=1, targets=list(TARGETS))
    table = capsys.readouterr().out
    assert found == 0, table
    for target in TARGETS:
        row = next(line for line in table.splitlines() if line.startswith(target))
        ok, refused = map(int, row.split()[2:4])
        assert ok, f"{target}: nothing comes through, so that little is tried"
        assert refused, f"{target}: nothing is refused"


def test_mutations_are_many_and_repeatable():
    value = {"a": [1, "two", {"b": None}], "c": 0.5}
    made = [repr(mutate(value, random.Random(seed))) for seed in range(200)]
    assert made == [repr(mutate(value, random.Random(seed))) for seed in range(200)]
    assert len(set(made)) > 80
    assert value == {"a": [1, "two", {"b": None}], "c": 0.5}
    data = bytes(range(256))
    assert len({mutate_bytes(data, random.Random(seed)) for seed in range(200)}) > 150
    assert mutate_bytes(b"", random.Random(0)) is not None


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize("hang", [spin, lambda: time.sleep(60)], ids=["busy", "waiting"])
def test_case_without_an_end_is_found(monkeypatch: pytest.MonkeyPatch, capsys, hang):
    monkeypatch.setattr(fuzzing, "Material", lambda folder: None)
    monkeypatch.setattr(fuzzing, "CPU_SECONDS", 0.2)
    monkeypatch.setattr(fuzzing, "WAIT_SECONDS", 600 if hang is spin else 1)
    monkeypatch.setitem(TARGETS, "hangs", lambda case: hang())
    assert fuzz(cases=1, seed=0, targets=["hangs"]) == 1
    assert "HangError" in capsys.readouterr().out
