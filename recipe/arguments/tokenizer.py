"""Options of `train_tokenizer.py`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from recipe.arguments.checks import PathName, PositiveInt, Rule, check_values
from recipe.arguments.corpus import CorpusArguments, check_corpora
from recipe.base.errors import require


@dataclass(kw_only=True)
class TokenizerArguments:
    """Options of `train_tokenizer.py`; in `GROUPS`, the option that each group of them begins with."""

    GROUPS: ClassVar = {"output_dir": "Text", "tokenizer_type": "Vocabulary"}

    output_dir: PathName
    """Folder for `tokenizer.json`, `tokenizer_config.json` and the vocabulary."""
    corpora: list[CorpusArguments]
    """Text to learn the vocabulary from, in the same form as in the pretraining config."""
    tokenizer_type: Literal["byte_level_bpe", "wordpiece", "unigram"] = "byte_level_bpe"
    """Kind of vocabulary: `byte_level_bpe` is RoBERTa's, `wordpiece` is BERT's and `unigram` is ALBERT's.
    Only `byte_level_bpe` comes out the same in each training on the same text: the trainers of `tokenizers` for the
    other two break ties by chance (146 of 2,000 entries differed), so keep what you have trained."""
    do_lower_case: bool = False
    """Lowercase the text and strip its accents; for `wordpiece` and `unigram` only."""
    vocab_size: int = 50265
    """Number of entries in the vocabulary, special tokens included (released RoBERTa: 50265, BERT: 30522 uncased and
    28996 cased, ALBERT: 30000). Byte-level BPE has 5 special tokens, 256 bytes, and merges for the rest."""
    min_frequency: PositiveInt = 2
    """Number of times that a pair must occur to be merged; `unigram` does not use it."""
    max_train_bytes: PositiveInt = 10_000_000_000
    """Number of UTF-8 bytes to read, shared among the corpora by weight and among a corpus's files evenly. The trainer
    counts words, so its memory grows with the distinct words in these bytes, not with the corpora."""
    max_document_characters: Annotated[int, Rule("1000 or more", lambda n: n >= 1000)] = 1_000_000
    """Length in characters above which a document is cut at a space between two letters, which changes no token."""
    add_prefix_space: bool = False
    """Tokenise the first word of a text as if a space stood before it (RoBERTa: false); for `byte_level_bpe` only."""
    model_max_length: Annotated[int, Rule("4 or more", lambda n: n >= 4)] = 512
    """Length in tokens to which the saved tokenizer truncates when it is asked to."""
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
