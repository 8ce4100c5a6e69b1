import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.base.errors import UserError
from recipe.data.batches import Counts, Rank, Resume
from recipe.data.corpora import LocalSource, SourceError
from recipe.data.modes import open_data
from recipe.data.preprocessor import Preprocessor
from recipe.data.sampling import LaneOrder, interleave, quotas_by_weight
from recipe.data.streamed import StreamedData
from recipe.data.streaming import LaneReader, LaneReaderState, from_tensors, to_arrays, to_tensors
from testing.helpers import make_text, never, write_jsonl
from tests.data.test_batches import text_of


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch) -> list[CorpusArguments]:
    """One corpus with more shards than lanes, one with fewer."""
    monkeypatch.setattr("recipe.data.corpora.SHARD_BYTES", 1)
    monkeypatch.setattr("recipe.data.streaming.REFILL_CHARACTERS", 2000)
    rng = random.Random(0)
    made = []
    for name, shards in (("many", 10), ("few", 2)):
        (tmp_path / name).mkdir()
        for shard in range(shards):
            texts = [f"{name} {shard} {n}. " + make_text(rng, rng.randint(1, 12)) for n in range(20)]
            write_jsonl(tmp_path / name / f"{shard}.jsonl", texts)
        made.append(CorpusArguments(name=name, path=str(tmp_path / name)))
    return made


@pytest.fixture
def make_data(corpora, tokenizer, tokenizer_dir: Path):
    def make(**changes: object) -> StreamedData:
        settings = {
            "output_dir": "unused",
            "tokenizer_name": str(tokenizer_dir),
            "corpora": corpora,
            "streaming": True,
            "num_lanes": 4,
            "shuffle_buffer_size": 40,
            "max_seq_length": 32,
            "eval_blocks": 10,
            "train_batch_size": 8,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 4,
            "dataloader_num_workers": 0,
        }
        args = PretrainArguments(**(settings | changes))
        return open_data(args, Preprocessor(args, tokenizer))

    return make


def read(data: StreamedData, num_processes: int, first: int, last: int, saved: dict | None = None):
    """Return the rows of all processes for each update, in an order that processes do not change, and its counts; and
    the lanes of all processes at the end, as a checkpoint has them."""
    processes = [
        data.train_updates(Rank(process, num_processes), Resume(first, saved or {}), last, never)
        for process in range(num_processes)
    ]
    updates = []
    for _ in range(first, last):
        shares = [next(process) for process in processes]
        rows = [torch.cat([b["input_ids"], b["labels"]], 1) for share in shares for b in share.micro_batches]
        updates.append((sorted(torch.cat(rows).tolist()), sum(share.counts.array for share in shares).tolist()))
    return updates, {key: value for share in shares for key, value in to_tensors(to_arrays(share.lanes)).items()}


@pytest.mark.parametrize("packing", ["full_sentences", "contiguous", "doc_sentences", "segment_pair", "sentence_order"])
def test_update_is_the_same_for_any_processes_workers_and_micro_batch(make_data, packing):
    reference, _ = read(make_data(packing=packing), 1, 0, 60)
    for processes, workers, micro_batch in [(2, 0, 2), (4, 0, 1), (1, 2, 8), (2, 2, 4)]:
        data = make_data(packing=packing, dataloader_num_workers=workers, per_device_train_batch_size=micro_batch)
        assert read(data, processes, 0, 60)[0] == reference


@pytest.mark.parametrize("packing", ["full_sentences", "doc_sentences", "segment_pair", "sentence_order"])
def test_checkpoint_goes_on_with_any_number_of_processes(make_data, packing, tmp_path: Path):
    reference, end = read(make_data(packing=packing), 1, 0, 90)
    updates, saved = [], None
    for processes, first, last in [(2, 0, 7), (1, 7, 31), (4, 31, 32), (2, 32, 90)]:
        part, saved = read(make_data(packing=packing), processes, first, last, saved)
        torch.save(saved, tmp_path / "lanes.pt")
        saved = torch.load(tmp_path / "lanes.pt", weights_only=True)
        updates += part
    assert updates == reference
    assert {key: value["numbers"][0].tolist() for key, value in saved.items()} == {
        key: value["numbers"][0].tolist() for key, value in end.items()
    }


def documents_read(data: StreamedData, lane: int, corpus: int, visits: int) -> list[list[str]]:
    """Return what a lane reads of a corpus in each of some passes: the beginnings of its documents."""
    reader = data.readers[corpus]
    found = []
    for visit in range(visits):
        parts = data.schedule.order.deal(corpus, visit, lane, reader.source.num_shards)
        found.append([])
        for shard, number, of in parts:
            first = reader.held_out.get(shard, 0)
            texts = [text for index, text in reader.source.read(shard, first) if index % of == number]
            found[-1] += [text.split(".")[0] for text in texts]
    return found


def test_each_pass_deals_every_document_to_one_lane(make_data):
    data = make_data()
    for corpus, shards in enumerate((10, 2)):
        passes = [documents_read(data, lane, corpus, 3) for lane in range(4)]
        for visit in range(3):
            dealt = Counter(document for lane in passes for document in lane[visit])
            assert set(dealt.values()) == {1}
            assert len(dealt) == shards * 20 - sum(data.readers[corpus].held_out.values())
        assert passes[0][0] != passes[0][1]


def test_lane_reader_packs_the_documents_that_its_lane_is_dealt(make_data, tokenizer):
    """Unpacked, the blocks of a lane in the order that they were made in are its documents' own ids."""
    data = make_data()
    for lane, corpus in [(0, 0), (3, 0), (1, 1), (2, 1)]:
        reader = data.readers[corpus]
        lane_reader = LaneReader(reader, data.schedule.order, corpus, lane, LaneReaderState(reader.nothing))
        ids = []
        while lane_reader.state.visit < 3:
            ids += [int(i) for block in lane_reader.refill()[0].split() for i in block.input_ids if i not in (0, 2)]
        expected = []
        for visit, documents in enumerate(documents_read(data, lane, corpus, 3)):
            parts = data.schedule.order.deal(corpus, visit, lane, reader.source.num_shards)
            for shard, number, of in parts:
                first = reader.held_out.get(shard, 0)
                for index, text in reader.source.read(shard, first):
                    if index % of == number:
                        expected += tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
            assert documents
        assert len(ids) > 0.9 * len(expected)
        length = min(len(ids), len(expected))
        assert ids[:length] == expected[:length]


def test_shares_hold_over_any_stretch_and_in_every_lane():
    order, pattern = LaneOrder(8, seed=1), interleave(quotas_by_weight([3.0, 1.0, 0.02]))
    rounds = np.concatenate([order.corpora(number, pattern)[None] for number in range(6000)])
    flat = rounds.ravel()
    shares = np.array([3.0, 1.0, 0.02]) / 4.02
    for start in (0, 1, 77, 12_345, 37_999):
        found = np.bincount(flat[start : start + 10_000], minlength=3) / 10_000
        assert np.abs(found - shares).max() < 0.001
    # Equal shares are not all due at the same places.
    many = np.array([90.0] + [1.0] * 10) / 100
    order, pattern = LaneOrder(64, seed=2), interleave(quotas_by_weight(many.tolist()))
    flat = np.concatenate([order.corpora(number, pattern) for number in range(800)])
    for start in (0, 33, 20_001):
        assert np.abs(np.bincount(flat[start : start + 10_000], minlength=11) / 10_000 - many).max() < 0.001
    by_lane = np.stack([np.bincount(lane, minlength=3) for lane in rounds.T]) / len(rounds)
    assert np.abs(by_lane - shares).max() < 0.03


def test_given_weights_are_kept(make_data, corpora):
    weighted = [replace(corpus, weight=weight) for corpus, weight in zip(corpora, (1, 3), strict=True)]
    updates, _ = read(make_data(corpora=weighted), 1, 0, 300)
    blocks = np.sum([Counts(2, np.array(counts)).corpora[:, 0] for _, counts in updates], axis=0)
    assert blocks[1] / blocks.sum() == pytest.approx(0.75, abs=0.002)


def test_held_out_documents_are_never_trained_on(make_data):
    data = make_data()
    assert len(data.eval_blocks) == 10
    beginnings = set()
    for corpus in range(2):
        for shard, count in data.readers[corpus].held_out.items():
            for index, text in data.readers[corpus].source.read(shard):
                if index < count:
                    beginnings.add(text.split(".")[0])
    assert beginnings
    dealt = {d for lane in range(4) for c in range(2) for p in documents_read(data, lane, c, 2) for d in p}
    assert not dealt & beginnings


def test_eval_corpora_are_not_read_for_training(make_data, tmp_path: Path):
    path = write_jsonl(tmp_path / "eval.jsonl", [make_text(random.Random(3), 30) for _ in range(10)])
    data = make_data(eval_corpora=[CorpusArguments(name="other", path=str(path))])
    assert set(data.eval_corpora.tolist()) == {-1}  # counted from the end, whatever there is to train on
    assert len(data.eval_blocks) == 10
    assert all(not reader.held_out for reader in data.readers[:2])
    assert next(data.train_updates(Rank(), Resume(), 1, never)).counts.corpora.shape == (2, 3)


def test_unigram_loss_is_the_same_every_time(make_data):
    assert make_data().unigram_loss() == make_data().unigram_loss() > 1


def test_description_says_what_sharing_costs(make_data):
    lines = make_data().describe()
    assert "many: " in lines[0]
    assert "10 shards" in lines[0]
    assert "2 shards for 4 lanes: each is read by 2 of them" in lines[1]
    assert "resume" in lines[2]


def test_buffers_hold_a_share_of_a_pass(make_data, corpora):
    """Else blocks come again before others have come once."""
    for size in (100_000, 40):
        data = make_data(shuffle_buffer_size=size, corpora=corpora[:1], eval_blocks=0)
        seen, drawn = Counter(), 0
        for share in data.train_updates(Rank(), Resume(), 10_000, never):
            seen.update(row.tobytes() for batch in share.micro_batches for row in text_of(batch).numpy())
            drawn += 8
            if np.mean([buffer.passes for buffer in share.lanes.values()]) >= 1:
                break
        held_back = 4 * data.schedule.buffer_sizes[0]
        assert held_back == pytest.approx(min(size, drawn / 8), rel=0.3)
        assert (f"{held_back:,} blocks held back for shuffling (not 100,000: at most" in data.describe()[-1]) == (
            size > 40
        )
        assert len(seen) > 0.8 * drawn


@pytest.mark.parametrize("packing", ["segment_pair", "sentence_order"])
def test_share_of_random_or_swapped_parts_is_told(make_data, packing):
    data = make_data(packing=packing, max_seq_length=64)
    kind = "are swapped" if packing == "sentence_order" else "have parts of two documents"
    share = next(data.train_updates(Rank(), Resume(), 1, never))
    for line, seen in zip(
        data.describe(), data.corpora_record([[1, 1, 1]] * 2, share.counts.streams).values(), strict=False
    ):
        assert f"{seen['negative_pairs']:.0%} of the pairs {kind}" in line
        assert 0.25 < seen["negative_pairs"] < 0.75
    assert "negative_pairs" not in make_data().corpora_record([[1, 1, 1]] * 2, share.counts.streams)["many"]


def test_passes_and_left_out_documents_are_counted(make_data, corpora):
    for file in Path(corpora[0].path).iterdir():
        file.write_text(file.read_text() + '{"text": ""}\nnot json\n')
    data = make_data(max_unreadable_documents=3)
    share = list(data.train_updates(Rank(), Resume(), 300, never))[-1]
    seen = data.corpora_record(share.counts.corpora.tolist(), share.counts.streams)
    passes = seen["many"]["passes"]
    assert passes > 2
    assert seen["many"]["unreadable"] == pytest.approx(10 * passes, rel=0.2)
    assert seen["many"]["empty"] == seen["many"]["unreadable"]
    assert seen["few"]["unreadable"] == 0
    with pytest.raises(UserError, match=r"corpus 'many' has 2 unreadable documents.*line 22 is not a JSON object"):
        list(make_data(max_unreadable_documents=1).train_updates(Rank(), Resume(), 300, never))


def test_corpus_too_small_for_its_lanes_is_named(make_data, corpora, tmp_path: Path):
    path = write_jsonl(tmp_path / "tiny.jsonl", ["One document.", "And one more."])
    tiny = CorpusArguments(name="tiny", path=str(path))
    data = make_data(corpora=[*corpora, tiny], eval_corpora=[corpora[0]], num_lanes=8, train_batch_size=8)
    # Two documents and eight lanes: each is dealt one now and then.
    list(data.train_updates(Rank(), Resume(), 30, never))
    with pytest.raises(UserError, match=r"`eval_blocks` \(10\) takes all of corpus 'tiny'"):
        make_data(corpora=[replace(tiny, weight=1.0)])
    (tmp_path / "hollow").mkdir()
    hollow = write_jsonl(tmp_path / "hollow" / "a.jsonl", ["text"] + [" "] * 30)
    data = make_data(corpora=[replace(tiny, path=str(hollow))], eval_corpora=[corpora[0]])
    data.readers[0].held_out[0] = 1
    with pytest.raises(UserError, match=r"'tiny': lane \d found no document in 20 passes; .* 4 `num_lanes`"):
        list(data.train_updates(Rank(), Resume(), 10, never))


class Dies(LocalSource):
    def records(self, shard, first, part):
        for index, text in super().records(shard, first, part):
            if index > 12:
                raise ConnectionError("gone")
            yield index, text


@pytest.mark.parametrize("workers", [0, 2])
def test_source_that_is_gone_ends_the_updates_with_its_name(make_data, workers, monkeypatch):
    data = make_data(dataloader_num_workers=workers)
    source = data.readers[0].source
    broken = Dies(source.corpus, [Path(file) for shard in source.shards for file in shard])
    data.readers[0] = data.readers[0]._replace(source=broken)
    shares = []
    with pytest.raises(SourceError, match="corpus 'many'"):
        shares.extend(data.train_updates(Rank(), Resume(), 500, never))
    # What came before is whole, and can be gone on from.
    assert from_tensors(to_tensors(to_arrays(shares[-1].lanes)), [0, 1, 2, 3]).keys() == shares[-1].lanes.keys()


def test_passes_are_of_what_was_drawn(make_data, tmp_path: Path):
    rng = random.Random(5)
    (tmp_path / "even").mkdir()
    for shard in range(4):
        write_jsonl(tmp_path / "even" / f"{shard}.jsonl", [make_text(rng, 8) for _ in range(50)])
    even = CorpusArguments(name="even", path=str(tmp_path / "even"))
    data = make_data(corpora=[even], eval_blocks=0)
    documents = 0
    for update, share in enumerate(data.train_updates(Rank(), Resume(), 400, never)):
        documents += int(share.counts.corpora[0, 2])
        if update % 50 == 49:
            seen = data.corpora_record([[1, 1, 1]], share.counts.streams)["even"]
            assert seen["passes"] == pytest.approx(documents / 200, abs=0.12)
    assert documents > 400


def test_identity_notices_another_text_of_the_same_size_and_stamps_tell_a_copy(make_data, corpora):
    before = make_data()
    identity = before.identity()
    file = Path(corpora[0].path) / "3.jsonl"
    text = file.read_bytes()
    file.write_bytes(text.replace(b" the ", b" teh "))
    os.utime(file, ns=(0, 0))
    changed = make_data()
    assert changed.identity()["many"] != identity["many"]
    file.write_bytes(text)
    copied = make_data()
    assert copied.identity() == identity
    assert copied.stamps()["many"] != before.stamps()["many"]
    assert copied.stamps()["few"] == before.stamps()["few"]
    file.rename(file.with_name("a.jsonl"))
    assert make_data().identity()["many"] != identity["many"]


def test_identity_notices_other_sizes(make_data, corpora):
    before = make_data(eval_corpora=[corpora[1]]).identity()
    assert make_data(eval_corpora=[corpora[1]]).identity() == before
    with (Path(corpora[0].path) / "3.jsonl").open("a") as file:
        file.write('{"text": "One more."}\n')
    changed = make_data(eval_corpora=[corpora[1]]).identity()
    assert changed["many"] != before["many"]
    assert changed["few"] == before["few"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"num_lanes": 3},
            r"`num_lanes` \(3\) does not divide `train_batch_size` \(8\); the nearest number that does is 2",
        ),
        ({"deduplicate": True}, "`deduplicate` needs every document's checksum"),
        ({"prepare_only": True}, "`prepare_only` makes token stores"),
    ],
)
def test_what_streaming_cannot_do_is_refused(make_data, changes, expected):
    with pytest.raises(UserError, match=expected):
        make_data(**changes)


def test_processes_and_workers_must_divide_the_lanes(make_data):
    args = make_data(dataloader_num_workers=2).args
    args.check_lanes(2)
    with pytest.raises(UserError, match=r"`num_lanes` \(4\) is not a multiple of 3 processes x 2 .* = 6"):
        args.check_lanes(3)
