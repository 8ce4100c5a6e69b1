"""Options of `train_tokenizer.py`."""

from dataclasses import dataclass
from typing import Literal

from recipe.arguments.checks import check_values
from recipe.arguments.corpus import CorpusArguments, check_corpora
from recipe.base.errors import require


@dataclass(kw_only=True)
class TokenizerArguments:
    output_dir: str
    """Folder for `tokenizer.json`, `tokenizer_config.json` and the vocabulary."""
    corpora: list[CorpusArguments]
    """The text to learn the vocabulary from; the same list as in the pretraining config."""
    tokenizer_type: Literal["byte_level_bpe", "wordpiece", "unigram"] = "byte_level_bpe"
    """RoBERTa's, BERT's or ALBERT's kind of vocabulary."""
    do_lower_case: bool = False
    """Uncased and without accents; of `wordpiece` and `unigram`."""
    vocab_size: int = 50265
    """Entries in all; of byte-level BPE 5 special tokens, 256 bytes, the rest merges (the released RoBERTa has 50265,
    BERT 30522 uncased and 28996 cased, ALBERT 30000)."""
    min_frequency: int = 2
    """Occurrences that a pair needs before it is merged; `unigram` has no use for it."""
    max_train_bytes: int = 10_000_000_000
    """UTF-8 bytes read in all, shared among the corpora by weight and among a corpus's files evenly. The trainer
    counts words, so its memory grows with the distinct words in this budget, not with the corpora."""
    max_document_characters: int = 1_000_000
    """Longer documents are cut at a space between two letters, which changes no token."""
    add_prefix_space: bool = False
    """Treat the first word of a text as if a space stood before it (RoBERTa: false); of `byte_level_bpe`."""
    model_max_length: int = 512
    """Length, in tokens, that the saved tokenizer truncates to when it is asked to."""
    dry_run: bool = False
    """Check everything, print the plan and stop."""

    def __post_init__(self) -> None:
        check_values(self)
        require(bool(self.output_dir), "output_dir", "empty", "name a folder")
        require(bool(self.corpora), "corpora", "empty", "name at least one corpus")
        check_corpora("corpora", self.corpora)
        if self.tokenizer_type == "byte_level_bpe":
            require(self.vocab_size >= 261, "vocab_size", self.vocab_size, "5 special tokens and 256 bytes need 261")
            require(not self.do_lower_case, "do_lower_case", True, "byte_level_bpe keeps every byte; leave it false")
        else:
            require(self.vocab_size >= 100, "vocab_size", self.vocab_size, "give 100 or more")
            require(not self.add_prefix_space, "add_prefix_space", True, "it is an option of byte_level_bpe only")
        require(self.min_frequency >= 1, "min_frequency", self.min_frequency, "give 1 or more")
        require(self.max_train_bytes >= 1, "max_train_bytes", self.max_train_bytes, "give a positive number of bytes")
        require(
            self.max_document_characters >= 1000,
            "max_document_characters",
            self.max_document_characters,
            "give 1000 or more",
        )
        require(self.model_max_length >= 4, "model_max_length", self.model_max_length, "give 4 or more")
