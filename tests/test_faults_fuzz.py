"""A short form of `python -m testing.faults.fuzz`; what the long one found is in the test files of the modules."""

import random

from testing.faults.fuzz import TARGETS, fuzz, mutate, mutate_bytes


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
