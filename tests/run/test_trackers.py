import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import trackio
from accelerate.tracking import GeneralTracker, register_tracker_class

from recipe.base.errors import UserError
from recipe.run import trackers
from recipe.run.directory import RunDirectory
from recipe.run.trackers import check_trackers, name_values, tracking
from testing.helpers import read_lines


class Notebook(GeneralTracker):
    """A tracker that keeps what it is sent, until it fails."""

    name = "notebook"
    requires_logging_directory = False
    told: list = []  # noqa: RUF012
    fails_after = 1_000

    def __init__(self, project: str, **kwargs: object) -> None:
        super().__init__()

    @property
    def tracker(self) -> list:
        return self.told

    def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
        if len(self.told) == self.fails_after:
            raise ConnectionError("the line is dead")
        self.told.append((step, values))


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    known = dict(trackers.LOGGER_TYPE_TO_CLASS)
    register_tracker_class(Notebook)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["notebook"])
    Notebook.told = []
    yield Notebook
    trackers.LOGGER_TYPE_TO_CLASS.clear()
    trackers.LOGGER_TYPE_TO_CLASS.update(known)


def test_trackers_are_told_what_metrics_jsonl_says(notebook, run_pretrain, flags, tmp_path: Path):
    run_pretrain(flags | {"report_to": "notebook"})
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [step for step, _ in notebook.told] == [record["step"] for record in records]
    assert notebook.told[0][1] == {f"eval/{name}": records[0][f"eval_{name}"] for name in ("loss", "perplexity")}
    charted = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
    assert notebook.told[1][1] == {f"train/{name}": records[1][name] for name in charted}


def test_what_goes_wrong_has_a_chart_and_other_counters_have_none():
    record = {
        "step": 3,
        "loss": None,
        "accuracy": 1,
        "pair_accuracy": 0.5,
        "overflows": 2,
        "loss_spikes": 0,
        "mfu": 0.4,
    }
    assert name_values(record) == {"train/pair_accuracy": 0.5, "train/overflows": 2}


def test_tracker_that_dies_is_one_warning(notebook, run_pretrain, flags, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(notebook, "fails_after", 2)
    run_pretrain(flags | {"report_to": "[notebook]"})
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count(
        "warning: notebook has failed and receives no more lines: ConnectionError: the line is dead"
    ) == 1
    assert len(notebook.told) == 2
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 6


def test_tracker_that_does_not_start_ends_the_run(notebook, run_pretrain, flags, tmp_path: Path, monkeypatch):
    def start(self: Notebook) -> None:
        raise PermissionError("log in first")

    monkeypatch.setattr(notebook, "start", start)
    with pytest.raises(UserError, match="a tracker cannot be started: PermissionError: log in first"):
        run_pretrain(flags | {"report_to": "notebook"})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_misspelt_and_missing_trackers_are_named(monkeypatch: pytest.MonkeyPatch):
    assert check_trackers("none") == []
    with pytest.raises(UserError, match=r"'tracio'.*did you mean `trackio`\?"):
        check_trackers("tracio")
    with pytest.raises(UserError, match=r"'none'.*known are"):
        check_trackers(["trackio", "none"])
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["trackio"])
    with pytest.raises(UserError, match="`report_to` names wandb, which is not installed; run: pip install wandb"):
        check_trackers(["trackio", "wandb"])


def test_tracker_that_ends_the_process_is_one_warning(
    notebook, run_pretrain, flags, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setattr(notebook, "log", lambda *arguments, **values: sys.exit("out of quota"))
    run_pretrain(flags | {"report_to": "notebook"})
    assert "warning: notebook has failed and receives no more lines: SystemExit" in capsys.readouterr().out
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 6


def test_settings_name_the_whole_path_and_where_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = []
    accelerator = SimpleNamespace(trackers=[], init_trackers=lambda project, config, settings: seen.append(settings))
    for folder in (tmp_path / "a" / "run", tmp_path / "b" / "run"):
        run = RunDirectory(folder, is_main=True, pids=[])
        run.step = 7
        with tracking(accelerator, run, {}):
            pass
    names = [settings["trackio"]["name"] for settings in seen]
    assert names[0] != names[1]
    assert all(name.startswith("run-") for name in names)
    assert seen[0]["tensorboard"] == {"purge_step": 8}
    assert seen[0]["wandb"]["group"] == names[0]


@pytest.fixture
def trackio_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], dict[str, list[list[tuple]]]]:
    """The (update, loss) of each run of the real tracker, by the runs' names, which end in a checksum."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    utils, storage = importlib.import_module("trackio.utils"), importlib.import_module("trackio.sqlite_storage")
    for module in (utils, storage):  # which may have been imported by another test
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")

    def read() -> dict[str, list[list[tuple]]]:
        lines: dict[str, list[list[tuple]]] = {}
        for run in trackio.Api().runs(trackers.PROJECT_NAME):
            logs = storage.SQLiteStorage.get_logs(trackers.PROJECT_NAME, run.name, run_id=run.id)
            values = [(log["step"], log.get("train/loss", log.get("eval/loss"))) for log in logs]
            lines.setdefault(run.name.rpartition("-")[0], []).append(values)
        return lines

    return read


def expected_lines(run: Path) -> list[tuple]:
    return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in read_lines(run / "metrics.jsonl")]


def test_trackio_has_each_line_once_after_a_resume(trackio_lines, run_pretrain, flags, tmp_path: Path):
    flags |= {"report_to": "trackio", "logging_steps": 1, "resume_from_checkpoint": "latest"}
    run = tmp_path / "run"
    run_pretrain(flags)
    assert trackio_lines() == {"run": [expected_lines(run)]}
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    run_pretrain(flags | {"learning_rate": 5e-3})
    assert trackio_lines() == {"run": [expected_lines(run)]}


def test_trackio_tells_folders_of_one_name_apart_and_keeps_what_was_there(trackio_lines, run_pretrain, flags, tmp_path):
    flags |= {"report_to": "trackio"}
    for folder in ("a", "b"):
        run_pretrain(flags | {"output_dir": tmp_path / folder / "run"})
    lines = trackio_lines()
    assert len(lines["run"]) == 2
    shutil.rmtree(tmp_path / "a")  # the user's new run in this place is no resume
    run_pretrain(flags | {"output_dir": tmp_path / "a" / "run"})
    assert len(trackio_lines()["run"]) == 3
