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
