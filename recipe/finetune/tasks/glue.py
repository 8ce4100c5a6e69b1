"""The GLUE tasks: `TASKS` has all that is known of each, its data, labels, metrics and published results.

To add a task of their kind (one sentence or two, with a label or a score):

1. Add an entry to `TASKS`. It needs the splits `train` and `validation`; splits whose names begin with `test` have no
   labels and are predicted into the file `submission`. The hub's data set is GLUE's unless `hub_id` names another.
2. If `SCORES` in scoring.py lacks one of its metrics, add it there: a function of (references, predictions).
3. Check it by `python finetune_glue.py --tasks '[NAME]' --dry_run true` and a model: what the data lacks is named.

Other modules know two tasks by name: MNLI, whose model others start from, and WNLI, which one average leaves out.
"""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

from recipe.base.errors import UserError, did_you_mean

SENTENCE_COLUMNS = ("sentence1", "sentence2")
GLUE_ID = "nyu-mll/glue"  # on the hub


@dataclass(frozen=True)
class Split:
    """Where one part of a task's data is."""

    hub: tuple[str, str]  # configuration and split of the task's `hub_id`
    files: tuple[str, ...]  # in the folder of the TSVs; the first that exists is read
    rows: int  # in the official data
    header: tuple[str, ...] = ()  # column names of a file that does not begin with them
    submission: str | None = None  # file of the predictions in the zip for gluebenchmark.com


@dataclass(frozen=True)
class Task:
    """What is known of a task."""

    title: str  # as the paper writes it
    splits: dict[str, Split]  # train, validation and test; MNLI has more
    published: dict[str, float]  # dev results of roberta.base and roberta.large, by the first metric, in percent
    columns: tuple[str, ...] = SENTENCE_COLUMNS  # the hub's, of the one sentence or two
    tsv_columns: tuple[str, ...] = (*SENTENCE_COLUMNS, "label")  # the TSVs', of the sentences and then of the label
    labels: tuple[str, ...] = ()  # names by id; empty for a regression
    tsv_labels: tuple[str, ...] = ("0", "1")  # their names in the TSVs and on the site; empty for a regression
    metrics: tuple[str, ...] = ("accuracy",)  # on the dev set; the first decides
    learning_rate: float = 1e-5  # fairseq's choice
    batch_size: int = 32  # fairseq's choice
    scale: float = 1.0  # regression targets are divided by it
    takes_mnli: bool = False  # whether the paper starts it from the MNLI model
    hub_id: str = GLUE_ID

    @property
    def is_regression(self) -> bool:
        """Whether the task asks for a score."""
        return not self.labels


def three_splits(config: str, folder: str, *rows: int, header: tuple[str, ...] = ()) -> dict[str, Split]:
    """Name the splits of a task whose files are named as most are, with the rows of the training, dev and test set."""
    return {
        "train": Split((config, "train"), (f"{folder}/train.tsv",), rows[0], header),
        "validation": Split((config, "validation"), (f"{folder}/dev.tsv",), rows[1], header),
        "test": Split((config, "test"), (f"{folder}/test.tsv",), rows[2], submission=f"{folder}.tsv"),
    }


COLA_HEADER = ("source", "label", "note", "sentence")
ENTAILMENT_LABELS = ("entailment", "not_entailment")
NLI_LABELS = ("entailment", "neutral", "contradiction")

# Published results: fairseq's examples/roberta. There RTE, STS-B and MRPC start from the MNLI model; the dev metric of
# STS-B is taken to be Pearson's. WNLI has no published dev result, being trained otherwise, with more data.
TASKS = {
    "cola": Task(
        title="CoLA",
        columns=("sentence",),
        tsv_columns=("sentence", "label"),
        labels=("unacceptable", "acceptable"),
        metrics=("matthews_correlation",),
        batch_size=16,
        published={"base": 63.6, "large": 68.0},
        splits=three_splits("cola", "CoLA", 8551, 1043, 1063, header=COLA_HEADER),
    ),
    "sst2": Task(
        title="SST-2",
        columns=("sentence",),
        tsv_columns=("sentence", "label"),
        labels=("negative", "positive"),
        published={"base": 94.8, "large": 96.4},
        splits=three_splits("sst2", "SST-2", 67_349, 872, 1821),
    ),
    "mrpc": Task(
        title="MRPC",
        tsv_columns=("#1 String", "#2 String", "Quality"),
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        batch_size=16,
        published={"base": 90.2, "large": 90.9},
        splits=three_splits("mrpc", "MRPC", 3668, 408, 1725),
        takes_mnli=True,
    ),
    "stsb": Task(
        title="STS-B",
        tsv_columns=(*SENTENCE_COLUMNS, "score"),
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
        metrics=("accuracy", "f1"),
        published={"base": 91.9, "large": 92.2},
        splits=three_splits("qqp", "QQP", 363_846, 40_430, 390_965),
    ),
    "mnli": Task(
        title="MNLI",
        columns=("premise", "hypothesis"),
        tsv_columns=(*SENTENCE_COLUMNS, "gold_label"),
        labels=NLI_LABELS,
        tsv_labels=NLI_LABELS,
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
        labels=ENTAILMENT_LABELS,
        tsv_labels=ENTAILMENT_LABELS,
        published={"base": 92.8, "large": 94.7},
        splits=three_splits("qnli", "QNLI", 104_743, 5463, 5463),
    ),
    "rte": Task(
        title="RTE",
        labels=ENTAILMENT_LABELS,
        tsv_labels=ENTAILMENT_LABELS,
        learning_rate=2e-5,
        batch_size=16,
        published={"base": 78.7, "large": 86.6},
        splits=three_splits("rte", "RTE", 2490, 277, 3000),
        takes_mnli=True,
    ),
    "wnli": Task(
        title="WNLI",
        labels=("not_entailment", "entailment"),
        published={},
        splits=three_splits("wnli", "WNLI", 635, 71, 146),
    ),
}


def is_official(name: str, splits: Mapping[str, Sized]) -> bool:
    """Tell whether results on these splits may stand beside published ones."""
    return all(len(splits[split]) == TASKS[name].splits[split].rows for split in ("train", "validation"))


def submitted_rows() -> dict[str, int]:
    """Return the names of the eleven files that gluebenchmark.com takes, and the rows of each."""
    splits = [split for task in TASKS.values() if task.hub_id == GLUE_ID for split in task.splits.values()]
    return {split.submission: split.rows for split in splits if split.submission}


def check_tasks(field: str, names: Sequence[str]) -> None:
    """Raise a `UserError` unless all names in a field are names of tasks."""
    for name in names:
        if name not in TASKS:
            hint = did_you_mean(name.lower().replace("-", ""), TASKS) or f"; the tasks are {', '.join(TASKS)}"
            raise UserError(f"`{field}`: there is no task {name!r}{hint}")


def find_files(task: Task, glue_dir: str) -> dict[str, Path]:
    """Find the files of a task's splits, of which only those of test splits may be missing."""
    folder = Path(glue_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"`glue_dir` {folder}: there is no such folder")
    found = {
        split: folder / file
        for split, place in task.splits.items()
        for file in reversed(place.files)
        if (folder / file).is_file()
    }
    needed = {split: place for split, place in task.splits.items() if not split.startswith("test")}
    if missing := [place.files[0] for split, place in needed.items() if split not in found]:
        raise UserError(
            f"`glue_dir` {folder} lacks {', '.join(missing)}; put the official TSVs there, or leave {task.title} out "
            "of `tasks`"
        )
    return found
