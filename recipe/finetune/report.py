"""What a grid of GLUE jobs came to: summary.json, table.md, glue.png and submission.zip."""

import math
import statistics
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import Dataset

from recipe.finetune.jobs import Job
from recipe.finetune.tasks.glue import TASKS, GlueMetric, is_official


def row_title(row: dict[str, Any]) -> str:
    return TASKS[row["task"]].title + (" (from MNLI)" if row["init"] == "mnli" else "")


def describe_jobs(
    jobs: list[Job], tasks: dict[str, dict[str, Dataset]], records: dict[Job, dict[str, Any]], epochs: int
) -> str:
    """What there is to do: rows, jobs and updates of each task."""
    lines = [f"{len(jobs)} jobs, {sum(job in records for job in jobs)} of them with a result; the longest first"]
    for name in dict.fromkeys(job.task for job in jobs):
        own = [job for job in jobs if job.task == name]
        rows = len(tasks[name]["train"])
        updates = sum(epochs * math.ceil(rows / job.batch_size) for job in own)
        tests = sum(split.startswith("test") for split in tasks[name])
        lines.append(
            f"  {TASKS[name].title:6} {rows:>8,} train rows, {len(tasks[name]['validation']):>6,} dev, {tests} test "
            f"sets, {len(own):>3} jobs, {updates:>10,} updates"
        )
    return "\n".join(lines)


def describe_data(name: str, splits: dict[str, Dataset]) -> dict[str, Any]:
    """What the report says of a task's data: whether it is the official one, and what needs no model.

    Returns:
        `official`, and `majority`: the first metric of always giving the commonest answer of the training set, or its
        mean in a regression.
    """
    task, labels = TASKS[name], splits["train"]["label"][:]
    answer = statistics.mean(labels) if task.is_regression else statistics.mode(labels)
    references = splits["validation"]["label"][:]
    scores = GlueMetric(name).compute(predictions=[answer] * len(references), references=references)
    return {"official": is_official(name, splits), "majority": scores[task.metrics[0]]}


def summarise(
    records: dict[Job, dict[str, Any]], jobs: list[Job], data: dict[str, dict[str, Any]], compare_with: str
) -> dict[str, Any]:
    """The report as numbers.

    A setting's result is the median over its seeds, a task's that of its best setting. Published results are given
    where the data is the official one. Averages take a task's run from the MNLI model where there is one, as the paper
    does.

    Args:
        records: of results.jsonl.
        jobs: that the report is about.
        data: of each task, from `describe_data`.
        compare_with: `base` or `large`.
    """
    groups = defaultdict(list)
    for job in jobs:
        groups[job.task, job.init].append(job)
    rows = []
    for name, init in sorted(groups, key=lambda key: list(TASKS).index(key[0])):
        group = groups[name, init]
        task, first = TASKS[name], TASKS[name].metrics[0]
        settings = defaultdict(list)
        for job in group:
            if records[job]["state"] == "done":
                settings[job.learning_rate, job.batch_size].append(records[job])
        row = {"task": name, "init": init, "metric": first, "n": 0, "failed": 0} | data[name]
        row["failed"] = sum(records[job]["state"] == "failed" for job in group)
        row["device_seconds"] = round(
            sum(records[job].get("seconds", 0) * records[job].get("processes", 1) for job in group), 1
        )
        row["published"] = task.published.get(compare_with) if row["official"] else None
        if settings:
            medians = {
                setting: statistics.median(record["metrics"][first] for record in done)
                for setting, done in settings.items()
            }
            best = max(medians, key=lambda setting: medians[setting])
            scores = [record["metrics"][first] for record in settings[best]]
            row |= {
                "learning_rate": best[0],
                "batch_size": best[1],
                "median": medians[best],
                "best": max(scores),
                "standard_deviation": statistics.stdev(scores) if len(scores) > 1 else None,
                "n": len(scores),
                "metrics": {
                    metric: statistics.median(record["metrics"][metric] for record in settings[best])
                    for metric in settings[best][0]["metrics"]
                },
                "difference": None if row["published"] is None else 100 * medians[best] - row["published"],
            }
        rows.append(row)
    counted = {row["task"]: row for row in sorted(rows, key=lambda row: row["init"] == "mnli") if row["n"]}
    return {
        "compare_with": compare_with,
        "tasks": rows,
        "average": average(list(counted.values())),
        "average_without_wnli": average([row for name, row in counted.items() if name != "wnli"]),
        "device_hours": sum(row["device_seconds"] for row in rows) / 3600,
    }


def average(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the medians, where there are several; of the published results too where every row has one."""
    if len(rows) < 2:
        return None
    has_all = all(row["published"] is not None for row in rows)
    return {
        "tasks": [row["task"] for row in rows],
        "median": statistics.mean(row["median"] for row in rows),
        "published": statistics.mean(row["published"] for row in rows) if has_all else None,
    }


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def format_table(summary: dict[str, Any], hours: float) -> str:
    """table.md.

    Args:
        hours: since the last start.
    """
    spent = f"{hours:.2f} hours since this start, {summary['device_hours']:.2f} device-hours in all."
    notes = format_notes(summary)
    if failed := sum(row["failed"] for row in summary["tasks"]):
        notes.append(f"{failed} jobs failed; results.jsonl says why, and the same command tries them again.")
    return "\n".join([format_rows(summary), "", *notes, spent]) + "\n"


def format_rows(summary: dict[str, Any]) -> str:
    """The table, columns aligned so that it reads on a terminal too."""
    published = f"roberta.{summary['compare_with']}"
    lines = [["task", "metric", "median", "best", "sd", "n", "lr", "batch", "majority", published, "difference"]]
    for row in summary["tasks"]:
        given = "–" if row["published"] is None else f"{row['published']:.1f}"
        cells = [row_title(row), row["metric"]]
        if not row["n"]:
            lines.append([*cells, "failed", "–", "–", "0", "–", "–", percent(row["majority"]), given, "–"])
            continue
        cells += [percent(row[name]) for name in ("median", "best", "standard_deviation")]
        cells += [str(row["n"]), f"{row['learning_rate']:g}", str(row["batch_size"]), percent(row["majority"]), given]
        lines.append([*cells, "–" if row["difference"] is None else f"{row['difference']:+.1f}"])
        for metric, value in row["metrics"].items():
            if metric != row["metric"]:
                lines.append(["", metric, percent(value), *[""] * 8])
    averages = {"average": summary["average"], "average without WNLI": summary["average_without_wnli"]}
    for name, values in averages.items():
        if values and (name == "average" or values != summary["average"]):
            given = "–" if values["published"] is None else f"{values['published']:.1f}"
            gap = "–" if values["published"] is None else f"{100 * values['median'] - values['published']:+.1f}"
            count = f"of {len(values['tasks'])}"
            lines.append([name, count, percent(values["median"]), *[""] * 6, given, gap])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


def format_notes(summary: dict[str, Any]) -> list[str]:
    """What the table's columns are."""
    notes = [
        "Dev results in percent: median over n seeds at the best setting, each of its best epoch; majority: what the "
        "commonest answer of the training set gets.",
    ]
    if any(row["published"] is not None for row in summary["tasks"]):
        published = f"roberta.{summary['compare_with']}"
        notes.append(f"{published}: fairseq's published dev results; RTE, STS-B and MRPC there start from MNLI.")
    unofficial = sorted({TASKS[row["task"]].title for row in summary["tasks"] if not row["official"]})
    if unofficial:
        notes.append(f"Not the official data, and not to be compared with published results: {', '.join(unofficial)}.")
    return notes


def write_submission(folder: Path, target: Path) -> list[str]:
    """A zip of the predictions that are there.

    Returns:
        names of the site's eleven files that are not.
    """
    names = [split.submission for task in TASKS.values() for split in task.splits.values() if split.submission]
    there = [name for name in names if (folder / name).is_file()]
    if there:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
            for name in there:
                file.write(folder / name, name)
    return [name for name in names if name not in there]
