"""Which block comes when: a function of the position in the run, the same for every world size.

1. `interleave` decides by quota which corpus each position belongs to, so that shares hold over any stretch.
2. The position's rank among those of its corpus gives the pass over the corpus and the place in that pass.
3. `permute` shuffles each pass anew without holding the permutation in memory.

A run's whole position in its data is therefore one integer.
"""

from collections.abc import Sequence

import numpy as np

from recipe.base.hashing import Purpose, hash64

PERIOD_POSITIONS = 2**16  # after which the pattern of corpora repeats, at the latest; its table is kept in memory
FEISTEL_ROUNDS = 6


def permute(index: np.ndarray, size: int, *key: np.ndarray | int) -> np.ndarray:
    """Apply a keyed permutation of `range(size)` to each index.

    It is a Feistel network over the next power of four, walked along its cycle until it lands inside (Black and
    Rogaway, 2002): on average fewer than four steps, and no memory. The keys are integers, or arrays that broadcast
    with `index`.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = np.atleast_1d(index).astype(np.uint64)
    round_key = np.broadcast_to(hash64(*key), result.shape)
    outside = np.ones(result.shape, bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (hash64(round_key[outside], number, right) & mask)
        result[outside] = (left << half) | right
        outside = result >= size
    return result.astype(np.int64)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split a whole number by weight, largest remainders first (Hamilton's method)."""
    exact = np.array(weights, np.float64) / np.sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    most_owed = np.argsort(shares - exact, kind="stable")
    shares[most_owed[: total - shares.sum()]] += 1
    return shares.tolist()


def quotas_by_weight(weights: Sequence[float]) -> list[int]:
    """Split a period of positions by weight, with a place for every corpus that has one, however small."""
    extras = apportion(PERIOD_POSITIONS - len(weights), weights)
    return [extra + (weight > 0) for extra, weight in zip(extras, weights, strict=True)]


def interleave(quotas: list[int]) -> np.ndarray:
    """Make an int64 sequence that holds corpus `c` `quotas[c]` times, each corpus evenly spread.

    Each begins at another phase (the golden ratio's multiples lie nowhere close together), or corpora of the same quota
    would all be due at the same places.
    """
    phases = (0.5 + np.arange(len(quotas)) * (5**0.5 - 1) / 2) % 1
    due = np.concatenate([(np.arange(quota) + phase) / quota for quota, phase in zip(quotas, phases, strict=True)])
    corpus = np.repeat(np.arange(len(quotas)), quotas)
    return corpus[np.argsort(due, kind="stable")]


def draw_held_out(num_blocks: Sequence[int], num_held_out: Sequence[int], seed: int) -> list[np.ndarray]:
    """Draw the blocks of each corpus that are kept for evaluation: their numbers, ascending, (held,) int64 each."""
    drawn = zip(num_blocks, num_held_out, strict=True)
    return [np.sort(permute(np.arange(n), size, Purpose.HELD_OUT, seed, c)) for c, (size, n) in enumerate(drawn)]


class BlockOrder:
    """The order of updates in a row whose blocks have one length: position -> (corpus, visit, block).

    Args:
        num_blocks: blocks of each corpus.
        left_out: for each corpus the blocks that are not trained on, ascending; fewer than it has.
        weights: relative shares, or None for shares by size, under which all corpora end their passes together (in
            runs of over 65,536 blocks a pass: nearly). A corpus of weight 0 has no blocks.
        seed: of the run.
        starts: (corpora,) how many blocks of each corpus were passed before the first position, 0 by default.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        left_out: Sequence[np.ndarray],
        weights: Sequence[float] | None,
        seed: int,
        starts: np.ndarray | None = None,
    ) -> None:
        self.left_out = left_out
        self.num_train = np.array(num_blocks, np.int64) - np.array([len(blocks) for blocks in left_out], np.int64)
        self.seed = seed
        self.starts = np.zeros_like(self.num_train) if starts is None else starts
        sizes = self.num_train.tolist()
        is_one_pass = weights is None and sum(sizes) <= PERIOD_POSITIONS
        quotas = sizes if is_one_pass else quotas_by_weight(sizes if weights is None else weights)
        self.quotas = np.array(quotas, np.int64)
        self.pattern = interleave(quotas)
        # How many earlier places of the pattern belong to the same corpus.
        self.rank = np.empty_like(self.pattern)
        self.rank[np.argsort(self.pattern, kind="stable")] = np.concatenate([np.arange(quota) for quota in quotas])

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find the blocks at positions, (n,) integers, 0 or more, without end.

        Returns:
            (n,) int64 each: corpus, visit (which pass over that corpus), block (its number in that corpus).
        """
        cycle, place = np.divmod(np.asarray(positions, np.int64), len(self.pattern))
        corpora = self.pattern[place]
        passed = self.starts[corpora] + cycle * self.quotas[corpora] + self.rank[place]
        visits, within = np.divmod(passed, self.num_train[corpora])
        blocks = np.empty_like(within)
        for corpus in np.unique(corpora):
            own = corpora == corpus
            size = int(self.num_train[corpus])
            shuffled = permute(within[own], size, Purpose.PASS, self.seed, corpus, visits[own])
            blocks[own] = pass_over(self.left_out[corpus], shuffled)
        return corpora, visits, blocks

    def passed(self, num_positions: int) -> np.ndarray:
        """Return (corpora,) int64: how many blocks of each corpus have been passed after so many positions."""
        cycles, rest = divmod(num_positions, len(self.pattern))
        return self.starts + cycles * self.quotas + np.bincount(self.pattern[:rest], minlength=len(self.quotas))


def pass_over(left_out: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return the numbers that the given ones have, counted without those left out, when these are counted too."""
    return index + np.searchsorted(left_out - np.arange(len(left_out)), index, side="right")


class LaneOrder:
    """The order of a streamed run, whose blocks come from lanes in turn: a round is one block of each.

    Lanes are the parts that the corpora are dealt to.
    """

    def __init__(self, num_lanes: int, seed: int) -> None:
        self.num_lanes = num_lanes
        self.seed = seed

    def corpora(self, number: int, pattern: np.ndarray) -> np.ndarray:
        """Return (lanes,) int64: which corpus each lane's block of a round is from, given `interleave` of the quotas.

        The quota pattern runs on from round to round, each time dealt out from another lane on: a fixed one would leave
        a lane with always the same corpus.
        """
        first = int(hash64(Purpose.ROTATION, self.seed, number) % np.uint64(self.num_lanes))
        place = np.roll(np.arange(self.num_lanes), first)
        return pattern[(number * self.num_lanes + place) % len(pattern)]

    def deal(self, corpus: int, visit: int, lane: int, num_shards: int) -> list[tuple[int, int, int]]:
        """Say what a lane reads in one pass over a corpus.

        Returns:
            (shard, number, of): the `number`-th of every `of` records of a shard, 0 of 1 being all. Each pass deals
            anew; over all lanes it covers every record once.
        """
        key = (self.seed, corpus, visit)
        shards = permute(np.arange(num_shards), num_shards, Purpose.SHARDS, *key)
        if num_shards >= self.num_lanes:
            return [(int(shard), 0, 1) for shard in shards[lane :: self.num_lanes]]
        place = int(permute(np.array([lane]), self.num_lanes, Purpose.PLACE, *key)[0])
        number, at = divmod(place, num_shards)
        return [(int(shards[at]), number, len(range(at, self.num_lanes, num_shards)))]
