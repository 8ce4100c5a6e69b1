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
    """Split a period of positions by weight, with a place for every corpus, whatever its weight."""
    return [1 + extra for extra in apportion(PERIOD_POSITIONS - len(weights), weights)]


def interleave(quotas: list[int]) -> np.ndarray:
    """Make an int64 sequence that holds corpus `c` `quotas[c]` times, each corpus evenly spread.

    Each begins at another phase (the golden ratio's multiples lie nowhere close together), or corpora of the same quota
    would all be due at the same places.
    """
    phases = (0.5 + np.arange(len(quotas)) * (5**0.5 - 1) / 2) % 1
    due = np.concatenate([(np.arange(quota) + phase) / quota for quota, phase in zip(quotas, phases, strict=True)])
    corpus = np.repeat(np.arange(len(quotas)), quotas)
    return corpus[np.argsort(due, kind="stable")]


class BlockOrder:
    """The order of a run: position -> (corpus, visit, block), and the held-out blocks.

    Args:
        num_blocks: blocks of each corpus.
        num_held_out: blocks of each corpus that are kept for evaluation; fewer than it has.
        weights: relative shares, or None for shares by size, under which all corpora end their passes together (in
            runs of over 65,536 blocks a pass: nearly).
    """

    def __init__(
        self, num_blocks: list[int], num_held_out: list[int], weights: Sequence[float] | None, seed: int
    ) -> None:
        self.num_blocks = np.array(num_blocks, np.int64)
        self.num_held_out = np.array(num_held_out, np.int64)
        self.num_train = self.num_blocks - self.num_held_out
        self.seed = seed
        sizes = self.num_train.tolist()
        is_one_pass = weights is None and sum(sizes) <= PERIOD_POSITIONS
        quotas = sizes if is_one_pass else quotas_by_weight(sizes if weights is None else weights)
        self.quotas = np.array(quotas, np.int64)
        self.pattern = interleave(quotas)
        # How many earlier places of the pattern belong to the same corpus.
        self.rank = np.empty_like(self.pattern)
        self.rank[np.argsort(self.pattern, kind="stable")] = np.concatenate([np.arange(quota) for quota in quotas])

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find the blocks at positions of the run, (n,) integers, 0 or more, without end.

        Returns:
            (n,) int64 each: corpus, visit (which pass over that corpus), block (its number in that corpus).
        """
        cycle, place = np.divmod(np.asarray(positions, np.int64), len(self.pattern))
        corpora = self.pattern[place]
        visits, within = np.divmod(cycle * self.quotas[corpora] + self.rank[place], self.num_train[corpora])
        blocks = np.empty_like(within)
        for corpus in np.unique(corpora):
            own = corpora == corpus
            size = int(self.num_train[corpus])
            shuffled = permute(within[own], size, Purpose.PASS, self.seed, corpus, visits[own])
            blocks[own] = self._split(corpus, self.num_held_out[corpus] + shuffled)
        return corpora, visits, blocks

    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the (corpus, block) of every held-out block, (n,) int64 each."""
        corpora = np.repeat(np.arange(len(self.num_held_out)), self.num_held_out)
        blocks = [self._split(c, np.arange(held)) for c, held in enumerate(self.num_held_out)]
        return corpora, np.concatenate(blocks)

    def _split(self, corpus: int, index: np.ndarray) -> np.ndarray:
        """Shuffle a corpus's blocks once for the run: the first ones are held out, the others trained on."""
        return permute(index, int(self.num_blocks[corpus]), Purpose.HELD_OUT, self.seed, corpus)


class LaneOrder:
    """The order of a streamed run, whose blocks come from lanes in turn: a round is one block of each.

    Lanes are the parts that the corpora are dealt to; the shares of the corpora are relative.
    """

    def __init__(self, num_lanes: int, shares: Sequence[float], seed: int) -> None:
        self.num_lanes = num_lanes
        self.seed = seed
        self.pattern = interleave(quotas_by_weight(shares))

    def corpora(self, number: int) -> np.ndarray:
        """Return (lanes,) int64: which corpus each lane's block of a round is from.

        The quota pattern runs on from round to round, each time dealt out from another lane on: a fixed one would leave
        a lane with always the same corpus.
        """
        first = int(hash64(Purpose.ROTATION, self.seed, number) % np.uint64(self.num_lanes))
        place = np.roll(np.arange(self.num_lanes), first)
        return self.pattern[(number * self.num_lanes + place) % len(self.pattern)]

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
