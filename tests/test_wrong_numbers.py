"""Losses that are no numbers, and losses that jump."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import recipe.training
from recipe.run.metrics import TrainState
from testing.helpers import PYTHONPATH, ROOT, SMALL_MODEL, command_line, learning, read_lines
from tests.test_pretrain import STREAMED, assert_same_run
from tests.test_scaling import run_fsdp  # noqa: F401  a fixture
from tests.test_schedules import HOURS, TickingClock

THIRD_UPDATE = """
import torch
import recipe.training

train_step, updates = recipe.training.train_step, 0

def spoil(accelerator, objective, optimizer, micro_batches, divisors, max_grad_norm):
    global updates
    updates += 1
    given = accelerator, objective, optimizer, micro_batches, divisors, max_grad_norm
    if updates != 3:
        return train_step(*given)
    if accelerator.num_processes == 1:  # the reference, in which this update is not made
        return torch.full((len(divisors) + 1,), float("nan"))
    hook = None
    if accelerator.process_index:
        hook = objective.register_forward_hook(lambda module, given, made: (made[0] * float("nan"), made[1]))
    result = train_step(*given)
    if hook:
        hook.remove()
    return result

recipe.training.train_step = spoil
"""


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_update_without_a_number_on_one_rank_is_left_out_on_all(flags, run_fsdp, tmp_path, engine):  # noqa: F811
    """And all that comes after it is as if it had not been made."""
    script = tmp_path / "spoils.py"
    script.write_text(
        THIRD_UPDATE + "import pretrain\nfrom recipe.base.errors import run_script\nrun_script(pretrain.main)\n"
    )
    sizes = SMALL_MODEL | {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    flags |= {"model_config": json.dumps(sizes), "logging_steps": 1, "per_device_train_batch_size": 2}
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        output = {"output_dir": tmp_path / str(processes)}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes == 2 and engine == "fsdp":
            run_fsdp(flags | output, before=THIRD_UPDATE)
        else:
            subprocess.run([*command, script, *command_line(flags | output)], cwd=ROOT, env=environment, check=True)
    one, two = (learning(tmp_path / name / "metrics.jsonl") for name in "12")
    assert [line["loss"] is None for line in two if "loss" in line] == [False, False, True, False, False, False]
    assert two[-1]["step"] == 6
    for line, other in zip(one, two, strict=True):
        for name in ("loss", "eval_loss", "grad_norm"):
            expected = line.get(name)
            assert other.get(name) == (expected if expected is None else pytest.approx(expected, rel=1e-5))
        assert line.get("nonfinite_updates") == other.get("nonfinite_updates")
    assert [line["nonfinite_updates"] for line in two if "loss" in line] == [0, 0, 1, 1, 1, 1]


def test_spike_is_told_by_the_median_before_it():
    state = TrainState()
    few = [9.0] * 3 + [2.0] * 16 + [4.0]
    assert [state.record_loss(loss, 1.5, number) for number, loss in enumerate(few)] == [None] * 20
    assert state.record_loss(3.0, 1.5, 20) is None
    assert state.record_loss(3.2, 1.5, 21) == pytest.approx(1.6)
    assert state.loss_spikes == 1
    for number in range(100):
        state.record_loss(3.2, 1.5, 22 + number)
    assert state.record_loss(3.2, 1.5, 122) is None  # no spike any more
    assert len(state.recent_losses) == 100
    assert state.record_loss(6.4, 1.5, 19) is None
    assert state.record_loss(6.4, 1.5, 20) == pytest.approx(2)


class Spiking:
    """`train_step`, whose loss is threefold on some updates' data; keeps what it was given."""

    def __init__(self, spiking: set[str] = frozenset(), dies_at: int = 0) -> None:
        self.real = recipe.training.train_step
        self.spiking, self.dies_at = spiking, dies_at
        self.seen: list[str] = []
        self.states: list[str] = []  # of weights and moments before each update

    def __call__(self, accelerator, objective, optimizer, micro_batches, *rest):
        rows = b"".join(batch[name].numpy().tobytes() for batch in micro_batches for name in ("input_ids", "labels"))
        self.seen.append(hashlib.sha256(rows).hexdigest())
        moments = [state["exp_avg"] for state in optimizer.state.values()]
        state = b"".join(tensor.detach().numpy().tobytes() for tensor in [*objective.parameters(), *moments])
        self.states.append(hashlib.sha256(state).hexdigest())
        if len(self.seen) == self.dies_at:
            raise KeyboardInterrupt
        result = self.real(accelerator, objective, optimizer, micro_batches, *rest)
        if self.seen[-1] in self.spiking:
            result[:-1] *= 3
        return result


@pytest.fixture
def run_spiking(run_pretrain, monkeypatch):
    def run(flags: dict[str, object], **kwargs) -> Spiking:
        step = Spiking(**kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(recipe.training, "train_step", step)
            run_pretrain(flags)
        return step

    return run


@pytest.mark.long
@pytest.mark.parametrize("mode", [{}, STREAMED | {"dataloader_num_workers": 2}], ids=["cached", "streaming"])
def test_spike_is_rolled_back_and_its_data_left_out(flags, run_spiking, tmp_path: Path, mode, capsys):
    flags |= mode | {"save_steps": 10, "logging_steps": 1, "eval_steps": 10}
    plain = run_spiking(flags | {"max_steps": 41}).seen

    flags |= {"max_steps": 36, "roll_back_loss_spikes": True, "resume_from_checkpoint": "latest"}
    rolled = flags | {"output_dir": tmp_path / "rolled"}
    step = run_spiking(rolled, spiking={plain[24]})
    # 25 updates, 20 of them kept, the next one, which was under way and comes again, and 15 more.
    assert step.seen == plain[:26] + plain[25:]
    assert step.states[26] == step.states[20] != step.states[24]
    printed = capsys.readouterr().out
    assert "warning: loss spike in update 25" in printed
    assert "step-00000020; the data of 5 updates after it is left out" in printed
    lines = [line for line in read_lines(tmp_path / "rolled" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 37))
    assert (lines[-1]["loss_spikes"], lines[-1]["updates_left_out"]) == (1, 5)

    # Killed after the rollback and before the next checkpoint, it goes back once more; after that one it goes on.
    for dies_at in (28, 38):
        killed = flags | {"output_dir": tmp_path / f"killed-{dies_at}"}
        with pytest.raises(KeyboardInterrupt):
            run_spiking(killed, spiking={plain[24]}, dies_at=dies_at)
        run_spiking(killed, spiking={plain[24]})
        assert_same_run(tmp_path / "rolled", tmp_path / f"killed-{dies_at}")


def test_rollback_over_a_change_of_length_counts_what_was_read(flags, run_spiking, tmp_path: Path):
    """The phases are of the data, of which 22 updates are left out, the last one before the change among them."""
    phases = "[{steps: 23, max_seq_length: 16}, {steps: 23, mlm_probability: 0.3}]"
    flags |= {"save_steps": 22, "logging_steps": 1, "eval_blocks": 0, "max_steps": 46, "phases": phases}
    plain = run_spiking(flags | {"output_dir": tmp_path / "plain"}).seen
    step = run_spiking(flags | {"roll_back_loss_spikes": True}, spiking={plain[43]})
    assert step.seen[:46] == plain  # the spike is read before a checkpoint would be of it
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["max_seq_length"] for line in lines] == 22 * [16] + 24 * [32]
    positions = 22 * 8 * 16 + 24 * 8 * 32
    assert lines[-1]["padding_share"] == pytest.approx(1 - lines[-1]["tokens"] / positions, abs=1e-4)


def test_higher_losses_of_another_phase_are_no_spikes(flags, run_spiking, tmp_path: Path):
    flags |= {"save_steps": 20, "logging_steps": 1, "eval_blocks": 0, "max_steps": 48, "roll_back_loss_spikes": True}
    flags |= {"phases": "[{steps: 22}, {steps: 26}]"}
    plain = run_spiking(flags | {"output_dir": tmp_path / "plain"}).seen
    step = run_spiking(flags, spiking=set(plain[22:]))
    assert step.seen == plain
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["loss_spikes"] == 0


def test_spikes_without_end_stop_the_run(flags, run_spiking, tmp_path: Path):
    flags |= {"save_steps": 21, "eval_steps": 50, "logging_steps": 1, "max_steps": 50, "roll_back_loss_spikes": True}
    plain = run_spiking(flags | {"output_dir": tmp_path / "plain", "max_steps": 49}).seen
    with pytest.raises(FloatingPointError, match=r"spikes again after 3 rollbacks to .*step-00000021"):
        run_spiking(flags, spiking=set(plain[22:]))


def test_spikes_are_logged_alone_by_default(flags, run_spiking, tmp_path: Path, capsys):
    flags |= {"logging_steps": 1, "max_steps": 30, "eval_steps": 30, "save_steps": 30}
    plain = run_spiking(flags | {"output_dir": tmp_path / "plain"}).seen
    assert run_spiking(flags, spiking={plain[24]}).seen == plain
    assert "1 loss_spikes" in capsys.readouterr().out


def test_rollback_goes_to_a_checkpoint_of_another_folder_too(flags, run_spiking, run_pretrain, tmp_path: Path):
    flags |= {"save_steps": 10, "eval_steps": 24, "logging_steps": 1}
    run_pretrain(flags | {"max_steps": 20})
    other = flags | {
        "output_dir": tmp_path / "other",
        "max_steps": 24,
        "save_steps": 100,
        "roll_back_loss_spikes": True,
    }
    other["resume_from_checkpoint"] = tmp_path / "run" / "checkpoints" / "step-00000020"
    first = run_spiking(other | {"output_dir": tmp_path / "first"}).seen
    assert run_spiking(other, spiking={first[1]}).seen[:5] == first[:3] + first[2:4]
    assert learning(tmp_path / "other" / "metrics.jsonl")[-2]["updates_left_out"] == 2


def test_hours_go_on_over_a_rollback(flags, run_spiking, tmp_path: Path, monkeypatch):
    """The rate is that of the time, which does not go back with the weights."""
    monkeypatch.setattr(recipe.training, "TrainingClock", TickingClock)
    flags |= HOURS | {"save_steps": 10, "eval_blocks": 0, "logging_steps": 1, "roll_back_loss_spikes": True}
    plain = run_spiking(flags | {"output_dir": tmp_path / "plain", "max_steps": 26}).seen
    run_spiking(flags, spiking={plain[24]})
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    seconds = [line["train_seconds"] for line in lines]
    assert lines[-1]["updates_left_out"] == 5
    assert seconds == sorted(seconds)
    assert seconds[20] - seconds[19] > 5 * 0.7
    assert [line["learning_rate"] for line in lines[20:]] == pytest.approx(
        [1e-3 * max(0, 36 - now) / 27 for now in seconds[20:]], abs=1e-9
    )
    assert lines[-1]["learning_rate"] == 0
