"""The paper's comparisons: their configs, scales, judgement, and a whole one at a scale of seconds."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ablations
import pytest
import yaml
from ablation_report import LOSS, Comparison, share_held_out_text
from ablation_tables import BASES, MNLI, PERPLEXITY, SQUAD_2, SST, TABLES, Finding, Table

from recipe.base.errors import UserError
from testing.helpers import ROOT, SAMPLE, read_lines, wait_for, wait_for_training

ROWS = ablations.read_rows()
# What a row is called and how its work is cut into micro-batches is no part of the experiment.
NO_PART = {"output_dir", "per_device_train_batch_size", "per_device_eval_batch_size"}
# What an overlay gives beside `output_dir`.
BUDGET = {"corpora", "train_batch_size", "max_steps", "learning_rate", "warmup_steps"}
OVERLAYS = {
    "static-masking": BUDGET | {"packing", "objective", "masking"},
    "segment-pair-nsp": BUDGET | {"packing", "objective"},
    "sentence-pair-nsp": BUDGET | {"packing", "objective"},
    "full-sentences": BUDGET,
    "doc-sentences": BUDGET | {"packing"},
    "batch-2k": BUDGET,
    "batch-8k": BUDGET - {"train_batch_size"},
    "character-vocabulary": BUDGET | {"tokenizer_name"},
    "bert": {"warmup_steps", "adam_beta2", "max_grad_norm"},
    "albert": BUDGET - {"corpora"} | {"adam_beta2", "max_grad_norm"},
    "data-16gb-100k": {"corpora", "max_steps"},
    "data-160gb-100k": {"max_steps"},
    "data-160gb-300k": {"max_steps"},
    "data-160gb-500k": set(),
}
UPDATES = 200
MICRO = {
    "launch": "accelerate_configs/cpu.yaml",
    "corpora": {
        name: {"path": "{data}/tales.jsonl.gz", "max_bytes": 80_000}
        for name in ("books", "wikipedia", "news", "web", "stories")
    },
    "eval_corpora": {"held-out": {"path": "{data}/tales.jsonl.gz"}},
    "tokenizer": {"divide": {"vocab_size": 50}},
    "pretrain": {
        "divide": {
            "train_batch_size": 32,
            "max_steps": 1_000_000 // UPDATES,
            "warmup_steps": 12_000,
            "model_config.num_hidden_layers": 6,
            "model_config.hidden_size": 24,
            "model_config.intermediate_size": 24,
            "model_config.num_attention_heads": 6,
        },
        "override": {
            "max_seq_length": 32,
            "eval_blocks": 16,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "torch_compile": False,
            "preprocessing_num_workers": None,
            "dataloader_num_workers": 0,
            "logging_steps": 2,
            "eval_steps": UPDATES,
            "save_steps": UPDATES,
        },
    },
    "glue": {
        "config": "recipe/configs/glue/tiny.yaml",
        "override": {"num_train_epochs": 1, "seeds": [1], "save_models": False},
    },
}


def with_changes(section: str, **changes: object) -> dict:
    scale = json.loads(json.dumps(MICRO))
    for name, values in changes.items():
        scale[section].setdefault(name, {}).update(values)
    return scale


@pytest.fixture
def scale_file(tmp_path: Path):
    def write(scale: dict) -> Path:
        path = tmp_path / "micro.yaml"
        path.write_text(yaml.safe_dump(scale))
        return path

    return write


@pytest.fixture
def arguments(scale_file, tmp_path: Path):
    """A command line, without the program's name."""

    def make(scale: dict, *flags: str) -> list[str]:
        folders = {"--output": tmp_path / "runs", "--results": tmp_path / "results", "--data": SAMPLE}
        folders |= {"--glue_dir": SAMPLE / "glue", "--scale": scale_file(scale)}
        given = [str(word) for pair in folders.items() for word in pair]
        return [*given, "--table", "masking", "--seeds", "1", *flags]

    return make


@pytest.fixture
def run(arguments, monkeypatch: pytest.MonkeyPatch):
    def call(scale: dict, *flags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["ablations.py", *arguments(scale, *flags)])
        ablations.main()

    return call


@pytest.mark.parametrize("path", sorted(ablations.ROWS.glob("*.yaml")), ids=lambda path: path.stem)
def test_overlay_gives_what_its_row_changes_in_its_base_and_nothing_else(path: Path):
    base, overlay = ablations.files_of(path.stem)
    before = ablations.read_config(ablations.PretrainArguments, base)
    changed = {name for name, value in ROWS[path.stem].items() if value != before.get(name)}
    assert set(yaml.safe_load(overlay.read_text())) == changed == OVERLAYS[path.stem] | {"output_dir"}
    assert ROWS[path.stem]["output_dir"] == f"runs/ablations/{path.stem}"


@pytest.mark.parametrize("row", BASES)
def test_overlay_opens_with_its_command_and_says_whether_it_was_run(row: str):
    files = ablations.files_of(row)
    head = files[1].read_text().split("\n\n")[0]
    assert re.findall(r"--config (\S+)", head) == [str(path.relative_to(ROOT)) for path in files]
    assert "Cost:" in head
    assert "Held-out loss: not run yet" in head
    for table in TABLES.values():
        for measure in (SQUAD_2, MNLI, SST, PERPLEXITY):
            figure = table.published.get(measure, {}).get(row)
            assert figure is None or re.search(rf"\b{figure}\b", head), measure


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_rows_differ_in_what_the_table_is_about_and_in_nothing_else(table: Table):
    rows = [ROWS[row] for row in table.rows]
    names = {name for options in rows for name in options}
    different = {name for name in names if any(options.get(name) != rows[0].get(name) for options in rows)}
    assert different - NO_PART == table.varies


def test_every_row_is_in_a_table_and_every_figure_has_a_row():
    assert {row for table in TABLES.values() for row in table.rows} == set(ROWS) == set(OVERLAYS)
    for table in TABLES.values():
        assert {row for finding in table.findings for row in (finding.better, finding.worse)} <= set(table.rows)
        assert all(figures.keys() == table.rows.keys() for figures in table.published.values())


def test_rows_of_a_table_have_equal_tokens_at_the_papers_scale():
    for name in ("masking", "batch", "systems"):
        assert len({ROWS[row]["train_batch_size"] * ROWS[row]["max_steps"] for row in TABLES[name].rows}) == 1


@pytest.mark.parametrize("path", sorted(ablations.SCALES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_scale_fits_every_table_and_keeps_ratios(path: Path, tmp_path: Path):
    data = tmp_path / "data"
    given = yaml.safe_load(path.read_text())
    for corpus in (given.get("corpora", {}) | given.get("eval_corpora", {})).values():
        file = Path(corpus["path"].format(data=data).replace("*", "x").replace("[0-2]", "0"))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    scale = ablations.Scale(path, str(data))
    scale.check(list(TABLES.values()), ROWS)
    study = ablations.Study(tmp_path / "runs", scale, None, 1)
    made = {}
    for row, options in ROWS.items():
        study.plan(row, options, 1)
        made[row] = ablations.read_config(ablations.PretrainArguments, study.run_folder(row, 1) / "pretrain.yaml")
    for row in ("batch-2k", "batch-8k"):
        for name in ("train_batch_size", "max_steps", "learning_rate"):
            ratio = ROWS[row][name] / ROWS["full-sentences"][name]
            assert made[row][name] / made["full-sentences"][name] == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize(
    ("table", "scale", "expected"),
    [
        ("masking", with_changes("pretrain", override={"masking": "static"}), "`masking`, which tells rows apart"),
        ("batch", with_changes("pretrain", override={"max_steps": 5}), "`max_steps`, which tells rows apart"),
        ("masking", with_changes("pretrain", override={"max_step": 5}), "did you mean `max_steps`?"),
        ("masking", with_changes("pretrain", divide={"model_config.layers": 5}), "`model_config.layers`, which no row"),
        ("masking", with_changes("pretrain", divide={"train_batch_size": 100}), "256 / 100 = 2.56"),
        ("masking", with_changes("pretrain", equal_tokens={"static": 5}), "did you mean `static-masking`?"),
        ("masking", MICRO | {"corpora": {"books": {"path": "{data}/tales.jsonl.gz"}}}, "`corpora` lacks 'wikipedia'"),
        ("masking", MICRO | {"corpora": {"books": {"path": "{data}/no"}}}, "there is no"),
        ("masking", MICRO | {"corpra": {}}, "there is no section `corpra`; did you mean `corpora`?"),
        ("masking", with_changes("pretrain", override={"eval_blocks": -1}), "`eval_blocks` is -1"),
    ],
)
def test_bad_scale_is_refused_before_anything_runs(run, tmp_path: Path, table, scale, expected):
    with pytest.raises(UserError) as caught:
        run(scale, "--table", table)
    assert expected in str(caught.value)
    assert not (tmp_path / "runs" / "micro" / "corpora").exists()


def test_missing_data_folder_and_scale_are_named(scale_file):
    with pytest.raises(UserError, match="say by --data"):
        ablations.Scale(scale_file(MICRO), None)
    with pytest.raises(UserError, match="--scale huge: there is no such scale"):
        ablations.Scale(Path("huge"), None)


def test_another_scale_does_not_go_on_with_runs_of_the_first(run):
    run(MICRO, "--dry_run")
    run(MICRO, "--dry_run")
    with pytest.raises(UserError, match=r"pretrain\.yaml has `learning_rate` 0\.0001, which would be 0\.01 now"):
        run(with_changes("pretrain", override={"learning_rate": 1e-2}), "--dry_run")


def measured(*scores: tuple[float, float]) -> list[dict]:
    return [{"seed": seed, "scores": {LOSS: loss, "SST-2": percent}} for seed, (loss, percent) in enumerate(scores)]


@pytest.mark.parametrize(
    ("dynamic", "static", "by_loss", "by_task"),
    [
        ([(2.0, 80), (2.1, 81)], [(2.2, 78), (2.3, 79)], "agrees", "agrees"),
        ([(2.2, 78), (2.3, 79)], [(2.0, 80), (2.1, 81)], "disagrees", "disagrees"),
        ([(2.0, 80), (2.2, 81)], [(2.1, 80.5), (2.3, 79)], "within the noise", "within the noise"),
        ([(2.0, 80), (2.2, 81)], [(2.2, 79), (2.3, 80)], "within the noise", "within the noise"),
        ([(2.0, 80)], [(2.2, 79), (2.3, 80)], "not judged", "not judged"),
    ],
)
def test_difference_counts_where_ranges_do_not_overlap(dynamic, static, by_loss, by_task):
    table = TABLES["masking"]
    runs = {"segment-pair-nsp": measured(*dynamic), "static-masking": measured(*static)}
    comparison = Comparison(table, {row: ROWS[row] for row in table.rows}, runs)
    [finding] = table.findings
    assert comparison.judge(finding, LOSS) == by_loss
    assert comparison.judge(finding, "SST-2") == by_task


def test_direction_is_that_of_the_papers_figure_for_the_measure():
    """In the paper MNLI is the other way round than what it says on the whole."""
    table = TABLES["masking"]
    runs = {
        "segment-pair-nsp": [{"scores": {"MNLI": 60.0}}, {"scores": {"MNLI": 61.0}}],
        "static-masking": [{"scores": {"MNLI": 62.0}}, {"scores": {"MNLI": 63.0}}],
    }
    comparison = Comparison(table, {row: ROWS[row] for row in table.rows}, runs)
    assert comparison.judge(Finding("segment-pair-nsp", "static-masking", ""), "MNLI") == "agrees"


def test_equal_figures_of_the_paper_leave_the_direction_to_what_it_says():
    table = TABLES["format"]
    runs = {row: [] for row in table.rows} | {
        "doc-sentences": [{"scores": {"MNLI": 62.0}}, {"scores": {"MNLI": 63.0}}],
        "full-sentences": [{"scores": {"MNLI": 60.0}}, {"scores": {"MNLI": 61.0}}],
    }
    comparison = Comparison(table, {row: ROWS[row] for row in table.rows}, runs)
    assert table.published["MNLI"]["doc-sentences"] == table.published["MNLI"]["full-sentences"]
    assert comparison.judge(table.findings[2], "MNLI") == "agrees"


def test_losses_are_compared_only_where_held_out_blocks_are_the_same():
    can = {name: share_held_out_text([ROWS[row] for row in table.rows]) for name, table in TABLES.items()}
    assert [name for name in can if can[name]] == ["masking", "batch"]
    text = [{"name": "held-out", "path": "x"}]
    assert share_held_out_text([ROWS[row] | {"eval_corpora": text} for row in TABLES["data"].rows])


@pytest.mark.long
def test_stopped_comparison_goes_on_to_its_table(arguments, run, tmp_path: Path):
    folder, results = tmp_path / "runs" / "micro", tmp_path / "results"
    first = folder / "static-masking" / "seed-1" / "pretrain"
    command = [sys.executable, "benchmarks/ablations.py", *arguments(MICRO)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for_training(first)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "stopped; the same command goes on" in errors.decode()
    # The launcher ends at once; the process that trains saves first.
    wait_for(lambda: json.loads((first / "status.json").read_text())["state"] != "running")
    status = json.loads((first / "status.json").read_text())
    assert status["state"] == "preempted"
    assert 0 < status["step"] < UPDATES

    run(MICRO, "--jobs", "2")
    assert f"step-{status['step']:08d}" in (first.parent / "pretrain.log").read_text()
    report = json.loads((results / "ablations_masking_micro.json").read_text())
    text = (results / "ablations_masking_micro.md").read_text()
    assert (results / "ablations_masking_micro.png").stat().st_size > 10_000
    assert "| static | 1 |" in text
    assert "| static | 78.3 | 84.3 | 92.5 |" in text
    assert "there are too few runs to judge by held-out loss, CoLA" in text
    assert str(tmp_path) not in json.dumps(report) + text
    for row, [own] in report["runs"].items():
        records = read_lines(folder / row / "seed-1" / "pretrain" / "metrics.jsonl")
        *_, evaluated = [record for record in records if "eval_loss" in record]
        assert evaluated["step"] == UPDATES
        assert own["scores"][LOSS] == evaluated["eval_loss"]
        assert own["tokens"] == evaluated["tokens"]
    static, dynamic = (report["runs"][row][0] for row in ("static-masking", "segment-pair-nsp"))
    assert static["tokens"] == dynamic["tokens"]
    assert static["unigram_loss"] == dynamic["unigram_loss"]  # of the same held-out tokens under the same masks
    assert {row: options["masking"] for row, options in report["options"].items()} == {
        "static-masking": "static",
        "segment-pair-nsp": "dynamic",
    }

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("status.json")}
    (results / "ablations_masking_micro.md").unlink()
    run(MICRO)
    assert (results / "ablations_masking_micro.md").read_text() == text
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("status.json")}
    # A run that is not complete is in no table.
    shutil.rmtree(folder / "static-masking" / "seed-1" / "glue")
    study = ablations.Study(folder, ablations.Scale(tmp_path / "micro.yaml", str(SAMPLE)), None, 1)
    ablations.write_results(results / "again", "command", TABLES["masking"], study, 1)
    assert "| static | 0 | – |" in (results / "again.md").read_text()
