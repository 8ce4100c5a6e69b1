"""Hub data sets, from a server on this machine that speaks the hub's API."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from testing.helpers import ROOT, command_line, read_lines
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
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "ACCELERATE_USE_CPU": "true", "no_proxy": "*"}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200
    )


READ = """
import json, sys, time
import datasets
import recipe.data.corpora
from recipe.arguments import CorpusArguments
from recipe.base.errors import report_user_errors
from recipe.data.corpora import Part, open_source

datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
recipe.data.corpora.RETRY_SECONDS = (1, 1)
time.sleep = recipe.base.workers.STOP_WAITING.wait = lambda seconds: None
with report_user_errors():
    corpus = CorpusArguments(**json.loads(sys.argv[1]))
    source = open_source(corpus)
    first, part = json.loads(sys.argv[2])
    for shard in range(source.num_shards):
        for index, text in source.read(shard, first, Part(*part)):
            print("READ", json.dumps([shard, index, text]))
"""


def read(hub: HubServer, tmp_path: Path, corpus: dict, first: int = 0, part: tuple[int, int] = (0, 1)):
    result = run(hub, tmp_path, "-c", READ, json.dumps({"name": "c"} | corpus), json.dumps([first, part]))
    return [json.loads(line[5:]) for line in result.stdout.splitlines() if line.startswith("READ ")], result


def test_shards_records_and_parts(hub, tmp_path, texts):
    found, _ = read(hub, tmp_path, {"path": "somebody/books"}, 15, (1, 4))
    records = [n for n in range(15, 40) if n % 4 == 1]
    assert found == [[shard, n, texts[shard * 40 + n]] for shard in range(3) for n in records]
    found, _ = read(hub, tmp_path, {"path": "somebody/letters", "text_column": "body"})
    assert [text for _, _, text in found] == texts[:30]


def test_what_the_hub_does_not_have_is_named(hub, tmp_path):
    for corpus, expected in [
        ({"path": "somebody/nothing"}, "corpus 'c': hub data set somebody/nothing"),
        ({"path": "somebody/books", "split": "test"}, "split test"),
        ({"path": "somebody/books", "text_column": "body"}, "no column 'body' among ['title', 'text']"),
    ]:
        _, result = read(hub, tmp_path, corpus)
        assert result.returncode == 2
        assert expected in result.stderr


def test_outage_is_waited_out_and_named_if_it_goes_on(hub, tmp_path, texts):
    hub.faults = [Fault(503, "GET .*resolve", after=2, times=2)]
    found, result = read(hub, tmp_path, {"path": "somebody/books"})
    assert [text for _, _, text in found] == texts
    hub.faults = [Fault(503, "GET .*resolve", after=2)]
    _, result = read(hub, tmp_path, {"path": "somebody/books"})
    assert result.returncode == 2
    assert "error: corpus 'c': somebody/books, shard" in result.stderr
    assert "cannot be read, after 2 retries" in result.stderr


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
    assert (
        read_lines(tmp_path / "again" / "metrics.jsonl")[0]["loss"]
        == (read_lines(tmp_path / "cached" / "metrics.jsonl")[0]["loss"])
    )


def test_default_weights_are_the_published_sizes(hub, flags, tmp_path):
    corpora = [{"name": name, "path": f"somebody/{name}"} for name in ("books", "letters")]
    corpora[1]["text_column"] = "body"
    flags |= {"corpora": json.dumps(corpora), "streaming": "true", "num_lanes": 4}
    result = run(hub, tmp_path, "pretrain.py", *command_line(flags))
    assert result.returncode == 2
    assert "'letters': somebody/letters does not publish its size; give all corpora a `weight`" in result.stderr
