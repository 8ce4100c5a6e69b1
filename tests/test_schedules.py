"""Schedules of the learning rate in whole runs: a decay that branches off, and arguments that are refused."""

from pathlib import Path

import pytest
import yaml

from recipe.base.errors import UserError
from testing.helpers import learning, weights


def test_decay_branches_off_a_stable_run(flags, run_pretrain, tmp_path: Path):
    """The branch is the run that was planned so from the start, bit for bit, and the stable run is left as it is."""
    stable = flags | {"lr_scheduler_type": "constant_with_warmup", "logging_steps": 1, "max_steps": 8}
    decaying = stable | {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": '{"num_decay_steps": 3}'}
    decaying |= {"max_steps": 6}
    run_pretrain(stable)
    before = learning(tmp_path / "run" / "metrics.jsonl")
    planned, branch = ({"output_dir": tmp_path / name} for name in ("planned", "branch"))
    run_pretrain(decaying | planned)
    run_pretrain(decaying | branch | {"resume_from_checkpoint": tmp_path / "run/checkpoints/step-00000003"})

    whole, rest = (learning(tmp_path / name / "metrics.jsonl") for name in ("planned", "branch"))
    rates = [line["learning_rate"] for line in whole if "loss" in line]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1e-3, 7.5e-4, 2.5e-4], rel=1e-6)
    assert [line for line in rest if line["step"] > 3] == [line for line in whole if line["step"] > 3]
    one, two = weights(tmp_path / "planned"), weights(tmp_path / "branch")
    assert all(one[name].equal(two[name]) for name in one)
    assert learning(tmp_path / "run" / "metrics.jsonl") == before
    card = (tmp_path / "branch/model/README.md").read_text()
    assert "0.001 after 2 updates of warmup, then warmup stable decay (num_decay_steps 3)" in card
    assert "after 3 updates lr scheduler type from constant_with_warmup to warmup_stable_decay" in card


def test_resume_goes_on_with_the_schedule_it_is_given(flags, run_pretrain, tmp_path: Path):
    run_pretrain(flags | {"lr_scheduler_type": "cosine", "logging_steps": 1})
    resumed = flags | {"lr_scheduler_type": "cosine", "logging_steps": 1, "output_dir": tmp_path / "resumed"}
    run_pretrain(resumed | {"resume_from_checkpoint": tmp_path / "run/checkpoints/step-00000003"})
    whole, rest = (learning(tmp_path / name / "metrics.jsonl") for name in ("run", "resumed"))
    assert [line for line in rest if line["step"] > 3] == [line for line in whole if line["step"] > 3]
    config = yaml.safe_load((tmp_path / "resumed" / "config.yaml").read_text())
    assert config["environment"]["changes"] == []


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        ({"lr_scheduler_kwargs": '{"num_cycles": 2}'}, "`lr_scheduler_kwargs` has `num_cycles`; linear takes none"),
        ({"lr_scheduler_type": "constant"}, "`warmup_steps` is 2; `lr_scheduler_type` is constant, which has none"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "takes decay_type, min_lr_ratio, num_cycles, num_decay_steps"),
    ],
)
def test_schedule_that_cannot_be_is_refused_before_any_work(flags, run_pretrain, tmp_path: Path, choice, problem):
    with pytest.raises(UserError, match=problem):
        run_pretrain(flags | choice)
    assert not (tmp_path / "run" / "checkpoints").exists()
