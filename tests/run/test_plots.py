import json
import math
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from recipe.base.errors import UserError
from recipe.run.plots import SMOOTHING_DIVISOR, Curves, plot_glue, plot_runs, read_curves, smooth
from testing.helpers import PYTHONPATH, ROOT

METRICS = [
    {"step": 1, "tokens": 1000, "loss": 9.0, "learning_rate": 1e-4, "grad_norm": 2.0, "tokens_per_second": 10.0},
    {"step": 2, "tokens": 2000, "loss": None, "learning_rate": 2e-4, "grad_norm": None, "tokens_per_second": 12.0},
    {"step": 2, "tokens": 2000, "eval_loss": 7.5, "eval_perplexity": 1808.0, "unigram_loss": 7.0},
    {"step": 3, "tokens": 3000, "loss": 6.5, "learning_rate": 3e-4, "grad_norm": 1.0, "tokens_per_second": 11.0},
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    return saved


def write_run(folder: Path, metrics: list[dict], vocabulary: str = "a") -> Path:
    folder.mkdir()
    config = {"expected_loss": None, "environment": {"tokenizer_checksum": vocabulary}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


@pytest.mark.parametrize(
    ("change", "file"),
    [
        ({"loss": "nine"}, "metrics"),
        ({"loss": [1.0]}, "metrics"),
        ({"loss": float("inf")}, "metrics"),
        ({"tokens": None}, "metrics"),
        ({"step": None}, "metrics"),
        (None, "config"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, change: dict | None, file: str):
    run = write_run(tmp_path / "run", [METRICS[0] | (change or {}), *METRICS[1:]])
    if change is None:
        (run / "config.yaml").write_text("environment: [a]")
    with pytest.raises(UserError, match=rf"{file}\.(yaml|jsonl) is damaged or missing"):
        read_curves(run)


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_figure_of_a_run_shows_all_there_is(tmp_path: Path, figures):
    plot_runs([Curves("a run", METRICS, 6.0)], tmp_path / "loss.png")
    loss, rate, norm, speed = figures[0].axes
    lines = {line.get_label(): line for line in loss.get_lines()}
    assert list(lines["training"].get_ydata()) == [9.0, 6.5]
    assert "held out: 7.500, perplexity 1,808" in lines
    assert "expected at the end: 6.000" in lines
    assert "unigram model: 7.000" in lines
    assert list(rate.get_lines()[0].get_ydata()) == [1e-4, 2e-4, 3e-4]
    assert list(norm.get_lines()[0].get_xdata()) == [1000, 3000]
    assert speed.get_ylim()[0] == 0
    for axes in figures[0].axes:
        assert axes.get_xlabel() == "tokens"
        assert axes.get_ylabel()
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[:2] == (900, 1080)


def test_several_runs_differ_in_colour_and_in_line(tmp_path: Path, figures):
    plot_runs([Curves(name, METRICS) for name in "abc"], tmp_path / "comparison.png")
    for axes in figures[0].axes:
        drawn = [line for line in axes.get_lines() if line.get_linestyle() != "None" and len(line.get_xdata())]
        assert len(drawn) == 3
        assert len({line.get_linestyle() for line in drawn}) == len({line.get_color() for line in drawn}) == 3
    assert labels(figures[0])[0] == "a: held out 7.500, perplexity 1,808"


def test_smoothed_line_is_the_mean_over_the_lines_before():
    values = np.arange(200.0)
    width = 200 // SMOOTHING_DIVISOR
    assert smooth(values)[0] == 0
    assert smooth(values)[-1] == pytest.approx(values[-width:].mean())
    assert list(smooth(values[:10])) == list(values[:10])


def falling(scale: float, grad_norms: tuple[float, float] = (1.0, 2.0)) -> list[dict]:
    """A run of 1,000 updates whose loss falls from 2 + `scale` to 2, and has been resumed after 500."""
    start = {"step": 0, "tokens": 0, "eval_loss": 2 + scale, "unigram_loss": 2.5}
    metrics = [{"step": n, "tokens": 100 * n, "loss": 2 + scale * math.exp(-n / 3)} for n in range(1, 1001)]
    metrics[0]["grad_norm"], metrics[1]["grad_norm"] = grad_norms
    metrics[504]["resumed_from"] = 500
    return [start, *metrics, start | {"step": 1000, "tokens": 100_000, "eval_loss": 2.125}]


def test_beginning_does_not_flatten_the_rest(tmp_path: Path, figures):
    plot_runs([Curves("a run", falling(8.0))], tmp_path / "loss.png")
    assert figures[0].axes[0].get_ylim()[1] < 4
    assert "held out: 2.125 (10.000 at the start), perplexity 8.4" in labels(figures[0])


def test_resume_is_marked_where_it_was(tmp_path: Path, figures):
    plot_runs([Curves("a run", falling(8.0))], tmp_path / "loss.png")
    for axes in figures[0].axes:
        marks = [list(line.get_xdata()) for line in axes.get_lines() if line.get_color() == "0.6"]
        assert [50_000, 50_000] in marks
    assert "resumed" in labels(figures[0])


@pytest.mark.parametrize("scale", [0.1, 8.0, 1e4])
def test_perplexity_and_tokens_have_few_round_ticks(tmp_path: Path, figures, scale: float):
    metrics = falling(scale)
    for line in metrics[1:]:
        line["loss"] = line.get("loss", 0) + scale / 3  # so that nothing is cropped away
    plot_runs([Curves("a run", metrics)], tmp_path / "loss.png")
    figures[0].canvas.draw()
    loss = figures[0].axes[0]
    [perplexity] = loss.child_axes
    ticks = [text.get_text() for text in perplexity.get_yticklabels()]
    assert 3 <= len(ticks) <= 12
    if 1 < scale < 100:
        assert all(re.fullmatch(r"[125][0,]*", tick) for tick in ticks)
    assert "40K" in [text.get_text() for text in loss.get_xticklabels()]


@pytest.mark.parametrize("norms", [(1.1, 1.9), (0.3, 0.9), (0.5, 40.0), (1e-3, 1e4)])
def test_gradient_axis_has_ticks_to_read_it_by(tmp_path: Path, figures, norms: tuple[float, float]):
    plot_runs([Curves("a run", falling(8.0, norms))], tmp_path / "loss.png")
    figures[0].canvas.draw()
    axes = figures[0].axes[2]
    low, high = axes.get_ylim()
    shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert 3 <= len(shown) <= 10


def test_diverged_run_is_drawn(tmp_path: Path):
    diverged = [{"step": 1, "tokens": 10, "loss": 1e5}, {"step": 1, "tokens": 10, "eval_loss": None}]
    diverged.append({"step": 2, "tokens": 20, "eval_loss": 900.0, "eval_perplexity": None, "unigram_loss": 7.0})
    plot_runs([Curves("a run", diverged)], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


def test_nothing_to_draw_draws_nothing(tmp_path: Path):
    plot_runs([Curves("a run", [])], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_runs_of_different_vocabularies_are_refused(tmp_path: Path):
    one, two = (read_curves(write_run(tmp_path / name, METRICS, name)) for name in ("one", "two"))
    with pytest.raises(UserError, match=r"one and .*two have different vocabularies"):
        plot_runs([one, two], tmp_path / "comparison.png")
    assert not (tmp_path / "comparison.png").exists()


def run_plots(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "recipe.run.plots", *map(str, arguments)]
    environment = {"PYTHONPATH": PYTHONPATH, "HOME": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_command_writes_a_figure_of_one_run_and_of_several(tmp_path: Path):
    runs = [write_run(tmp_path / name, METRICS) for name in ("one", "two")]
    assert run_plots(tmp_path, runs[0]).stdout.strip() == str(runs[0] / "loss.png")
    assert run_plots(tmp_path, *runs).stdout.strip() == "comparison.png"
    assert run_plots(tmp_path, *runs, "--output", "c.png").returncode == 0
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (runs[0] / "loss.png", tmp_path / "c.png"))


def test_only_drawing_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = "import sys, recipe.run.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    run = read_curves(write_run(tmp_path / "run", METRICS))
    with pytest.raises(UserError, match="matplotlib is not installed; run: pip install matplotlib"):
        plot_runs([run], tmp_path / "loss.png")
    row = {"n": 1, "median": 0.5, "majority": 0.4, "standard_deviation": None, "published": None}
    with pytest.raises(UserError, match="matplotlib is not installed; run: pip install matplotlib"):
        plot_glue([row], ["rte"], "published", "a title", tmp_path / "glue.png")
    assert not list(tmp_path.glob("*.png"))


def test_command_refuses_what_is_no_run(tmp_path: Path):
    empty = write_run(tmp_path / "empty", [])
    (tmp_path / "folder").mkdir()
    other = write_run(tmp_path / "other", METRICS)
    (other / "config.yaml").write_text("tasks: [rte]\n")
    cases = [(tmp_path / "folder", "has no config.yaml"), (empty, "has no training loss"), (other, "is not of a pretr")]
    for folder, expected in cases:
        result = run_plots(tmp_path, folder)
        assert result.returncode == 2
        assert expected in result.stderr
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
