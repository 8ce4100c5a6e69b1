import json
import statistics
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from recipe.finetune.jobs import Job
from recipe.finetune.report import format_table, summarise, write_report, write_submission
from recipe.finetune.tasks.glue import TASKS, submitted_rows, three_splits
from recipe.finetune.tasks.loading import load_task
from recipe.finetune.tasks.scoring import describe_data
from testing.glue_data import write_cola, write_stsb

SCORES = {  # (task, init, learning rate) -> a score a seed
    ("rte", "pretrained", 1e-5): [0.70, 0.72, 0.60],
    ("rte", "pretrained", 2e-5): [0.68, 0.75, 0.71],
    ("rte", "mnli", 2e-5): [0.80, 0.81, 0.79],
    ("cola", "pretrained", 1e-5): [0.60, None, 0.62],
    ("wnli", "pretrained", 1e-5): [0.56, 0.56, 0.50],
    ("mrpc", "pretrained", 1e-5): [None, None, None],
}
DATA = {name: {"official": name != "cola", "majority": 0.5} for name in ("rte", "cola", "wnli", "mrpc")}


@pytest.fixture
def summary() -> dict:
    records = {}
    for (name, init, rate), scores in SCORES.items():
        for seed, score in enumerate(scores):
            record = {"state": "failed", "reason": "diverged"}
            if score is not None:
                metrics = {TASKS[name].metrics[0]: score}
                record = {"state": "done", "metrics": metrics, "seconds": 30.0, "processes": 2}
            records[Job(name, init, rate, 16, seed)] = record
    return summarise(records, list(records), DATA, "base")


def row(summary: dict, name: str, init: str = "pretrained") -> dict:
    [found] = [row for row in summary["tasks"] if (row["task"], row["init"]) == (name, init)]
    return found


def test_result_is_the_median_over_seeds_at_the_best_setting(summary):
    rte = row(summary, "rte")
    assert (rte["learning_rate"], rte["median"], rte["best"], rte["n"]) == (2e-5, 0.71, 0.75, 3)
    assert rte["standard_deviation"] == pytest.approx(statistics.stdev([0.68, 0.75, 0.71]))
    assert rte["published"] == 78.7
    assert rte["difference"] == pytest.approx(71 - 78.7)
    assert row(summary, "rte", "mnli")["median"] == 0.80


def test_failed_jobs_are_counted_and_leave_the_others(summary):
    assert (row(summary, "cola")["n"], row(summary, "cola")["failed"]) == (2, 1)
    assert row(summary, "cola")["median"] == pytest.approx(0.61)
    assert row(summary, "cola")["published"] is None  # not the official data
    assert (row(summary, "mrpc")["n"], row(summary, "mrpc")["failed"]) == (0, 3)
    assert "median" not in row(summary, "mrpc")


def test_averages_take_the_run_from_mnli_and_count_what_there_is(summary):
    assert summary["average"]["tasks"] == ["cola", "rte", "wnli"]
    assert summary["average"]["median"] == pytest.approx((0.80 + 0.61 + 0.56) / 3)
    assert summary["average"]["published"] is None
    assert summary["average_without_wnli"]["median"] == pytest.approx((0.80 + 0.61) / 2)
    done = sum(score is not None for scores in SCORES.values() for score in scores)
    assert summary["device_hours"] == pytest.approx(done * 30 * 2 / 3600)


def test_table_shows_every_row_and_says_what_it_is_not(summary):
    lines = format_table(summary, 1.5).splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if "|" in line
    }
    assert cells["RTE"] == ["accuracy", "71.0", "75.0", "3.5", "3", "2e-05", "16", "50.0", "78.7", "-7.7"]
    assert cells["RTE (from MNLI)"][1:3] == ["80.0", "81.0"]
    assert cells["MRPC"][1] == "failed"
    assert cells["average without WNLI"][1] == "70.5"
    assert len({len(line) for line in lines if "|" in line}) == 1  # aligned
    text = "\n".join(lines)
    assert "Failed jobs: 4;" in text
    assert "Not the official data, and not to be compared with published results: CoLA." in text
    assert "1.50 hours since this start, 0.23 device-hours in all" in text


def test_majority_is_what_needs_no_model(tmp_path: Path):
    write_cola(tmp_path)
    write_stsb(tmp_path)
    assert describe_data("cola", load_task("cola", str(tmp_path))[0]) == {"official": False, "majority": 0.0}
    assert describe_data("stsb", load_task("stsb", str(tmp_path))[0])["majority"] == 0.0


def test_submission_holds_what_is_there_and_names_the_rest(tmp_path: Path):
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    assert len(write_submission(predictions, tmp_path / "submission.zip")) == 11
    assert not (tmp_path / "submission.zip").exists()
    (predictions / "AX.tsv").write_text("index\tprediction\n0\tneutral\n")
    missing = write_submission(predictions, tmp_path / "submission.zip")
    assert len(missing) == 10
    with zipfile.ZipFile(tmp_path / "submission.zip") as file:
        assert file.namelist() == ["AX.tsv"]
        assert file.read("AX.tsv") == b"index\tprediction\n0\tneutral\n"


def test_report_is_written_with_failed_tasks_too(summary, tmp_path: Path):
    [table, *others] = write_report(tmp_path, summary, 1.5, "a model")
    assert (tmp_path / "glue.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert table == f"\n{(tmp_path / 'table.md').read_text()}"
    assert not any("submission" in line for line in others)  # there are no predictions


def test_only_the_site_s_eleven_files_of_official_data_are_to_be_submitted(summary, tmp_path: Path, monkeypatch):
    """Also where there is a task of one's own, whose predictions are not the site's."""
    monkeypatch.setitem(
        TASKS, "own", replace(TASKS["rte"], hub_id="me/own", splits=three_splits("own", "Own", 1, 1, 1))
    )
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "Own.tsv").write_text("index\tprediction\n0\tentailment\n")
    official = summary | {"tasks": [row for row in summary["tasks"] if row["task"] != "cola"]}
    assert not any("submission" in line for line in write_report(tmp_path, official, 1.5, "a model"))
    rows = submitted_rows()
    assert len(rows) == 11
    for name, number in rows.items():
        lines = write_report(tmp_path, official, 1.5, "a model")
        assert not any("gluebenchmark.com" in line for line in lines), name
        (tmp_path / "predictions" / name).write_text("index\tprediction\n" + "0\tx\n" * number)
    with zipfile.ZipFile(tmp_path / "submission.zip") as file:
        assert len(file.namelist()) == 10
    for given, is_named in ((official, True), (summary, False)):
        lines = write_report(tmp_path, given, 1.5, "a model")
        assert f"submission: {tmp_path / 'submission.zip'}" in lines
        assert any("gluebenchmark.com" in line for line in lines) == is_named
    (tmp_path / "predictions" / "CoLA.tsv").write_text("index\tprediction\n0\tx\n")  # of another test set
    assert not any("gluebenchmark.com" in line for line in write_report(tmp_path, official, 1.5, "a model"))
