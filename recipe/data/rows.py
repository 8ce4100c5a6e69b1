"""Rows of a run without training: those of an update, or blocks of what stands at the heads of the corpora."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from recipe.base.errors import UserError
from recipe.data.batches import Rank, Resume
from recipe.data.cached import STATIC_VISITS, find_store
from recipe.data.corpora import corpus_bytes, open_source
from recipe.data.masking import DynamicMaskingCollator
from recipe.data.modes import open_data
from recipe.data.preprocessor import Preprocessor
from recipe.data.streaming import CorpusReader

SMALL_BYTES = 20_000_000  # of text, that is tokenised in seconds


Batch = dict[str, np.ndarray]  # the arrays of a batch of `DynamicMaskingCollator`


def has_update(preprocessor: Preprocessor) -> bool:
    """Say whether an update can be read at once: no large corpus has to be tokenised for its rows."""
    args = preprocessor.args
    corpora = [*args.corpora, *args.eval_corpora]
    if args.streaming or all(find_store(args, preprocessor, corpus).is_complete for corpus in corpora):
        return True
    try:
        return sum(map(corpus_bytes, corpora)) <= SMALL_BYTES
    except UserError:  # not every hub data set has its size published
        return False


def read_update(preprocessor: Preprocessor, update: int) -> tuple[Batch, list[str]]:
    """Have the data of the run make the rows of an update as one batch, and say where each is from.

    In cached mode, token stores are made where they are missing. In streaming mode, all updates before are made too.
    """
    size = preprocessor.args.timeline.at(update).train_batch_size
    args = replace(preprocessor.args, per_device_train_batch_size=size)
    data = open_data(args, preprocessor, verifies=False)
    resume = Resume(update, skipped_updates=update if args.streaming else 0)
    with closing(data.train_updates(Rank(), resume, update + 1, lambda: False)) as updates:
        (batch,) = next(updates).micro_batches
    return {name: tensor.numpy() for name, tensor in batch.items()}, data.name_rows(update)


def read_heads(
    preprocessor: Preprocessor, num_corpora: int, characters: int, document_characters: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Pack the first documents of the first corpora, up to a number of characters of each and of each document.

    Returns:
        the blocks as the collator takes them, in the order of the text, the corpora in turn; and where each is from.

    Raises:
        UserError: there is no text.
    """
    found = []
    for corpus, described in enumerate(preprocessor.args.corpora[:num_corpora]):
        documents = partial(preprocessor.document_filter, described)
        reader = CorpusReader(open_source(described), {}, preprocessor.encoder, documents, preprocessor.format)
        blocks, texts = reader.pack_sample(characters, document_characters)
        for number, block in enumerate(blocks):
            origin = f"{described.name}, of the first {document_characters:,} characters of {len(texts):,} documents"
            found.append((number, corpus, preprocessor.example(block, corpus, 0, number), origin))
    if not found:
        raise UserError("`corpora` have no text at their heads; give others")
    found.sort(key=lambda one: one[:2])
    return [example for *_, example, _ in found], [origin for *_, origin in found]


def collate(collator: DynamicMaskingCollator, examples: list[dict[str, Any]]) -> Batch:
    """Mask and collate examples."""
    return {name: tensor.numpy() for name, tensor in collator(examples).items()}


def collate_visits(collator: DynamicMaskingCollator, example: dict[str, Any], visits: Sequence[int]) -> Batch:
    """Mask and collate one block as it is in some visits with dynamic masking, and then as with static masking."""
    return collate(collator, [example | {"visit": visit} for visit in [*visits, *(v % STATIC_VISITS for v in visits)]])
