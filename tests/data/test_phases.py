"""Random lists of phases: what each update holds, whoever makes it, and that no text is lost or doubled."""

import random
from collections import Counter
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.arguments.phases import PhaseArguments
from recipe.base.errors import UserError
from recipe.checks import check_writable
from recipe.data.batches import Rank, Resume, Row
from recipe.data.cached import CachedData
from recipe.data.modes import open_data
from recipe.data.preprocessor import Preprocessor
from recipe.data.streamed import StreamedData
from recipe.data.streaming import LaneBuffers
from testing.helpers import make_text, never, write_jsonl
from tests.data.test_streaming import read

LENGTHS, SEEDS = (16, 24, 32), range(6)


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch) -> list[CorpusArguments]:
    monkeypatch.setattr("recipe.data.corpora.SHARD_BYTES", 1)
    monkeypatch.setattr("recipe.data.streaming.REFILL_CHARACTERS", 2000)
    rng = random.Random(0)
    made = []
    for name, files in (("a", 3), ("b", 2)):
        (tmp_path / name).mkdir()
        for file in range(files):
            write_jsonl(tmp_path / name / f"{file}.jsonl", [make_text(rng, rng.randint(1, 12)) for _ in range(12)])
        made.append(CorpusArguments(name=name, path=str(tmp_path / name)))
    return made


@pytest.fixture
def make_data(corpora, tokenizer, tokenizer_dir: Path):
    def make(phases: list[PhaseArguments], max_steps: int, **changes: object) -> CachedData | StreamedData:
        settings = {
            "output_dir": "unused",
            "tokenizer_name": str(tokenizer_dir),
            "corpora": corpora,
            "phases": phases,
            "max_steps": max_steps,
            "warmup_steps": 1,
            "max_seq_length": 32,
            "eval_blocks": 10,
            "train_batch_size": 8,
            "per_device_train_batch_size": 3,
            "dataloader_num_workers": 0,
            "shuffle_buffer_size": 40,
            "num_lanes": 4,
        }
        args = PretrainArguments(**(settings | changes))
        return open_data(args, Preprocessor(args, tokenizer))

    return make


def draw_phases(seed: int, multiple: int = 4) -> tuple[list[PhaseArguments], int]:
    """Draw one to four phases, and the updates that they have together; `multiple` divides all batches."""
    rng = random.Random(seed)
    phases = []
    for _ in range(rng.randint(1, 4)):
        small = multiple * rng.randint(1, 2)
        ramp = [small, 3 * small] if rng.random() < 0.5 else [2 * small, small]
        phases.append(
            PhaseArguments(
                steps=rng.randint(4, 12),
                max_seq_length=rng.choice((None, *LENGTHS)),
                train_batch_size=rng.choice((None, small, ramp)),
                mlm_probability=rng.choice((None, 0.3, [0.4, 0.2])),
                weights=rng.choice((None, {"a": 1, "b": 3}, {"a": 1, "b": 0})),
            )
        )
    return phases, sum(phase.steps for phase in phases)


@pytest.mark.parametrize("seed", SEEDS)
def test_updates_are_the_same_for_any_processes_and_from_any_update_on(make_data, seed):
    phases, steps = draw_phases(seed)
    data = make_data(phases, steps)
    reference, _ = read(data, 1, 0, steps)
    timeline = data.args.timeline
    assert [len(rows) for rows, _ in reference] == [timeline.at(update).train_batch_size for update in range(steps)]
    assert [len(rows[0]) // 2 for rows, _ in reference] == [timeline.at(n).max_seq_length for n in range(steps)]
    for processes, workers, micro_batch in [(2, 0, 2), (4, 0, 1), (1, 2, 8)]:
        other = make_data(phases, steps, dataloader_num_workers=workers, per_device_train_batch_size=micro_batch)
        assert read(other, processes, 0, steps)[0] == reference
    for first in sorted({stage.first for stage in timeline.stages} | {steps // 2}):
        assert read(data, 2, first, steps)[0] == reference[first:]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stream_is_the_same_for_any_processes_and_resumes_at_every_boundary(make_data, seed, tmp_path: Path):
    phases, steps = draw_phases(seed)
    reference, end = read(make_data(phases, steps, streaming=True), 1, 0, steps)
    timeline = make_data(phases, steps).args.timeline
    saved, updates = None, []
    places = sorted({0, *(stage.first for stage in timeline.stages), steps // 2, steps})
    for number, (first, last) in enumerate(pairwise(places)):
        data = make_data(phases, steps, streaming=True, dataloader_num_workers=2 * (number == 1))
        part, saved = read(data, (1, 2)[number % 2], first, last, saved)
        torch.save(saved, tmp_path / "lanes.pt")
        saved = torch.load(tmp_path / "lanes.pt", weights_only=True)
        updates += part
    assert updates == reference
    assert {key: value["numbers"][0].tolist() for key, value in saved.items()} == {
        key: value["numbers"][0].tolist() for key, value in end.items()
    }


def test_a_stream_passes_over_updates_across_a_change_of_length(make_data):
    """As after a spike: the data of some updates after a checkpoint is left out."""
    phases = [PhaseArguments(steps=6, max_seq_length=16), PhaseArguments(steps=6)]
    reference, _ = read(make_data(phases, 12, streaming=True), 1, 0, 12)
    _, saved = read(make_data(phases, 12, streaming=True), 1, 0, 4)
    for first in (5, 6, 9):
        resume = Resume(first, saved, skipped_updates=first - 4)
        shares = list(make_data(phases, 12, streaming=True).train_updates(Rank(), resume, 12, never))
        assert [share.counts.array.tolist() for share in shares] == [counts for _, counts in reference[first:]]


def rows_by_length(data: CachedData, steps: int) -> list[list[Row]]:
    """Return the rows of updates in a row whose blocks have one length."""
    updates = [data.rows(update) for update in range(steps)]
    grouped = groupby(updates, key=lambda rows: rows[0].max_seq_length)
    return [[row for rows in group for row in rows] for _, group in grouped]


@pytest.mark.parametrize("seed", SEEDS)
def test_no_block_is_lost_or_doubled_in_a_pass_whatever_the_phases(make_data, seed):
    phases, _ = draw_phases(seed)
    phases = [PhaseArguments(**vars(phase) | {"steps": 20 * phase.steps}) for phase in phases]
    steps = sum(phase.steps for phase in phases)
    data = make_data(phases, steps, masking="dynamic")
    last_visit = dict.fromkeys(range(2), -1)
    for rows in rows_by_length(data, steps):
        length = rows[0].max_seq_length
        for corpus in range(2):
            own = [row for row in rows if row.corpus == corpus]
            everything = set(range(len(data.views[length][corpus]))) - set(data.left_out[length][corpus].tolist())
            visits = {visit: [r.block for r in own if r.visit == visit] for visit in sorted({r.visit for r in own})}
            assert list(visits) == list(range(last_visit[corpus] + 1, last_visit[corpus] + 1 + len(visits)))
            for number, blocks in enumerate(visits.values()):
                assert len(set(blocks)) == len(blocks)
                assert set(blocks) <= everything
                if number < len(visits) - 1:
                    assert set(blocks) == everything
            last_visit[corpus] = max(visits, default=last_visit[corpus])


def positions_of(view, number: int) -> set[int]:
    """Return the places of a block's tokens in its shard's text, apart for each shard."""
    shard, own = view.find(number)
    segments = view.shards[shard].segments_of(own).tolist()
    return {shard * 10**9 + place for start, size, _ in segments for place in range(start, start + size)}


@pytest.mark.parametrize(
    ("packing", "objective"),
    [("full_sentences", "masked_lm"), ("doc_sentences", "masked_lm"), ("segment_pair", "next_sentence")],
)
def test_no_length_trains_on_text_that_is_held_out_and_all_other_text_is_read(make_data, packing, objective):
    phases = [PhaseArguments(steps=1, max_seq_length=length) for length in LENGTHS]
    data = make_data(phases, 3, packing=packing, objective=objective)
    held = list(zip(data.eval_corpora.tolist(), data.eval_blocks.tolist(), strict=True))
    assert len(held) == 10
    for corpus in range(2):
        held_places = set().union(*(positions_of(data.packed[corpus], n) for c, n in held if c == corpus))
        for length in LENGTHS:
            view = data.views[length][corpus]
            touching = [n for n in range(len(view)) if positions_of(view, n) & held_places]
            assert data.left_out[length][corpus].tolist() == touching
            assert set().union(*(positions_of(view, n) for n in touching)) >= held_places
            if view.format.exchanges:
                trained = set(range(len(view))) - set(touching)
                assert {view.partner(n, key) for n in trained for key in range(9)} == trained


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("packing", ["full_sentences", "contiguous"])
def test_a_stream_loses_no_text_where_its_length_changes(make_data, seed, packing):
    """What was drawn, what is held back and what is not packed yet are together what was read, token by token."""
    phases, steps = draw_phases(seed)
    data = make_data(phases, steps, packing=packing, streaming=True, eval_blocks=1)
    made = data.train_updates(Rank(), Resume(), steps, never)
    drawn: Counter[int] = Counter()
    documents = 0
    for update in made:
        for batch in update.micro_batches:
            text = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
            drawn.update(text[text > 2].tolist())
        documents += update.counts.corpora[:, 2].sum()
        lanes = update.lanes
    read_again: Counter[int] = Counter()
    ends = 0
    for (lane, corpus), buffer in lanes.items():
        for _, block in buffer.blocks:
            drawn.update(block.input_ids[block.input_ids > 2].tolist())
            documents += block.documents
        drawn.update(buffer.state.remainder.input_ids.tolist())
        documents += len(buffer.state.remainder.document_ends)
        reader, state = data.readers[corpus], buffer.state
        for visit in range(state.visit + 1):
            parts = data.schedule.order.deal(corpus, visit, lane, reader.source.num_shards)
            for ordinal, (shard, number, of) in enumerate(parts):
                if (visit, ordinal) > (state.visit, state.ordinal):
                    continue
                last = state.record if (visit, ordinal) == (state.visit, state.ordinal) else 10**9
                for index, text in reader.source.read(shard, reader.held_out.get(shard, 0)):
                    if index % of == number and index < last:
                        [(ids, _)] = reader.encoder([text])
                        read_again.update(ids.tolist())
                        ends += 1
    assert drawn == read_again
    assert documents == ends


def test_blocks_are_unpacked_in_the_order_of_the_text(make_data):
    """Draws have shuffled a buffer: its blocks follow each other by their numbers, before what is not packed yet."""
    phases = [PhaseArguments(steps=6, max_seq_length=16), PhaseArguments(steps=2)]
    data = make_data(phases, 8, streaming=True)
    *_, last = data.train_updates(Rank(), Resume(), 6, never)
    lanes = LaneBuffers(data.readers, data.schedule, list(range(4)), last.lanes)
    expected = {}
    for key, buffer in last.lanes.items():
        blocks = [block for _, block in sorted(buffer.blocks, key=lambda numbered: numbered[0])]
        kept = [block.input_ids[block.input_ids > 2] for block in blocks]
        expected[key] = np.concatenate([*kept, buffer.state.remainder.input_ids]).tolist()
    numbers = [[number for number, _ in buffer.blocks] for buffer in last.lanes.values()]
    assert any(one != sorted(one) for one in numbers), "nothing is shuffled"
    lanes.unpack()
    assert {key: buffer.state.remainder.input_ids.tolist() for key, buffer in lanes.buffers.items()} == expected
    assert not any(buffer.blocks for buffer in lanes.buffers.values())


def test_a_unigram_model_is_of_all_corpora_whatever_the_first_phase_reads(make_data):
    phases = [PhaseArguments(steps=4, max_seq_length=16, weights={"a": 1, "b": 0}), PhaseArguments(steps=4)]
    for streaming in (False, True):
        expected = make_data([], 8, streaming=streaming).unigram_loss()
        assert make_data(phases, 8, streaming=streaming).unigram_loss() == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_corpora_have_the_weights_of_the_phase(make_data, streaming):
    phases = [PhaseArguments(steps=10, weights=weights) for weights in ({"a": 1, "b": 0}, {"a": 1, "b": 3})]
    made = make_data(phases, 20, streaming=streaming).train_updates(Rank(), Resume(), 20, never)
    blocks = np.array([share.counts.corpora[:, 0] for share in made])
    assert blocks[:10].sum(0).tolist() == [80, 0]
    assert blocks[10:].sum(0) == pytest.approx([20, 60], abs=1)


def test_a_stream_holds_back_of_a_corpus_what_its_largest_share_asks_for(make_data, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recipe.data.streamed.MAX_BUFFER_SHARE", 1)
    phases = [PhaseArguments(steps=2, weights={"a": 1 - b, "b": b}) for b in (0, 1)]
    assert make_data(phases, 4, streaming=True).schedule.buffer_sizes == [10, 10]


def test_the_masks_and_the_passes_follow_the_phases(make_data):
    phases = [PhaseArguments(steps=10, mlm_probability=[0.4, 0.2]), PhaseArguments(steps=10, max_seq_length=16)]
    data = make_data(phases, 20, train_batch_size=64)
    made = [share.counts for share in data.train_updates(Rank(), Resume(), 20, never)]
    shares = np.array([counts["masked"] / counts.tokens for counts in made])
    assert (np.diff(shares[:10]) < 0.02).all()
    assert shares[[0, 9, 10, 19]] == pytest.approx([0.37, 0.185, 0.13, 0.13], abs=0.03)
    passes = np.array([counts.streams[:, -1] for counts in made]) / 1e6
    assert (np.diff(passes, axis=0) > 0).all()
    base, short = (int(stretch.order.num_train[0]) for stretch in data.stretches)
    blocks = [sum(counts.corpora[0, 0] for counts in made[at : at + 10]) for at in (0, 10)]
    assert passes[-1, 0] == pytest.approx(blocks[0] / base + blocks[1] / short, rel=1e-4)


def test_the_passes_of_a_stream_go_on_evenly_where_its_length_changes(make_data):
    phases = [PhaseArguments(steps=12, max_seq_length=length) for length in (16, 32, 24)]
    data = make_data(phases, 36, streaming=True)
    made = data.train_updates(Rank(), Resume(), 36, never)
    passes = np.array([share.counts.streams[:, -1].mean() for share in made]) / 1e6 / data.args.num_lanes
    growth = np.diff(passes)
    assert 0.02 < growth.min() < growth.max() < 0.08


def test_phases_that_a_stream_cannot_have_are_refused(make_data):
    phases = [PhaseArguments(steps=2, max_seq_length=16), PhaseArguments(steps=2)]
    with pytest.raises(UserError, match="`packing` is doc_sentences; a stream of other `packing` cannot change"):
        make_data(phases, 4, packing="doc_sentences", streaming=True)
    phases = [PhaseArguments(steps=2, train_batch_size=6), PhaseArguments(steps=2)]
    problem = (
        r"`num_lanes` \(4\) does not divide `train_batch_size` \(6\) of phase 1; the nearest number that does is 3"
    )
    with pytest.raises(UserError, match=problem):
        make_data(phases, 4, streaming=True)


def test_views_of_every_phase_are_tried_to_be_written(make_data, monkeypatch: pytest.MonkeyPatch):
    data, tried = make_data([], 4), []
    monkeypatch.setattr("recipe.checks.check_output_dir", lambda folder, _: tried.append(folder))
    check_writable(data.args, data.preprocessor, data.stores)
    assert tried == []
    phases = [PhaseArguments(steps=2, max_seq_length=16), PhaseArguments(steps=2)]
    check_writable(replace(data.args, phases=phases), data.preprocessor, data.stores)
    assert tried == sorted(store.path for store in data.stores)


def test_held_out_blocks_that_touch_all_of_a_short_corpus_are_refused(make_data, tmp_path: Path, tokenizer):
    """Of 130 tokens, the last four are trained on, and a block of 22 tokens that holds them has others, too."""
    words = next(n for n in range(300) if len(tokenizer(" a" * n, add_special_tokens=False).input_ids) == 130)
    corpora = [CorpusArguments(name="one", path=str(write_jsonl(tmp_path / "one.jsonl", [" a" * words])))]
    phases = [PhaseArguments(steps=1, max_seq_length=24), PhaseArguments(steps=1)]
    settings = {"corpora": corpora, "max_seq_length": 128, "packing": "contiguous"}
    data = make_data(phases, 2, **settings, eval_blocks=0)
    assert [len(data.views[length][0]) for length in (24, 128)] == [6, 2]
    with pytest.raises(UserError, match="take text of all blocks of 24 tokens of corpus 'one'; lower it, or"):
        data.leave_out(data.views[24], [np.array([0])])
