"""What the runs of a comparison came to: markdown table, sentences, plot."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from ablation_tables import PERPLEXITY, Finding, Table
from matplotlib.figure import Figure

from recipe.base.formatting import format_count, format_duration
from recipe.finetune.tasks.glue import TASKS
from recipe.publish.card import count_weights

LOSS = "held-out loss"
# What decides which tokens are predicted from what, beside the corpora.
HELD_OUT_FIELDS = ("tokenizer_name", "packing", "max_seq_length", "eval_blocks", "eval_mlm_probability", "eval_corpora")


def measure_run(folder: Path) -> dict[str, Any]:
    """What a complete run came to.

    Args:
        folder: with `pretrain` and `glue`.

    Returns:
        `scores` (held-out loss in nats, GLUE in percent; a task that failed is not in it), `parameters`, `tokens`
        without padding, `passes` over the text, `seconds` of pretraining, `pair_accuracy` if there are pairs.
    """
    records = [json.loads(line) for line in (folder / "pretrain" / "metrics.jsonl").read_text("utf-8").splitlines()]
    trained = [record for record in records if "seconds_per_update" in record]
    evaluated = next(record for record in reversed(records) if "eval_loss" in record)
    steps = [0, *(record["step"] for record in trained)]
    summary = json.loads((folder / "glue" / "summary.json").read_text("utf-8"))
    pairs = [value for name, value in evaluated.items() if name.endswith("_accuracy")]
    scores = {LOSS: evaluated["eval_loss"]}
    scores |= {TASKS[row["task"]].title: 100 * row["median"] for row in summary["tasks"] if row["n"]}
    return {
        "scores": scores,
        "unigram_loss": evaluated["unigram_loss"],
        "majority": {TASKS[row["task"]].title: 100 * row["majority"] for row in summary["tasks"]},
        "parameters": count_weights(folder / "pretrain" / "model"),
        "tokens": trained[-1]["tokens"],
        "passes": trained[-1]["epoch"],
        "seconds": sum(
            record["seconds_per_update"] * (record["step"] - before)
            for record, before in zip(trained, steps, strict=False)
        ),
        "pair_accuracy": pairs[0] if pairs else None,
    }


def share_held_out_text(configs: list[dict[str, Any]]) -> bool:
    """Whether the held-out losses of these runs, with one seed, are of the same blocks."""
    fields = HELD_OUT_FIELDS if configs[0]["eval_corpora"] else (*HELD_OUT_FIELDS, "corpora")
    return all(config[name] == configs[0][name] for config in configs for name in fields)


def spread(values: list[float], digits: int) -> str:
    """Median and range."""
    if not values:
        return "–"
    median = f"{statistics.median(values):.{digits}f}"
    return median if len(values) == 1 else f"{median} ({min(values):.{digits}f} to {max(values):.{digits}f})"


class Comparison:
    """A table with the runs of its rows.

    Args:
        table: of the paper.
        configs: of each row, the options that it ran with.
        runs: of each row, what its complete runs came to, see `measure_run`.
    """

    def __init__(self, table: Table, configs: dict[str, dict[str, Any]], runs: dict[str, list[dict[str, Any]]]) -> None:
        self.table = table
        self.runs = runs
        self.is_loss_comparable = share_held_out_text(list(configs.values()))
        self.done = [run for own in runs.values() for run in own]
        self.tasks = list(dict.fromkeys(name for run in self.done for name in run["scores"] if name != LOSS))

    def scores(self, row: str, measure: str) -> list[float]:
        return [run["scores"][measure] for run in self.runs[row] if measure in run["scores"]]

    def judge(self, finding: Finding, measure: str) -> str:
        """`agrees`, `disagrees`, `within the noise` or `not judged`: two rows by one measure.

        Noise is what the seeds come to: where the ranges of the two rows overlap, nothing is told apart. The direction
        is that of the paper's figures for this measure or, where they are equal or missing, that of what it says.
        """
        better, worse = self.scores(finding.better, measure), self.scores(finding.worse, measure)
        if min(len(better), len(worse)) < 2:
            return "not judged"
        if max(better) >= min(worse) and max(worse) >= min(better):
            return "within the noise"
        sign = -1 if measure == LOSS else 1
        figures = self.table.published.get(PERPLEXITY if measure == LOSS else measure)
        published = sign * (figures[finding.better] - figures[finding.worse]) if figures else 0
        return "agrees" if (sign * (min(better) - min(worse)) > 0) == (published >= 0) else "disagrees"

    def sentence(self, finding: Finding) -> str:
        """What the paper says of two rows, and what the runs say."""
        said: dict[str, list[str]] = {}
        for measure in [LOSS] * self.is_loss_comparable + self.tasks:
            said.setdefault(self.judge(finding, measure), []).append(measure)
        wording = {
            "agrees": "the direction agrees by",
            "disagrees": "the direction disagrees by",
            "within the noise": "the difference is within the noise of the seeds by",
            "not judged": "there are too few runs to judge by",
        }
        here = [f"{words} {', '.join(said[verdict])}" for verdict, words in wording.items() if verdict in said]
        better, worse = finding.better, finding.worse
        text = f"**{self.table.rows[better]} against {self.table.rows[worse]}.** {finding.statement}. "
        text += f"Here: {'; '.join(here)}."
        if self.is_loss_comparable:
            one, two = ({run["seed"]: run["scores"][LOSS] for run in self.runs[row]} for row in (better, worse))
            apart = [f"{one[seed] - two[seed]:+.3f}" for seed in sorted(one.keys() & two.keys())]
            text += f" Difference of the {LOSS}es, seed by seed: {', '.join(apart) or 'no seed of both'}."
        return text

    def cells(self, row: str) -> list[str]:
        """What stands behind a row's name."""
        runs, losses = self.runs[row], self.scores(row, LOSS)
        pairs = [100 * run["pair_accuracy"] for run in runs if run["pair_accuracy"] is not None]
        numbers = {"parameters": format_count, "tokens": format_count, "passes": "{:.1f}".format}
        numbers |= {"seconds": format_duration}
        return [
            str(len(runs)),
            *(form(statistics.median(run[name] for run in runs)) if runs else "–" for name, form in numbers.items()),
            spread(losses, 3),
            spread([math.exp(loss) for loss in losses], 0 if min(losses, default=0) > 4 else 2),
            spread(pairs, 1),
            *(spread(self.scores(row, task), 1) for task in self.tasks),
        ]

    def to_markdown(self, head: str) -> str:
        """The runs, the paper's figures, a sentence a finding, and how to read them.

        Args:
            head: text to begin with.
        """
        rows = self.table.rows
        names = ["", "runs", "parameters", "tokens", "passes", "time", LOSS, "perplexity", "pairs", *self.tasks]
        lines = [names] + [[title, *self.cells(row)] for row, title in rows.items()]
        majority = self.done[0]["majority"]
        lines.append(["*commonest answer*", *[""] * 8, *(f"{majority[task]:.1f}" for task in self.tasks)])
        text = [head, "", *rows_of(lines), ""]
        if published := self.table.published:
            digits = {PERPLEXITY: 2}
            figures = [
                [title, *(f"{values[row]:.{digits.get(name, 1)}f}" for name, values in published.items())]
                for row, title in rows.items()
            ]
            text += [*rows_of([["the paper", *published], *figures]), ""]
        text += [*(f"- {self.sentence(finding)}" for finding in self.table.findings), ""]

        seeds = min(map(len, self.runs.values()))
        chance = f", which {2 / math.comb(2 * seeds, seeds):.0%} of the pairs of equal rows do by chance" * (seeds > 1)
        notes = [
            "Medians over runs with a seed each, from pretraining on, and their range; GLUE dev and pairs told apart in"
            f" percent. A difference counts where the two ranges do not overlap{chance}.",
            "Tokens are without padding; time is of pretraining, beside other work on the same cores.",
            "Held-out losses are of the same blocks under the same masks in all rows, for each seed."
            if self.is_loss_comparable
            else "Held-out losses are of each row's own tokens or blocks, and not compared between rows.",
        ]
        return "\n".join([*text, *notes]) + "\n"

    def plot(self, path: Path) -> None:
        """Every run and the median of each row, by each measure."""
        measures, rows = [LOSS, *self.tasks], self.table.rows
        figure = Figure(figsize=(2.6 * len(measures) + 2, 1.4 + 0.5 * len(rows)), layout="constrained")
        panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for axes, measure in zip(panels, measures, strict=True):
            for place, values in enumerate(self.scores(row, measure) for row in rows):
                axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5)
                axes.plot(statistics.median(values or [math.nan]), place, "|", color="tab:red", markersize=18)
            unit = "percent" if measure != LOSS else "nats" if self.is_loss_comparable else "nats, not to be compared"
            axes.set(title=measure, xlabel=unit)
            axes.grid(alpha=0.3, axis="x")
        panels[0].set_yticks(range(len(rows)), labels=list(rows.values()))
        panels[0].invert_yaxis()
        figure.suptitle(f"{self.table.title}: runs (dots), their median (bars)")
        figure.savefig(path, dpi=110)


def rows_of(lines: list[list[str]]) -> list[str]:
    """A markdown table, the first line its head."""
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return [body[0], "| --- |" + " ---: |" * (len(lines[0]) - 1), *body[1:]]
