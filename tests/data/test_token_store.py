import errno
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recipe.arguments import CorpusArguments
from recipe.arguments.corpus_files import local_files
from recipe.base.errors import UserError
from recipe.data import token_store
from recipe.data.corpora import LocalSource
from recipe.data.document_encoder import DocumentEncoder
from recipe.data.encoders import RunEncoder
from recipe.data.hygiene import Decontaminator, find_copies
from recipe.data.integrity import read_json
from recipe.data.packed_corpus import PackedCorpus
from recipe.data.packing import BlockFormat
from recipe.data.token_store import TokenStore, check_space
from recipe.data.tokenizer import load_tokenizer
from testing.helpers import PATIENCE_SECONDS, wait_for, write_jsonl

FULL = BlockFormat("full_sentences", 32, 0, 2, pair_special_tokens=4, seed=1)


@pytest.fixture
def encoder(tokenizer) -> DocumentEncoder:
    return DocumentEncoder(tokenizer, "sentencex", "en")


@pytest.fixture
def corpus(tmp_path: Path, texts, monkeypatch) -> CorpusArguments:
    """Four shards."""
    monkeypatch.setattr("recipe.data.corpora.SHARD_BYTES", 1)
    (tmp_path / "text").mkdir()
    for number in range(4):
        write_jsonl(tmp_path / "text" / f"{number}.jsonl", texts[number * 30 : number * 30 + 30])
    return CorpusArguments(name="a/b c", path=str(tmp_path / "text"))


def build(corpus, encoder, root: Path, process_index: int = 0, num_workers: int | None = None, **limits) -> TokenStore:
    store = TokenStore(corpus, encoder, Decontaminator([]), root)
    store.build(process_index, num_workers, limits.get("max_unreadable", 0))
    return store


def contents(store: TokenStore) -> list[bytes]:
    return [store.arrow(shard).read_bytes() for shard in range(store.num_shards)]


def all_blocks(packed: PackedCorpus) -> list[list[int]]:
    return [packed.block(number).input_ids.tolist() for number in range(len(packed))]


def test_blocks_are_the_documents_own_ids(corpus, encoder, tokenizer, tmp_path: Path, texts):
    store = build(corpus, encoder, tmp_path / "stores")
    assert store.path.name.startswith("a_b_c-")
    expected = [id for t in texts for id in tokenizer.backend_tokenizer.encode(t, add_special_tokens=False).ids]
    for packing in ("full_sentences", "contiguous"):
        packed = PackedCorpus(store, BlockFormat(packing, 32, 0, 2, 4, 1))
        packed.build(0)
        assert [id for block in all_blocks(packed) for id in block if id not in (0, 2)] == expected
        assert packed.counts == {"documents": len(texts), "tokens": len(expected), "copies": 0}
        assert packed.left_out == {"empty": 0, "unreadable": 0, "contaminated": 0, "copies": 0}


def test_store_does_not_depend_on_workers(corpus, encoder, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("recipe.data.encoders.RECORD_CHARACTERS", 70_000)
    stores = [build(corpus, encoder, tmp_path / f"{n}", num_workers=n) for n in (None, 1, 3)]
    assert contents(stores[0]) == contents(stores[1]) == contents(stores[2])
    assert stores[0].counts() == stores[2].counts()


def test_killed_worker_is_told_of(corpus, encoder, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(RunEncoder, "__call__", lambda self, run: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"a preprocessing worker was killed.*lower `preprocessing_num_workers`"):
        build(corpus, encoder, tmp_path, num_workers=2)


def test_units_end_in_a_short_block_and_are_read_across_the_corpus(corpus, encoder, tmp_path: Path, monkeypatch, texts):
    whole = PackedCorpus(build(corpus, encoder, tmp_path / "one"), FULL)
    whole.build(0)
    monkeypatch.setattr(token_store, "UNIT_TOKENS", 300)
    store = build(corpus, encoder, tmp_path / "many")
    packed = PackedCorpus(store, FULL)
    packed.build(0)
    assert sum(len(shard.units) for shard in packed.shards) > 20
    assert len(packed) > len(whole)
    tokens = [[id for block in all_blocks(view) for id in block if id not in (0, 2)] for view in (packed, whole)]
    assert tokens[0] == tokens[1]
    assert sum(packed.block(n).documents for n in range(len(packed))) == len(texts)


def test_store_is_found_again_and_made_anew_for_another_splitter(corpus, encoder, tokenizer, tmp_path, monkeypatch):
    build(corpus, encoder, tmp_path)
    calls = []
    encode = RunEncoder.__call__
    monkeypatch.setattr(RunEncoder, "__call__", lambda self, run: (calls.append(1), encode(self, run))[1])
    build(corpus, encoder, tmp_path)
    assert not calls
    build(corpus, DocumentEncoder(tokenizer, "sentencex", "de"), tmp_path)
    assert calls


def test_store_can_be_opened_by_its_folder_without_the_text(corpus, encoder, tokenizer, tmp_path: Path):
    store = build(corpus, encoder, tmp_path / "stores")
    for file in Path(corpus.path).iterdir():
        file.unlink()
    moved = store.path.rename(tmp_path / "elsewhere")
    opened = build(CorpusArguments(name="c", path=str(moved)), encoder, tmp_path / "unused")
    packed = PackedCorpus(opened, FULL)
    packed.build(0)
    assert len(packed) > 50
    with pytest.raises(UserError, match=r"corpus 'c': the token store .*elsewhere was made with another tokenizer"):
        build(CorpusArguments(name="c", path=str(moved)), DocumentEncoder(tokenizer, "newline", "en"), tmp_path)
    opened.arrow(2).with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"elsewhere lacks 1 of 4 shards"):
        build(CorpusArguments(name="c", path=str(moved)), encoder, tmp_path)


def test_store_opens_with_datasets(corpus, encoder, tokenizer, tmp_path: Path, texts):
    from datasets import load_dataset

    build(corpus, encoder, tmp_path / "stores")
    rows = load_dataset("arrow", data_files=str(tmp_path / "stores" / "*" / "*.arrow"), split="train")
    assert len(rows) == len(texts)
    assert tokenizer.decode(rows[0]["input_ids"]) == texts[0]


def build_and_pack(corpus, encoder, root: Path, process_index: int) -> None:
    PackedCorpus(build(corpus, encoder, root, process_index), FULL).build(process_index)


def test_processes_share_the_shards(corpus, encoder, tmp_path: Path, monkeypatch):
    """Three processes at once; each shard is written once, by whoever takes it."""
    written = tmp_path / "written"
    written.mkdir()
    write = token_store.write_shard

    def slow(path, *arguments):
        (written / f"{path.name}-{os.getpid()}").touch()
        time.sleep(0.3)
        write(path, *arguments)

    monkeypatch.setattr(token_store, "write_shard", slow)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=build_and_pack, args=(corpus, encoder, tmp_path / "shared", index)) for index in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == 0
    names = [path.name for path in written.iterdir()]
    assert len(names) == 4
    assert len({name.rsplit("-", 1)[1] for name in names}) > 1
    alone = build(corpus, encoder, tmp_path / "alone")
    assert contents(TokenStore(corpus, encoder, Decontaminator([]), tmp_path / "shared")) == contents(alone)


def test_killed_build_goes_on_with_the_shards_that_are_missing(corpus, encoder, tmp_path: Path, monkeypatch):
    write = token_store.write_shard

    def stuck_at_the_third(path, *arguments):
        if "00002" in path.name:
            (path.parent / f".{path.name}.1").touch()  # half a file
            time.sleep(PATIENCE_SECONDS)
        write(path, *arguments)

    monkeypatch.setattr(token_store, "write_shard", stuck_at_the_third)
    process = multiprocessing.get_context("fork").Process(target=build, args=(corpus, encoder, tmp_path / "stores"))
    process.start()
    wait_for(lambda: list((tmp_path / "stores").glob("*/.shard-00002*")))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    finished = {path.with_suffix(".arrow").name for path in (tmp_path / "stores").glob("*/shard-*.json")}
    made = []
    monkeypatch.setattr(token_store, "write_shard", lambda path, *rest: (made.append(path.name), write(path, *rest))[1])
    store = build(corpus, encoder, tmp_path / "stores")
    assert "shard-00002.arrow" in made
    assert sorted({*made, *finished}) == [f"shard-{number:05d}.arrow" for number in range(4)]
    assert not {*made} & finished
    assert not list(store.path.glob(".shard*"))
    assert contents(store) == contents(build(corpus, encoder, tmp_path / "alone"))


def test_copies_are_left_out_of_the_blocks(corpus, encoder, tokenizer, tmp_path: Path, texts):
    write_jsonl(Path(corpus.path) / "4.jsonl", [texts[3], "Something new.", texts[40], texts[3]])
    store = build(corpus, encoder, tmp_path / "stores")
    checksums = store.checksums()
    is_copy = find_copies(np.concatenate(checksums))
    copies = np.split(is_copy, np.cumsum([len(shard) for shard in checksums])[:-1])
    packed = PackedCorpus(store, FULL, copies)
    packed.build(0)
    assert packed.counts["copies"] == 3
    assert packed.counts["documents"] == 121
    kept = [*texts, "Something new."]
    expected = [id for t in kept for id in tokenizer.backend_tokenizer.encode(t, add_special_tokens=False).ids]
    assert [id for block in all_blocks(packed) for id in block if id not in (0, 2)] == expected
    whole = PackedCorpus(store, FULL)
    assert whole.path != packed.path


def test_left_out_documents_are_counted(corpus, encoder, tmp_path: Path, texts):
    with (Path(corpus.path) / "0.jsonl").open("a") as file:
        file.write('{"text": ""}\n{"text": " "}\n{"text": 3}\nnot json\n')
    with pytest.raises(UserError, match=r"0\.jsonl, line 33.*`?max_unreadable_documents|max_unreadable_documents"):
        build(corpus, encoder, tmp_path)
    store = build(corpus, encoder, tmp_path, max_unreadable=2)
    counts = store.counts()
    assert (counts["documents"], counts["empty"], counts["unreadable"]) == (len(texts), 2, 2)
    with pytest.raises(UserError, match=r"2 unreadable documents, more than `max_unreadable_documents` \(1\)"):
        build(corpus, encoder, tmp_path, max_unreadable=1)


def test_error_of_a_worker_names_the_file(corpus, encoder, tmp_path: Path):
    (Path(corpus.path) / "3.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match=r"3\.jsonl, line 1"):
        build(corpus, encoder, tmp_path, num_workers=2)


def test_packed_corpus_reopens_its_files_when_sent_to_a_worker(corpus, encoder, tmp_path: Path):
    packed = PackedCorpus(build(corpus, encoder, tmp_path), FULL)
    packed.build(0)
    sent = pickle.dumps(packed)
    assert len(sent) < 200_000
    assert all_blocks(pickle.loads(sent)) == all_blocks(packed)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_open_blocks_keep_no_file_open(corpus, encoder, tmp_path: Path):
    store = build(corpus, encoder, tmp_path)
    PackedCorpus(store, FULL).build(0)
    before = len(os.listdir("/proc/self/fd"))
    views = [PackedCorpus(store, FULL) for _ in range(10)]
    for view in views:
        view.build(0)
    assert len(os.listdir("/proc/self/fd")) < before + 5


def test_documents_that_a_normalizer_empties_are_left_out(corpus, texts, tokenizer_dirs, tmp_path: Path):
    encoder = DocumentEncoder(load_tokenizer(str(tokenizer_dirs["bert"])), "sentencex", "en")
    write_jsonl(Path(corpus.path) / "0.jsonl", ["\u200b", "a b " * 15, "\u200b", texts[0]])
    store = build(corpus, encoder, tmp_path)
    packed = PackedCorpus(store, FULL)
    packed.build(0)
    assert store.counts()["empty"] == 2
    assert all(len(packed.block(number).input_ids) <= 32 for number in range(len(packed)))
    assert packed.counts["documents"] == store.counts()["documents"] == 92


def test_store_of_a_hub_data_set_stays_with_the_commit_that_it_was_begun_with(tmp_path, encoder, corpus, monkeypatch):
    opened = []

    class Hub(LocalSource):
        revision = "commit-1"

    def open_hub(asked):
        opened.append(asked.revision)
        return Hub(asked, local_files(replace(asked, revision=None)))

    monkeypatch.setattr(token_store, "open_source", open_hub)
    store = build(corpus, encoder, tmp_path)
    store.arrow(1).with_suffix(".json").unlink()
    build(corpus, encoder, tmp_path)
    assert opened == [None, "commit-1"]
    store.arrow(1).with_suffix(".json").unlink()
    (Path(corpus.path) / "3.jsonl").rename(tmp_path / "gone.jsonl")
    monkeypatch.setattr(token_store, "source_fingerprint", lambda _: "same")
    changed = TokenStore(corpus, encoder, Decontaminator([]), tmp_path)
    changed.path = store.path
    with pytest.raises(UserError, match=r"has 3 shards, and had 4 when .* was begun; remove that folder"):
        changed.build(0, None, 0)


def test_large_vocabularies_are_stored_in_four_bytes(corpus, encoder, tmp_path: Path):
    small = build(corpus, encoder, tmp_path / "small")
    encoder.dtype = np.dtype(np.int32)
    large = build(corpus, encoder, tmp_path / "large")
    schemas = [pa.ipc.open_file(str(store.arrow(0))).schema for store in (small, large)]
    assert [schema.field("input_ids").type.value_type for schema in schemas] == [pa.uint16(), pa.int32()]


def test_full_disk_is_named_and_what_is_finished_stays(corpus, encoder, tmp_path: Path, monkeypatch):
    write = token_store.to_batch
    calls = []

    def full(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(token_store, "to_batch", full)
    with pytest.raises(UserError, match=r"no space is left in .*stores.*`token_store_dir`.*finished is kept"):
        build(corpus, encoder, tmp_path / "stores")
    assert len(list((tmp_path / "stores").glob("*/shard-*.json"))) == 2
    assert not list((tmp_path / "stores").glob("*/.shard*"))
    monkeypatch.setattr(token_store, "to_batch", write)
    assert contents(build(corpus, encoder, tmp_path / "stores"))


def test_too_small_a_disk_is_told_before_the_work(corpus, encoder, tmp_path: Path, monkeypatch):
    stores = [TokenStore(corpus, encoder, Decontaminator([]), tmp_path / "stores")]
    check_space(tmp_path / "stores", stores)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"about \d.* KB in .*stores, 1 KB free; .*`token_store_dir`.*`streaming"):
        check_space(tmp_path / "stores", stores)
    assert not (tmp_path / "stores").exists()


def test_counts_are_read_from_the_store(corpus, encoder, tmp_path: Path, texts):
    store = build(corpus, encoder, tmp_path)
    about = json.loads((store.path / "store.json").read_text())
    assert about["num_shards"] == 4
    assert about["corpus"]["name"] == corpus.name
    assert store.counts()["documents"] == len(texts)


@pytest.mark.parametrize("name", ["store.json", "shard-00002.json", "shard-00002.arrow"])
def test_torn_file_of_a_store_is_named(corpus, encoder, tmp_path: Path, name):
    store = build(corpus, encoder, tmp_path / "stores")
    torn = store.path / name
    torn.write_bytes(torn.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{name} is damaged"):
        PackedCorpus(store, FULL).build(0)


def test_preparation_tells_a_log_file_how_far_all_processes_have_come(corpus, encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(token_store, "LOOK_SECONDS", 0)
    monkeypatch.setattr(token_store, "LOG_SECONDS", 0)
    store = build(corpus, encoder, tmp_path)
    printed = capsys.readouterr().out.splitlines()
    pattern = r"tokenising a/b c: [\d.]+ .?B of about [\d.]+ KB, [\d.]+ .?B a second, \d+:\d\d:\d\d left"
    assert re.fullmatch(pattern, printed[0])
    made = rf"tokenised a/b c: [\d.]+ KB of text in 0:00:\d\d, .* a second; the token store is {store.path}"
    assert re.fullmatch(made, printed[-1])
    size = sum(read_json(store.path / f"shard-{n:05d}.json")["text_bytes"] for n in range(store.num_shards))
    done = read_json(store.path / "shard-00001.json")["text_bytes"]
    store.arrow(1).with_suffix(".json").unlink()
    preparation = token_store.Preparation(store, True)
    assert preparation.initial == preparation.count() == size - done, "what was there before is no progress"
    preparation.update(1, done)
    assert preparation.count() == size
