import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.data.sampling import (
    BlockOrder,
    LaneOrder,
    apportion,
    draw_held_out,
    interleave,
    pass_over,
    permute,
    quotas_by_weight,
)

NONE = np.zeros(0, np.int64)


@given(st.integers(1, 3000), st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_mixes_and_depends_on_its_key():
    first, second = permute(np.arange(100_000), 100_000, 1), permute(np.arange(100_000), 100_000, 2)
    assert abs(np.corrcoef(np.arange(100_000), first)[0, 1]) < 0.02
    assert (first == second).mean() < 0.001
    assert (np.diff(first) == 1).mean() < 0.001


def test_permute_takes_positions_one_by_one():
    whole = permute(np.arange(500), 500, 9)
    assert [int(permute(np.array([i]), 500, 9)[0]) for i in range(500)] == whole.tolist()


def test_permute_reaches_sizes_beyond_memory():
    size = 5 * 10**12
    found = permute(np.array([0, 1, size - 1]), size, 3)
    assert ((found >= 0) & (found < size)).all()


@given(st.integers(0, 10_000), st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_apportion_gives_everything_within_one(total, weights):
    shares = apportion(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1 + 1e-6


def test_interleave_spreads_evenly():
    pattern = interleave([2, 4])
    assert sorted(pattern.tolist()) == [0, 0, 1, 1, 1, 1]
    assert [set(pattern[:3].tolist()), set(pattern[3:].tolist())] == [{0, 1}, {0, 1}]


@pytest.mark.parametrize("weights", [[5, 11, 76, 38, 31], [1, 1, 1], [0.001, 1, 3], [7.77, 2.1, 0.13, 90]])
def test_given_weights_hold_over_any_10000_blocks(weights):
    order = BlockOrder([70_000] * len(weights), [NONE] * len(weights), weights, seed=1)
    corpora, _, _ = order.locate(np.arange(1_000_000, 1_200_000))
    for corpus, weight in enumerate(weights):
        before = np.cumsum([0, *(corpora == corpus)])
        inside = (before[10_000:] - before[:-10_000]) / 10_000
        share = weight / sum(weights)
        assert inside.min() > share - 0.001
        assert inside.max() < share + 0.001


def test_default_weights_visit_every_block_once_a_pass():
    order = BlockOrder([300, 1000, 77], draw_held_out([300, 1000, 77], [10, 20, 7], 5), None, seed=5)
    for epoch in range(3):
        positions = np.arange(epoch * 1340, (epoch + 1) * 1340)
        corpora, visits, blocks = order.locate(positions)
        assert (visits == epoch).all()
        assert len(set(zip(corpora.tolist(), blocks.tolist(), strict=True))) == 1340


def test_held_out_blocks_are_never_trained_on():
    held = draw_held_out([300, 1000], [30, 100], 5)
    order = BlockOrder([300, 1000], held, [1, 1], seed=5)
    held_out = {(corpus, block) for corpus, blocks in enumerate(held) for block in blocks.tolist()}
    assert len(held_out) == 130
    where = order.locate(np.arange(10_000))
    assert not held_out & set(zip(where[0].tolist(), where[2].tolist(), strict=True))


def test_passes_differ_and_seeds_differ():
    order, other = (BlockOrder([500], [NONE], None, seed) for seed in (1, 2))
    blocks = order.locate(np.arange(1000))[2]
    assert (blocks[:500] != blocks[500:]).any()
    assert (blocks[:500] != other.locate(np.arange(500))[2]).any()


def test_small_corpus_keeps_a_place_beside_a_huge_one():
    order = BlockOrder([10, 50_000_000], [NONE, NONE], None, seed=1)
    corpora, _, _ = order.locate(np.arange(2**16))
    assert (corpora == 0).sum() >= 1


def test_order_of_a_seed_never_changes():
    """Every checkpoint depends on these values: a run that is resumed must go on in the same order."""
    held = draw_held_out([30, 100], [3, 10], 5)
    order = BlockOrder([30, 100], held, [1, 3], seed=5)
    assert [array.tolist() for array in order.locate(np.array([0, 1, 500]))] == [[1, 1, 1], [0, 0, 4], [66, 52, 39]]
    assert held[0].tolist() == [3, 4, 29]
    lanes = LaneOrder(4, seed=1)
    assert lanes.corpora(7, interleave(quotas_by_weight([3.0, 1.0]))).tolist() == [0, 1, 0, 0]
    assert lanes.deal(1, 2, 3, num_shards=10) == [(6, 0, 1), (4, 0, 1)]
    assert lanes.deal(1, 2, 3, num_shards=2) == [(1, 1, 2)]


def test_blocks_that_are_left_out_are_passed_over():
    left_out = np.array([0, 2, 3, 7])
    assert pass_over(left_out, np.arange(6)).tolist() == [1, 4, 5, 6, 8, 9]


def test_an_order_goes_on_where_another_has_stopped():
    """The weights change after 100 positions: each corpus goes on with its own next block, in its own pass."""
    sizes, none = [30, 50], [NONE, NONE]
    first = BlockOrder(sizes, none, [1, 3], seed=5)
    second = BlockOrder(sizes, none, [3, 1], 5, first.passed(100))
    found = [order.locate(np.arange(n)) for order, n in ((first, 100), (second, 300))]
    corpora, visits, blocks = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    for corpus, size in enumerate(sizes):
        own = corpora == corpus
        count = int(own.sum())
        assert visits[own].tolist() == (np.arange(count) // size).tolist()
        for visit in range(count // size):
            assert sorted(blocks[own & (visits == visit)].tolist()) == list(range(size))
    assert second.passed(300).tolist() == np.bincount(corpora).tolist()


def test_a_corpus_of_weight_0_has_no_place():
    corpora, _, _ = BlockOrder([30, 50], [NONE, NONE], [0, 3], seed=5).locate(np.arange(100))
    assert corpora.tolist() == [1] * 100
