"""Batches without padding: the tokens of all rows one behind the other, as sequences of various lengths.

Numbers of tokens, slots and sequences are rounded up to a few sizes, each of which is compiled once. What is missing is
filled by sequences of padding: under one percent of the tokens of a large micro-batch.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

Batch = dict[str, torch.Tensor]

SIZES = 64  # a compiled micro-batch has one of so many sizes: the share of padding in it is half of one in the mean
ALIGNMENT = 8  # the matrix products of a GPU want sizes that this divides


@dataclass(frozen=True)
class Unpadding:
    """How rows become sequences.

    Attributes:
        kernel: that attends within sequences, see `attention.py`.
        max_length: positions of a row, at the most.
        masked_share: of them, at the most, are masked.
        reads_first: whether the first position of a row is read beside the masked ones.
    """

    kernel: str
    max_length: int
    masked_share: float
    reads_first: bool = False

    def __call__(self, batch: Batch) -> Batch:
        """Take the padding out of a collated batch, on the CPU.

        Returns:
            `input_ids`, `position_ids` and `token_type_ids`, if it has any: (tokens,) int64.
            `slots`: (slots,) int64, the positions among the tokens whose last hidden state is read.
            `labels`: (slots,) int64, of these; -100 where nothing is predicted.
            `query_bounds`, `key_bounds`: (sequences + 1,) int32, see `Sequences`, of the slots and of all tokens.
            `pair_label`: (rows,), and `first_slots`: (rows,) int64, which slot is the first position of a row.
        """
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        shape = arrays["input_ids"].shape
        numbers = arrays.pop("document_ids", arrays.pop("attention_mask", np.ones(shape, np.int64)))
        taken = np.flatnonzero(numbers)
        rows, columns = np.divmod(taken, shape[1])
        starts = np.flatnonzero(np.diff(rows, prepend=-1) | np.diff(numbers.ravel()[taken], prepend=-1))
        labels = arrays.pop("labels").ravel()[taken]
        is_read = labels != -100
        if self.reads_first:
            is_read |= columns == 0
        slots = np.flatnonzero(is_read)
        bounds = np.append(starts, len(taken))
        made = {name: values.ravel()[taken] for name, values in arrays.items() if values.shape == shape}
        made |= {"slots": slots, "labels": labels[slots]}
        made |= {"key_bounds": bounds, "query_bounds": np.searchsorted(slots, bounds)}
        if self.reads_first:
            made["pair_label"] = arrays["pair_label"]
            made["first_slots"] = np.searchsorted(slots, np.flatnonzero(columns == 0))
        self.fill_up(made, *shape)
        made |= {name: made[name].astype(np.int32) for name in ("key_bounds", "query_bounds")}
        return {name: torch.from_numpy(array) for name, array in made.items()}

    def fill_up(self, made: dict[str, np.ndarray], rows: int, length: int) -> None:
        """Append sequences of padding, so that all sizes are those of many other batches."""
        step = round_up(rows * length / SIZES)
        # Each filler has a token and not too many, of tokens and of slots.
        most = max(step, self.slots_of(rows * length + step, rows))
        fillers = -(-most // (self.max_length - 1))
        tokens = round_up(len(made["input_ids"]) + fillers, step)
        slots = self.slots_of(tokens, rows)
        first, last = made["key_bounds"][-1], made["query_bounds"][-1]
        key_bounds = np.linspace(first, tokens, fillers + 1).astype(np.int64)
        query_bounds = np.linspace(last, slots, fillers + 1).astype(np.int64)
        made["slots"] = np.append(made["slots"], np.repeat(key_bounds[:-1], np.diff(query_bounds)))
        made["labels"] = np.append(made["labels"], np.full(slots - last, -100))
        for name in {"input_ids", "position_ids", "token_type_ids"} & made.keys():
            made[name] = np.append(made[name], np.zeros(tokens - first, np.int64))
        sequences = len(made["key_bounds"]) - 1
        if sequences > rows:  # of documents, any number: some sequences of no length follow
            sequences = 2 ** math.ceil(math.log2(sequences + fillers)) - fillers
        for name, bounds in (("key_bounds", key_bounds), ("query_bounds", query_bounds)):
            missing = sequences + 1 - len(made[name])
            made[name] = np.concatenate([made[name], bounds[1:], np.repeat(bounds[-1], missing)])

    def slots_of(self, tokens: int, rows: int) -> int:
        """Return how many slots so many tokens have at the most."""
        # A row of `n` tokens masks less than `masked_share * n + 1` of them.
        return round_up(self.masked_share * tokens + rows * (1 + self.reads_first))


def round_up(size: float, step: int = ALIGNMENT) -> int:
    """Round up to a multiple of `step`."""
    return math.ceil(size / step) * step
