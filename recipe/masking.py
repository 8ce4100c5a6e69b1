"""Dynamic masking (paper, section 4.1): new masks on every visit, the same masks on a rerun."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling

from recipe.hashing import hash64, uniform

COUNT, CHOICE, REPLACEMENT, TOKEN = range(4)  # what a hash decides


@dataclass
class DynamicMaskingCollator(DataCollatorForLanguageModeling):
    """Blocks to a masked batch of fixed shape, in the format of the stock collator and model.

    Which tokens are masked, and what replaces them, is a hash of (seed, corpus, block, visit, position): no matter
    which process draws it, and with no generator to save.

    Departures from `DataCollatorForLanguageModeling`: each row masks `int(p * n + u)` of its `n` maskable tokens,
    `u` uniform in [0, 1), without replacement, in place of one coin a token: unbiased, with a number of masked tokens
    that differs by at most one between full rows (fairseq does the same). Random replacements are never special
    tokens: a `<pad>` inside a sentence would shift RoBERTa's positions. `position_ids` are given. There is no
    `attention_mask` when no row has padding. It never calls `tokenizer.pad`.
    Departure from fairseq: `<s>` and `</s>` are never masked.

    Attributes:
        max_seq_length: tokens in a row; shorter blocks are padded.
    """

    max_seq_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        is_special = np.zeros(len(self.tokenizer), bool)
        is_special[self.tokenizer.all_special_ids] = True
        self.is_special = is_special
        self.ordinary_ids = np.flatnonzero(~is_special)

    @property
    def max_masked(self) -> int:
        """The most tokens that a row can have masked."""
        return int(np.ceil(self.mlm_probability * self.max_seq_length))

    def __call__(
        self, examples: Sequence[dict[str, Any]], return_tensors: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Collate and mask.

        Args:
            examples: `input_ids` ((length,) integers, special tokens included), `corpus`, `block`, `visit` (int).

        Returns:
            `input_ids`, `labels` (-100 where nothing is predicted), `position_ids`: (batch, max_seq_length) int64;
            `attention_mask` of the same shape, if any row has padding.
        """
        lengths = np.array([len(example["input_ids"]) for example in examples])
        input_ids = np.full((len(examples), self.max_seq_length), self.tokenizer.pad_token_id, np.int64)
        for row, example in zip(input_ids, examples, strict=True):
            row[: len(example["input_ids"])] = example["input_ids"]
        keys = [np.array([example[name] for example in examples]) for name in ("corpus", "block", "visit")]

        positions = np.arange(self.max_seq_length)
        is_text = positions < lengths[:, None]
        labels = self.mask_tokens(input_ids, hash64(self.seed, *keys))
        first = self.tokenizer.pad_token_id + 1  # RoBERTa's first position; padding has the pad token's
        batch = {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": np.where(is_text, positions + first, self.tokenizer.pad_token_id),
        }
        if not is_text.all():
            batch["attention_mask"] = is_text.astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def mask_tokens(self, input_ids: np.ndarray, row_keys: np.ndarray) -> np.ndarray:
        """Mask in place.

        Args:
            input_ids: (batch, length) int64.
            row_keys: (batch,) uint64, what the choices of a row are drawn from.

        Returns:
            (batch, length) int64 labels.
        """
        maskable = ~self.is_special[input_ids]
        counts = (self.mlm_probability * maskable.sum(1) + uniform(hash64(row_keys, COUNT))).astype(np.int64)
        scores = hash64(row_keys[:, None], CHOICE, np.arange(input_ids.shape[1]))
        # The `counts` lowest scores of a row win. Only the lowest few need to be in order.
        scores[~maskable] = np.iinfo(np.uint64).max
        most = min(int(counts.max(initial=0)) + 1, input_ids.shape[1])
        lowest = np.argpartition(scores, most - 1, axis=1)[:, :most]
        lowest = np.take_along_axis(lowest, np.argsort(np.take_along_axis(scores, lowest, 1), axis=1), 1)
        chosen = np.arange(most) < counts[:, None]
        rows, columns = np.broadcast_to(np.arange(len(input_ids))[:, None], lowest.shape)[chosen], lowest[chosen]

        labels = np.full_like(input_ids, -100)
        labels[rows, columns] = input_ids[rows, columns]
        fate = uniform(hash64(row_keys[rows], REPLACEMENT, columns))
        is_masked = fate < self.mask_replace_prob
        is_random = ~is_masked & (fate < self.mask_replace_prob + self.random_replace_prob)
        input_ids[rows[is_masked], columns[is_masked]] = self.tokenizer.mask_token_id
        drawn = hash64(row_keys[rows[is_random]], TOKEN, columns[is_random]) % np.uint64(len(self.ordinary_ids))
        input_ids[rows[is_random], columns[is_random]] = self.ordinary_ids[drawn]
        return labels
