from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, register_tracker_class

from recipe.base.errors import UserError
from recipe.run import trackers
from recipe.run.trackers import check_trackers, log_metrics, tracking
from testing.helpers import read_lines, reset_accelerate


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
    (_, values), record = notebook.told[0], records[0]
    assert values["train/loss"] == record["loss"]
    assert values["corpora/sample/tokens"] == record["corpora"]["sample"]["tokens"]
    assert not {"train/data_digest", "train/step"} & set(values)  # no number; the axis
    (_, values), record = notebook.told[-1], records[-1]
    assert values["eval/loss"] == record["eval_loss"]


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


def test_trackio_keeps_the_curves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """This is the real tracker, started as the documentation does."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()
    accelerator = Accelerator(log_with=check_trackers("trackio"))
    with tracking(accelerator, tmp_path / "small", {"learning_rate": 1e-3, "corpora": [1, 2], "reason": None}):
        for step in (10, 20):
            log_metrics(accelerator, {"step": step, "loss": 1 / step, "learning_rate": 1e-3, "grad_norm": None})
    reset_accelerate()
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs(trackers.PROJECT_NAME, "small")
    assert [(log["step"], log["train/loss"]) for log in logs] == [(10, 0.1), (20, 0.05)]
