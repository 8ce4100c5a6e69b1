"""What the runs of a comparison came to: markdown table, sentences, plot."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from ablation_tables import Finding, Table
from matplotlib.figure import Figure
from safetensors import safe_open

from recipe.glue_tasks import TASKS
from recipe.metrics import format_count, format_duration

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
    records = [json.loads(line) for line in (folder / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "seconds_per_update" in record]
    evaluated = next(record for record in reversed(records) if "eval_loss" in record)
    steps = [0, *(record["step"] for record in trained)]
    summary = json.loads((folder / "glue" / "summary.json").read_text())
    pairs = [value for name, value in evaluated.items() if name.endswith("_accuracy")]
    scores = {LOSS: evaluated["eval_loss"]}
    scores |= {TASKS[row["task"]].title: 100 * row["median"] for row in summary["tasks"] if row["n"]}
    return {
        "scores": scores,
        "unigram_loss": evaluated["unigram_loss"],
        "majority": {TASKS[row["task"]].title: 100 * row["majority"] for row in summary["tasks"]},
        "parameters": count_saved_parameters(folder / "pretrain" / "model"),
        "tokens": trained[-1]["tokens"],
        "passes": trained[-1]["epoch"],
        "seconds": sum(
            record["seconds_per_update"] * (record["step"] - before)
            for record, before in zip(trained, steps, strict=False)
        ),
        "pair_accuracy": pairs[0] if pairs else None,
    }


def count_saved_parameters(model: Path) -> int:
    count = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def share_held_out_text(configs: list[dict[str, Any]]) -> bool:
    """Whether the held-out losses of these runs, with one seed, are of the same blocks."""
    fields = HELD_OUT_FIELDS if configs[0]["eval_corpora"] else (*HELD_OUT_FIELDS, "corpora")
    return all(config[name] == configs[0][name] for config in configs for name in fields)


def judge(finding: Finding, measure: str, runs: dict[str, list[dict[str, Any]]], table: Table) -> str:
    """`agrees`, `disagrees`, `within the noise` or `not judged`, of one measure of two rows.

    Noise is what the seeds come to: where the ranges of the two rows overlap, nothing is told apart. The direction is
    that of the paper's figures for this measure, or else that of what it says.
    """
    better, worse = ([run["scores"][measure] for run in runs[row] if measure in run["scores"]] for row in (finding.better, finding.worse))
    if min(len(better), len(worse)) < 2:
        return "not judged"
    if max(better) >= min(worse) and max(worse) >= min(better):
        return "within the noise"
    is_above = (min(better) > max(worse)) != (measure == LOSS)
    published = table.published.get({LOSS: "perplexity"}.get(measure, measure), {})
    expected = True
    if published.get(finding.better, 0) != published.get(finding.worse, 0):
        expected = (published[finding.better] > published[finding.worse]) != (measure == LOSS)
    return "agrees" if is_above == expected else "disagrees"


def sentence(finding: Finding, measures: list[str], runs: dict[str, list[dict[str, Any]]], table: Table) -> str:
    """What the paper says of two rows, and what the runs say."""
    said: dict[str, list[str]] = {}
    for measure in measures:
        said.setdefault(judge(finding, measure, runs, table), []).append(measure)
    opening = f"{table.rows[finding.better]} against {table.rows[finding.worse]}. The paper: {finding.statement}. Here: "
    if set(said) == {"within the noise"}:
        return f"{opening}the difference is within the noise of the seeds, by {' and by '.join(measures)}."
    wording = {
        "agrees": "the direction agrees by",
        "disagrees": "the direction disagrees by",
        "within the noise": "within the noise of the seeds by",
        "not judged": "not judged, for want of two seeds, by",
    }
    return opening + "; ".join(f"{wording[verdict]} {', '.join(said[verdict])}" for verdict in wording if verdict in said) + "."


def spread(values: list[float], digits: int) -> str:
    """Median and range."""
    if not values:
        return "–"
    median = f"{statistics.median(values):.{digits}f}"
    return median if len(values) == 1 else f"{median} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def chance_of_no_overlap(seeds: int) -> float:
    """That the ranges of two rows that do not differ do not overlap."""
    return 2 / math.comb(2 * seeds, seeds)


def report(name: str, table: Table, configs: dict[str, dict[str, Any]], runs: dict[str, list[dict[str, Any]]]) -> str:
    """The comparison as markdown.

    Args:
        name: of the comparison and its scale, in the title.
        configs: of each row, flat.
        runs: of each row, what its complete runs came to.
    """
    is_comparable = share_held_out_text(list(configs.values()))
    done = [run for row in table.rows for run in runs[row]]
    tasks = list(dict.fromkeys(measure for run in done for measure in run["scores"] if measure != LOSS))
    has_pairs = any(run["pair_accuracy"] is not None for run in done)
    heads = ["row", "runs", "parameters", "tokens", "passes", "time", LOSS + ("" if is_comparable else " ¹"), "perplexity"]
    heads += ["pairs told"] * has_pairs + tasks + [f"paper: {measure}" for measure in table.published]
    lines = []
    for row, title in table.rows.items():
        own = runs[row]
        losses = [run["scores"][LOSS] for run in own]
        cells = [title, str(len(own)), format_count(own[0]["parameters"]) if own else "–"]
        cells += [middle(own, "tokens", format_count), middle(own, "passes", "{:.1f}".format)]
        cells += [middle(own, "seconds", format_duration), spread(losses, 3), spread([math.exp(loss) for loss in losses], 1)]
        if has_pairs:
            cells.append(spread([100 * run["pair_accuracy"] for run in own if run["pair_accuracy"] is not None], 1))
        cells += [spread([run["scores"][task] for run in own if task in run["scores"]], 1) for task in tasks]
        lines.append([*cells, *(f"{figures[row]:g}" for figures in table.published.values())])
    if done:
        guess = ["commonest answer", *["–"] * (6 + has_pairs), *(f"{done[0]['majority'][task]:.1f}" for task in tasks)]
        guess[6] = ... 
        lines.append(guess + [""] * len(table.published))
    return ""
