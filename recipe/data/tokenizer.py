"""Tokenizers: train a vocabulary, save it as the fast tokenizer that `AutoTokenizer` finds, and encode documents.

The special tokens of byte-level BPE stand where the released RoBERTa has them: `<s>`=0, `<pad>`=1, `</s>`=2, `<unk>`=3
and `<mask>` last. (`ByteLevelBPETokenizer` given all five would put `<mask>` at 4.) WordPiece is BERT's and Unigram
ALBERT's, with the normalizer, special tokens (0 to 4) and templates of their classes in transformers; neither keeps
every byte of the text.
"""

import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import sentencex
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AlbertTokenizer,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from recipe.base.errors import UserError, describe_error
from recipe.base.model_files import LARGEST, check_model_files, count_ids
from recipe.data.corpora import group_by_size

ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # `<mask>` comes after the merges
BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ALBERT_TOKENS = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
FAST_CLASSES: dict[type[models.Model], type[PreTrainedTokenizerFast]] = {
    models.BPE: RobertaTokenizer,
    models.WordPiece: BertTokenizer,
    models.Unigram: AlbertTokenizer,
}
MASK_TOKEN = AddedToken("<mask>", lstrip=True, rstrip=False, normalized=False, special=True)
COMMON_WORDS, COMMON_WORD_COUNT = 100, 100  # words that must not be missing, and occurrences from which that holds
ENCODED_CHARACTERS = 2_000_000  # encoded at once; an `Encoding` takes some 100 bytes a token
PIECE_CHARACTERS, MARGIN_CHARACTERS = 10_000, 2_000  # of a long paragraph, whose sentences are found piece by piece
UNKNOWN_LENGTH = -(2**40)  # of a token: no others make up for it in the sum of a text
UNWRITTEN = "\U0010ffff" * 8  # no character, and in no text
NAME_CLASS = "load it by its class and `save_pretrained` it, for the tokenizer_config.json that is missing"


def split_text(text: str, max_characters: int) -> Iterator[str]:
    """Cut a long text at spaces between two letters, where byte-level BPE never joins.

    The pieces' tokens are therefore the text's tokens. A stretch of `max_characters` without such a space is cut at its
    end all the same, which can change the tokens at the cut.
    """
    start = 0
    while len(text) - start > max_characters:
        cut = text.rfind(" ", start + 1, start + max_characters)
        while cut > start and not (text[cut - 1].isalpha() and text[cut + 1].isalpha()):
            cut = text.rfind(" ", start + 1, cut)
        end = cut if cut > start else start + max_characters
        yield text[start:end]
        start = end
    yield text[start:]


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

    The trainer needs one for each. It would find out when all its work is done.
    """
    characters: set[str] = set()
    for batch in texts:
        characters.update(*batch)
        yield batch
    words = count_words(tokenizer, [" ".join(sorted(characters))])
    needed = len(set().union(*words)) + len(ALBERT_TOKENS)
    if needed > vocab_size:
        raise UserError(
            f"`vocab_size` is {vocab_size:,}, and unigram has an entry for each character of the text, which are "
            f"{needed:,} with the special tokens; give that many and more for words, or leave out text with rare ones"
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


def load_tokenizer(name_or_path: str, option: str = "tokenizer_name") -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from a folder or the hub; raise a `UserError` if it cannot serve masked language modelling.

    RoBERTa's needs no more than its `tokenizer.json`, or `vocab.json` and `merges.txt`. `option` named it.
    """
    field = f"`{option}` is {name_or_path}"
    folder = check_model_files(option, name_or_path, "tokenizer")
    try:
        if any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json")):
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        else:
            tokenizer = load_bare_tokenizer(folder)
    except UserError as error:
        raise UserError(f"{field}, {error}") from None
    except Exception as error:  # of one library or another
        problem = f"no tokenizer can be loaded from there; make one by train_tokenizer.py ({describe_error(error)})"
        raise UserError(f"{field}, and {problem}") from None
    if len(tokenizer) == len(tokenizer.all_special_ids):
        # What transformers makes of a folder with a config and no vocabulary.
        raise UserError(f"{field}, and no vocabulary is there, only {len(tokenizer)} special tokens")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{field}, which is not a fast tokenizer; save it with a tokenizer.json")
    check_ids(field, tokenizer.get_vocab())
    for name in ("cls_token", "sep_token", "pad_token", "mask_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"{field}, and it has no `{name}`, which the blocks need; add it or take another tokenizer")
    tokenizer.backend_tokenizer.no_truncation()  # some tokenizers come with truncation or padding switched on
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def load_bare_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer whose files do not name its class, if it is RoBERTa's.

    Raises:
        UserError: it is another, or there is none.
    """
    file = folder / "tokenizer.json"
    if not file.is_file() and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        problem = "and no tokenizer.json is there, nor vocab.json with merges.txt; make one by train_tokenizer.py, or"
        raise UserError(f"{problem} {NAME_CLASS}")
    options: dict[str, Any] = {"mask_token": MASK_TOKEN}
    tokenizer = RobertaTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    loaded = json.loads(tokenizer.backend_tokenizer.to_str())
    saved = json.loads(Tokenizer.from_file(str(file)).to_str()) if file.is_file() else loaded
    is_alike = all(saved[part] == loaded[part] for part in ("normalizer", "pre_tokenizer"))
    if not is_alike or saved["model"]["type"] != "BPE" or set(ROBERTA_TOKENS) - saved["model"]["vocab"].keys():
        tokens = ", ".join(ROBERTA_TOKENS)
        raise UserError(f"and is no byte-level BPE with {tokens}, as RoBERTa's without a class's name is; {NAME_CLASS}")
    return tokenizer


def check_ids(field: str, vocab: dict[str, int]) -> None:
    """Raise a `UserError` if two tokens have one id, or if ids are so high that no table of embeddings has them."""
    if (num_ids := count_ids(vocab)) > LARGEST[""]:
        raise UserError(f"{field}, whose ids go up to {num_ids - 1:,}; renumber them below {LARGEST['']:,}")
    tokens = {index: token for token, index in vocab.items()}
    for token, index in vocab.items():
        if tokens[index] != token:
            raise UserError(
                f"{field}, in which {token} and {tokens[index]} have one id, {index}: the library numbers added tokens "
                "from the size of the vocabulary on, which has gaps here; write each added token, with its id, into "
                "`model.vocab` of tokenizer.json too"
            )


def role_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the tokens with a role: bos, cls, sep, eos, pad, unk, mask. These alone are never predicted."""
    roles = {getattr(tokenizer, f"{name}_id") for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    return sorted(index for index in roles if index is not None)


def build_text_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Copy what encodes text so that a token with a role stays text where a document spells it.

    All others, also special tokens that users have added (`<url>`), keep their ids. `encode_special_tokens`, which is
    to be set on the copy, spares special tokens. Models other than BPE find what is in their vocabulary in the text
    nevertheless, so that tokens with a role have names there that no text has. Nothing is cut or padded, though a call
    of the tokenizer leaves that switched on.
    """
    state, roles = json.loads(tokenizer.backend_tokenizer.to_str()), role_ids(tokenizer)
    state["truncation"] = state["padding"] = None
    model, names = state["model"], {}
    if model["type"] != "BPE" or model["ignore_merges"]:
        names = {tokenizer.convert_ids_to_tokens(index): f"{UNWRITTEN}{index}" for index in roles}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [(names.get(token, token), score) for token, score in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    for token in state["added_tokens"]:
        token["special"] = token["id"] in roles
        token["content"] = names.get(token["content"], token["content"])
    return Tokenizer.from_str(json.dumps(state))


def tokenizer_checksum(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of everything that decides a text's ids."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray | None:
    """Count the UTF-8 bytes of text that each token stands for, by id.

    They are `UNKNOWN_LENGTH` for `<unk>`, and for an added token that takes white space beside it along or after which
    `add_prefix_space` puts a space into the text.

    Returns:
        (ids,) int64, or None unless the tokenizer is byte-level and no normalizer changes the bytes.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    pre_tokenizer = backend["pre_tokenizer"] or {}
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    is_marked = any(backend["model"].get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    if backend["normalizer"] or is_marked or not any(part.get("type") == "ByteLevel" for part in parts):
        return None
    # In the byte-level alphabet a character stands for a byte; added tokens are written as they are.
    vocab = tokenizer.get_vocab()
    lengths = np.zeros(count_ids(vocab), np.int64)
    for token, index in vocab.items():
        lengths[index] = len(token)
    for token in backend["added_tokens"]:
        is_known = not (token["lstrip"] or token["rstrip"] or puts_space_before(backend))
        lengths[token["id"]] = len(token["content"].encode()) if is_known else UNKNOWN_LENGTH
    if tokenizer.unk_token_id is not None:
        lengths[tokenizer.unk_token_id] = UNKNOWN_LENGTH
    return lengths


def puts_space_before(backend: dict[str, Any]) -> bool:
    """Say whether a tokenizer, given as what its tokenizer.json holds, has `add_prefix_space`."""
    pre_tokenizer = backend["pre_tokenizer"] or {}
    return any(part.get("add_prefix_space") for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]))


class DocumentEncoder:
    """An encoder of documents to token ids, which finds where their sentences end among them.

    The ids are those of the whole document with no special token added. Sentences are found in the text and their ends
    carried over to the tokens; the white space before a sentence goes with it, as in `ĠThen`. A token that reaches over
    an end belongs to the earlier sentence. Picklable, for worker processes.

    Args:
        sentence_splitter: `sentencex` or `newline`.
        language: ISO 639-1 code, for `sentencex`.
        joins_sentences: put one space before each sentence, the document's first too, in place of the white space that
            is there, so that no sentence tells by its first token where it stood; for pairs.
        max_document_characters: longer documents are encoded in pieces (see `split_text`), for flat memory.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        sentence_splitter: str,
        language: str,
        joins_sentences: bool = False,
        max_document_characters: int = 1_000_000,
    ) -> None:
        self.backend = build_text_backend(tokenizer)
        self.num_ids = count_ids(tokenizer.get_vocab())
        self.dtype = np.dtype(np.uint16 if self.num_ids <= 2**16 else np.int32)
        self.unk_token_id = tokenizer.unk_token_id
        self.byte_lengths = token_byte_lengths(tokenizer)
        self.puts_space_before = puts_space_before(json.loads(self.backend.to_str()))
        self.sentence_splitter = sentence_splitter
        self.language = language
        self.joins_sentences = joins_sentences
        self.max_document_characters = max_document_characters

    @property
    def fingerprint(self) -> tuple[str, ...]:
        """Return all that the ids and sentence ends of a text depend on."""
        joined = ("joined",) if self.joins_sentences else ()
        return self.backend.to_str(), self.sentence_splitter, self.language, version("sentencex"), *joined

    def __call__(self, texts: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Encode documents, some at a time.

        Yields the ids of each, (tokens,) uint16 (int32 for vocabularies over 65,536), and the ends of its sentences,
        (sentences,) int64 ascending, the last of which is the number of ids.
        """
        self.backend.encode_special_tokens = True  # does not survive pickling
        ids, ends, length = [], [np.empty(0, np.int64)], 0
        for batch in group_by_size(self.pieces(texts), lambda piece: len(piece[0]), ENCODED_CHARACTERS):
            texts_of_batch, ends_of_batch = zip(*(self.split_sentences(piece) for piece, _ in batch), strict=True)
            rows = self.rows(texts_of_batch, ends_of_batch)
            for (_, is_last), (piece_ids, piece_ends) in zip(batch, rows, strict=True):
                ids.append(piece_ids)
                # A piece's end is a cut, not the end of a sentence; the document's end is added below.
                ends.append(piece_ends + length)
                length += len(piece_ids)
                if is_last:
                    whole = piece_ids if len(ids) == 1 else np.concatenate(ids)
                    yield whole, np.concatenate([*ends, [length]] if length else ends).astype(np.int64, copy=False)
                    ids, ends, length = [], [np.empty(0, np.int64)], 0

    def count_unknown(self, ids: np.ndarray) -> int:
        """Count how often a text has something that the tokenizer does not know."""
        return 0 if self.unk_token_id is None else int(np.count_nonzero(ids == self.unk_token_id))

    def pieces(self, texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """Cut documents into pieces, and say which are their document's last."""
        for text in texts:
            *pieces, last = split_text(text, self.max_document_characters)
            yield from ((piece, False) for piece in pieces)
            yield last, True

    def rows(self, texts: Sequence[str], ends: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the ids of each text, and the ends of its sentences in tokens, ascending and distinct, without its own.

        All texts are worked on as one long one, since numpy's cost for a call on each alone would be most of it. Those
        whose tokens do not add up to their bytes are encoded once more, for the offsets in characters.
        """
        encode = self.backend.encode_batch if self.byte_lengths is None else self.backend.encode_batch_fast
        encodings = encode(texts, add_special_tokens=False)
        lists = [encoding.ids for encoding in encodings]
        counts = np.array([len(ids) for ids in lists])
        firsts = np.cumsum(counts) - counts
        ids = np.fromiter(itertools.chain.from_iterable(lists), self.dtype, counts.sum())
        token_ends, sizes, is_exact = self.measure(texts, ids, counts)
        rest = np.flatnonzero(~is_exact).tolist()
        if self.byte_lengths is not None:
            encodings = self.backend.encode_batch([texts[number] for number in rest], add_special_tokens=False)
        for number, encoding in zip(rest, encodings, strict=True):
            sizes[number] = len(texts[number])
            token_ends[firsts[number] :][: counts[number]] = [end for _, end in encoding.offsets]
        ends = [
            byte_positions(text, own) if exact else own for text, own, exact in zip(texts, ends, is_exact, strict=True)
        ]
        bases = np.cumsum(sizes) - sizes
        token_ends = np.maximum.accumulate(token_ends + np.repeat(bases, counts))
        text_of = np.repeat(np.arange(len(texts)), [len(own) for own in ends])
        wanted = np.concatenate(ends) + bases[text_of]
        # The first token that reaches an end, and all those after it that share its last character.
        found = np.maximum(np.searchsorted(token_ends, wanted) + 1, np.searchsorted(token_ends, wanted, side="right"))
        is_end = (np.diff(found, prepend=-1) > 0) & (found < (firsts + counts)[text_of])
        found, text_of = (found - firsts[text_of])[is_end], text_of[is_end]
        yield from zip(
            np.split(ids, firsts[1:]), np.split(found, np.searchsorted(text_of, np.arange(1, len(texts)))), strict=True
        )

    def measure(
        self, texts: Sequence[str], ids: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Add up the bytes of the tokens of each text.

        Returns:
            (tokens,) int64, where each token ends in its own text; (texts,) int64, the bytes of each text; and
            (texts,) bool, whether its tokens add up to them. Where that is False, its token ends mean nothing.
        """
        if self.byte_lengths is None:
            return np.zeros(len(ids), np.int64), np.zeros(len(texts), np.int64), np.zeros(len(texts), bool)
        sizes = np.array([len(text) if text.isascii() else len(text.encode()) for text in texts])
        sums = np.concatenate([[0], np.cumsum(self.byte_lengths[ids])])
        text_ends = sums[np.cumsum(counts)]
        # A byte of `add_prefix_space` is in front of the text: where tokens end is counted back from its end.
        added = [self.puts_space_before and not text.startswith(" ") for text in texts]
        return sums[1:] - np.repeat(text_ends - sizes, counts), sizes, np.diff(text_ends, prepend=0) == sizes + added

    def split_sentences(self, text: str) -> tuple[str, np.ndarray]:
        """Return a text as it is encoded, and where its sentences end, in characters, without white space behind."""
        ends = self.sentence_ends(text)
        if not self.joins_sentences:
            return text, ends
        sentences = [f" {text[start:end].strip()}" for start, end in itertools.pairwise([0, *ends.tolist()])]
        return "".join(sentences), np.cumsum([len(sentence) for sentence in sentences], dtype=np.int64)

    def sentence_ends(self, text: str) -> np.ndarray:
        """Find where the sentences of a text end, in characters, ascending, without the white space behind each.

        sentencex takes time quadratic in a paragraph without white space, as Chinese and Japanese are written. A text
        with a paragraph longer than `PIECE_CHARACTERS` is therefore taken in pieces of this length, each of which
        begins at an end found in the one before, `MARGIN_CHARACTERS` before its end at the latest: what stands in
        quotation marks or brackets is in one piece with both of them, if it is no longer than that.
        """
        if self.sentence_splitter == "newline":
            return find_ends(text, text.split("\n"))
        if len(text) <= PIECE_CHARACTERS or max(map(len, text.split("\n\n"))) <= PIECE_CHARACTERS:
            return find_ends(text, sentencex.segment(self.language, text))
        ends, start = [], 0
        while len(text) - start > PIECE_CHARACTERS:
            piece = text[start : start + PIECE_CHARACTERS]
            own = find_ends(piece, sentencex.segment(self.language, piece))[:-1]  # the last is the piece's own
            own = own[own <= PIECE_CHARACTERS - MARGIN_CHARACTERS]
            ends.append(own + start)
            start += int(own[-1]) if len(own) else PIECE_CHARACTERS - MARGIN_CHARACTERS
        ends.append(find_ends(text[start:], sentencex.segment(self.language, text[start:])) + start)
        return np.concatenate(ends)


def find_ends(text: str, sentences: Iterable[str]) -> np.ndarray:
    """Find where sentences of a text end in it, in characters, ascending, without the white space behind each."""
    ends, start = [], 0
    for sentence in sentences:
        # sentencex leaves out some paragraph breaks, so lengths alone do not tell where a sentence stands.
        start = text.index(sentence, start)
        if stripped := sentence.rstrip():
            ends.append(start + len(stripped))
        start += len(sentence)
    return np.array(ends, np.int64)


def byte_positions(text: str, character_positions: np.ndarray) -> np.ndarray:
    """Turn ascending character positions into positions of UTF-8 bytes."""
    if text.isascii():
        return character_positions
    starts = [0, *character_positions.tolist()]
    lengths = [len(text[a:b].encode()) for a, b in itertools.pairwise(starts)]
    return np.cumsum(np.array(lengths, np.int64))
