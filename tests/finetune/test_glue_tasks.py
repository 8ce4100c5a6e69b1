import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import f1_score, matthews_corrcoef

from recipe.base.errors import UserError
from recipe.finetune.tasks.glue import TASKS, Split, check_tasks, is_official
from recipe.finetune.tasks.loading import load_task
from recipe.finetune.tasks.scoring import format_predictions, score
from testing.glue_data import write, write_cola, write_mnli, write_rte, write_stsb
from testing.helpers import PATIENCE_SECONDS, PYTHONPATH, ROOT
from testing.hub_server import serve

REAL = Path("../shared/data/glue")


def test_cola_has_no_header_and_quotes_are_letters(tmp_path: Path):
    write_cola(tmp_path, train=2)
    (tmp_path / "CoLA" / "train.tsv").write_text('gj04\t1\t\tHe said "no.\ngj04\t0\t*\tHe "said no.')
    splits, _ = load_task("cola", str(tmp_path))
    assert splits["train"].to_dict() == {"sentence1": ['He said "no.', 'He "said no.'], "label": [1, 0]}
    assert splits["test"].column_names == ["sentence1"]


def test_mrpc_begins_with_a_byte_order_mark_and_names_its_columns_oddly(tmp_path: Path):
    rows = [[1, 10, 11, "One .", "1 ."], [0, 12, 13, "Two .", "3 ."]]
    for name in ("train", "dev"):
        write(tmp_path / "MRPC" / f"{name}.tsv", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", rows, "utf-8-sig")
    splits, _ = load_task("mrpc", str(tmp_path))
    assert splits["validation"].to_dict() == {
        "sentence1": ["One .", "Two ."],
        "sentence2": ["1 .", "3 ."],
        "label": [1, 0],
    }


def test_labels_are_ids_by_name_and_scores_stay_scores(tmp_path: Path):
    write_rte(tmp_path)
    write_stsb(tmp_path)
    write_mnli(tmp_path)
    rte, stsb, mnli = (load_task(name, str(tmp_path))[0] for name in ("rte", "stsb", "mnli"))
    first = (tmp_path / "RTE" / "train.tsv").read_text().splitlines()[1]
    assert TASKS["rte"].labels[rte["train"][0]["label"]] == first.split("\t")[-1]
    assert set(stsb["train"]["label"][:]) == {0.0, 5.0}
    assert set(mnli["train"]["label"][:]) == {0, 1, 2}
    assert list(mnli) == ["train", "validation", "validation_mismatched"]


def test_other_row_counts_than_the_official_ones_are_named(tmp_path: Path):
    write_cola(tmp_path, train=48)
    splits, warnings = load_task("cola", str(tmp_path))
    assert "CoLA: the train split has 48 rows, the official one 8,551" in warnings
    assert not is_official("cola", splits)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n1\tA.\tB", "line 3: not the 4 fields"),
        ("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailed\n", "line 2: 'entailed' is no label of RTE"),
        ("index\tsentence1\tlabel\n0\tA.\tentailment\n", "there is no column 'sentence2'"),
        ("index\tsentence1\tsentence2\tlabel\n", "no example"),
        ("", "there is no column 'sentence1'"),
        (b"index\tsentence1\tsentence2\tlabel\n0\t\xff\tB.\tentailment\n", "not valid UTF-8 at byte 34"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, text: str | bytes, expected: str):
    write_rte(tmp_path)
    (tmp_path / "RTE" / "train.tsv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        load_task("rte", str(tmp_path))
    assert expected in str(caught.value)
    assert "train.tsv" in str(caught.value)


def test_malformed_lines_of_a_file_that_is_whole_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_rte(tmp_path, train=3)
    monkeypatch.setitem(TASKS["rte"].splits, "train", Split(("rte", "train"), ("RTE/train.tsv",), 3))
    with (tmp_path / "RTE" / "train.tsv").open("a") as file:
        file.write("9\tshort\n")
    splits, warnings = load_task("rte", str(tmp_path))
    assert len(splits["train"]) == 3
    assert any("1 malformed lines" in warning for warning in warnings)


def test_missing_files_are_listed(tmp_path: Path):
    write_mnli(tmp_path)
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    with pytest.raises(UserError, match=r"lacks MNLI/dev_mismatched\.tsv; put the official TSVs there"):
        load_task("mnli", str(tmp_path))
    with pytest.raises(UserError, match=r"lacks QQP/train\.tsv, QQP/dev\.tsv"):
        load_task("qqp", str(tmp_path))
    with pytest.raises(UserError, match="there is no such folder"):
        load_task("qqp", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("score", ["5.5", "-1", "high"])
def test_score_out_of_range_is_refused(tmp_path: Path, score: str):
    write_stsb(tmp_path)
    write(tmp_path / "STS-B" / "dev.tsv", "index\tsentence1\tsentence2\tscore", [[0, "A.", "B.", score]])
    with pytest.raises(UserError, match=f"the label '{score}' of STS-B is no number from 0 to 5"):
        load_task("stsb", str(tmp_path))


def test_unknown_task_gets_the_nearest_name():
    check_tasks("tasks", list(TASKS))
    with pytest.raises(UserError, match="no task 'SST-2'; did you mean `sst2`"):
        check_tasks("tasks", ["SST-2"])


HUB_LABELS = {"rte": ["not_entailment", "entailment"], "wnli": ["not_entailment", "entailment"]}
LOAD = """
import json
from recipe.base.errors import UserError
from recipe.finetune.tasks.loading import load_task

splits, _ = load_task("rte", None)
print("FOUND", json.dumps({name: split.to_dict() for name, split in splits.items()}))
try:
    load_task("wnli", None)
except UserError as error:
    print("ERROR", error)
"""


def test_hub_labels_are_taken_by_name_and_minus_one_is_none(tmp_path: Path):
    root = tmp_path / "hub" / "nyu-mll" / "glue"
    infos, configs = [], []
    for task, names in HUB_LABELS.items():
        label = {"name": "label", "dtype": {"class_label": {"names": dict(enumerate(names))}}}
        texts = [{"name": name, "dtype": "string"} for name in ("sentence1", "sentence2")]
        features = [*texts, label, {"name": "idx", "dtype": "int32"}]
        splits = [{"name": split, "num_examples": 4} for split in ("train", "validation", "test")]
        infos.append({"config_name": task, "features": features, "splits": splits})
        files = [{"split": split["name"], "path": f"{task}/{split['name']}-*"} for split in splits]
        configs.append({"config_name": task, "data_files": files})
        (root / task).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            values = [-1] * 4 if split == "test" else [0, 1, 1 if task == "rte" else -1, 0]
            columns = {"sentence1": list("abcd"), "sentence2": list("efgh"), "label": values}
            table = pa.table(columns | {"idx": pa.array(range(4), pa.int32())})
            pq.write_table(table, root / task / f"{split}-00000-of-00001.parquet")
    card = yaml.safe_dump({"dataset_info": infos, "configs": configs})
    (root / "README.md").write_text(f"---\n{card}---\n")
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    with serve(tmp_path / "hub") as server:
        environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": PYTHONPATH}
        environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "no_proxy": "*"}
        result = subprocess.run(
            [sys.executable, "-c", LOAD],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
    assert result.returncode == 0, result.stderr
    found, error = (line for line in result.stdout.splitlines() if line.startswith(("FOUND", "ERROR")))
    assert '"label": [1, 0, 0, 1]' in found  # ours: entailment is 0
    assert '"test": {"sentence1": ["a", "b", "c", "d"], "sentence2": ["e", "f", "g", "h"]}' in found
    assert "(wnli, train): example 2 has the label -1, which stands for none" in error


def test_metrics_are_those_of_scikit_learn_and_scipy():
    references, predictions = [0, 1, 1, 0, 1], [0, 1, 0, 0, 1]
    assert score(TASKS["cola"], predictions, references) == {
        "matthews_correlation": pytest.approx(matthews_corrcoef(references, predictions))
    }
    assert score(TASKS["mrpc"], predictions, references) == {
        "accuracy": 0.8,
        "f1": pytest.approx(f1_score(references, predictions)),
    }
    scores = score(TASKS["stsb"], [0.0, 1.0, 9.0], [0.0, 1.0, 2.0])
    assert scores["spearman"] == pytest.approx(1)
    assert scores["pearson"] == pytest.approx(np.corrcoef([0, 1, 9], [0, 1, 2])[0, 1])
    assert score(TASKS["stsb"], [1.0, 1.0], [0.0, 1.0]) == {"pearson": 0, "spearman": 0}


def test_submission_has_names_where_the_task_has_names():
    assert format_predictions(TASKS["rte"], np.array([1, 0])) == "index\tprediction\n0\tnot_entailment\n1\tentailment\n"
    assert format_predictions(TASKS["cola"], np.array([1])) == "index\tprediction\n0\t1\n"
    assert format_predictions(TASKS["stsb"], np.array([5.2, 1.25])) == "index\tprediction\n0\t5.000\n1\t1.250\n"


def test_a_zip_of_all_tasks_has_the_eleven_files_of_the_site():
    names = {split.submission for task in TASKS.values() for split in task.splits.values()} - {None}
    assert names == {
        f"{name}.tsv"
        for name in ("CoLA", "SST-2", "MRPC", "STS-B", "MNLI-m", "MNLI-mm", "QNLI", "QQP", "RTE", "WNLI", "AX")
    }


@pytest.mark.skipif(not REAL.is_dir(), reason="the official TSVs are not here")
@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb", "rte"])
def test_official_files_are_read_whole(name: str):
    splits, warnings = load_task(name, str(REAL))
    assert not warnings
    assert is_official(name, splits)
