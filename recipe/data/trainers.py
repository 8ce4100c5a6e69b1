"""Vocabularies: train one, and save it as the fast tokenizer that `AutoTokenizer` finds.

The special tokens of byte-level BPE stand where the released RoBERTa has them: `<s>`=0, `<pad>`=1, `</s>`=2, `<unk>`=3
and `<mask>` last. (`ByteLevelBPETokenizer` given all five would put `<mask>` at 4.) WordPiece is BERT's and Unigram
ALBERT's, with the normalizer, special tokens (0 to 4) and templates of their classes in transformers; neither keeps
every byte of the text.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AlbertTokenizer,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from recipe.base.errors import UserError
from recipe.data.document_encoder import split_text
from recipe.data.tokenizer import MASK_TOKEN, ROBERTA_TOKENS

BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ALBERT_TOKENS = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
FAST_CLASSES: dict[type[models.Model], type[PreTrainedTokenizerFast]] = {
    models.BPE: RobertaTokenizer,
    models.WordPiece: BertTokenizer,
    models.Unigram: AlbertTokenizer,
}
COMMON_WORDS, COMMON_WORD_COUNT = 100, 100  # words that must not be missing, and occurrences from which that holds


def split_batches(texts: Iterable[list[str]], max_characters: int) -> Iterator[list[str]]:
    """Cut the long texts of batches."""
    return ([piece for text in batch for piece in split_text(text, max_characters)] for batch in texts)


def shows_progress() -> bool:
    """Tell whether the trainers may print their progress: where stdout is no terminal, a failure to print ends them."""
    return sys.stdout is not None and sys.stdout.isatty()


def train_byte_level_bpe(
    texts: Iterable[list[str]],
    vocab_size: int,
    min_frequency: int,
    add_prefix_space: bool,
    max_document_characters: int,
) -> Tokenizer:
    """Learn a byte-level BPE with RoBERTa's special tokens from batches of texts.

    Args:
        vocab_size: entries in all; there are fewer where the text has too few pairs to merge.
        min_frequency: occurrences that a pair needs before it is merged.
        add_prefix_space: treat the first word of a text as if a space stood before it.
        max_document_characters: longer texts are cut, so that no worker of the trainer holds more.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        show_progress=shows_progress(),
        vocab_size=vocab_size - 1,  # without `<mask>`
        min_frequency=min_frequency,
        special_tokens=ROBERTA_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(split_batches(texts, max_document_characters), trainer)
    tokenizer.add_special_tokens([MASK_TOKEN])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=add_prefix_space
    )
    return tokenizer


def train_wordpiece(
    texts: Iterable[list[str]], vocab_size: int, min_frequency: int, do_lower_case: bool, max_document_characters: int
) -> Tokenizer:
    """Learn BERT's kind of vocabulary, without accents if lower-cased; for the arguments see `train_byte_level_bpe`."""
    tokenizer = BertTokenizer(do_lower_case=do_lower_case).backend_tokenizer
    trainer = trainers.WordPieceTrainer(
        show_progress=shows_progress(),
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=BERT_TOKENS,
        limit_alphabet=1000,  # the value of `BertWordPieceTokenizer`; rarer characters are unknown
    )
    tokenizer.train_from_iterator(split_batches(texts, max_document_characters), trainer)
    return tokenizer


def train_unigram(
    texts: Iterable[list[str]], vocab_size: int, do_lower_case: bool, max_document_characters: int
) -> Tokenizer:
    """Learn ALBERT's kind of vocabulary; see `train_wordpiece`.

    It normalizes by NFKD where SentencePiece has NFKC, and drops accents when uncased.
    """
    tokenizer = AlbertTokenizer(do_lower_case=do_lower_case, keep_accents=not do_lower_case).backend_tokenizer
    trainer = trainers.UnigramTrainer(
        show_progress=shows_progress(), vocab_size=vocab_size, special_tokens=ALBERT_TOKENS, unk_token="<unk>"
    )
    copy = Tokenizer.from_str(tokenizer.to_str())  # the trainer keeps the other locked
    texts = counting_characters(texts, copy, vocab_size)
    tokenizer.train_from_iterator(split_batches(texts, max_document_characters), trainer)
    return tokenizer


def counting_characters(texts: Iterable[list[str]], tokenizer: Tokenizer, vocab_size: int) -> Iterator[list[str]]:
    """Yield batches of texts, and after the last raise a `UserError` if Unigram lacks entries for their characters.

    The trainer needs one for each, and one more: with these alone it never finds that it has enough. It would find out
    when all its work is done.
    """
    characters: set[str] = set()
    for batch in texts:
        characters.update(*batch)
        yield batch
    words = count_words(tokenizer, [" ".join(sorted(characters))])
    needed = len(set().union(*words)) + len(ALBERT_TOKENS) + 1
    if needed > vocab_size:
        raise UserError(
            f"`vocab_size` is {vocab_size:,}, and unigram has an entry for each character of the text, which are "
            f"{needed:,} with the special tokens and a word; give that many or more, or leave out text with rare ones"
        )


def save_tokenizer(
    tokenizer: Tokenizer, output_dir: Path, add_prefix_space: bool, model_max_length: int, do_lower_case: bool = False
) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and the vocabulary as the files of its kind.

    These are `vocab.json` and `merges.txt`, `vocab.txt`, or `unigram.json`.
    """
    model = json.loads(tokenizer.to_str())["model"]
    settings: dict[str, Any] = {"vocab": model["vocab"], "model_max_length": model_max_length}
    if model["type"] == "BPE":
        settings["merges"] = [tuple(merge) for merge in model["merges"]]
        settings |= {"mask_token": MASK_TOKEN, "add_prefix_space": add_prefix_space}
    else:
        settings["do_lower_case"] = do_lower_case
    if model["type"] == "Unigram":
        settings["vocab"] = [tuple(entry) for entry in model["vocab"]]
        # Segment ids too, which ALBERT's class leaves out.
        settings |= {"keep_accents": not do_lower_case, "model_input_names": BertTokenizer.model_input_names}
    FAST_CLASSES[type(tokenizer.model)](**settings).save_pretrained(output_dir)
    tokenizer.model.save(str(output_dir))


def check_saved_tokenizer(tokenizer: Tokenizer, output_dir: Path, texts: list[str], add_prefix_space: bool) -> None:
    """Reload what was saved, both ways; raise a `RuntimeError` if ids, special tokens or settings were lost.

    Loading a byte-level tokenizer has turned silently character-level upstream before (transformers#47706).
    """
    expected = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    fast_class = FAST_CLASSES[type(tokenizer.model)]
    special = {"pad_token_id": 0, "unk_token_id": 1, "cls_token_id": 2, "sep_token_id": 3, "mask_token_id": 4}
    if fast_class is RobertaTokenizer:
        special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "unk_token_id": 3}
        special |= {"cls_token_id": 0, "sep_token_id": 2, "mask_token_id": tokenizer.get_vocab_size() - 1}
    loaders: tuple[Any, ...] = (AutoTokenizer, fast_class)
    for loader in loaders:
        source = f"{loader.__name__}.from_pretrained({output_dir})"
        loaded = loader.from_pretrained(output_dir, trust_remote_code=False)
        if [loaded(text, verbose=False)["input_ids"] for text in texts] != expected:
            raise RuntimeError(f"{source} does not give the trained ids")
        found = {name: getattr(loaded, name) for name in special}
        if found != special or len(loaded) != tokenizer.get_vocab_size():
            raise RuntimeError(f"{source} moved the special tokens: {found}")
        if not isinstance(loaded, fast_class):
            raise RuntimeError(f"{source} gives a {type(loaded).__name__}")
        if fast_class is RobertaTokenizer and not loaded.added_tokens_decoder[loaded.mask_token_id].lstrip:
            raise RuntimeError(f"{source} lost `lstrip` of <mask>")
        if fast_class is RobertaTokenizer and loaded.add_prefix_space != add_prefix_space:
            raise RuntimeError(f"{source} lost `add_prefix_space`")


def count_words(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """Count what a tokenizer would cut texts into if all of it were single tokens."""
    counts: Counter[str] = Counter()
    for text in texts:
        normalized = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized))
    return counts


def find_lost_words(tokenizer: Tokenizer, word_counts: Counter[str]) -> list[str]:
    """Return which common words of `count_words`, occurring 100 times at least, are not single tokens.

    A count that overflows in the trainer loses them silently (tokenizers#2058: "the" was missing). Only as many words
    are checked as the vocabulary surely has room for: one for each 100 entries beyond bytes and special tokens. None
    are in a Unigram vocabulary, which does without words that their parts make likely enough.
    """
    if isinstance(tokenizer.model, models.Unigram):
        return []
    commonest = word_counts.most_common(max(0, min(COMMON_WORDS, (tokenizer.get_vocab_size() - 261) // 100)))
    common = [word for word, count in commonest if count >= COMMON_WORD_COUNT]
    lost = [word for word in common if [token.value for token in tokenizer.model.tokenize(word)] != [word]]
    return [tokenizer.decoder.decode([word]) for word in lost]
