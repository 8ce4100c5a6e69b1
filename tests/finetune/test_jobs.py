import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from recipe.base.errors import UserError
from recipe.finetune.jobs import Job, Results
from testing.helpers import PATIENCE_SECONDS, wait_for

JOBS = [Job("rte", "pretrained", rate, 16, seed) for rate in (1e-5, 3e-5) for seed in range(6)]


def work(folder: Path, seconds: float, log: Path) -> None:
    results = Results(folder)
    for job in results.claim(JOBS, lambda job: True):
        time.sleep(seconds)
        with log.open("a") as file:
            file.write(f"{job.file_name}\n")
        results.add(job, state="done", metrics={"accuracy": 0.5}, epochs=[{"loss": 1.0}] * 50)


def start(folder: Path, seconds: float, log: Path) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=(folder, seconds, log))
    process.start()
    return process


@pytest.fixture(autouse=True)
def short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipe.finetune.jobs.POLL_SECONDS", 0.01)


def test_a_line_gives_its_job_back(tmp_path: Path):
    results = Results(tmp_path)
    for job in JOBS:
        results.add(job, state="done", metrics={"accuracy": 1 / 3})
    assert list(results.read()) == JOBS
    assert results.read()[JOBS[3]]["metrics"] == {"accuracy": 1 / 3}


def test_processes_share_the_jobs_and_none_is_run_twice(tmp_path: Path):
    workers = [start(tmp_path, 0.02, tmp_path / "log") for _ in range(3)]
    for worker in workers:
        worker.join(PATIENCE_SECONDS)
        assert worker.exitcode == 0
    ran = (tmp_path / "log").read_text().splitlines()
    assert sorted(ran) == sorted(job.file_name for job in JOBS)
    assert set(Results(tmp_path).read()) == set(JOBS)


def test_kills_lose_no_result_and_tear_no_line(tmp_path: Path):
    rng, log = random.Random(0), tmp_path / "log"
    kills, seen = 0, set()
    while len(Results(tmp_path).read()) < len(JOBS):
        worker = start(tmp_path, 0.01, log)
        worker.join(rng.uniform(0.005, 0.08))
        if worker.is_alive():
            os.kill(worker.pid, signal.SIGKILL)
            kills += 1
        worker.join()
        if (tmp_path / "results.jsonl").exists():
            for line in (tmp_path / "results.jsonl").read_text().splitlines(keepends=True):
                assert line.endswith("\n")
                json.loads(line)
        found = set(Results(tmp_path).read())
        assert seen <= found
        seen = found
    assert kills > 3
    ran = log.read_text().splitlines()
    # A job that was killed before its line was there is run again; one with a line never is.
    assert len(ran) <= len(JOBS) + kills


def test_job_of_a_dead_process_goes_to_another(tmp_path: Path):
    dying = start(tmp_path, PATIENCE_SECONDS, tmp_path / "log")
    wait_for(lambda: list((tmp_path / "locks").glob("*")))
    other = start(tmp_path, 0, tmp_path / "log")
    time.sleep(0.3)
    assert other.is_alive()  # waits for the job that is being worked on
    os.kill(dying.pid, signal.SIGKILL)
    dying.join()
    other.join(PATIENCE_SECONDS)
    assert other.exitcode == 0
    assert set(Results(tmp_path).read()) == set(JOBS)


def test_jobs_wait_for_what_they_need(tmp_path: Path):
    results, order = Results(tmp_path), []
    for job in results.claim(JOBS, lambda job: job == JOBS[-1] or JOBS[-1] in results.read()):
        order.append(job)
        results.add(job, state="done")
    assert order == [JOBS[-1], *JOBS[:-1]]


def test_failures_are_forgotten_and_results_stay(tmp_path: Path):
    results = Results(tmp_path)
    results.forget_failures()
    results.add(JOBS[0], state="failed", reason="diverged")
    assert next(results.claim(JOBS[:1], lambda job: True), None) is None
    results.forget_failures()
    assert not results.read()
    results.add(JOBS[0], state="failed", reason="diverged")
    results.add(JOBS[1], state="done")
    results.forget_failures()
    assert list(results.read()) == [JOBS[1]]


@pytest.mark.parametrize("line", ["", "[]", '{"job": 3}', '{"job": {"task": "rte"}}', '{"job"'])
def test_damaged_results_are_named(tmp_path: Path, line: str):
    (tmp_path / "results.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"results\.jsonl is damaged or missing"):
        Results(tmp_path).read()
