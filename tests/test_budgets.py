"""What is compared for small budgets: its setting, its figures, and a comparison at a scale of seconds."""

import json
import shutil
import sys
from pathlib import Path

import budgets
import pytest
import yaml

from recipe.base.errors import UserError
from testing.helpers import SAMPLE, read_lines

UPDATES = 16
MICRO = {
    "tokenizer": {"vocab_size": 300},
    "run": {
        "corpora": [{"name": "novels", "path": "{data}/novels.jsonl.gz"}],
        "eval_corpora": [{"name": "tales", "path": "{data}/tales.jsonl.gz"}],
        "eval_blocks": 8,
        "packing": "contiguous",
        "max_seq_length": 32,
        "dataloader_num_workers": 0,
        "model_config": {
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 1,
            "max_position_embeddings": 34,
        },
        "train_batch_size": 8,
        "per_device_train_batch_size": 8,
        "max_steps": UPDATES,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "eval_steps": 4,
        "save_steps": UPDATES,
    },
    "arms": {"flat": {}, "short": {"max_seq_length": 16}},
    "rates": {"flat": [3e-2]},
}


def test_loss_is_crossed_on_a_line_between_evaluations():
    curve = {"step": [0, 10, 20], "tokens": [0, 100, 200], "cpu_seconds": [0.0, 3.0, 7.0], "eval_loss": [8.0, 6.0, 5.0]}
    assert budgets.find_crossing(curve, 5.25) == {"step": 17.5, "tokens": 175, "cpu_seconds": 6.0}
    assert budgets.find_crossing(curve, 6.0) == {"step": 10, "tokens": 100, "cpu_seconds": 3.0}
    assert budgets.find_crossing(curve, 4.9) is None


def test_steps_scale_together_and_shares_stay():
    options = {"max_steps": 200, "eval_steps": 10, "warmup_steps": 0.06, "seed": 3}
    assert budgets.scale_steps(options, 1.25) == options | {"max_steps": 250, "eval_steps": 12}


def test_median_counts_runs_that_stay_on_the_plateau():
    def run(tokens: float | None) -> dict:
        return {"crossing": None if tokens is None else {"tokens": tokens}}

    runs = {
        "all": [run(20e3), run(10e3), run(30e3)],
        "most": [run(None), run(20e3), run(10e3)],
        "one": [run(9), run(None)],
    }
    runs |= {"none": [run(None)], "few": [run(None), run(10e3), run(None)]}
    report = budgets.Report(runs, runs, {}, {})
    assert {arm: report.crossings(arm, "tokens") for arm in runs} == {
        "all": "20K (10K to 30K)",
        "most": "20K (10K to 20K), not reached by 1 of 3",
        "one": "9, not reached by 1 of 2",
        "none": "not reached",
        "few": "not reached by 2 of 3",
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a comparison of this setting."""

    def call(setting: dict, *flags: str) -> None:
        (tmp_path / "micro.yaml").write_text(yaml.safe_dump(setting))
        folders = {name: str(tmp_path / name) for name in ("output", "results")}
        given = folders | {"setting": str(tmp_path / "micro.yaml"), "data": str(SAMPLE), "seeds": "1"}
        argv = [word for name, value in given.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["budgets.py", *argv, *flags])
        budgets.main()

    return call


def test_unknown_arm_and_missing_text_are_named(run):
    with pytest.raises(UserError, match=r"--arms flad: there is no such arm; did you mean `flat`\?"):
        run(MICRO, "--arms", "flad")
    with pytest.raises(UserError, match="`--data` is no/such"):
        run(MICRO, "--data", "no/such")


@pytest.mark.long
def test_comparison_goes_on_to_its_table(run, tmp_path: Path):
    folder, results = tmp_path / "output", tmp_path / "results"
    run(MICRO, "--jobs", "2")
    report = json.loads((results / "budgets.json").read_text())
    text = (results / "budgets.md").read_text()
    assert (results / "budgets.png").stat().st_size > 10_000
    assert str(tmp_path) not in json.dumps(report) + text
    assert "| flat, rate 0.03 |" in text
    for arm in MICRO["arms"]:
        assert f"| {arm} | 1 |" in text
        records = read_lines(folder / arm / "equal-tokens-seed-1" / "pretrain" / "metrics.jsonl")
        evaluated = [record for record in records if "eval_loss" in record]
        [own] = report["equal tokens"][arm]
        assert own["curve"]["step"] == [record["step"] for record in evaluated] == [0, 4, 8, 12, 16]
        assert own["end"]["eval_loss"] == evaluated[-1]["eval_loss"]
        assert own["curve"]["cpu_seconds"] == sorted(own["curve"]["cpu_seconds"])

    # What is not complete begins anew; the rest stays.
    first, second = (folder / arm / "equal-tokens-seed-1" / "pretrain" for arm in MICRO["arms"])
    before = (first / "status.json").stat().st_mtime_ns
    status = json.loads((second / "status.json").read_text())
    (second / "status.json").write_text(json.dumps(status | {"state": "preempted"}))
    (second / "stale").touch()
    run(MICRO)
    assert not (second / "stale").exists()
    assert (first / "status.json").stat().st_mtime_ns == before
    shutil.rmtree(first)
    with pytest.raises(UserError, match=r"`learning_rate` 0\.01, which would be 0.02 now"):
        run(MICRO | {"run": MICRO["run"] | {"learning_rate": 2e-2}})
