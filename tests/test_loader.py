import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from recipe.config import CorpusArguments, PretrainArguments, UserError
from recipe.loader import CachedData, PackedCorpus, build_token_store
from recipe.tokenizer import DocumentEncoder
from tests.conftest import write_jsonl


@pytest.fixture
def make_data(corpus_file: Path, tokenizer, tokenizer_dir: Path):
    def make(**changes: object) -> CachedData:
        settings = {
            "output_dir": "unused",
            "tokenizer_name": str(tokenizer_dir),
            "corpora": [CorpusArguments(name="sample", path=str(corpus_file))],
            "max_seq_length": 32,
            "eval_blocks": 10,
            "train_batch_size": 8,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 4,
        }
        return CachedData(PretrainArguments(**(settings | changes)), tokenizer)

    return make


def rows_of_update(data: CachedData, update: int, num_processes: int, num_workers: int = 0) -> torch.Tensor:
    rows = [
        torch.cat([batch["input_ids"], batch["labels"]], 1)
        for process in range(num_processes)
        for batch in next(data.train_batches(process, num_processes).iterate(update, update + 1, num_workers))
    ]
    return torch.stack(sorted(torch.cat(rows), key=lambda row: row.tolist()))


def test_blocks_are_the_documents_own_ids(make_data, tokenizer, texts):
    packed = make_data().packed[0]
    tokens = [id for n in range(len(packed)) for id in packed.block(n).tolist() if id not in (0, 2)]
    expected = [id for t in texts for id in tokenizer.backend_tokenizer.encode(t, add_special_tokens=False).ids]
    assert tokens == expected


def test_store_does_not_depend_on_num_proc(tmp_path: Path, texts, tokenizer):
    stores = []
    for num_proc in (1, 3):
        # Two copies, since the cache would give the first store back.
        path = write_jsonl(tmp_path / f"{num_proc}.jsonl", texts)
        encoder = DocumentEncoder(tokenizer, "sentencex", "en")
        stores.append(build_token_store(CorpusArguments(name="c", path=str(path)), encoder, num_proc))
    assert stores[0].to_list() == stores[1].to_list()
    one, three = (PackedCorpus(store, 32, 0, 2) for store in stores)
    assert one.block_ends.tolist() == three.block_ends.tolist()
    assert [one.block(n).tolist() for n in range(len(one))] == [three.block(n).tolist() for n in range(len(three))]


def test_store_is_found_again_and_made_anew_for_another_splitter(corpus_file: Path, tokenizer, monkeypatch):
    corpus = CorpusArguments(name="c", path=str(corpus_file))
    build_token_store(corpus, DocumentEncoder(tokenizer, "sentencex", "en"), None)
    calls = []
    encode = DocumentEncoder.__call__
    monkeypatch.setattr(DocumentEncoder, "__call__", lambda self, batch: (calls.append(1), encode(self, batch))[1])
    build_token_store(corpus, DocumentEncoder(tokenizer, "sentencex", "en"), None)
    assert not calls
    build_token_store(corpus, DocumentEncoder(tokenizer, "sentencex", "de"), None)
    assert calls


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("num_processes", "micro_batch"), [(1, 4), (2, 4), (2, 1), (4, 2)])
def test_update_is_the_same_for_any_processes_workers_and_micro_batch(
    make_data, num_processes, micro_batch, num_workers
):
    reference = rows_of_update(make_data(), 5, 1)
    data = make_data(per_device_train_batch_size=micro_batch)
    assert torch.equal(rows_of_update(data, 5, num_processes, num_workers), reference)


def test_iteration_goes_on_from_any_update(make_data):
    batches = make_data(per_device_train_batch_size=4).train_batches(0, 1)
    whole = list(batches.iterate(0, 6, 0))
    resumed = list(batches.iterate(4, 6, 0))
    for one, two in zip(whole[4:], resumed, strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a["input_ids"], b["input_ids"])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_update_of_many_micro_batches_keeps_no_file_open(make_data):
    data = make_data(train_batch_size=512, per_device_train_batch_size=1)
    before = len(os.listdir("/proc/self/fd"))
    batches = next(data.train_batches(0, 1).iterate(0, 1, num_workers=2))
    assert len(batches) == 512
    assert len(os.listdir("/proc/self/fd")) < before + 50


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_every_held_out_block_is_evaluated_once(make_data, num_processes):
    data = make_data()
    rows, counts = [], []
    for process in range(num_processes):
        batches = next(data.eval_batches(process, num_processes).iterate(0, 1, 0))
        counts.append(len(batches))
        for batch in batches:
            # Restored, a row is its block.
            ids = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
            rows += [tuple(row.tolist()) for row in ids if (row != 1).sum() > 2]
    assert len(set(counts)) == 1
    held = [tuple(data.packed[0].block(int(n)).tolist()) for n in data.eval_blocks]
    assert sorted(row[: len(block)] for row, block in zip(sorted(rows), sorted(held), strict=True)) == sorted(held)


def test_eval_corpora_are_used_whole_for_evaluation_alone(make_data, tmp_path: Path, texts):
    path = write_jsonl(tmp_path / "eval.jsonl", texts[:10])
    data = make_data(eval_corpora=[CorpusArguments(name="other", path=str(path))], eval_blocks=10_000)
    assert data.order.num_held_out.tolist() == [0]
    assert len(data.eval_blocks) == len(data.packed[1])
    assert (data.locate_eval(np.arange(len(data.eval_blocks)))[0] == 1).all()


def test_chunks_are_read_across_their_edges(make_data, monkeypatch):
    packed = make_data().packed[0]
    whole = np.concatenate(packed.chunks)
    packed.chunks = [whole[:7], whole[7:50], whole[50:51], whole[51:]]
    packed.chunk_starts = np.cumsum([0, *map(len, packed.chunks)])
    for start, end in [(0, 7), (3, 52), (7, 50), (49, 60), (51, 60), (0, len(whole))]:
        assert packed.tokens(start, end).tolist() == whole[start:end].tolist()


def test_unigram_loss_is_that_of_the_counts(make_data):
    data = make_data()
    counts = np.ones(len(data.collator.tokenizer))
    for n in range(data.blocks_per_epoch):
        corpus, _, block = (int(array[0]) for array in data.order.locate(np.array([n])))
        np.add.at(counts, data.packed[corpus].block(block), 1)
    counts[data.collator.tokenizer.all_special_ids] = 0
    labels = np.concatenate([b["labels"].numpy().ravel() for b in next(data.eval_batches(0, 1).iterate(0, 1, 0))])
    expected = -np.log((counts / counts.sum())[labels[labels != -100]]).mean()
    assert data.unigram_loss() == pytest.approx(expected)


def test_too_small_and_too_eager_are_named(make_data, tmp_path: Path):
    small = write_jsonl(tmp_path / "small.jsonl", ["It was."])
    with pytest.raises(
        UserError, match=r"'small' has \d+ tokens, too few for a single block of `max_seq_length` \(32\)"
    ):
        make_data(corpora=[CorpusArguments(name="small", path=str(small))])
    with pytest.raises(UserError, match=r"`eval_blocks` \(100000\) takes 100000 blocks of corpus 'sample'"):
        make_data(eval_blocks=100_000)


def test_weights_of_the_config_are_kept(make_data, tmp_path: Path, texts):
    corpora = [
        CorpusArguments(name=name, path=str(write_jsonl(tmp_path / f"{name}.jsonl", texts)), weight=weight)
        for name, weight in (("a", 3), ("b", 1))
    ]
    corpora_of = make_data(corpora=corpora).order.locate(np.arange(10_000))[0]
    assert (corpora_of == 0).mean() == pytest.approx(0.75, abs=0.001)


def test_description_counts_documents_and_tokens(make_data, texts):
    line = make_data().describe()[0]
    assert f"{len(texts):,} documents" in line
    assert json.dumps(make_data().identity())
