import json
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.base.errors import UserError
from recipe.data.batches import Counts, Rank, Resume, Row, TrainingData, noticing_dead_workers
from recipe.data.modes import open_data
from recipe.data.preprocessor import Preprocessor
from testing.helpers import never, write_jsonl


@pytest.fixture
def make_data(corpus_file: Path, tokenizer, tokenizer_dir: Path):
    def make(**changes: object) -> TrainingData:
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
        args = PretrainArguments(**(settings | changes))
        return open_data(args, Preprocessor(args, tokenizer))

    return make


def rows_of_update(data: TrainingData, update: int, num_processes: int) -> tuple[list, list[int]]:
    """All rows of an update, in an order that processes do not change, and its counts."""
    shares = [
        next(data.train_updates(Rank(process, num_processes), Resume(update), update + 1, never))
        for process in range(num_processes)
    ]
    rows = [torch.cat([b["input_ids"], b["labels"]], 1) for share in shares for b in share.micro_batches]
    return sorted(torch.cat(rows).tolist()), sum(share.counts.array for share in shares).tolist()


@pytest.mark.parametrize("packing", ["full_sentences", "segment_pair", "sentence_order"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("num_processes", "micro_batch"), [(1, 4), (2, 4), (2, 1), (4, 2)])
def test_update_is_the_same_for_any_processes_workers_and_micro_batch(
    make_data, num_processes, micro_batch, num_workers, packing
):
    reference = rows_of_update(make_data(dataloader_num_workers=0, packing=packing), 5, 1)
    workers = {"dataloader_num_workers": num_workers}
    data = make_data(per_device_train_batch_size=micro_batch, packing=packing, **workers)
    assert rows_of_update(data, 5, num_processes) == reference


def text_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


def parts_of(example: dict) -> list[tuple[int, ...]]:
    return [tuple(part[part > 2].tolist()) for part in np.split(example["input_ids"], example["spans"][:1])]


@pytest.mark.parametrize("packing", ["segment_pair", "sentence_pair", "sentence_order"])
def test_every_pass_has_the_same_parts_in_other_pairs_and_none_of_what_is_held_out(make_data, packing):
    data = make_data(packing=packing)
    order = data.stretches[0].order
    _, visits, blocks = order.locate(np.arange(3 * int(order.num_train[0])))
    passes = [
        [data.example(Row(0, visit, block, 32)) for block in np.sort(blocks[visits == visit]).tolist()]
        for visit in range(3)
    ]
    parts = [sorted(part for example in one for part in parts_of(example)) for one in passes]
    assert parts[0] == parts[1] == parts[2]
    held_out = [data.example(Row(0, -1, block, 32)) for block in data.eval_blocks.tolist()]
    together = sorted(parts[0] + [part for example in held_out for part in parts_of(example)])
    whole = make_data(packing=packing, eval_blocks=0)
    everything = [whole.example(Row(0, 7, block, 32)) for block in range(len(whole.packed[0]))]
    assert sorted(part for example in everything for part in parts_of(example)) == together
    changed = [a["input_ids"].tolist() != b["input_ids"].tolist() for a, b in zip(*passes[:2], strict=True)]
    assert np.mean(changed) > 0.3


@pytest.mark.parametrize("packing", ["full_sentences", "segment_pair", "sentence_order"])
@pytest.mark.parametrize(("masking", "texts_and_masks"), [("dynamic", 40), ("static", 10)])
def test_static_data_repeats_after_ten_visits(make_data, packing, masking, texts_and_masks):
    size = len(make_data(packing=packing, masking=masking, eval_blocks=0).packed[0])
    data = make_data(packing=packing, masking=masking, eval_blocks=0, train_batch_size=size)
    rows = [row for update in range(40) for row in data.rows(update) if row.block == 5]
    batches = [data.preprocessor.collator([data.example(row)]) for row in rows]
    seen = Counter(str((batch["input_ids"].tolist(), batch["labels"].tolist())) for batch in batches)
    assert list(seen.values()) == [40 // texts_and_masks] * texts_and_masks


@pytest.mark.parametrize("packing", ["full_sentences", "segment_pair", "sentence_order"])
def test_iteration_goes_on_from_any_update(make_data, packing):
    data = make_data(per_device_train_batch_size=4, dataloader_num_workers=0, packing=packing)
    whole = list(data.train_updates(Rank(), Resume(), 6, never))
    resumed = list(data.train_updates(Rank(), Resume(4), 6, never))
    for one, two in zip(whole[4:], resumed, strict=True):
        assert one.counts.array.tolist() == two.counts.array.tolist()
        for a, b in zip(one.micro_batches, two.micro_batches, strict=True):
            assert torch.equal(a["input_ids"], b["input_ids"])


def test_counts_are_those_of_the_rows(make_data, texts):
    data = make_data(train_batch_size=1, per_device_train_batch_size=1, dataloader_num_workers=0, eval_blocks=0)
    blocks = len(data.packed[0])
    shares = list(data.train_updates(Rank(), Resume(), blocks, never))
    counts = Counts(1, sum(share.counts.array for share in shares))
    assert counts.corpora.tolist() == [[blocks, counts.corpora[0, 1], len(texts)]]
    assert counts.corpora[0, 1] >= data.packed[0].counts["tokens"] + 2 * blocks
    seen = data.corpora_record(counts.corpora.tolist(), shares[-1].counts.streams)["sample"]
    assert seen == {"blocks": blocks, "tokens": counts.corpora[0, 1], "documents": len(texts), "passes": 1.0} | {
        "empty": 0,
        "unreadable": 0,
        "contaminated": 0,
        "copies": 0,
    }


PLAIN = {"input_ids", "labels", "position_ids", "attention_mask"}
PAIR = PLAIN | {"token_type_ids", "pair_label"}


@pytest.mark.parametrize(
    ("packing", "streaming", "names"),
    [
        ("full_sentences", False, PLAIN),
        ("full_sentences", True, PLAIN),
        ("doc_sentences", False, {"input_ids", "labels", "position_ids", "document_ids"}),
        ("doc_sentences", True, {"input_ids", "labels", "position_ids", "document_ids"}),
        ("contiguous", False, {"input_ids", "labels", "position_ids"}),
        ("contiguous", True, {"input_ids", "labels", "position_ids"}),
        ("segment_pair", False, PAIR),
        ("sentence_pair", False, PAIR),
        ("sentence_order", False, PAIR),
        ("sentence_order", True, PAIR),
    ],
)
def test_every_packing_gives_its_batches(make_data, packing, streaming, names, tokenizer):
    changes = {"streaming": True, "num_lanes": 4, "shuffle_buffer_size": 8} if streaming else {}
    data = make_data(packing=packing, train_batch_size=8, **changes)
    (batch,) = next(data.train_updates(Rank(), Resume(), 1, never)).micro_batches
    assert set(batch) == names
    assert (text_of(batch)[:, 0] == tokenizer.cls_token_id).all()


def test_copies_are_left_out_of_all_corpora(make_data, tmp_path: Path, texts):
    corpora = [
        CorpusArguments(name=name, path=str(write_jsonl(tmp_path / f"{name}.jsonl", chosen)))
        for name, chosen in (("a", texts[:60]), ("b", [*texts[50:], texts[60]]))
    ]
    plain, clean = make_data(corpora=corpora), make_data(corpora=corpora, deduplicate=True)
    assert [packed.counts["copies"] for packed in plain.packed] == [0, 0]
    assert [packed.counts["copies"] for packed in clean.packed] == [0, 11]
    assert sum(packed.counts["documents"] for packed in clean.packed) == len(texts)
    assert "left out: 11 copies" in clean.describe()[1]
    assert clean.corpora_record([[1, 1, 1]] * 2, np.zeros((2, 4)))["b"]["copies"] == 11


def test_test_sentences_are_left_out_and_counted(make_data, tmp_path: Path, texts):
    sentence = max(texts, key=len).split(". ")[0]
    (tmp_path / "dev.tsv").write_text(
        f"sentence\tlabel\n{sentence} and so on it went\t1\n{' '.join(texts[5].split()[:14])}\t0\n"
    )
    data = make_data(decontaminate_against=[str(tmp_path / "*.tsv")])
    assert data.packed[0].left_out["contaminated"] >= 1
    assert "contaminated" in data.describe()[0]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_worker_that_is_killed_while_it_sends_is_noticed_when_data_is_asked_for(make_data, streaming, number):
    mode = {"streaming": True, "num_lanes": 4, "shuffle_buffer_size": 4096} if streaming else {}
    sizes = {"train_batch_size": 4096, "per_device_train_batch_size": 4096}  # more than fits into a pipe
    updates = make_data(dataloader_num_workers=2, **mode, **sizes).train_updates(Rank(), Resume(), 1000, never)
    with noticing_dead_workers():
        next(updates)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, number)
    for worker in workers:
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # and nothing is raised here
    dead = r"DataLoader worker \(pid \d+\) is killed by signal.*`dataloader_num_workers`"
    with pytest.raises(UserError, match=dead) as error, noticing_dead_workers():
        next(updates)
    assert ("token store" in str(error.value)) == (number == signal.SIGBUS)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    updates.close()


def test_signal_of_a_dead_worker_is_named_whatever_is_put_over_it():
    named = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. ")
    with (
        pytest.raises(UserError, match=r"\(pid 7\) is killed by signal: Bus error.*token store"),
        noticing_dead_workers(),
    ):
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly") from named


def test_update_of_many_micro_batches_keeps_no_file_open(make_data):
    data = make_data(train_batch_size=512, per_device_train_batch_size=1)
    before = len(os.listdir("/proc/self/fd"))
    share = next(data.train_updates(Rank(), Resume(), 1, never))
    assert len(share.micro_batches) == 512
    assert len(os.listdir("/proc/self/fd")) < before + 50


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_every_held_out_block_is_evaluated_once(make_data, num_processes):
    data = make_data()
    rows, counts = [], []
    for process in range(num_processes):
        batches, _ = next(data.eval_batches(Rank(process, num_processes)).iterate(0, 1, 0))
        counts.append(len(batches))
        for batch in batches:
            # Restored, a row is its block.
            ids = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
            rows += [tuple(row.tolist()) for row in ids if (row != 1).sum() > 2]
    assert len(set(counts)) == 1
    held = [tuple(data.packed[0].block(int(n)).input_ids.tolist()) for n in data.eval_blocks]
    assert sorted(row[: len(block)] for row, block in zip(sorted(rows), sorted(held), strict=True)) == sorted(held)


def test_eval_corpora_are_used_whole_for_evaluation_alone(make_data, tmp_path: Path, texts):
    path = write_jsonl(tmp_path / "eval.jsonl", texts[:10])
    data = make_data(eval_corpora=[CorpusArguments(name="other", path=str(path))], eval_blocks=10_000)
    assert data.left_out[data.args.max_seq_length][0].tolist() == []
    assert len(data.eval_blocks) == len(data.packed[1])
    rows = data.eval_batches(Rank()).rows(0)
    assert {row.corpus for row in rows[: len(data.eval_blocks)]} == {-1}  # the last corpus


def test_held_out_masks_are_the_same_for_other_training_text_and_masks(make_data, tmp_path: Path, texts, corpus_file):
    path = write_jsonl(tmp_path / "eval.jsonl", texts[:10])
    held_out = {"eval_corpora": [CorpusArguments(name="other", path=str(path))]}
    more = [CorpusArguments(name=name, path=str(corpus_file)) for name in ("a", "b")]
    batches = [
        next(made.eval_batches(Rank()).iterate(0, 1, num_workers=0))[0]
        for made in (
            make_data(**held_out),
            make_data(**held_out, corpora=more),
            make_data(**held_out, masking="static"),
        )
    ]
    for others in zip(*batches, strict=True):
        for name in ("input_ids", "labels"):
            assert torch.equal(others[0][name], others[1][name])
            assert torch.equal(others[0][name], others[2][name])


def test_unigram_loss_is_that_of_the_counts(make_data):
    data = make_data()
    counts = np.ones(len(data.preprocessor.tokenizer))
    for block in set(range(len(data.packed[0]))) - set(data.eval_blocks.tolist()):
        np.add.at(counts, data.packed[0].block(block).input_ids, 1)
    counts[data.preprocessor.tokenizer.all_special_ids] = 0
    labels = np.concatenate([b["labels"].numpy().ravel() for b in next(data.eval_batches(Rank()).iterate(0, 1, 0))[0]])
    expected = -np.log((counts / counts.sum())[labels[labels != -100]]).mean()
    assert data.unigram_loss() == pytest.approx(expected)


def test_too_small_and_too_eager_are_named(make_data, tmp_path: Path):
    small = write_jsonl(tmp_path / "small.jsonl", ["It was."])
    with pytest.raises(
        UserError, match=r"'small' has \d+ tokens, too few for a single block of `max_seq_length` \(32\)"
    ):
        make_data(corpora=[CorpusArguments(name="small", path=str(small))])
    with pytest.raises(UserError, match=r"`eval_blocks` \(100000\) takes 100,000 blocks of corpus 'sample'"):
        make_data(eval_blocks=100_000)


def test_weights_of_the_config_are_kept(make_data, tmp_path: Path, texts):
    corpora = [
        CorpusArguments(name=name, path=str(write_jsonl(tmp_path / f"{name}.jsonl", texts)), weight=weight)
        for name, weight in (("a", 3), ("b", 1))
    ]
    corpora_of = make_data(corpora=corpora).stretches[0].order.locate(np.arange(10_000))[0]
    assert (corpora_of == 0).mean() == pytest.approx(0.75, abs=0.001)


def test_identity_notices_another_text_with_the_same_counts(make_data, tmp_path: Path, texts):
    path = write_jsonl(tmp_path / "mine.jsonl", texts)
    corpora = [CorpusArguments(name="mine", path=str(path))]
    *counts, digest = make_data(corpora=corpora).identity()["mine"]
    write_jsonl(path, [texts[1], texts[0], *texts[2:]])
    *reordered, other = make_data(corpora=corpora).identity()["mine"]
    assert reordered == counts
    assert other != digest
    write_jsonl(path, texts)
    assert make_data(corpora=corpora).identity()["mine"] == [*counts, digest]


def test_description_counts_documents_and_tokens(make_data, texts):
    line = make_data().describe()[0]
    assert f"{len(texts):,} documents" in line
    assert json.dumps(make_data().identity())


@pytest.mark.parametrize(
    ("masking", "passes", "is_warned"), [("static", 8, True), ("static", 12, False), ("dynamic", 8, False)]
)
def test_static_data_that_never_repeats_is_told(make_data, masking, passes, is_warned):
    blocks = len(make_data().packed[0]) - 10
    changes = {"train_batch_size": 1, "per_device_train_batch_size": 1, "max_steps": passes * blocks}
    line = make_data(masking=masking, warmup_steps=1, **changes).describe()[0]
    assert ("static, which repeats after 10 passes, and `max_steps` makes 8: " in line) == is_warned


def test_evaluation_masks_as_ever_whatever_the_training_masks(make_data):
    data, plain = make_data(mlm_probability=0.4, dataloader_num_workers=0), make_data(dataloader_num_workers=0)
    held_out, expected = (next(d.eval_batches(Rank()).iterate(0, 1, num_workers=0))[0] for d in (data, plain))
    assert [batch["labels"].tolist() for batch in held_out] == [batch["labels"].tolist() for batch in expected]
    [share] = data.train_updates(Rank(), Resume(), 1, never)
    assert share.counts["masked"] > 0.3 * share.counts.tokens
    assert data.args.masked_share == 0.4
