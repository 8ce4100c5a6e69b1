"""Figures of a run, of several runs side by side, or of GLUE results. matplotlib is loaded only to draw one.

python -m recipe.run.plots runs/roberta-base [runs/another …]
"""

import argparse
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipe.base.errors import UserError, raising_damaged_file, run_script
from recipe.base.formatting import format_count
from recipe.run.directory import RunDirectory, read_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that colour-blind readers tell apart (Okabe and Ito); lines and markers tell the runs apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
PANELS = ("learning_rate", "grad_norm", "tokens_per_second")  # below the loss
DRAWN_FIELDS = ("loss", "eval_loss", "unigram_loss", "resumed_from", "phase", *PANELS)
MARKERS = ("o", "s", "^", "D", "v", "P")
MAX_TICKS = 12  # of the perplexity, before only powers of ten are shown
SMOOTHING_DIVISOR = 50  # a smoothed line is the mean over the number of log lines divided by this
CROPPED_FRACTION = 0.02  # of the tokens, in which the loss falls from higher than the figure shows


@dataclass(frozen=True)
class Curves:
    """The lines of a run's metrics.jsonl, its expected loss (held out, in nats), and a checksum of its vocabulary."""

    name: str
    metrics: list[dict[str, Any]]
    expected_loss: float | None = None
    vocabulary: str = ""

    def series(self, field: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens and the values of the lines that have the field, (lines,) each."""
        lines = [line for line in self.metrics if line.get(field) is not None]
        return np.array([line["tokens"] for line in lines], float), np.array([line[field] for line in lines], float)

    def phases(self) -> list[float]:
        """List how many tokens had been seen where a phase began, as the lines of the log tell; not of the first."""
        tokens, numbers = self.series("phase")
        return [before for before, now, then in zip(tokens, numbers, numbers[1:], strict=False) if now != then]

    def resumes(self) -> list[float]:
        """List how many tokens had been seen where the run was resumed."""
        before = {line["step"]: line["tokens"] for line in self.metrics if "tokens" in line}
        starts = [line["resumed_from"] for line in self.metrics if line.get("resumed_from") is not None]
        return [max((tokens for step, tokens in before.items() if step <= start), default=0) for start in starts]


def read_curves(path: Path) -> Curves:
    """Read the curves of a run from its folder; one that is of no pretraining run or damaged is a `UserError`."""
    run = RunDirectory(path, is_main=False, pids=[])
    for file in (run.config_file, run.metrics_file):
        if not file.is_file():
            raise UserError(f"{path} is no pretraining run, since it has no {file.name}; name the `output_dir` of one")
    with raising_damaged_file(run.config_file, "correct it"):
        config = read_config(path)
        checksum = config.get("environment", {}).get("tokenizer_checksum")
        expected = None if config["expected_loss"] is None else float(config["expected_loss"])
    if checksum is None:
        raise UserError(f"{run.config_file} is not of a pretraining run of this version of the recipe")
    curves = Curves(str(path), run.read_metrics(), expected, checksum)
    with raising_damaged_file(run.metrics_file, "remove the lines that are wrong"):
        for field in DRAWN_FIELDS:
            for values in curves.series(field):
                if values.ndim > 1 or not np.isfinite(values).all():
                    raise ValueError(f"`tokens` or `{field}` of a line is no number")
    return curves


def smooth(values: np.ndarray) -> np.ndarray:
    """Smooth (n,) values: each becomes the mean over itself and those before it, one `SMOOTHING_DIVISOR`th of all."""
    width = max(1, len(values) // SMOOTHING_DIVISOR)
    return np.array([values[max(0, end - width) : end].mean() for end in range(1, len(values) + 1)])


def new_figure(width: float, height: float) -> "Figure":
    """Make an empty figure of this size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("no figure can be drawn: matplotlib is not installed; run: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def format_perplexity(nats: float) -> str:
    """Write the perplexity of a loss, as a power where the run diverged."""
    return f"e^{nats:.0f}" if nats > 20 else f"{math.exp(nats):,.{0 if nats > 4 else 1}f}"


def plot_runs(runs: list[Curves], path: Path) -> None:
    """Draw loss and perplexity, learning rate, gradient norm and throughput over the tokens seen, to a PNG file.

    A single run is drawn with its unsmoothed training loss, the loss of a unigram model and the expected loss. Runs
    without a training loss are not drawn, and without any there is no figure. Different vocabularies are a `UserError`.
    """
    for run in runs[1:]:
        if run.vocabulary != runs[0].vocabulary:
            problem = f"{runs[0].name} and {run.name} have different vocabularies"
            raise UserError(f"{problem}, and losses are comparable only over the same tokens; plot them apart")
    runs = [run for run in runs if len(run.series("loss")[0])]
    if not runs:
        return
    figure = new_figure(9, 7.5)
    panels = figure.subplot_mosaic([["loss"] * 3, list(PANELS)], height_ratios=[2.2, 1])
    is_alone = len(runs) == 1
    styles = zip(runs, itertools.cycle(COLOURS), itertools.cycle(LINE_STYLES), itertools.cycle(MARKERS), strict=False)
    for run, colour, line, marker in styles:
        style: dict[str, Any] = {"color": colour, "linestyle": line}
        panels["learning_rate"].plot(*run.series("learning_rate"), **style)
        for field in ("grad_norm", "tokens_per_second"):
            draw_smoothed(panels[field], run.series(field), style, is_alone)
        if is_alone:
            draw_only_loss(panels["loss"], run, style)
        else:
            draw_compared_loss(panels["loss"], run, style, marker)
    panels["learning_rate"].set(ylabel="learning rate")
    panels["grad_norm"].set(ylabel="gradient norm", yscale="log")
    set_log_ticks(panels["grad_norm"])
    panels["tokens_per_second"].set(ylabel="tokens/s", ylim=(0, None))
    panels["tokens_per_second"].yaxis.set_major_formatter(format_tick)
    panels["loss"].set(ylabel="masked-LM loss (nats a token)", title=runs[0].name if is_alone else None)
    marks: dict[str, Any] = {}
    if is_alone:
        marks["resumed"] = runs[0].resumes(), {"color": "0.6", "linestyle": (0, (1, 2)), "linewidth": 1, "zorder": 0}
        marks["next phase"] = runs[0].phases(), {"color": "0.6", "linestyle": "-", "linewidth": 1, "zorder": 0}
    for axes in panels.values():
        for name, (places, style) in marks.items():
            for tokens in places:
                axes.axvline(tokens, **style, label=name if axes is panels["loss"] and tokens == places[0] else None)
        axes.set(xlabel="tokens", xlim=(0, None))
        axes.xaxis.set_major_formatter(format_tick)
        axes.grid(alpha=0.3)
    crop_beginning(panels["loss"], runs)
    add_perplexity(panels["loss"])
    figure.legend(*panels["loss"].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=120)


def format_tick(number: float, position: float) -> str:
    """Write a number at a tick as the log does: 540,000 as 540K, and 1e11 as 100B."""
    return format_count(number)


def set_log_ticks(axes: "Axes") -> None:
    """Set a handful of round ticks on a logarithmic axis, whether it covers half a decade or several."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    low, high = axes.get_ylim()
    is_narrow = high < 10 * low  # where a logarithmic axis would have one or two ticks
    several = LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,))
    axes.yaxis.set_major_locator(MaxNLocator(5) if is_narrow else several)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_smoothed(
    axes: "Axes", series: tuple[np.ndarray, np.ndarray], style: dict[str, Any], is_alone: bool, label: str | None = None
) -> None:
    """Draw a smoothed line; for a single run, on the faint line that it smooths."""
    tokens, values = series
    if is_alone:
        axes.plot(tokens, values, color=style["color"], alpha=0.25, linewidth=0.8)
    axes.plot(tokens, smooth(values), **style, label=label)


def draw_only_loss(axes: "Axes", run: Curves, style: dict[str, Any]) -> None:
    """Draw the losses of a single run, the loss of a unigram model and the expected loss."""
    width = max(1, len(run.series("loss")[1]) // SMOOTHING_DIVISOR)
    label = f"training, mean over {width} log lines" if width > 1 else "training"
    draw_smoothed(axes, run.series("loss"), style, True, label)
    tokens, held_out = run.series("eval_loss")
    if len(held_out):
        first = f" ({held_out[0]:.3f} at the start)" if tokens[0] == 0 and len(tokens) > 1 else ""
        label = f"held out: {held_out[-1]:.3f}{first}, perplexity {format_perplexity(held_out[-1])}"
        axes.plot(tokens, held_out, color=COLOURS[1], linestyle="--", marker="o", markersize=4, label=label)
        unigram = run.series("unigram_loss")[1][-1]
        axes.axhline(unigram, color="0.4", linestyle=":", label=f"unigram model: {unigram:.3f}")
    if run.expected_loss is not None:
        label = f"expected at the end: {run.expected_loss:.3f}"
        axes.axhline(run.expected_loss, color=COLOURS[2], linestyle="-.", label=label)


def draw_compared_loss(axes: "Axes", run: Curves, style: dict[str, Any], marker: str) -> None:
    """Draw the losses of one of several runs: training as a line, held out as markers."""
    tokens, held_out = run.series("eval_loss")
    label = run.name
    if len(held_out):
        label += f": held out {held_out[-1]:.3f}, perplexity {format_perplexity(held_out[-1])}"
    draw_smoothed(axes, run.series("loss"), style, False)
    axes.plot(tokens, held_out, color=style["color"], linestyle="none", marker=marker, markerfacecolor="white")
    axes.plot([], [], **style, marker=marker, markerfacecolor="white", label=label)  # for the legend


def crop_beginning(axes: "Axes", runs: list[Curves]) -> None:
    """Crop the axis to the losses after the very beginning, in which they fall the most."""
    end = max(run.series("loss")[0][-1] for run in runs)
    later = [
        values[tokens > CROPPED_FRACTION * end]
        for run in runs
        for tokens, values in map(run.series, ("loss", "eval_loss", "unigram_loss"))
    ]
    low, high = axes.get_ylim()
    highest = np.concatenate(later).max(initial=low)
    if low < highest < high:
        axes.set_ylim(low, highest + 0.05 * (highest - low))


def add_perplexity(axes: "Axes") -> None:
    """Add a perplexity axis on the right, with round ticks: 1, 2 or 5 times a power of ten, or powers of e far up."""
    perplexity = axes.secondary_yaxis("right")
    low, high = axes.get_ylim()
    shown = [(math.log(digit) + power * math.log(10), digit * 10**power) for power in range(9) for digit in (1, 2, 5)]
    ticks = {nats: f"{number:,}" for nats, number in shown if low <= nats <= high}
    if len(ticks) > MAX_TICKS:
        ticks = {nats: text for nats, text in ticks.items() if text.startswith("1")}
    if len(ticks) < 3:
        ticks = {nats: format_perplexity(nats) for nats in axes.get_yticks() if low <= nats <= high}
    perplexity.set_yticks(list(ticks), labels=list(ticks.values()))
    perplexity.set_ylabel("perplexity")


def plot_glue(rows: list[dict[str, Any]], names: list[str], published: str, title: str, path: Path) -> None:
    """Draw the median and standard deviation of the tasks of summary.json beside the majority's and published results.

    The figure calls the tasks by `names` and the published results by `published`, and is written to a PNG file.
    """
    figure = new_figure(8, 1.6 + 0.42 * len(rows))
    axes = figure.subplots()
    done = [place for place, row in enumerate(rows) if row["n"]]
    axes.barh(range(len(rows)), [100 * row["majority"] for row in rows], color="lightgray", label="majority")
    axes.errorbar(
        [100 * rows[place]["median"] for place in done],
        done,
        xerr=[100 * (rows[place]["standard_deviation"] or 0.0) for place in done],
        fmt="o",
        color=COLOURS[0],
        capsize=4,
        label="median over seeds, with their standard deviation",
    )
    if given := [(row["published"], place) for place, row in enumerate(rows) if row["published"] is not None]:
        axes.plot(*zip(*given, strict=True), "D", color=COLOURS[1], label=published)
    for place, row in enumerate(rows):
        text = f"{100 * row['median']:.1f}" if row["n"] else "failed"
        axes.annotate(text, (100 * row.get("median", 0), place), (0, 7), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(rows)), labels=names)
    axes.invert_yaxis()
    axes.set(xlabel="dev result (percent)", title=title)
    axes.set_xlim(min(0, *(100 * row.get("median", 0) - 5 for row in rows)), 100)
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Draw the runs that are named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="`output_dir` of a pretraining run")
    parser.add_argument("--output", type=Path, help="PNG; default: loss.png of a single run, comparison.png of several")
    args = parser.parse_args()
    path = args.output or (args.run_dirs[0] / "loss.png" if len(args.run_dirs) == 1 else Path("comparison.png"))
    runs = [read_curves(folder) for folder in args.run_dirs]
    for run in runs:
        if not len(run.series("loss")[0]):
            raise UserError(f"{run.name} has no training loss in its metrics.jsonl yet; leave it out")
    plot_runs(runs, path)
    print(path)


if __name__ == "__main__":
    run_script(main)
