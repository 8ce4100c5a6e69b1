"""Phases in whole runs: resumes at every boundary, what may change of them, what is said of them, and bad ones."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from recipe.arguments import PretrainArguments, parse_config
from recipe.arguments.phases import Timeline
from recipe.base.errors import UserError
from recipe.run.checkpoint import check_phases
from recipe.run.plots import read_curves
from testing.helpers import command_line, learning, read_lines, weights, write_jsonl

PHASES = (
    "[{steps: 3, max_seq_length: 16, train_batch_size: [4, 8], mlm_probability: [0.3, 0.15]},"
    " {steps: 0.3, mlm_probability: 0.3}, {steps: 4, max_seq_length: 24, train_batch_size: 12}]"
)
STREAMED = {"streaming": True, "num_lanes": 4, "shuffle_buffer_size": 64}


@pytest.fixture
def phased(flags) -> dict[str, object]:
    every = dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), 1)
    return flags | every | {"phases": PHASES, "max_steps": 10, "save_total_limit": 20}


@pytest.mark.parametrize("mode", [{}, STREAMED], ids=["cached", "streaming"])
def test_a_resume_at_every_boundary_ends_as_the_whole_run(phased, run_pretrain, tmp_path: Path, mode):
    flags = phased | mode
    run_pretrain(flags)
    whole = learning(tmp_path / "run" / "metrics.jsonl")
    settings = [tuple(line[name] for name in SETTINGS) for line in whole if "loss" in line]
    assert settings == [
        (1, 16, 4, 0.3),
        (1, 16, 4, pytest.approx(0.225)),
        (1, 16, 8, pytest.approx(0.15)),
        *[(2, 32, 8, 0.3)] * 3,
        *[(3, 24, 12, 0.15)] * 4,
    ]
    for first in (2, 3, 6, 8):
        name = f"from-{first}"
        checkpoint = tmp_path / f"run/checkpoints/step-{first:08d}"
        run_pretrain(flags | {"output_dir": tmp_path / name, "resume_from_checkpoint": checkpoint})
        rest = learning(tmp_path / name / "metrics.jsonl")
        assert [line for line in rest if line["step"] > first] == [line for line in whole if line["step"] > first]
        one, two = weights(tmp_path / "run"), weights(tmp_path / name)
        assert all(one[key].equal(two[key]) for key in one)


SETTINGS = ("phase", "max_seq_length", "train_batch_size", "mlm_probability")


def test_phases_to_come_may_change_and_those_done_may_not(phased, run_pretrain, tmp_path: Path):
    run_pretrain(phased)
    branch = phased | {"output_dir": tmp_path / "branch", "max_steps": 12}
    branch["resume_from_checkpoint"] = tmp_path / "run/checkpoints/step-00000006"
    changed = PHASES.replace("0.3, mlm", "3, mlm").replace("{steps: 4", "{steps: 2, max_seq_length: 16}, {steps: 4")
    run_pretrain(branch | {"phases": changed})
    rest = learning(tmp_path / "branch" / "metrics.jsonl")
    planned = phased | {"output_dir": tmp_path / "planned", "max_steps": 12, "phases": changed}
    run_pretrain(planned)
    expected = learning(tmp_path / "planned" / "metrics.jsonl")
    digests = [
        [line["data_digest"] for line in lines if line["step"] > 6 and "loss" in line] for lines in (expected, rest)
    ]
    assert len(digests[0]) == 6
    assert digests[0] == digests[1]

    shutil.rmtree(tmp_path / "branch")
    problem = (
        r"step-00000006 is of another experiment: update 4, which is done, was of a phase with updates 4 to 6: 8 "
        r"blocks of 32 tokens, 30 % masked, and would be of one with updates 4 to 6: 8 blocks of 32 tokens, 20 % masked"
    )
    with pytest.raises(UserError, match=problem):
        run_pretrain(branch | {"phases": changed.replace("mlm_probability: 0.3}", "mlm_probability: 0.2}")})
    with pytest.raises(UserError, match="update 1, which is done, was of a phase with updates 1 to 3: 4 to 8 blocks"):
        run_pretrain(branch | {"phases": "[]"})


def record(phases: list[dict], max_steps: int = 10) -> dict:
    """Return of the recorded arguments of a run what its timeline is made of."""
    corpora = [{"name": "a", "weight": None}, {"name": "b", "weight": None}]
    run = {"max_seq_length": 32, "train_batch_size": 8, "mlm_probability": 0.15}
    return run | {"phases": phases, "max_steps": max_steps, "corpora": corpora}


RAMP = {"mlm_probability": [0.15, 0.3]}


@pytest.mark.parametrize(
    ("phases", "updates", "different"),
    [
        ([{"steps": 0.4}, {"steps": 6, "train_batch_size": 8, "max_seq_length": 32}], 10, None),
        ([{"steps": 4}, {"steps": 2, "mlm_probability": 0.3}, {"steps": 4}], 10, 4),
        ([{"steps": 4}, {"steps": 2, "mlm_probability": 0.3}, {"steps": 4}], 4, None),
        ([{"steps": 3}, {"steps": 4} | RAMP, {"steps": 3}], 10, 6),
        ([{"steps": 10} | RAMP], 5, 4),
        ([{"steps": 10} | RAMP], 1, None),
        ([{"steps": 6}, {"steps": 4, "weights": {"a": 1, "b": 3}}], 10, 6),
    ],
)
def test_what_is_done_differs_in_any_setting(phases, updates, different):
    one, two = Timeline.of_record(record(phases)), Timeline.of_record(record([]))
    assert one.differs_at(two, updates) == two.differs_at(one, updates) == different


def test_updates_that_were_left_out_are_done(tmp_path: Path):
    state = {"step": 5, "train_state": {"updates_left_out": 3}, "arguments": record([])}
    check_phases(state, record([{"steps": 8}, {"steps": 2, "max_seq_length": 16}]), tmp_path)
    with pytest.raises(UserError, match=r"update 8, which is done, .* that leave the first 8 updates as they were"):
        check_phases(state, record([{"steps": 7}, {"steps": 3, "max_seq_length": 16}]), tmp_path)


def test_plan_tells_of_each_phase(phased, run_pretrain, tmp_path: Path, texts, capsys):
    files = {"one": texts[:60], "two": texts[60:]}
    corpora = [{"name": name, "path": str(write_jsonl(tmp_path / f"{name}.jsonl", own))} for name, own in files.items()]
    phases = (
        "[{steps: 6, max_seq_length: 16, train_batch_size: [8, 24], weights: {one: 1, two: 0}},"
        " {steps: 4, weights: {one: 1, two: 1}}]"
    )
    run_pretrain(phased | {"corpora": json.dumps(corpora), "phases": phases, "dry_run": True})
    printed = capsys.readouterr().out
    batches = "1 process x 8 a micro-batch x 1 to 3 accumulated; 1 process x 4 a micro-batch x 2 accumulated"
    assert f"ok       batch: {batches}\n" in printed
    one, two = 96 * 16 + 4 * 4 * 32, 4 * 4 * 32
    assert f", {one / (one + two):.1%} of the positions; two " in printed
    assert f", {two / (one + two):.1%} of the positions\n" in printed


def test_card_and_plot_tell_of_the_phases(phased, run_pretrain, tmp_path: Path, capsys):
    run_pretrain(phased)
    described = "updates 1 to 3: 4 to 8 blocks of 16 tokens, 30 to 15 % masked"
    card = (tmp_path / "run/model/README.md").read_text()
    assert f"| phase 1 | {described} |" in card
    assert "| batch |" not in card
    assert f"phase 1: {described}; " in capsys.readouterr().out
    curves = read_curves(tmp_path / "run")
    tokens = {line["step"]: line["tokens"] for line in read_lines(tmp_path / "run/metrics.jsonl")}
    assert curves.phases() == [tokens[3], tokens[6]]
    last = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if "padding_share" in line][-1]
    positions = 2 * 4 * 16 + 8 * 16 + 3 * 8 * 32 + 4 * 12 * 24
    assert last["padding_share"] == pytest.approx(1 - last["tokens"] / positions, abs=1e-4)
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["phases"][1]["steps"] == 0.3


BAD = [
    ("[{steps: 4}, {steps: 0.5}]", "`phases` have 9 updates together, and `max_steps` is 10: change the `steps` of"),
    (
        "[{steps: 10, max_seq_length: 64}]",
        "`max_seq_length` of phase 1 is 64; the run's own is 32, which is the longest",
    ),
    ("[{steps: 5}, {steps: 5, train_batch_size: [8, 8]}]", r"of phase 2 is \[8, 8\]; that goes nowhere: give 8"),
    ("[{steps: 10, train_batch_size: [8, 12]}]", "it goes by multiples of the smaller one: give 16 for 12"),
    ("[{steps: 10, train_batch_size: [8, 800]}]", "that is 100 batches in 10 updates: give the phase more"),
    ("[{steps: 10, train_batch_size: [8, 16, 24]}]", "a ramp is its first and its last value"),
    ("[{steps: 1, train_batch_size: [8, 16]}, {steps: 9}]", "a phase of one update has no ramp"),
    ("[{steps: 0.01}, {steps: 0.99}]", "`steps` of phase 1 is 0.01; that is no update of 10"),
    ("[{steps: .inf}]", "`steps` of phase 1 is inf; give"),
    ("[{steps: 1.5}, {steps: 8.5}]", "`steps` of phase 1 is 1.5; give 1 or more, or a share below 1"),
    ("[{steps: 10, weights: {sample: 0}}]", "`weights` of phase 1 is {'sample': 0.0}; give one of them more than 0"),
    ("[{steps: 10, weights: {simple: 1}}]", "`corpora` are sample; did you mean `sample`?"),
    ("[{steps: 10, weights: {}}]", "sample has none: give each corpus one; 0 leaves it out"),
    ("[{steps: 10, weights: {sample: -1}}]", r"`weights` of phase 1 holds -1.0; give 0 or more"),
    ("[{steps: 10, mlm_probability: 0.001}]", "of phase 1 is 0.001; that is less than one masked token in a block"),
    (
        "[{steps: 10, train_batch_size: [4.0, 8.0]}]",
        r"`train_batch_size` in `phases` \(on the command line\) is 4.0; it takes null or int or list of int, 1 or m",
    ),
    ("[{stps: 10}]", "there is no field `stps` in `phases` .*; did you mean `steps`?"),
    ("[{max_seq_length: 16}]", "steps must be given in `phases` .*, for each phase"),
    ("[10]", "`phases` .* is 10; it takes a list of phases"),
    ("short", "`phases` .* is short; it takes a list of phases"),
]


@pytest.mark.parametrize(("phases", "problem"), BAD)
def test_bad_phases_are_refused_with_the_way_out(flags, phases, problem):
    with pytest.raises(UserError, match=problem):
        parse_config(PretrainArguments, "test", command_line(flags | {"phases": phases, "max_steps": 10}))


def test_shares_of_a_run_by_the_hours_are_refused(flags):
    flags |= {
        "phases": "[{steps: 0.5}, {steps: 0.5}]",
        "schedule_by": "hours",
        "max_train_hours": 1,
        "warmup_steps": 0.1,
    }
    problem = "`steps` of phase 1 is 0.5; `schedule_by` is hours, of which nobody knows the updates: give so many"
    with pytest.raises(UserError, match=problem):
        parse_config(PretrainArguments, "test", command_line(flags))


def test_processes_that_do_not_divide_the_batch_of_a_phase_are_refused(flags):
    phases = "[{steps: 5}, {steps: 5, train_batch_size: 6}]"
    args = parse_config(PretrainArguments, "test", command_line(flags | {"phases": phases, "max_steps": 10}))
    args.check_processes(2)
    with pytest.raises(UserError, match="`train_batch_size` of phase 2 is 6; which 4 processes do not divide: give 8"):
        args.check_processes(4)


def test_micro_batches_have_as_many_positions_whatever_the_length(flags):
    phases = "[{steps: 5, max_seq_length: 16, train_batch_size: 24},"
    phases += " {steps: 5, train_batch_size: 9, mlm_probability: [0.3, 0.2]}]"
    args = parse_config(PretrainArguments, "test", command_line(flags | {"phases": phases, "max_steps": 10}))
    assert args.micro_batch_sizes(1, 0) == [8, 8, 8]
    assert args.micro_batch_sizes(1, 9) == [4, 4, 1]
    assert args.micro_batch_sizes(1, 99) == [4, 4, 1], "the last phase goes on"
    assert args.timeline.at(99).mlm_probability == pytest.approx(0.2)
    assert args.masked_share == 0.3
    ramp = flags | {"phases": "[{steps: 10, train_batch_size: [2, 6]}]", "max_steps": 10}
    ramped = parse_config(PretrainArguments, "test", command_line(ramp))
    assert [ramped.micro_batch_sizes(1, update) for update in (0, 5, 9)] == [[2], [2, 2], [2, 2, 2]]
    assert args.timeline.positions(10) == 5 * 24 * 16 + 5 * 9 * 32
