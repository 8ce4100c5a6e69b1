import pytest

from testing.faults.storm import brewing


@pytest.mark.long
def test_killed_runs_end_as_the_undisturbed_one():
    """In short; `make faults` is the whole."""
    with brewing(seed=1, max_steps=120) as storm:
        storm.strike(disturbances=5)
    assert storm.failures == []
