"""Dynamic masking (paper, section 4.1): new masks on every visit, the same on a rerun."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling

from recipe.arguments.pretraining import PAIR_PACKINGS
from recipe.base.hashing import hash64, uniform
from recipe.base.model_files import count_ids
from recipe.data.tokenizer import role_ids

# What is counted of a row. The digest is of the block and of what is masked in it.
ROW = ("corpus", "tokens", "documents", "masked", "pairs", "digest")


class MaskingPurpose(IntEnum):
    """What a hash of a row decides, as the key after the row's own. No value may ever change."""

    COUNT = 0
    CHOICE = 1
    REPLACEMENT = 2
    TOKEN = 3


@dataclass
class DynamicMaskingCollator(DataCollatorForLanguageModeling):
    """A collator that makes a masked batch of fixed shape of blocks, in the format of the stock collator and model.

    Which tokens are masked, and what replaces them, is a hash of (seed, corpus, block, visit, position): it does not
    depend on the process that draws it, and there is no generator to save.

    Departures from `DataCollatorForLanguageModeling`: each row masks `int(p * n + u)` of its `n` maskable tokens,
    `u` uniform in [0, 1), without replacement, in place of one coin a token: unbiased, with a number of masked tokens
    that differs by at most one between full rows (fairseq does the same). Random replacements are never special
    tokens: a `<pad>` inside a sentence would shift RoBERTa's positions. Special tokens are those with a role (`<s>`,
    `<mask>`); others, which users have added (`<url>`), are text. `position_ids` are given. There is no
    `attention_mask` when no row has padding. `tokenizer.pad` is never called.
    Departure from fairseq: `<s>` and `</s>` are never masked.
    """

    max_seq_length: int = 512  # tokens in a row; shorter blocks are padded
    seed: int = 0
    packing: str = "full_sentences"  # decides what a batch has beside ids and labels
    # Number of a row's first position. Padding has the number before it (RoBERTa: the pad token's id), if there is one.
    first_position: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        vocab, roles = self.tokenizer.get_vocab(), role_ids(self.tokenizer)
        self.is_special = np.zeros(count_ids(vocab), bool)
        self.is_special[roles] = True
        self.ordinary_ids = np.setdiff1d([*vocab.values()], roles)  # without ids that no token has

    def __call__(
        self, examples: Sequence[dict[str, Any]], return_tensors: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Collate and mask examples, always to PyTorch's tensors.

        Args:
            examples: `input_ids` ((length,) integers, special tokens included), `corpus`, `block`, `visit` (int), and
                `spans` ((parts,) integers), the lengths of its parts, `label` of a pair and `documents` that end in it.

        Returns:
            `input_ids`, `labels` (-100 where nothing is predicted), `position_ids`: (batch, max_seq_length) int64;
            of the same shape `attention_mask`, if any row has padding, or `document_ids` (0 at padding) where rows are
            shared by documents that do not see each other, or `token_type_ids` of pairs, beside (batch,) `pair_label`.
            `rows`: (batch, 6) int64, see `ROW`, for counting; not for the model.
        """
        lengths = np.array([len(example["input_ids"]) for example in examples])
        corpora, blocks, visits, documents = (
            np.array([example[name] for example in examples]) for name in ("corpus", "block", "visit", "documents")
        )
        positions = np.arange(self.max_seq_length)
        is_text = positions < lengths[:, None]
        input_ids = np.full(is_text.shape, self.tokenizer.pad_token_id, np.int64)
        input_ids[is_text] = np.concatenate([example["input_ids"] for example in examples])
        row_keys = hash64(self.seed, corpora, blocks, visits)
        labels = self.mask_tokens(input_ids, row_keys)
        batch = {"input_ids": input_ids, "labels": labels}
        if self.packing == "doc_sentences":
            numbers = batch["document_ids"] = number_parts(examples, is_text)
            starts = np.where(np.diff(numbers, prepend=0) != 0, positions, 0)
            positions = positions - np.maximum.accumulate(starts, axis=1)
        elif not is_text.all():
            batch["attention_mask"] = is_text.astype(np.int64)
        pairs = np.zeros_like(lengths)
        if self.packing in PAIR_PACKINGS:
            batch["token_type_ids"] = np.maximum(number_parts(examples, is_text) - 1, 0)
            batch["pair_label"] = np.array([example["label"] for example in examples])
            pairs = batch["pair_label"] != -100
        batch["position_ids"] = np.where(is_text, positions + self.first_position, max(0, self.first_position - 1))
        is_masked = labels != -100
        digests = np.where(is_masked, hash64(row_keys[:, None], np.arange(self.max_seq_length), labels), 0).sum(1)
        rows = [corpora, lengths, documents, is_masked.sum(1), pairs, digests.astype(np.int64)]
        batch["rows"] = np.stack(rows, axis=1)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def mask_tokens(self, input_ids: np.ndarray, row_keys: np.ndarray) -> np.ndarray:
        """Mask (batch, length) int64 tokens in place by the (batch,) uint64 keys of the rows, and return the labels."""
        maskable = ~self.is_special[input_ids]
        rounding = uniform(hash64(row_keys, MaskingPurpose.COUNT))
        counts = (self.mlm_probability * maskable.sum(1) + rounding).astype(np.int64)
        scores = hash64(row_keys[:, None], MaskingPurpose.CHOICE, np.arange(input_ids.shape[1]))
        # The `counts` lowest scores of a row win. Only the lowest few need to be in order.
        scores[~maskable] = np.iinfo(np.uint64).max
        most = min(int(counts.max(initial=0)) + 1, input_ids.shape[1])
        lowest = np.argpartition(scores, most - 1, axis=1)[:, :most]
        lowest = np.take_along_axis(lowest, np.argsort(np.take_along_axis(scores, lowest, 1), axis=1), 1)
        chosen = np.arange(most) < counts[:, None]
        rows, columns = np.broadcast_to(np.arange(len(input_ids))[:, None], lowest.shape)[chosen], lowest[chosen]

        labels = np.full_like(input_ids, -100)
        labels[rows, columns] = input_ids[rows, columns]
        fate = uniform(hash64(row_keys[rows], MaskingPurpose.REPLACEMENT, columns))
        is_masked = fate < self.mask_replace_prob
        is_random = ~is_masked & (fate < self.mask_replace_prob + self.random_replace_prob)
        input_ids[rows[is_masked], columns[is_masked]] = self.tokenizer.mask_token_id
        rows, columns = rows[is_random], columns[is_random]
        drawn = hash64(row_keys[rows], MaskingPurpose.TOKEN, columns) % np.uint64(len(self.ordinary_ids))
        input_ids[rows, columns] = self.ordinary_ids[drawn]
        return labels


def number_parts(examples: Sequence[dict[str, Any]], is_text: np.ndarray) -> np.ndarray:
    """Return, in the shape of `is_text`, int64, which part of its row a position is in, from 1 on; 0 at padding."""
    spans = [example["spans"] for example in examples]
    numbers = is_text.astype(np.int64)
    numbers[is_text] = np.repeat(np.concatenate([np.arange(1, 1 + len(own)) for own in spans]), np.concatenate(spans))
    return numbers
