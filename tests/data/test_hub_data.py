"""Hub data sets, from a server on this machine that speaks the hub's API."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from testing.helpers import PATIENCE_SECONDS, PYTHONPATH, ROOT, command_line, learning, read_lines
from testing.hub_server import Fault, HubServer, serve

CARD = """---
dataset_info:
  features:
  - {name: title, dtype: string}
  - {name: text, dtype: string}
  splits:
  - {name: train, num_bytes: 54321, num_examples: 120}
---
"""


@pytest.fixture
def hub(tmp_path: Path, texts) -> Iterator[HubServer]:
    """`somebody/books`: three Parquet shards with a size, and `somebody/letters`: JSON lines without."""
    books, letters = (tmp_path / "hub" / "somebody" / name for name in ("books", "letters"))
    (books / "data").mkdir(parents=True)
    (books / "README.md").write_text(CARD)
    for shard in range(3):
        part = texts[shard * 40 : shard * 40 + 40]
        table = pa.table({"title": ["title"] * 40, "text": part})
        pq.write_table(table, books / "data" / f"train-{shard:05d}-of-00003.parquet", row_group_size=10)
    letters.mkdir()
    (letters / "train.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts[:30]))
    with serve(tmp_path / "hub") as server:
        yield server


def run(hub: HubServer, tmp_path: Path, *command: object) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": PYTHONPATH}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "ACCELERATE_USE_CPU": "true", "no_proxy": "*"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


ANSWER = """
import json, sys, time
import datasets
import recipe.data.corpora
from recipe.arguments import CorpusArguments
from recipe.base.errors import UserError
from recipe.data.corpora import Part, corpus_bytes, open_source

datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
recipe.data.corpora.RETRY_SECONDS = (1, 1)
time.sleep = recipe.base.workers.STOP_WAITING.wait = lambda seconds: None


def answer(corpus, first=0, part=(0, 1)):
    corpus = CorpusArguments(name="c", **corpus)
    found = {"bytes": None, "records": [], "errors": []}
    try:
        found["bytes"] = corpus_bytes(corpus)
    except UserError as error:
        found["errors"].append(str(error))
    try:
        source = open_source(corpus)
        for shard in range(source.num_shards):
            found["records"] += [[shard, index, text] for index, text in source.read(shard, first, Part(*part))]
    except UserError as error:
        found["errors"].append(str(error))
    return found


print("ANSWERS", json.dumps([answer(**question) for question in json.loads(sys.argv[1])]))
"""


def ask(hub: HubServer, tmp_path: Path, *questions: dict) -> list[dict]:
    """What a process finds that reads these corpora, one after the other: `bytes`, `records` and `errors` of each."""
    result = run(hub, tmp_path, "-c", ANSWER, json.dumps(questions))
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stdout.splitlines() if line.startswith("ANSWERS ")]
    return json.loads(line.removeprefix("ANSWERS "))


def test_shards_records_and_parts(hub, tmp_path, texts):
    books, letters = ask(
        hub,
        tmp_path,
        {"corpus": {"path": "somebody/books"}, "first": 15, "part": (1, 4)},
        {"corpus": {"path": "somebody/letters", "text_column": "body"}},
    )
    wanted = [n for n in range(15, 40) if n % 4 == 1]
    assert books["records"] == [[shard, n, texts[shard * 40 + n]] for shard in range(3) for n in wanted]
    assert books["errors"] == []
    assert [text for _, _, text in letters["records"]] == texts[:30]
    # The default weights are the published sizes.
    assert books["bytes"] == 54321
    assert letters["errors"] == ["corpus 'c': somebody/letters does not publish its size; give all corpora a `weight`"]


def test_what_the_hub_does_not_have_is_named(hub, tmp_path):
    expected = [
        ({"path": "somebody/nothing"}, "corpus 'c': hub data set somebody/nothing"),
        ({"path": "somebody/books", "split": "test"}, "split test"),
        ({"path": "somebody/books", "text_column": "body"}, "no column 'body' among ['title', 'text']"),
    ]
    answers = ask(hub, tmp_path, *({"corpus": corpus} for corpus, _ in expected))
    for answer, (_, message) in zip(answers, expected, strict=True):
        assert message in answer["errors"][-1]
        assert answer["records"] == []


def test_outage_is_waited_out_and_named_if_it_goes_on(hub, tmp_path, texts):
    shutil.copytree(hub.root / "somebody" / "books", hub.root / "somebody" / "novels")
    hub.faults = [Fault(503, "GET .*books.*resolve", after=2, times=2), Fault(503, "GET .*novels.*resolve", after=2)]
    short, long = ask(hub, tmp_path, *({"corpus": {"path": f"somebody/{name}"}} for name in ("books", "novels")))
    assert not hub.faults[0].times
    assert [text for _, _, text in short["records"]] == texts
    [error] = long["errors"]
    assert error.startswith("corpus 'c': somebody/novels, shard")
    assert "cannot be read, after 2 retries" in error


@pytest.mark.long
def test_training_from_the_hub_in_both_modes(hub, flags, tmp_path, texts):
    flags |= {"corpora": json.dumps([{"name": "books", "path": "somebody/books"}]), "num_lanes": 4}
    for mode in ("cached", "streaming"):
        extra = {"output_dir": tmp_path / mode, "streaming": str(mode == "streaming").lower()}
        extra |= {"dataloader_num_workers": 2, "preprocessing_num_workers": 2}
        result = run(hub, tmp_path, "pretrain.py", *command_line(flags | extra))
        assert result.returncode == 0, result.stderr
        last = [line for line in read_lines(tmp_path / mode / "metrics.jsonl") if "corpora" in line][-1]
        assert last["corpora"]["books"]["blocks"] == 48
    # The store is there: no need for the hub.
    hub.reads.clear()
    again = flags | {"output_dir": tmp_path / "again"}
    hub.faults = [Fault(503)]
    assert run(hub, tmp_path, "pretrain.py", *command_line(again)).returncode == 0
    assert not hub.reads
    assert learning(tmp_path / "again" / "metrics.jsonl") == learning(tmp_path / "cached" / "metrics.jsonl")
