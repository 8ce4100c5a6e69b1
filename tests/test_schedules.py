"""Schedules of the learning rate in whole runs: a decay that branches off, and arguments that are refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

import recipe.training
from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.base.errors import UserError
from testing.helpers import PYTHONPATH, ROOT, command_line, learning, read_lines, weights

HOURS = {"schedule_by": "hours", "max_train_hours": 0.01, "warmup_steps": 0.25, "max_steps": 10_000}
HOURS |= {"logging_steps": 2, "eval_steps": 20, "save_steps": 20, "resume_from_checkpoint": "latest"}


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
        ({"schedule_by": "hours"}, "`schedule_by` is hours, and `max_train_hours` is null; give the hours"),
        ({"schedule_by": "hours", "max_train_hours": 1}, "`warmup_steps` is 2; `schedule_by` is hours, of which this"),
        (
            HOURS | {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs.num_decay_steps": 100},
            "`lr_scheduler_kwargs.num_decay_steps` is 100; `schedule_by` is hours",
        ),
        (
            HOURS | {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 0},
            "`warmup_steps` is 0; by which inverse_sqrt",
        ),
    ],
)
def test_schedule_that_cannot_be_is_refused_before_any_work(flags, run_pretrain, tmp_path: Path, choice, problem):
    with pytest.raises(UserError, match=problem):
        run_pretrain(flags | choice)
    assert not (tmp_path / "run" / "checkpoints").exists()


class TickingClock:
    """In place of `TrainingClock`: 0.7 s pass from one look to the next, and a SIGTERM comes at some of them."""

    stops: ClassVar[list[int]] = []  # milliseconds of training

    def __init__(self, before: int) -> None:
        self.now = before

    def milliseconds(self) -> int:
        self.now += 700
        if self.stops and self.now > self.stops[0]:
            self.stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return self.now


def test_rate_is_at_its_end_when_the_hours_are_over_two_preemptions(flags, run_pretrain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe.training, "TrainingClock", TickingClock)
    monkeypatch.setattr(TickingClock, "stops", [10_000, 22_000])
    run = tmp_path / "run"
    for state in ("preempted", "preempted", "complete", "complete"):  # the last time there is nothing left to do
        run_pretrain(flags | HOURS)
        status = json.loads((run / "status.json").read_text())
        assert status["state"] == state
    assert "of 10,000 updates done, 0.0101 of 0.01 hours used" in capsys.readouterr().out
    lines = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    seconds = [line["train_seconds"] for line in lines]
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        [1e-3 * min(now / 9, max(0, 36 - now) / 27) for now in seconds], abs=1e-9
    )
    assert seconds == sorted(seconds)
    assert lines[-1]["learning_rate"] == 0
    assert 36 <= seconds[-1] < 36 + 0.7 * HOURS["logging_steps"]
    last = lines[-1]["step"]
    assert 40 < last == status["step"] < 36 / 0.7  # saving takes looks at the clock, too
    assert [line["step"] for line in read_lines(run / "metrics.jsonl") if "eval_loss" in line] == [0, 20, 40, last]
    card = (run / "model" / "README.md").read_text()
    assert "0.001 after 25% of the run as warmup, then linearly to zero, by the share of 0.01 hours" in card
    assert f"| updates | {last} |" in card
    assert "under way" not in card


def test_steps_of_a_schedule_may_be_shares_of_the_run():
    def schedule(**options: object) -> tuple:
        given = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 0.25}}
        corpora = [CorpusArguments(name="a", path="a")]
        args = PretrainArguments(output_dir="run", tokenizer_name="a", corpora=corpora, **given, **options)
        return args.schedule

    decay = {"num_decay_steps": 250}
    assert schedule(warmup_steps=0.0601, max_steps=1000) == ("warmup_stable_decay", decay, 61, 1000)
    assert schedule(warmup_steps=100, max_steps=1000) == ("warmup_stable_decay", decay, 100, 1000)
    hours = {"schedule_by": "hours", "max_train_hours": 0.5, "max_steps": 10}
    decay = {"num_decay_steps": 450_000}
    assert schedule(warmup_steps=0.1, **hours) == ("warmup_stable_decay", decay, 180_000, 1_800_000)


def test_more_hours_go_on_and_less_than_are_used_are_refused(flags, run_pretrain, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(recipe.training, "TrainingClock", TickingClock)
    run_pretrain(flags | HOURS | {"max_train_hours": 0.002})
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    with pytest.raises(UserError, match=r"`max_train_hours` \(0.001\) is less than what .* has used, 0.002"):
        run_pretrain(flags | HOURS | {"max_train_hours": 0.001})
    capsys.readouterr()
    run_pretrain(flags | HOURS | {"max_train_hours": 0.02, "max_steps": status["step"] + 4})
    printed = capsys.readouterr().out
    assert f"{status['step']} of {status['step'] + 4} updates done, 0.00214 of 0.02 hours used" in printed
    assert f"`max_steps` ({status['step'] + 4}) came when 0.00" in printed
    card = (tmp_path / "run/model/README.md").read_text()
    assert f"after {status['step']} updates max train hours from 0.002 to 0.02" in card


TWO_PROCESSES = """
import os
import recipe.training
import pretrain
from recipe.base.errors import run_script

set_rate = recipe.training.set_rate

def note(scheduler, position):
    rate = set_rate(scheduler, position)
    with open(os.path.join(os.environ["NOTES"], os.environ["RANK"]), "a") as file:
        file.write(f"{position} {rate!r}\\n")
    return rate

recipe.training.set_rate = note
run_script(pretrain.main)
"""


@pytest.mark.long
def test_processes_have_the_same_rates_and_end_together(flags, tmp_path: Path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    flags |= HOURS | {"max_train_hours": 0.001}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    environment["NOTES"] = str(tmp_path)
    subprocess.run([*launch, script, *command_line(flags)], cwd=ROOT, env=environment, check=True)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "complete"
    first, second = ((tmp_path / rank).read_text().splitlines() for rank in "01")
    assert first == second
    assert first[-1] == "3600 0.0"
