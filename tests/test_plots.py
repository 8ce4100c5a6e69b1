from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from recipe.plots import plot_loss

METRICS = [
    {"step": 1, "tokens": 1000, "loss": 9.0},
    {"step": 2, "tokens": 2000, "loss": None},
    {"step": 2, "tokens": 2000, "eval_loss": 7.5, "eval_perplexity": 1808.0, "unigram_loss": 7.0},
    {"step": 3, "tokens": 3000, "loss": 6.5},
]


def test_figure_shows_both_losses_and_what_to_expect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    plot_loss(METRICS, 6.0, "a run", tmp_path / "loss.png")
    axes = figures[0].axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["training"].get_ydata()) == [9.0, 6.5]
    assert any("perplexity 1,808" in label for label in lines)
    assert any("expected" in label for label in lines)
    assert any("unigram" in label for label in lines)
    image = matplotlib.image.imread(tmp_path / "loss.png")
    assert image.shape[:2] == (600, 960)


def test_diverged_run_is_drawn(tmp_path: Path):
    diverged = [{"step": 1, "tokens": 10, "loss": 1e5}, {"step": 1, "tokens": 10, "eval_loss": None}]
    diverged.append({"step": 2, "tokens": 20, "eval_loss": 900.0, "eval_perplexity": None, "unigram_loss": 7.0})
    plot_loss(diverged, None, "a run", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


def test_nothing_to_draw_draws_nothing(tmp_path: Path):
    plot_loss([], None, "a run", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
