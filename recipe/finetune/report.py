"""The report of a grid of jobs: summary.json, table.md, glue.png and submission.zip."""

import json
import statistics
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from recipe.base.errors import UserError
from recipe.base.files import write_atomically
from recipe.finetune.jobs import Job
from recipe.finetune.tasks.glue import TASKS, submitted_rows
from recipe.run.plots import plot_glue


def row_title(row: dict[str, Any]) -> str:
    """Name a row of summary.json."""
    return TASKS[row["task"]].title + (" (from MNLI)" if row["init"] == "mnli" else "")


def describe_jobs(
    jobs: list[Job], tasks: Mapping[str, Mapping[str, Sized]], records: dict[Job, dict[str, Any]], epochs: int
) -> str:
    """Describe what there is to do: rows, jobs and updates of each task."""
    lines = [f"{len(jobs)} jobs, {sum(job in records for job in jobs)} of them with a result; the longest first"]
    for name in dict.fromkeys(job.task for job in jobs):
        own = [job for job in jobs if job.task == name]
        rows = len(tasks[name]["train"])
        updates = sum(job.num_updates(rows, epochs) for job in own)
        tests = sum(split.startswith("test") for split in tasks[name])
        lines.append(
            f"  {TASKS[name].title:6} {rows:>8,} train rows, {len(tasks[name]['validation']):>6,} dev, {tests} test "
            f"sets, {len(own):>3} jobs, {updates:>10,} updates"
        )
    return "\n".join(lines)


def summarise(
    records: dict[Job, dict[str, Any]], jobs: list[Job], data: dict[str, dict[str, Any]], compare_with: str
) -> dict[str, Any]:
    """Summarise a grid in numbers; `records` are lines of results.jsonl, `data` what `describe_data` says of each task.

    Averages take a task's run from the MNLI model where there is one, as the paper does.
    """
    groups = defaultdict(list)
    for job in sorted(jobs, key=lambda job: list(TASKS).index(job.task)):
        groups[job.task, job.init].append(job)
    rows = [summarise_task({job: records[job] for job in group}, data, compare_with) for group in groups.values()]
    counted = {row["task"]: row for row in sorted(rows, key=lambda row: row["init"] == "mnli") if row["n"]}
    return {
        "compare_with": compare_with,
        "tasks": rows,
        "average": average(list(counted.values())),
        "average_without_wnli": average([row for name, row in counted.items() if name != "wnli"]),
        "device_hours": sum(row["device_seconds"] for row in rows) / 3600,
    }


def summarise_task(
    records: dict[Job, dict[str, Any]], data: dict[str, dict[str, Any]], compare_with: str
) -> dict[str, Any]:
    """Summarise the jobs of a task that start from the same model.

    A setting's result is the median over its seeds, the task's that of its best setting. Published results are given
    where the data is the official one.
    """
    name, init = next((job.task, job.init) for job in records)
    task, first = TASKS[name], TASKS[name].metrics[0]
    settings = defaultdict(list)
    for job, record in records.items():
        if record["state"] == "done":
            settings[job.learning_rate, job.batch_size].append(record["metrics"])
    seconds = sum(record.get("seconds", 0) * record.get("processes", 1) for record in records.values())
    failed = sum(record["state"] == "failed" for record in records.values())
    row = {"task": name, "init": init, "metric": first, "n": 0, "failed": failed, **data[name]}
    row["device_seconds"] = round(seconds, 1)
    row["published"] = task.published.get(compare_with) if row["official"] else None
    if not settings:
        return row
    medians = {
        setting: {metric: statistics.median(one[metric] for one in metrics) for metric in metrics[0]}
        for setting, metrics in settings.items()
    }
    best = max(medians, key=lambda setting: medians[setting][first])
    scores, median = [metrics[first] for metrics in settings[best]], medians[best][first]
    return row | {
        "learning_rate": best[0],
        "batch_size": best[1],
        "median": median,
        "best": max(scores),
        "standard_deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        "n": len(scores),
        "metrics": medians[best],
        "difference": None if row["published"] is None else 100 * median - row["published"],
    }


def check_failures(records: dict[Job, dict[str, Any]], jobs: list[Job], file: Path) -> None:
    """Raise a `UserError` if any job has failed; `file` is where the results are."""
    if failed := [job for job in jobs if records[job]["state"] == "failed"]:
        raise UserError(
            f"{len(failed)} of {len(jobs)} jobs failed: {failed[0]}: {records[failed[0]]['reason']}; {file} says why "
            "for each, and the same command tries them again"
        )


def average(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Average the medians of several rows, and the published results if every row has one."""
    if len(rows) < 2:
        return None
    has_all = all(row["published"] is not None for row in rows)
    return {
        "tasks": [row["task"] for row in rows],
        "median": statistics.mean(row["median"] for row in rows),
        "published": statistics.mean(row["published"] for row in rows) if has_all else None,
    }


def percent(value: float | None) -> str:
    """Format a share in percent."""
    return points(None if value is None else 100 * value)


def points(value: float | None, sign: str = "") -> str:
    """Format a number of percentage points."""
    return "–" if value is None else f"{value:{sign}.1f}"


def format_table(summary: dict[str, Any], hours: float) -> str:
    """Format table.md, with the hours since the last start."""
    spent = f"{hours:.2f} hours since this start, {summary['device_hours']:.2f} device-hours in all."
    notes = format_notes(summary)
    if failed := sum(row["failed"] for row in summary["tasks"]):
        notes.append(f"Failed jobs: {failed}; results.jsonl says why, and the same command tries them again.")
    return "\n".join([format_rows(summary), "", *notes, spent]) + "\n"


def format_rows(summary: dict[str, Any]) -> str:
    """Format the table, with columns aligned so that it can be read on a terminal too."""
    published = f"roberta.{summary['compare_with']}"
    lines = [["task", "metric", "median", "best", "sd", "n", "lr", "batch", "majority", published, "difference"]]
    for row in summary["tasks"]:
        cells, known = [row_title(row), row["metric"]], [percent(row["majority"]), points(row["published"])]
        if not row["n"]:
            lines.append([*cells, "failed", "–", "–", "0", "–", "–", *known, "–"])
            continue
        cells += [percent(row[name]) for name in ("median", "best", "standard_deviation")]
        cells += [str(row["n"]), f"{row['learning_rate']:g}", str(row["batch_size"])]
        lines.append([*cells, *known, points(row["difference"], "+")])
        for metric, value in row["metrics"].items():
            if metric != row["metric"]:
                lines.append(["", metric, percent(value), *[""] * 8])
    averages = {"average": summary["average"], "average without WNLI": summary["average_without_wnli"]}
    for name, values in averages.items():
        if values and (name == "average" or values != summary["average"]):
            median, given = values["median"], values["published"]
            difference = points(None if given is None else 100 * median - given, "+")
            lines.append([name, f"of {len(values['tasks'])}", percent(median), *[""] * 6, points(given), difference])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    forms = [f"{'<' if column < 2 else '>'}{width}" for column, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(map(format, line, forms))} |" for line in lines)


def format_notes(summary: dict[str, Any]) -> list[str]:
    """Explain the table's columns."""
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
    """Write a zip of the predictions on GLUE that exist; return the names of the site's eleven files that it lacks."""
    names = submitted_rows()
    found = [name for name in names if (folder / name).is_file()]
    if found:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
            for name in found:
                file.write(folder / name, name)
    return [name for name in names if name not in found]


def write_report(folder: Path, summary: dict[str, Any], hours: float, model: str) -> list[str]:
    """Write summary.json, table.md, glue.png and, of predictions, submission.zip; return lines for the log."""
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    table = format_table(summary, hours)
    write_atomically(folder / "table.md", table)
    rows, published = summary["tasks"], f"roberta.{summary['compare_with']}, published"
    plot_glue(rows, [row_title(row) for row in rows], published, model, folder / "glue.png")
    lines = [f"\n{table}", f"plot: {folder / 'glue.png'}", f"table, summary and results: {folder}"]
    submission = folder / "submission.zip"
    missing = write_submission(folder / "predictions", submission)
    if submission.exists():
        lines.append(f"submission: {submission}" + (f", without {', '.join(missing)}" if missing else ""))
        is_whole = not missing and all(
            (folder / "predictions" / name).read_text("utf-8").count("\n") == 1 + number
            for name, number in submitted_rows().items()
        )
        if is_whole and all(row["official"] for row in rows):
            lines.append("next: submit it at https://gluebenchmark.com/submit")
    return lines
