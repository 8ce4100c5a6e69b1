"""The figures of a run."""

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter


def perplexity_of(nats: float) -> str:
    if nats > 20:  # a run that diverged
        return f"e^{nats:.0f}"
    return f"{math.exp(nats):,.{0 if nats > 4 else 1}f}"


def plot_loss(metrics: list[dict[str, Any]], expected_loss: float | None, title: str, path: Path) -> None:
    """Training and held-out loss over tokens, perplexity on the right axis.

    Args:
        metrics: the lines of metrics.jsonl.
        expected_loss: held-out loss that the config says to expect, in nats.
        title: of the figure.
        path: PNG file to write.
    """
    train = [record for record in metrics if record.get("loss") is not None]
    held_out = [record for record in metrics if record.get("eval_loss") is not None]
    if not train and not held_out:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["tokens"] for r in train], [r["loss"] for r in train], color="tab:blue", alpha=0.6, label="training")
    if held_out:
        last = held_out[-1]
        axes.plot(
            [r["tokens"] for r in held_out],
            [r["eval_loss"] for r in held_out],
            color="tab:orange",
            marker="o",
            markersize=3,
            label=f"held out (last: {last['eval_loss']:.3f}, perplexity {perplexity_of(last['eval_loss'])})",
        )
        unigram = last["unigram_loss"]
        axes.axhline(unigram, color="tab:gray", linestyle=":", label=f"unigram model ({unigram:.3f})")
    if expected_loss is not None:
        axes.axhline(
            expected_loss, color="tab:green", linestyle="--", label=f"expected at the end ({expected_loss:.3f})"
        )
    axes.set(xlabel="tokens", ylabel="masked-LM loss (nats a token)", title=title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.legend()
    perplexity = axes.secondary_yaxis("right")
    low, high = axes.get_ylim()
    ticks = [nats for nats in axes.get_yticks() if low <= nats <= high]
    perplexity.set_yticks(ticks, labels=[perplexity_of(nats) for nats in ticks])
    perplexity.set_ylabel("perplexity")
    figure.savefig(path, dpi=120)


def plot_glue(rows: list[dict[str, Any]], names: list[str], published: str, title: str, path: Path) -> None:
    """Median and range of each task beside the majority's and the published result.

    Args:
        rows: the tasks of summary.json.
        names: of the rows.
        published: what the published results are called.
        title: of the figure.
        path: PNG file to write.
    """
    figure = Figure(figsize=(8, 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    done = [(place, row) for place, row in enumerate(rows) if row["n"]]
    spread = [row["standard_deviation"] or 0.0 for _, row in done]
    axes.barh(range(len(rows)), [100 * row["majority"] for row in rows], color="lightgray", label="majority")
    axes.errorbar(
        [100 * row["median"] for _, row in done],
        [place for place, _ in done],
        xerr=[100 * value for value in spread],
        fmt="o",
        color="tab:blue",
        capsize=4,
        label="median over seeds, with their standard deviation",
    )
    given = [(place, row["published"]) for place, row in enumerate(rows) if row["published"] is not None]
    if given:
        axes.plot(
            [value for _, value in given], [place for place, _ in given], "D", color="tab:orange", label=published
        )
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
