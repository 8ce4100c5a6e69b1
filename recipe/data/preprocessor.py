"""What documents become batches with: encoder, filters, block format and collators."""

import os
import time
from collections import Counter
from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.arguments.pretraining import PAIR_PACKINGS, first_position
from recipe.base.errors import UserError
from recipe.base.hashing import Purpose, hash64, pass_key
from recipe.data.corpora import check_corpus, group_by_size, open_source
from recipe.data.document_encoder import DocumentEncoder
from recipe.data.hygiene import Decontaminator, DocumentFilter, nothing_left
from recipe.data.masking import DynamicMaskingCollator
from recipe.data.packing import CONTINUES, Block, BlockFormat
from recipe.data.streaming import CorpusReader

# What is looked at before a corpus is tokenised: of its head, for pairs and for a plan, and of one document in it.
PAIR_CHARACTERS, HEAD_CHARACTERS, DOCUMENT_CHARACTERS = 2_000_000, 300_000, 100_000
MIN_PAIR_SHARE = 0.05  # of the blocks, that each of the two kinds of pairs must have


class Head(NamedTuple):
    """What the documents at the head of a corpus have, and the seconds in which one process encodes them."""

    bytes: int
    tokens: int
    blocks: int
    seconds: float


class Preprocessor:
    """What documents of a run are encoded, filtered, packed and masked with; the same in both modes."""

    def __init__(self, args: PretrainArguments, tokenizer: PreTrainedTokenizerFast) -> None:
        self.args = args
        self.tokenizer = tokenizer
        self.collator = DynamicMaskingCollator(
            tokenizer,
            mlm_probability=args.mlm_probability,
            max_seq_length=args.max_seq_length,
            seed=args.seed,
            packing=args.packing,
            first_position=first_position(args.model_type, tokenizer.pad_token_id),
        )
        self.eval_collator = replace(self.collator, mlm_probability=args.eval_mlm_probability)
        joins_sentences = args.packing in PAIR_PACKINGS
        self.encoder = DocumentEncoder(tokenizer, args.sentence_splitter, args.language, joins_sentences)
        self.decontaminator = Decontaminator(args.decontaminate_against)
        special = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        pair_special_tokens = tokenizer.num_special_tokens_to_add(pair=True)
        self.format = BlockFormat(args.packing, args.max_seq_length, *special, pair_special_tokens, args.seed)
        ids = np.array(special, self.encoder.dtype)
        self.empty_block = Block(ids, np.array([len(ids)], np.int32), -100, 0)  # with nothing to predict

    def train_collator(self, update: int) -> DynamicMaskingCollator:
        """Return the collator of an update; updates count from 0."""
        settings, collator = self.args.timeline.at(update), copy(self.collator)  # whose checks need not be made again
        collator.max_seq_length, collator.mlm_probability = settings.max_seq_length, settings.mlm_probability
        return collator

    def format_of(self, max_seq_length: int) -> BlockFormat:
        """Return the format of blocks of some length."""
        return replace(self.format, max_seq_length=max_seq_length)

    def example(self, block: Block, corpus: int, visit: int, number: int) -> dict[str, Any]:
        """Return a block as the collator takes it. Half of the pairs whose order is to be told are swapped."""
        if self.args.packing == "sentence_order" and block.label == CONTINUES:
            key = pass_key(Purpose.SWAP, self.args.seed, corpus, visit)
            block = self.format.swap(block) if hash64(key, number) % np.uint64(2) else block
        return block._asdict() | {"corpus": corpus, "block": number, "visit": visit}

    def document_filter(self, corpus: CorpusArguments) -> DocumentFilter:
        """Return a new filter, with counts of its own, for documents of a corpus; one process speaks of them."""
        is_quiet = os.environ.get("RANK", "0") != "0"
        return DocumentFilter(corpus.name, self.args.max_unreadable_documents, self.decontaminator, is_quiet=is_quiet)

    def check_corpus(self, corpus: CorpusArguments) -> None:
        """Read a little of a corpus; raise a `UserError` if it cannot be read, or has no pairs to learn from."""
        check_corpus(corpus, self.args.max_unreadable_documents)
        if not self.args.predicts_pairs:
            return
        blocks, texts = self.pack_head(corpus, PAIR_CHARACTERS)
        self.check_pairs(corpus, self.count_labels(blocks), len(texts))

    def pack_head(self, corpus: CorpusArguments, max_characters: int) -> tuple[list[Block], list[str]]:
        """Pack the first documents of a corpus, and return the blocks and the documents; a `UserError` without any."""
        filters = partial(self.document_filter, corpus)
        reader = CorpusReader(open_source(corpus), {}, self.encoder, filters, self.format)
        blocks, texts = reader.pack_sample(max_characters, DOCUMENT_CHARACTERS)
        if not blocks:
            raise nothing_left(corpus, "all documents are empty, malformed or contaminated")
        return blocks, texts

    def measure_head(self, corpus: CorpusArguments) -> Head:
        """Measure the first documents of a corpus, and how fast one process encodes them."""
        blocks, texts = self.pack_head(corpus, HEAD_CHARACTERS)
        started = time.perf_counter()
        tokens = sum(len(ids) for ids, _ in self.encoder(texts))  # again: the first time, threads start
        return Head(sum(len(text.encode()) for text in texts), tokens, len(blocks), time.perf_counter() - started)

    def describe_head(self, corpus: CorpusArguments) -> list[str]:
        """Say how much at the head of a corpus the tokenizer does not know."""
        texts = (text[:DOCUMENT_CHARACTERS] for _, text in open_source(corpus).read(0) if isinstance(text, str))
        encoded = [ids for ids, _ in self.encoder(next(group_by_size(texts, len, DOCUMENT_CHARACTERS), []))]
        return self.describe_unknown(corpus.name, sum(map(self.encoder.count_unknown, encoded)), sum(map(len, encoded)))

    def describe_unknown(self, name: str, unknown: int, tokens: int) -> list[str]:
        """Return a warning of the tokens of a corpus that stand for what the tokenizer does not know, if there are any.

        What was there is lost for the model, and these tokens are never masked.
        """
        share = f"{unknown:,} of {tokens:,} tokens ({unknown / max(1, tokens):.2%})"
        problem = f"are {self.tokenizer.unk_token}, for characters or words that the tokenizer does not have"
        return [f"warning: corpus {name}: {share} {problem}"] if unknown else []

    def count_labels(self, blocks: Iterable[Block]) -> Counter[int]:
        """Count the labels of the pairs of some blocks in a first visit; blocks of one part have -100."""
        return Counter(self.example(block, 0, 0, number)["label"] for number, block in enumerate(blocks))

    def check_pairs(self, corpus: CorpusArguments, labels: Counter[int], documents: int) -> None:
        """Raise a `UserError` if a corpus lacks one of the two kinds of pairs, where pairs are learnt.

        Args:
            labels: how many of its blocks have which label.
            documents: how many documents the blocks were made of.
        """
        if self.args.predicts_pairs and min(labels[0], labels[1]) < MIN_PAIR_SHARE * labels.total():
            raise UserError(
                f"`objective` is {self.args.objective}, and {documents:,} documents of corpus {corpus.name!r} do not "
                "make pairs of both kinds; give more documents, of two sentences and more, or `objective: masked_lm`"
            )
