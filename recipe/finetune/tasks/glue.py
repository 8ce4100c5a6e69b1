"""The GLUE tasks: their data, labels, metrics and published results; all that is known of a task stands in `TASKS`.

The data comes from the hub (`nyu-mll/glue`) or from a folder of the official TSVs. Either way a split is a `Dataset`
with the columns `sentence1`, `sentence2` (pairs only) and `label`: an id that is the label's place in `Task.labels`, or
a float for STS-B; none in test splits.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from datasets import Dataset, Features, Value, load_dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from recipe.base.errors import UserError, did_you_mean

HUB_ID = "nyu-mll/glue"


@dataclass(frozen=True)
class Split:
    """Where one part of a task's data is.

    Attributes:
        hub: configuration and split of `nyu-mll/glue`.
        files: in the folder of the TSVs; the first that is there is read.
        rows: that the official data has.
        header: of a file that has none.
        submission: name that the site's zip has for predictions on this split.
    """

    hub: tuple[str, str]
    files: tuple[str, ...]
    rows: int
    header: tuple[str, ...] = ()
    submission: str | None = None


@dataclass(frozen=True)
class Task:
    """What is to know about a task.

    Attributes:
        title: as the paper writes it.
        columns: of the hub's sentences.
        tsv_columns: of the TSVs' sentences and label.
        labels: names, by id; none for a regression.
        tsv_labels: what the TSVs and the site call the labels.
        metrics: names of the dev metrics; the first decides.
        learning_rate, batch_size: fairseq's.
        published: dev results of roberta.base and roberta.large, by the first metric in percent.
        splits: train, validation and test; MNLI's others too.
        scale: that regression targets are divided by.
        takes_mnli: whether the paper starts it from the MNLI model.
    """

    title: str
    columns: tuple[str, ...]
    tsv_columns: tuple[str, ...]
    labels: tuple[str, ...]
    tsv_labels: tuple[str, ...]
    metrics: tuple[str, ...]
    learning_rate: float
    batch_size: int
    published: dict[str, float]
    splits: dict[str, Split]
    scale: float = 1.0
    takes_mnli: bool = False

    @property
    def is_regression(self) -> bool:
        return not self.labels


def three_splits(config: str, folder: str, train: int, dev: int, test: int) -> dict[str, Split]:
    return {
        "train": Split((config, "train"), (f"{folder}/train.tsv",), train),
        "validation": Split((config, "validation"), (f"{folder}/dev.tsv",), dev),
        "test": Split((config, "test"), (f"{folder}/test.tsv",), test, submission=f"{folder}.tsv"),
    }


COLA_HEADER = ("source", "label", "note", "sentence")
NUMBERS = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")
PAIR = ("sentence1", "sentence2")

# Published results: fairseq's examples/roberta. There RTE, STS-B and MRPC start from the MNLI model; the dev metric of
# STS-B is taken to be Pearson's. WNLI has no published dev result, being trained otherwise, with more data.
TASKS = {
    "cola": Task(
        title="CoLA",
        columns=("sentence",),
        tsv_columns=("sentence", "label"),
        labels=("unacceptable", "acceptable"),
        tsv_labels=NUMBERS,
        metrics=("matthews_correlation",),
        learning_rate=1e-5,
        batch_size=16,
        published={"base": 63.6, "large": 68.0},
        splits={
            "train": Split(("cola", "train"), ("CoLA/train.tsv",), 8551, COLA_HEADER),
            "validation": Split(("cola", "validation"), ("CoLA/dev.tsv",), 1043, COLA_HEADER),
            "test": Split(("cola", "test"), ("CoLA/test.tsv",), 1063, submission="CoLA.tsv"),
        },
    ),
    "sst2": Task(
        title="SST-2",
        columns=("sentence",),
        tsv_columns=("sentence", "label"),
        labels=("negative", "positive"),
        tsv_labels=NUMBERS,
        metrics=("accuracy",),
        learning_rate=1e-5,
        batch_size=32,
        published={"base": 94.8, "large": 96.4},
        splits=three_splits("sst2", "SST-2", 67_349, 872, 1821),
    ),
    "mrpc": Task(
        title="MRPC",
        columns=PAIR,
        tsv_columns=("#1 String", "#2 String", "Quality"),
        labels=("not_equivalent", "equivalent"),
        tsv_labels=NUMBERS,
        metrics=("accuracy", "f1"),
        learning_rate=1e-5,
        batch_size=16,
        published={"base": 90.2, "large": 90.9},
        splits=three_splits("mrpc", "MRPC", 3668, 408, 1725),
        takes_mnli=True,
    ),
    "stsb": Task(
        title="STS-B",
        columns=PAIR,
        tsv_columns=(*PAIR, "score"),
        labels=(),
        tsv_labels=(),
        metrics=("pearson", "spearman"),
        learning_rate=2e-5,
        batch_size=16,
        published={"base": 91.2, "large": 92.4},
        splits=three_splits("stsb", "STS-B", 5749, 1500, 1379),
        scale=5.0,
        takes_mnli=True,
    ),
    "qqp": Task(
        title="QQP",
        columns=("question1", "question2"),
        tsv_columns=("question1", "question2", "is_duplicate"),
        labels=("not_duplicate", "duplicate"),
        tsv_labels=NUMBERS,
        metrics=("accuracy", "f1"),
        learning_rate=1e-5,
        batch_size=32,
        published={"base": 91.9, "large": 92.2},
        splits=three_splits("qqp", "QQP", 363_846, 40_430, 390_965),
    ),
    "mnli": Task(
        title="MNLI",
        columns=("premise", "hypothesis"),
        tsv_columns=(*PAIR, "gold_label"),
        labels=NLI,
        tsv_labels=NLI,
        metrics=("accuracy",),
        learning_rate=1e-5,
        batch_size=32,
        published={"base": 87.6, "large": 90.2},
        splits={
            "train": Split(("mnli", "train"), ("MNLI/train.tsv",), 392_702),
            "validation": Split(("mnli", "validation_matched"), ("MNLI/dev_matched.tsv",), 9815),
            "validation_mismatched": Split(("mnli", "validation_mismatched"), ("MNLI/dev_mismatched.tsv",), 9832),
            "test": Split(("mnli", "test_matched"), ("MNLI/test_matched.tsv",), 9796, submission="MNLI-m.tsv"),
            "test_mismatched": Split(
                ("mnli", "test_mismatched"), ("MNLI/test_mismatched.tsv",), 9847, submission="MNLI-mm.tsv"
            ),
            "test_ax": Split(
                ("ax", "test"), ("AX/AX.tsv", "AX.tsv", "diagnostic/diagnostic.tsv"), 1104, submission="AX.tsv"
            ),
        },
    ),
    "qnli": Task(
        title="QNLI",
        columns=("question", "sentence"),
        tsv_columns=("question", "sentence", "label"),
        labels=ENTAILMENT,
        tsv_labels=ENTAILMENT,
        metrics=("accuracy",),
        learning_rate=1e-5,
        batch_size=32,
        published={"base": 92.8, "large": 94.7},
        splits=three_splits("qnli", "QNLI", 104_743, 5463, 5463),
    ),
    "rte": Task(
        title="RTE",
        columns=PAIR,
        tsv_columns=(*PAIR, "label"),
        labels=ENTAILMENT,
        tsv_labels=ENTAILMENT,
        metrics=("accuracy",),
        learning_rate=2e-5,
        batch_size=16,
        published={"base": 78.7, "large": 86.6},
        splits=three_splits("rte", "RTE", 2490, 277, 3000),
        takes_mnli=True,
    ),
    "wnli": Task(
        title="WNLI",
        columns=PAIR,
        tsv_columns=(*PAIR, "label"),
        labels=("not_entailment", "entailment"),
        tsv_labels=NUMBERS,
        metrics=("accuracy",),
        learning_rate=1e-5,
        batch_size=32,
        published={},
        splits=three_splits("wnli", "WNLI", 635, 71, 146),
    ),
}


def check_tasks(field: str, names: Sequence[str]) -> None:
    """
    Raises:
        UserError: there is no task of some name.
    """
    for name in names:
        if name not in TASKS:
            hint = did_you_mean(name.lower().replace("-", ""), TASKS) or f"; the tasks are {', '.join(TASKS)}"
            raise UserError(f"`{field}`: there is no task {name!r}{hint}")


def load_task(name: str, glue_dir: str | None) -> tuple[dict[str, Dataset], list[str]]:
    """All splits of a task that are there, and warnings about them.

    Raises:
        UserError: no train or dev data, a damaged file, or a label that is not the task's.
    """
    task = TASKS[name]
    if glue_dir is not None:
        check_files(task, Path(glue_dir).expanduser())
    splits, remarks = {}, []
    for split, place in task.splits.items():
        if glue_dir is None:
            dataset = from_hub(task, split)
        else:
            file = find_file(place, Path(glue_dir).expanduser())
            if file is None:
                continue
            dataset = from_tsv(task, split, file, remarks)
        splits[split] = dataset
        if len(dataset) != place.rows:
            remarks.append(
                f"{task.title}: the {split} split has {len(dataset):,} rows, the official one {place.rows:,}"
            )
    return splits, remarks


def is_official(name: str, splits: dict[str, Dataset]) -> bool:
    """Whether results on these splits may stand beside published ones."""
    return all(len(splits[split]) == TASKS[name].splits[split].rows for split in ("train", "validation"))


def find_file(place: Split, folder: Path) -> Path | None:
    return next((folder / file for file in place.files if (folder / file).is_file()), None)


def check_files(task: Task, folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"`glue_dir` {folder}: there is no such folder")
    needed = [place for split, place in task.splits.items() if not split.startswith("test")]
    missing = [place.files[0] for place in needed if find_file(place, folder) is None]
    if missing:
        raise UserError(
            f"`glue_dir` {folder} lacks {', '.join(missing)}; put the official TSVs there, or leave {task.title} out "
            "of `tasks`"
        )


def from_tsv(task: Task, split: str, file: Path, remarks: list[str]) -> Dataset:
    place = task.splits[split]
    wanted = list(task.tsv_columns[: len(task.columns)] if split.startswith("test") else task.tsv_columns)
    rows, bad_lines, fields = read_tsv(file, place.header, wanted)
    if bad_lines:
        # The official QQP has three such lines, which its official size leaves out.
        if len(rows) != place.rows:
            raise UserError(
                f"{file}, line {bad_lines[0]}: not the {fields} fields that a line has here ({len(bad_lines)} such "
                "lines); the file is cut off or damaged: fetch it again"
            )
        remarks.append(f"{task.title}: {file} has {len(bad_lines)} malformed lines, which are left out")
    columns = dict(zip(PAIR[: len(task.columns)], map(list, zip(*(row for _, row in rows), strict=True)), strict=False))
    if not split.startswith("test"):
        columns["label"] = [parse_label(task, row[-1], f"{file}, line {line}") for line, row in rows]
    return Dataset.from_dict(columns)


def read_tsv(
    file: Path, header: tuple[str, ...], wanted: list[str]
) -> tuple[list[tuple[int, list[str]]], list[int], int]:
    """The wanted fields of each line with its number; the numbers of malformed lines; fields that a line must have.

    Quotes mean nothing in these files: a field may hold a single one.
    """
    try:
        text = file.read_text("utf-8-sig")  # MRPC's begin with a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not valid UTF-8 at byte {error.start}") from None
    lines = [line.removesuffix("\r").split("\t") for line in text.removesuffix("\n").split("\n")]
    first = 1 if header else 2
    if not header:
        header = tuple(lines.pop(0))
    if missing := [name for name in wanted if name not in header]:
        raise UserError(f"{file}: there is no column {missing[0]!r}; its first line names {', '.join(header)[:200]}")
    places = [header.index(name) for name in wanted]
    rows = [
        (number, [line[place] for place in places])
        for number, line in enumerate(lines, start=first)
        if len(line) == len(header)
    ]
    if not rows:
        raise UserError(f"{file}: there is no example in it")
    good = {number for number, _ in rows}
    bad = [number for number in range(first, first + len(lines)) if number not in good]
    return rows, bad, len(header)


def parse_label(task: Task, label: str, where: str) -> int | float:
    if task.is_regression:
        try:
            value = float(label)
        except ValueError:
            value = -1.0
        if 0 <= value <= task.scale:
            return value
        raise UserError(f"{where}: the label {label!r} of {task.title} is no number from 0 to {task.scale:g}")
    if label not in task.tsv_labels:
        raise UserError(f"{where}: {label!r} is no label of {task.title}; those are {', '.join(task.tsv_labels)}")
    return task.tsv_labels.index(label)


def from_hub(task: Task, split: str) -> Dataset:
    """A split of `nyu-mll/glue`, its labels by name: their order is not ours to rely on."""
    config, hub_split = task.splits[split].hub
    where = f"{HUB_ID} ({config}, {hub_split})"
    try:
        dataset = load_dataset(HUB_ID, config, split=hub_split)
    except Exception as error:  # of the network, the hub, the cache, …: `datasets` names no common one
        raise UserError(
            f"{where} cannot be loaded: {error}; go on where there is a network, or give the TSVs by --glue_dir"
        ) from None
    columns = ("premise", "hypothesis") if config == "ax" else task.columns
    if missing := {*columns, "label"} - set(dataset.column_names):
        raise UserError(f"{where}: there is no column {', '.join(sorted(missing))}")
    names = None if task.is_regression else getattr(dataset.features["label"], "names", None)
    if not task.is_regression and sorted(names or []) != sorted(task.labels):
        raise UserError(f"{where}: its labels are {names}, those of {task.title} {', '.join(task.labels)}")
    labels = dataset["label"][:]
    dataset = dataset.select_columns(list(columns)).rename_columns(dict(zip(columns, PAIR, strict=False)))
    if split.startswith("test"):
        return dataset
    for row, label in enumerate(labels):
        if label < 0:
            raise UserError(f"{where}: example {row} has the label {label}, which stands for none")
    return dataset.add_column(
        "label", labels if names is None else [task.labels.index(names[label]) for label in labels]
    )


def correlation(measure: Any, references: list[float], predictions: list[float]) -> float:
    """0 where all predictions are equal, as `matthews_corrcoef` has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(measure(references, predictions).statistic)
    return 0.0 if np.isnan(value) else value


SCORES = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews_correlation": matthews_corrcoef,
    "pearson": lambda references, predictions: correlation(pearsonr, references, predictions),
    "spearman": lambda references, predictions: correlation(spearmanr, references, predictions),
}


class GlueMetric(evaluate.Metric):
    """The dev metrics of one task, `config_name`, without the script that `evaluate.load("glue")` fetches."""

    def __init__(self, task: str) -> None:
        super().__init__(config_name=task, keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        kind = Value("float64" if TASKS[self.config_name].is_regression else "int64")
        return evaluate.MetricInfo(
            description="GLUE dev metrics, from scikit-learn and scipy",
            citation="",
            features=Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {name: float(SCORES[name](references, predictions)) for name in TASKS[self.config_name].metrics}


def format_predictions(task: Task, predictions: np.ndarray) -> str:
    """A file of the site's submission zip: label names where the task has names, STS-B's scores within their range.

    Args:
        predictions: (examples,) label ids, or scores.
    """
    if task.is_regression:
        values = [f"{value:.3f}" for value in np.clip(predictions, 0, task.scale)]
    else:
        values = [task.tsv_labels[label] for label in predictions]
    return "index\tprediction\n" + "".join(f"{index}\t{value}\n" for index, value in enumerate(values))
