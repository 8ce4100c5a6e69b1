"""finetune_glue.py as its command line runs it, on small data."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from recipe.base.errors import UserError
from recipe.finetune.classifier import load_classifier
from recipe.finetune.finetuning import Finetuner
from recipe.finetune.jobs import Job, Results
from recipe.finetune.progress import Progress
from recipe.finetune.tasks.glue import TASKS, Split, Task
from recipe.run.stopping import STOP_SIGNALS
from testing.glue_data import sentence, write, write_cola, write_mnli, write_rte, write_stsb
from testing.helpers import PATIENCE_SECONDS, PYTHONPATH, ROOT, command_line, read_lines


@pytest.fixture
def flags(tmp_path: Path, small_model: Path) -> dict[str, object]:
    write_cola(tmp_path / "glue")
    write_rte(tmp_path / "glue")
    return {
        "output_dir": tmp_path / "out",
        "model_name_or_path": small_model,
        "glue_dir": tmp_path / "glue",
        "tasks": "[cola,rte]",
        "learning_rates": "[3e-3]",
        "batch_sizes": "[8]",
        "seeds": "[1,2]",
        "num_train_epochs": 3,
        "max_seq_length": 32,
    }


def learnt(folder: Path) -> dict[Job, list]:
    """Each job's curve; not how long it took."""
    return {job: record["epochs"] for job, record in Results(folder).read().items()}


def test_grid_ends_with_results_summary_table_plot_and_submission(run_glue, flags, tmp_path: Path, capsys):
    run_glue(flags)
    out = tmp_path / "out"
    curves = learnt(out)
    assert len(curves) == 4
    summary = json.loads((out / "summary.json").read_text())
    rows = {row["task"]: row for row in summary["tasks"]}
    for name, metric in (("cola", "matthews_correlation"), ("rte", "accuracy")):
        scores = [max(epoch[metric] for epoch in epochs) for job, epochs in curves.items() if job.task == name]
        assert rows[name]["median"] == pytest.approx(sum(scores) / 2)
        assert rows[name]["best"] == max(scores)
        assert rows[name]["published"] is None  # not the official data
    printed = capsys.readouterr().out
    assert (out / "table.md").read_text() in printed
    assert "warning: CoLA: the train split has 48 rows, the official one 8,551" in printed
    assert f"submission: {out / 'submission.zip'}, without SST-2.tsv" in printed
    assert "gluebenchmark.com" not in printed  # this is not the official data
    assert (out / "glue.png").stat().st_size > 10_000
    with zipfile.ZipFile(out / "submission.zip") as file:
        assert sorted(file.namelist()) == ["CoLA.tsv", "RTE.tsv"]
        lines = file.read("RTE.tsv").decode().splitlines()
    assert lines[0] == "index\tprediction"
    assert len(lines) == 6
    assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "not_entailment"}
    assert json.loads((out / "status.json").read_text())["state"] == "complete"


def test_job_that_another_start_forgets_is_run_again(run_glue, flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    claim, run, failures = Results.claim, Finetuner.run, [FloatingPointError("not finite")]

    def run_or_fail(self, *arguments):
        if failures:
            raise failures.pop()
        return run(self, *arguments)

    def claim_and_forget(self, *arguments):
        yield from claim(self, *arguments)
        self.forget_failures()  # as another process does that starts now

    monkeypatch.setattr(Finetuner, "run", run_or_fail)
    monkeypatch.setattr(Results, "claim", claim_and_forget)
    run_glue(flags)
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "complete"
    assert len(learnt(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    "place", ["grid.Grid.keep_best", "report.write_report", "report.summarise", "jobs.Results.add"]
)
def test_crash_anywhere_is_noted(run_glue, flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    def crash(*arguments, **values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"recipe.finetune.{place}", crash)
    with pytest.raises(OSError, match="No space left"):
        run_glue(flags | {"tasks": "[rte]", "seeds": "[1]", "num_train_epochs": 1})
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "OSError: [Errno 28] No space left on device")
    assert status["step"] == (1 if place.startswith("report") else 0)


def test_seeds_differ_and_a_seed_repeats_itself(run_glue, flags, tmp_path: Path):
    run_glue(flags)
    run_glue(flags | {"output_dir": tmp_path / "again", "seeds": "[2,1]"})
    first, again = learnt(tmp_path / "out"), learnt(tmp_path / "again")
    assert first == again
    for name in ("cola", "rte"):
        one, two = (first[Job(name, "pretrained", 3e-3, 8, seed)] for seed in (1, 2))
        assert one != two


def test_restart_runs_only_what_is_missing(run_glue, flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_glue(flags)
    out = tmp_path / "out"
    before = (out / "results.jsonl").read_text()
    run_glue(flags)
    assert (out / "results.jsonl").read_text() == before
    run_glue(flags | {"seeds": "[1,2,3]"})
    assert (out / "results.jsonl").read_text().startswith(before)
    assert len(read_lines(out / "results.jsonl")) == 6


def test_other_settings_do_not_mix_with_earlier_results(run_glue, flags, tmp_path: Path, small_model: Path):
    run_glue(flags | {"tasks": "[rte]", "seeds": "[1]", "num_train_epochs": 1})
    with pytest.raises(UserError, match="`num_train_epochs`: 1 before, 3 now"):
        run_glue(flags)
    model = AutoModelForSequenceClassification.from_pretrained(small_model)
    with torch.no_grad():
        model.roberta.embeddings.word_embeddings.weight[7] += 1
    model.save_pretrained(tmp_path / "model")
    for file in small_model.glob("*token*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "out" / "config.yaml").write_text(
        (tmp_path / "out" / "config.yaml").read_text().replace(str(small_model), str(tmp_path / "model"))
    )
    with pytest.raises(UserError, match="`model_checksum`"):
        run_glue(flags | {"num_train_epochs": 1, "model_name_or_path": tmp_path / "model"})


def test_failed_job_is_recorded_and_tried_again(run_glue, flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flags |= {"tasks": "[rte]", "learning_rates": "[1e14,3e-3]", "seeds": "[1]"}
    with pytest.raises(
        UserError, match=r"1 of 2 jobs failed: rte, lr 1e\+14, batch 8, seed 1: .* is nan; .*/results.jsonl"
    ):
        run_glue(flags)
    out = tmp_path / "out"
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 2)
    assert status["reason"].startswith("UserError: 1 of 2 jobs failed")
    records = Results(out).read()
    assert records[Job("rte", "pretrained", 1e14, 8, 1)]["state"] == "failed"
    assert "the training loss of epoch 1 is nan" in records[Job("rte", "pretrained", 1e14, 8, 1)]["reason"]
    assert records[Job("rte", "pretrained", 3e-3, 8, 1)]["state"] == "done"
    assert "Failed jobs: 1; results.jsonl says why" in (out / "table.md").read_text()

    attempts = []
    finetune = Finetuner.run

    def run(self, job, *rest):
        attempts.append(job.learning_rate)
        return finetune(self, replace(job, learning_rate=min(job.learning_rate, 1e-3)), *rest)

    monkeypatch.setattr("recipe.finetune.grid.Finetuner.run", run)
    run_glue(flags)
    assert attempts == [1e14]
    assert {record["state"] for record in Results(out).read().values()} == {"done"}
    assert json.loads((out / "status.json").read_text())["state"] == "complete"


def test_out_of_memory_fails_one_job(run_glue, flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    finetune = Finetuner.run

    def run(self, job, *rest):
        if job.seed == 1:
            raise torch.OutOfMemoryError("no room")
        return finetune(self, job, *rest)

    monkeypatch.setattr("recipe.finetune.grid.Finetuner.run", run)
    with pytest.raises(UserError, match=r"1 of 2 jobs failed: .* OutOfMemoryError: no room"):
        run_glue(flags | {"tasks": "[rte]"})
    states = {job.seed: record["state"] for job, record in Results(tmp_path / "out").read().items()}
    assert states == {1: "failed", 2: "done"}


def test_kept_model_is_the_best_and_loads_without_our_code(run_glue, flags, tmp_path: Path):
    write_stsb(tmp_path / "glue")
    run_glue(flags | {"save_models": "true", "tasks": "[rte,stsb]"})
    out = tmp_path / "out"
    classify = pipeline("text-classification", model=str(out / "models" / "rte"), device="cpu")
    rows = [line.split("\t") for line in (tmp_path / "glue" / "RTE" / "dev.tsv").read_text().splitlines()[1:]]
    answers = [classify({"text": row[1], "text_pair": row[2]})["label"] for row in rows]
    accuracy = sum(answer == row[3] for answer, row in zip(answers, rows, strict=True)) / len(rows)
    best = max(record["metrics"]["accuracy"] for job, record in Results(out).read().items() if job.task == "rte")
    assert accuracy == pytest.approx(best)
    classify = pipeline("text-classification", model=str(out / "models" / "stsb"), device="cpu")
    [answer] = classify(["the of a. " * 700], truncation=True)
    assert answer["label"] == "similarity / 5"


def test_small_tasks_start_from_the_best_mnli_model_too(run_glue, flags, tmp_path: Path, monkeypatch):
    write_mnli(tmp_path / "glue")
    sources = []

    def load(name, *rest):
        sources.append(name)
        return load_classifier(name, *rest)

    monkeypatch.setattr("recipe.finetune.grid.load_classifier", load)
    run_glue(flags | {"tasks": "[rte,mnli]", "init_from_mnli": "true"})
    out = tmp_path / "out"
    assert [Path(name).name for name in sources[-2:]] == ["mnli", "mnli"]
    summary = json.loads((out / "summary.json").read_text())
    assert [(row["task"], row["init"]) for row in summary["tasks"]] == [
        ("mnli", "pretrained"),
        ("rte", "pretrained"),
        ("rte", "mnli"),
    ]
    assert "accuracy_mm" in summary["tasks"][0]["metrics"]
    assert "RTE (from MNLI)" in (out / "table.md").read_text()
    curves = learnt(out)
    assert curves[Job("rte", "mnli", 3e-3, 8, 1)] != curves[Job("rte", "pretrained", 3e-3, 8, 1)]


def test_task_needs_no_more_than_an_entry(run_glue, flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """As the docstring of recipe/finetune/tasks/glue.py has it: a table of one task that knows none of GLUE's."""
    rng = random.Random(0)
    words = {"bad": "rive", "fair": "mor", "good": "belda"}
    for name, rows in (("train", 120), ("dev", 12), ("test", 4)):
        labels = [rng.choice(list(words)) for _ in range(rows)]
        texts = [[sentence(rng, words[label]), label][: 1 if name == "test" else 2] for label in labels]
        write(tmp_path / "glue" / f"toy-{name}.tsv", "review\tmark"[: 6 if name == "test" else None], texts)
    monkeypatch.setitem(
        TASKS,
        "toy",
        Task(
            title="Toy",
            columns=("review",),
            tsv_columns=("review", "mark"),
            labels=tuple(words),
            tsv_labels=tuple(words),
            metrics=("accuracy",),
            learning_rate=3e-3,
            batch_size=8,
            published={},
            splits={
                "train": Split(("toy", "train"), ("toy-train.tsv",), 120),
                "validation": Split(("toy", "validation"), ("toy-dev.tsv",), 12),
                "test": Split(("toy", "test"), ("toy-test.tsv",), 4, submission="Toy.tsv"),
            },
            hub_id="someone/toy",
        ),
    )
    changes = {"tasks": "[toy]", "learning_rates": "null", "batch_sizes": "null", "num_train_epochs": 12}
    run_glue(flags | changes | {"save_models": "true"})
    [row] = json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"]
    assert (row["task"], row["learning_rate"], row["n"], row["official"]) == ("toy", 3e-3, 2, True)
    assert row["median"] > 0.9  # the sentences tell their label
    assert "| Toy " in (tmp_path / "out" / "table.md").read_text()
    predictions = (tmp_path / "out" / "predictions" / "Toy.tsv").read_text().splitlines()[1:]
    assert {line.split("\t")[1] for line in predictions} <= set(words)
    assert "A classifier for Toy" in (tmp_path / "out" / "models" / "toy" / "README.md").read_text()


HEAVY = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("loaded:", *{"torch", "transformers", "datasets", "evaluate", "accelerate"} & sys.modules.keys())
"""


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("finetune_glue.py", ["--help"], "--learning_rates"),
        ("finetune_glue.py", ["--output_dir=x", "--model_name_or_path=x", "--print_config"], "warmup_ratio: 0.06"),
        ("finetune_glue.py", ["--output_dirs=x"], "there is no field `output_dirs`"),
        ("finetune_glue.py", ["--config=nowhere.yaml"], "nowhere.yaml: there is no such file"),
        ("finetune_glue.py", ["--output_dir=x", "--model_name_or_path=x", "--tasks=[rt]"], "did you mean `rte`"),
        ("train_tokenizer.py", ["--help"], "--max_train_bytes"),
        ("train_tokenizer.py", ["--output_dir=x", "--corpora=[]", "--print_config"], "min_frequency: 2"),
        ("train_tokenizer.py", ["--output_dirs=x"], "there is no field `output_dirs`"),
        ("train_tokenizer.py", ["--config=nowhere.yaml"], "nowhere.yaml: there is no such file"),
        ("train_tokenizer.py", ["--output_dir=x", "--corpora=[]"], "`corpora` is empty"),
    ],
)
def test_options_are_answered_without_loading_torch(script, arguments, expected, tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-c", HEAVY, str(ROOT / script), *arguments]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert expected in result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "loaded:", result.stderr


def test_bad_input_is_refused_before_training(run_glue, flags, tmp_path: Path, small_model: Path):
    for changes, expected in [
        ({"tasks": "[rt]"}, "there is no task 'rt'; did you mean `rte`"),
        ({"data_parallel_tasks": "[mnlii]"}, "`data_parallel_tasks`: there is no task 'mnlii'"),
        ({"tasks": "[rte,rte]"}, "leave out what is there twice"),
        ({"tasks": "[]"}, "`tasks` is empty"),
        ({"tasks": "[rte,qnli]"}, "lacks QNLI/train.tsv, QNLI/dev.tsv"),
        ({"model_name_or_path": tmp_path}, "no model there"),
        ({"learning_rates": "[0]"}, "`learning_rates` holds 0.0; give more than 0"),
        ({"seeds": "[-1]"}, "`seeds` holds -1; give 0 or more"),
        ({"num_train_epochs": 0}, "`num_train_epochs` is 0"),
        ({"max_seq_length": 513}, "the model reads 512 tokens"),
        ({"init_from_mnli": "true"}, "`init_from_mnli` needs an MNLI model"),
        ({"learning_rate": "[1e-5]"}, "did you mean `learning_rates`"),
        ({"resume_from_checkpoint": "checkpoint-500"}, "a checkpoint to start from is given as `model_name_or_path`"),
        ({"output_dir": __file__}, "is a file"),
    ]:
        with pytest.raises(UserError) as caught:
            run_glue(flags | changes)
        assert expected in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_dry_run_prints_the_jobs_and_writes_nothing(run_glue, flags, tmp_path: Path, capsys):
    run_glue(flags | {"dry_run": "true"})
    printed = capsys.readouterr().out
    assert "4 jobs, 0 of them with a result" in printed
    assert not (tmp_path / "out").exists()


def launch(flags: dict[str, object], processes: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = command if processes > 1 else [sys.executable]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "finetune_glue.py", *command_line(flags)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.long
def test_two_processes_share_jobs_and_a_shared_task_with_the_results_of_one(run_glue, flags, tmp_path: Path):
    config = json.loads((Path(flags["model_name_or_path"]) / "config.json").read_text())
    model = tmp_path / "dropless"
    model.mkdir()
    for file in Path(flags["model_name_or_path"]).iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    flags |= {"model_name_or_path": model}
    two = launch(flags | {"output_dir": tmp_path / "two", "data_parallel_tasks": "[cola]"}, processes=2)
    out, err = two.communicate(timeout=PATIENCE_SECONDS)
    assert two.returncode == 0, err
    assert out.count("| CoLA") == 1
    run_glue(flags)
    one, other = learnt(tmp_path / "out"), learnt(tmp_path / "two")
    assert set(one) == set(other)
    for job, epochs in one.items():
        for a, b in zip(epochs, other[job], strict=True):
            assert a == pytest.approx(b, abs=2e-4)
    processes = {job.task: record["processes"] for job, record in Results(tmp_path / "two").read().items()}
    assert processes == {"cola": 2, "rte": 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_stop_signal_leaves_a_grid_that_the_same_command_ends(
    run_glue, flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, number: signal.Signals
):
    evaluate, calls, handlers = Finetuner.evaluate, [], [signal.getsignal(one) for one in STOP_SIGNALS]

    def evaluate_or_stop(self, *arguments):
        calls.append(1)
        if len(calls) == 5:  # in the second of four jobs
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # the launcher's
        return evaluate(self, *arguments)

    monkeypatch.setattr(Finetuner, "evaluate", evaluate_or_stop)
    with pytest.raises(KeyboardInterrupt, match=number.name):  # of which `run_script` makes an exit status
        run_glue(flags)
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["state"], status["reason"], status["step"]) == ("preempted", number.name, 1)
    assert "1 of 4 jobs have a result; the same command runs the others" in capsys.readouterr().out
    assert [signal.getsignal(one) for one in STOP_SIGNALS] == handlers
    run_glue(flags)
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "complete"


def test_log_tells_epoch_loss_and_time_left(run_glue, flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("recipe.finetune.progress.REFRESH_SECONDS", 0)
    monkeypatch.setattr("recipe.finetune.progress.LOG_SECONDS", 0)
    run_glue(flags | {"seeds": "[1]"})
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if ": epoch" in line]
    assert len(told) == 3 * (48 // 8 + 40 // 8)
    assert "rte, lr 0.003, batch 8, seed 1: epoch 3 of 3, " in told[14]
    assert "; 15 of 33 updates, left 0:" in told[14]
    assert re.fullmatch(r"cola, .*: epoch 3 of 3, loss 0\.\d+; 33 of 33 updates, left 0:00:00", told[-1])
    loss = Results(tmp_path / "out").read()[Job("cola", "pretrained", 3e-3, 8, 1)]["epochs"][2]["loss"]
    assert f"loss {loss:.3f};" in told[-1]
    assert len([line for line in lines if "(epoch " in line]) == 2  # each result once


def test_results_of_other_processes_are_told_by_the_main_one(tmp_path: Path, capsys):
    jobs, beats = {Job("rte", "pretrained", 1e-5, 8, seed): 10 for seed in (1, 2, 3)}, []
    results = Results(tmp_path)
    first, second, third = jobs
    done = {"state": "done", "metrics": {"accuracy": 0.5}, "best_epoch": 1, "epochs": [{}], "seconds": 3.0}
    results.add(first, **done)
    with Progress(jobs, results, beats.append, True) as progress, Progress(jobs, results, beats.append, False) as other:
        results.add(second, **done)
        results.add(third, state="failed", reason="no room")
        for one in (progress, other, progress):
            one.show_results()
    assert capsys.readouterr().out.splitlines() == [
        "rte, lr 1e-05, batch 8, seed 2: accuracy 50.0 (epoch 1 of 1), 3 s",
        "rte, lr 1e-05, batch 8, seed 3: failed: no room",
    ]
    assert beats == [3, 3]
    assert progress.done == 30


@pytest.mark.long
def test_killed_grid_goes_on_without_loss(flags, tmp_path: Path):
    flags |= {"tasks": "[rte]", "seeds": "[1,2,3,4,5,6,7,8]", "num_train_epochs": 12}
    rng, kills, seen, out = random.Random(0), 0, {}, tmp_path / "out"
    while kills < 3:
        process = launch(flags, processes=1 + kills % 2)
        while process.poll() is None and len(Results(out).read()) == len(seen):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.2))
        assert process.poll() is None, process.communicate()
        os.killpg(process.pid, signal.SIGKILL)
        for pid in json.loads((out / "status.json").read_text())["pids"]:  # ranks are sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        for line in (out / "results.jsonl").read_text().splitlines(keepends=True):
            assert line.endswith("\n")
        found = learnt(out)
        assert seen.items() <= found.items()
        assert len(seen) < len(found)
        seen = found
    assert len(seen) < 8
    for folder in (out, tmp_path / "whole"):
        process = launch(flags | {"output_dir": folder}, processes=1)
        _, err = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, err
    assert seen.items() <= learnt(out).items()
    assert learnt(out) == learnt(tmp_path / "whole")
