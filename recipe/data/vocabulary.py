"""Learn a vocabulary from corpora, and save it once it has passed the checks.

`VocabularyText` reads the text for `train_vocabulary` and keeps what the checks of `save_checked` and the last lines of
train_tokenizer.py need of it, so that nothing is read twice.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from recipe.arguments import CorpusArguments, TokenizerArguments
from recipe.arguments.corpus_files import describe_left_out, find_files
from recipe.base.errors import UserError, describe_error
from recipe.base.formatting import format_bytes
from recipe.base.progress import progress_bar
from recipe.data.corpora import check_corpus, corpus_bytes, sample_texts
from recipe.data.trainers import (
    check_saved_tokenizer,
    count_words,
    find_lost_words,
    save_tokenizer,
    train_byte_level_bpe,
    train_unigram,
    train_wordpiece,
)

# Of each corpus, for the checks after training:
COUNTED_BYTES = 1_000_000  # text whose words are counted
COMPARED_TEXTS, COMPARED_CHARACTERS = 50, 2000  # texts encoded with the trained and the saved tokenizer


class VocabularyText:
    """The text that a vocabulary is learnt from, `max_bytes` of it in all; raise a `UserError` if it cannot be read."""

    def __init__(self, corpora: list[CorpusArguments], max_bytes: int) -> None:
        self.corpora = corpora
        self.max_bytes = max_bytes
        self.sizes = {corpus.name: corpus_bytes(corpus) for corpus in corpora if corpus.weight is None}
        self.read_bytes: Counter[str] = Counter()  # of each corpus
        self.beginnings: list[str] = []  # the first texts of each corpus, whose words are counted
        self.sample: list[str] = []  # the beginnings of the first texts of each corpus
        for corpus in corpora:
            check_corpus(corpus)

    def describe(self) -> list[str]:
        """Name the corpora, their sizes where these decide how much of each is read, and what of them is not read."""
        sizes = {name: f", about {format_bytes(size)}" for name, size in self.sizes.items()}
        left_out = {corpus.name: describe_left_out(find_files(corpus)[1]) for corpus in self.corpora}
        rest = {name: f"; left out: {text}" for name, text in left_out.items() if text}
        return [f"corpus {c.name}: {c.path}{sizes.get(c.name, '')}{rest.get(c.name, '')}" for c in self.corpora]

    def batches(self) -> Iterator[list[str]]:
        """Read the corpora under a progress bar, and keep what the checks need of the beginning of each."""
        expected_bytes = min(self.max_bytes, round(sum(self.sizes.values())) or self.max_bytes)
        with progress_bar("reading", expected_bytes, "B") as bar:
            for name, batch, size in sample_texts(self.corpora, self.max_bytes):
                if not self.read_bytes[name]:
                    self.sample += [text[:COMPARED_CHARACTERS] for text in batch[:COMPARED_TEXTS]]
                if self.read_bytes[name] < COUNTED_BYTES:
                    self.beginnings += [text[:COUNTED_BYTES] for text in batch]
                self.read_bytes[name] += size
                bar.update(size)
                yield batch

    def measure(self, tokenizer: Tokenizer) -> tuple[float, float]:
        """Measure on the sample how many bytes of text a token stands for, and which share of the tokens is unknown."""
        encodings = tokenizer.encode_batch(self.sample, add_special_tokens=False)
        tokens = Counter(token for encoding in encodings for token in encoding.tokens)
        unknown = tokens["<unk>"] + tokens["[UNK]"]
        return sum(len(text.encode()) for text in self.sample) / tokens.total(), unknown / tokens.total()


def train_vocabulary(args: TokenizerArguments, texts: Iterator[list[str]]) -> Tokenizer:
    """Learn a vocabulary of the kind that `tokenizer_type` asks for."""
    longest = args.max_document_characters
    if args.tokenizer_type == "wordpiece":
        return train_wordpiece(texts, args.vocab_size, args.min_frequency, args.do_lower_case, longest)
    if args.tokenizer_type == "unigram":
        return train_unigram(texts, args.vocab_size, args.do_lower_case, longest)
    return train_byte_level_bpe(texts, args.vocab_size, args.min_frequency, args.add_prefix_space, longest)


def save_checked(args: TokenizerArguments, tokenizer: Tokenizer, text: VocabularyText) -> None:
    """Save a tokenizer, and give its files their names once it has passed the checks.

    Raises:
        UserError: `output_dir` can no longer be written; the tokenizer is in a temporary folder.
        RuntimeError: another check has failed. The tokenizer is left in `output_dir/.unchecked`.
    """
    output_dir, failure = Path(args.output_dir), None
    folder = output_dir / ".unchecked"
    settings = args.add_prefix_space, args.model_max_length, args.do_lower_case
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_tokenizer(tokenizer, folder, *settings)
    except Exception as error:  # of the disk, or of one library or another that writes to it
        failure = describe_error(error)
        shutil.rmtree(folder, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix="tokenizer-"))
        save_tokenizer(tokenizer, folder, *settings)
    try:
        check_saved_tokenizer(tokenizer, folder, text.sample, args.add_prefix_space)
    except RuntimeError as error:
        raise RuntimeError(f"{error}; the vocabulary is kept in {folder}") from None
    if failure:
        raise UserError(
            f"`output_dir` {output_dir} cannot be written ({failure}); the tokenizer is in {folder}: move it"
        )
    for file in sorted(folder.iterdir(), key=lambda file: file.name == "tokenizer.json"):  # by which it is recognised
        file.replace(output_dir / file.name)
    folder.rmdir()


def describe_vocabulary(args: TokenizerArguments, tokenizer: Tokenizer, text: VocabularyText) -> list[str]:
    """Return what there is to say of a vocabulary: its size, how much text a token has, and what is doubtful in it."""
    num_entries, lines = tokenizer.get_vocab_size(), []
    if num_entries < args.vocab_size:
        lines.append(f"warning: the text was enough for only {num_entries:,} of {args.vocab_size:,} entries")
    if num_entries > args.vocab_size:
        lines.append(
            f"warning: `vocab_size` is {args.vocab_size:,}, and the characters of the text alone need "
            f"{num_entries:,} entries, which the vocabulary has; give more to have words in it too"
        )
    bytes_per_token, unknown = text.measure(tokenizer)
    if unknown:
        lines.append(
            f"warning: {unknown:.2%} of the tokens of the first texts are unknown, since their characters are rare"
        )
    if lost := find_lost_words(tokenizer, count_words(tokenizer, text.beginnings)):
        lines.append(
            f"warning: the common words {lost} did not become single tokens, as when the trainer's counts overflow; "
            "look at the vocabulary, and lower `max_train_bytes` if it is not what you want"
        )
    return [*lines, f"{args.output_dir}: {num_entries:,} entries, {bytes_per_token:.2f} bytes a token"]
