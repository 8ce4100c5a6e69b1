"""The plateau that training starts on: when it is told of, and when it is not."""

import json
import math
from pathlib import Path

import pytest

import recipe.monitoring
from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.monitoring import find_plateau
from recipe.run.metrics import TrainState

UNIGRAM = 7.4


@pytest.fixture
def run_at(run_pretrain, monkeypatch: pytest.MonkeyPatch):
    """Run with held-out losses that differ from the unigram model's by so much, one evaluation after the other."""

    def run(flags: dict[str, object], *differences: float) -> None:
        left = iter(differences)
        monkeypatch.setattr("recipe.data.batches.TrainingData.unigram_loss", lambda data: UNIGRAM)
        monkeypatch.setattr(recipe.monitoring, "evaluate", lambda *_: ([UNIGRAM + next(left)], None))
        run_pretrain(flags | {"eval_steps": 1, "resume_from_checkpoint": "latest"})
        assert not list(left)

    return run


def read_notice(run: Path) -> str | None:
    return json.loads((run / "status.json").read_text())["notice"]


def test_plateau_is_told_once_in_a_run_and_at_its_end(flags, run_at, tmp_path: Path, capsys):
    run_at(flags | {"max_steps": 4}, 3.0, 0.1, 0.05, -0.05, 0.02)
    printed = capsys.readouterr().out
    assert (
        printed.count(
            "warning: the held-out loss (7.350) has been about that of a unigram model (7.400) since update 1"
        )
        == 1
    )
    assert printed.count("that of a unigram model") == 1
    for remedy in (
        "`phases`",
        "`model_type: roberta-prelayernorm`",
        "more updates",
        "`warmup_steps`",
        "`learning_rate`",
    ):
        assert remedy in printed
    run_at(flags | {"max_steps": 6}, 0.0, 0.01)
    assert "that of a unigram model" not in capsys.readouterr().out
    notice = "the held-out loss (7.410) has been about that of a unigram model (7.400) since update 1"
    assert read_notice(tmp_path / "run").startswith(notice)
    assert f"{notice}: the model does not use context yet." in (tmp_path / "run" / "model" / "README.md").read_text()
    run_at(flags | {"max_steps": 6})  # complete, and asked to go on
    assert read_notice(tmp_path / "run").startswith(notice)


def test_run_that_leaves_the_plateau_is_not_reproached_with_it(flags, run_at, tmp_path: Path, capsys):
    run_at(flags | {"max_steps": 7}, 3.0, 0.1, 0.0, 0.0, -0.5, 0.1, 0.1, -0.3)
    assert capsys.readouterr().out.count("that of a unigram model") == 1
    assert read_notice(tmp_path / "run") is None
    assert "that of a unigram model" not in (tmp_path / "run" / "model" / "README.md").read_text()


def make_args(**options: object) -> PretrainArguments:
    corpora = [CorpusArguments(name="a", path="a")]
    return PretrainArguments(output_dir="run", tokenizer_name="a", corpora=corpora, max_steps=1000, **options)


@pytest.mark.parametrize(
    ("losses", "baseline", "expected"),
    [
        ({0: 10.8, 50: 7.41, 100: 7.4, 150: 7.4}, UNIGRAM, [150]),  # not before warmup is over
        ({0: 10.8, 200: 7.5, 400: 5.0, 1000: 3.0}, UNIGRAM, []),  # on its way down
        ({0: 10.8, 1000: 7.45}, UNIGRAM, [1000]),  # the only evaluation, at the end
        ({0: 2.1, 200: 2.0, 400: 1.9, 1000: 1.8}, UNIGRAM, []),  # a pretrained model
        ({0: 10.8, 200: 7.19, 400: 7.1, 1000: 7.09}, UNIGRAM, []),
        ({0: 10.8, 200: 9.0, 400: 8.9, 1000: 8.5}, UNIGRAM, []),
        ({0: 10.8, 200: None, 400: None, 1000: None}, UNIGRAM, []),  # a loss that is no number
        ({0: 10.8, 200: 7.4, 400: 7.4, 1000: 7.4}, math.nan, []),  # no baseline
    ],
)
def test_plateau_is_two_evaluations_near_the_unigram_model_after_warmup(losses, baseline, expected):
    args, state, told = make_args(warmup_steps=100), TrainState(), []
    for state.step, loss in losses.items():
        if find_plateau(args, state, loss, baseline):
            told.append(state.step)
    assert told == expected


def test_warmup_by_hours_is_over_when_its_share_is_used():
    args = make_args(schedule_by="hours", max_train_hours=1, warmup_steps=0.5)
    for minutes, is_told in ((29, False), (31, True)):
        state = TrainState(step=200, train_milliseconds=minutes * 60_000, plateau_since=100)
        assert bool(find_plateau(args, state, UNIGRAM, UNIGRAM)) == is_told
