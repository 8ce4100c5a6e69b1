"""Read the data of a task, from the hub or from a folder of the official TSVs.

Either way a split is a `Dataset` with the columns `sentence1`, `sentence2` (pairs only) and `label`: an id that is the
label's place in `Task.labels`, or a number for a regression. Test splits have no labels.
"""

from pathlib import Path

from datasets import Dataset, load_dataset

from recipe.base.errors import UserError, describe_error
from recipe.finetune.tasks.glue import SENTENCE_COLUMNS, TASKS, Task, find_files


def load_task(name: str, glue_dir: str | None) -> tuple[dict[str, Dataset], list[str]]:
    """Load all splits of a task that exist, from the hub unless a folder of the TSVs is given; return warnings too.

    Raises:
        UserError: there is no train or dev data, a file is damaged, or a label is not the task's.
    """
    task = TASKS[name]
    splits: dict[str, Dataset] = {}
    warnings: list[str] = []
    files = dict.fromkeys(task.splits) if glue_dir is None else find_files(task, glue_dir)
    for split, file in files.items():
        place = task.splits[split]
        splits[split], num_malformed = from_tsv(task, split, file) if file else (from_hub(task, split), 0)
        if num_malformed:
            warnings.append(f"{task.title}: {file} has {num_malformed} malformed lines, which are left out")
        if (rows := len(splits[split])) != place.rows:
            warnings.append(f"{task.title}: the {split} split has {rows:,} rows, the official one {place.rows:,}")
    return splits, warnings


def from_tsv(task: Task, split: str, file: Path) -> tuple[Dataset, int]:
    """Read a split, and count its malformed lines, which are left out.

    Quotes mean nothing in these files: a field may hold a single one.
    """
    place, is_test = task.splits[split], split.startswith("test")
    try:
        text = file.read_text("utf-8-sig")  # MRPC's begin with a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not valid UTF-8 at byte {error.start}") from None
    lines = [line.removesuffix("\r").split("\t") for line in text.removesuffix("\n").split("\n")]
    header = list(place.header) or lines.pop(0)
    sentence_columns = task.tsv_columns[: len(task.columns)]
    columns = sentence_columns if is_test else task.tsv_columns
    if missing := [name for name in columns if name not in header]:
        raise UserError(f"{file}: there is no column {missing[0]!r}; its first line names {', '.join(header)[:200]}")
    numbered = dict(enumerate(lines, start=1 if place.header else 2))
    rows = {number: line for number, line in numbered.items() if len(line) == len(header)}
    malformed = sorted(numbered.keys() - rows.keys())
    if not rows:
        raise UserError(f"{file}: there is no example in it")
    # The official QQP has three malformed lines, which its official size leaves out.
    if malformed and len(rows) != place.rows:
        raise UserError(
            f"{file}, line {malformed[0]}: not the {len(header)} fields that a line has here ({len(malformed)} such "
            "lines); the file is cut off or damaged: fetch it again"
        )
    values: dict[str, list] = {
        name: [line[header.index(column)] for line in rows.values()]
        for name, column in zip(SENTENCE_COLUMNS, sentence_columns, strict=False)
    }
    if not is_test:
        place_of_label = header.index(columns[-1])
        values["label"] = [parse_label(task, row[place_of_label], f"{file}, line {n}") for n, row in rows.items()]
    return Dataset.from_dict(values), len(malformed)


def parse_label(task: Task, label: str, place: str) -> int | float:
    """Turn a label of a TSV into an id, or into a number for a regression."""
    if task.is_regression:
        try:
            value = float(label)
        except ValueError:
            value = -1.0
        if 0 <= value <= task.scale:
            return value
        raise UserError(f"{place}: the label {label!r} of {task.title} is no number from 0 to {task.scale:g}")
    if label not in task.tsv_labels:
        raise UserError(f"{place}: {label!r} is no label of {task.title}; those are {', '.join(task.tsv_labels)}")
    return task.tsv_labels.index(label)


def from_hub(task: Task, split: str) -> Dataset:
    """Load a split from the hub, its labels by name: their order there is not ours to rely on."""
    config, hub_split = task.splits[split].hub
    place = f"{task.hub_id} ({config}, {hub_split})"
    try:
        dataset = load_dataset(task.hub_id, config, split=hub_split, trust_remote_code=False)
    except Exception as error:  # of the network, the hub, the cache, …: `datasets` names no common one
        raise UserError(
            f"{place} cannot be loaded ({describe_error(error)}); run this where there is a network, or give the TSVs "
            "by --glue_dir"
        ) from None
    if missing := {*task.columns, "label"} - set(dataset.column_names):
        raise UserError(f"{place}: there is no column {', '.join(sorted(missing))}")
    names = getattr(dataset.features["label"], "names", [])  # a regression has none
    if sorted(names) != sorted(task.labels):
        raise UserError(f"{place}: its labels are {names}, those of {task.title} {', '.join(task.labels)}")
    labels = dataset["label"][:]
    dataset = dataset.select_columns(list(task.columns))
    dataset = dataset.rename_columns(dict(zip(task.columns, SENTENCE_COLUMNS, strict=False)))
    if split.startswith("test"):
        return dataset
    for row, label in enumerate(labels):
        if label < 0:
            raise UserError(f"{place}: example {row} has the label {label}, which stands for none")
    labels = [task.labels.index(names[label]) for label in labels] if names else labels
    return dataset.add_column("label", labels)
