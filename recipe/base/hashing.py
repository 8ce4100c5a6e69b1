"""Random choices as a function of what they are for: a hash of integers in place of a generator with a state.

A process that needs choice number `n` of something computes it from `n`, in any order, and computes the same again
after a resume. The mixing function is splitmix64's (Steele, Lea and Flood, 2014).
"""

import hashlib
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

STEP = np.uint64(0x9E3779B97F4A7C15)
FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
PIECE_BYTES = 4_000_000  # of a file, read at once


class Purpose(IntEnum):
    """What a choice about the order of the data is for, as the first key of its hash. No value may ever change."""

    HELD_OUT = 0
    PASS = 1
    SHARDS = 2
    PLACE = 3
    ROTATION = 4
    DRAW = 5
    HELD_OUT_HEAD = 6
    PARTNER = 7
    SWAP = 8


def hash64(*keys: np.ndarray | int) -> np.ndarray:
    """Hash the keys, in their order, to uniform 64-bit integers.

    Args:
        keys: integers or integer arrays whose shapes broadcast; negative ones wrap.

    Returns:
        uint64 array of the broadcast shape.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = (state ^ np.asarray(key).astype(np.uint64)) + STEP
            state = (state ^ (state >> np.uint64(30))) * FACTORS[0]
            state = (state ^ (state >> np.uint64(27))) * FACTORS[1]
            state = state ^ (state >> np.uint64(31))
    return state


# The hash of what the blocks of a pass have in common, which is the same for many of them.
pass_key = lru_cache(hash64)


def uniform(hashed: np.ndarray) -> np.ndarray:
    """Turn hashes into float64 in [0, 1), from their upper 53 bits."""
    return (hashed >> np.uint64(11)) * 2.0**-53


def digest(*values: Any) -> str:
    """Return the SHA-256 of values as they are printed."""
    return hashlib.sha256(repr(values).encode()).hexdigest()


def file_checksum(path: Path, before_piece: Callable[[], None] = lambda: None) -> str:
    """Compute the SHA-256 of a file, without holding up other threads; `before_piece` may raise to end that early."""
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while True:
            before_piece()
            if not (piece := file.read(PIECE_BYTES)):
                return hashed.hexdigest()
            hashed.update(piece)
