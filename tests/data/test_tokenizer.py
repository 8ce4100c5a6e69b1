import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlbertTokenizer,
    AutoTokenizer,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
    RobertaTokenizerFast,
)

from recipe.base.errors import UserError
from recipe.data.document_encoder import PIECE_CHARACTERS, DocumentEncoder, find_ends, split_text
from recipe.data.tokenizer import load_tokenizer, role_ids
from recipe.data.trainers import (
    check_saved_tokenizer,
    save_tokenizer,
    train_byte_level_bpe,
    train_unigram,
    train_wordpiece,
)
from testing.helpers import ROOT, SAMPLE

SPECIALS = "text with <s> and </s>, <pad>, <unk> and <mask> in it. Another <mask>"
any_text = st.text(min_size=1, max_size=300)
sentences = st.lists(
    st.sampled_from(
        ["He went. ", "Née à Paris!\n\n", "  Then — so  he said: “No.” ", "Dr. Who?\n", "😀😀. ", "<mask> </s> "]
    ),
    min_size=1,
    max_size=30,
).map("".join)


def test_special_tokens_stand_where_roberta_has_them(tokenizer_dir: Path):
    for loader in (AutoTokenizer, RobertaTokenizerFast):
        loaded = loader.from_pretrained(tokenizer_dir)
        assert loaded.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == [0, 1, 2, 3, 399]
        assert len(loaded) == 400
        assert loaded.added_tokens_decoder[399].lstrip
        assert loaded("a <mask>.")["input_ids"][0] == 0
        assert loaded("a <mask>.")["input_ids"][-1] == 2
        assert 399 in loaded("a <mask>.")["input_ids"]
    assert {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"} <= set(os.listdir(tokenizer_dir))
    from_files = RobertaTokenizerFast(vocab=str(tokenizer_dir / "vocab.json"), merges=str(tokenizer_dir / "merges.txt"))
    assert from_files("He was there.")["input_ids"] == loaded("He was there.")["input_ids"]


@given(any_text)
@example("<unk> and </s><mask>")
@settings(max_examples=200, deadline=None)
def test_no_text_is_unknown_and_decoding_gives_it_back(tokenizer, text):
    [(ids, _)] = DocumentEncoder(tokenizer, "newline", "en")([text])
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_add_prefix_space_survives_the_round_trip(texts, tmp_path: Path, add_prefix_space: bool):
    trained = train_byte_level_bpe([texts], 350, 2, add_prefix_space, max_document_characters=10_000)
    save_tokenizer(trained, tmp_path, add_prefix_space, model_max_length=64)
    check_saved_tokenizer(trained, tmp_path, texts[:20], add_prefix_space)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    first = loaded.convert_ids_to_tokens(loaded("the", add_special_tokens=False)["input_ids"])[0]
    assert first.startswith("Ġ") == add_prefix_space


def test_check_after_saving_sees_a_different_tokenizer(texts, tokenizer_dir: Path):
    other = train_byte_level_bpe([texts[:10]], 300, 2, add_prefix_space=False, max_document_characters=10_000)
    with pytest.raises(RuntimeError, match="does not give the trained ids"):
        check_saved_tokenizer(other, tokenizer_dir, texts[:20], add_prefix_space=False)


def test_vocabulary_is_that_of_one_thread_on_several(tmp_path: Path):
    """The library trains with one thread here, by `TOKENIZERS_PARALLELISM` in conftest.py, and with three there."""
    corpora = json.dumps([{"name": "tales", "path": str(SAMPLE / "tales.jsonl.gz")}])
    command = [sys.executable, "train_tokenizer.py", f"--output_dir={tmp_path}", f"--corpora={corpora}"]
    environment = os.environ | {"RAYON_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "true"}
    subprocess.run([*command, "--vocab_size=1000", "--max_train_bytes=300000"], cwd=ROOT, env=environment, check=True)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    once_more = train_byte_level_bpe(
        [[text for _, batch, _ in sample() for text in batch]], 1000, 2, False, max_document_characters=1_000_000
    )
    assert {token: id for token, id in once_more.get_vocab().items() if token != "<mask>"} == vocab


def sample():
    from recipe.arguments import CorpusArguments
    from recipe.data.corpora import sample_texts

    return sample_texts([CorpusArguments(name="tales", path=str(SAMPLE / "tales.jsonl.gz"))], 300_000)


def test_tokenizer_script_refuses_an_existing_one(tokenizer_dir: Path, corpus_file: Path):
    corpora = json.dumps([{"name": "a", "path": str(corpus_file)}])
    command = [sys.executable, "train_tokenizer.py", f"--output_dir={tokenizer_dir}", f"--corpora={corpora}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: `output_dir`")
    assert "already holds a tokenizer" in result.stderr


@given(st.text(alphabet="ab. \n1é", min_size=1, max_size=400), st.integers(5, 60))
@settings(max_examples=200, deadline=None)
def test_pieces_of_a_text_have_its_ids(tokenizer, text, limit):
    pieces = list(split_text(text, limit))
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)
    # Cut at a space between letters wherever there is one in reach; ids then cannot differ.
    if all(p[-1].isalpha() and q[:1] == " " and q[1:2].isalpha() for p, q in itertools.pairwise(pieces)):
        whole = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        parts = [tokenizer.backend_tokenizer.encode(p, add_special_tokens=False).ids for p in pieces]
        assert [id for ids in parts for id in ids] == whole


def test_special_tokens_in_the_text_stay_text(tokenizer: PreTrainedTokenizerFast):
    encoder = pickle.loads(pickle.dumps(DocumentEncoder(tokenizer, "sentencex", "en")))
    ids = next(encoder([SPECIALS]))[0].tolist()
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == SPECIALS


@given(st.lists(sentences, min_size=1, max_size=5), st.sampled_from(["sentencex", "newline"]))
@settings(max_examples=100, deadline=None)
def test_rows_are_the_documents_own_ids(tokenizer, documents, splitter):
    rows = list(DocumentEncoder(tokenizer, splitter, "en")(documents))
    assert len(rows) == len(documents)
    for (ids, ends), document in zip(rows, documents, strict=True):
        assert ids.tolist() == tokenizer(document, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert (np.diff(ends) > 0).all()
        assert ends[0] > 0
        assert ends[-1] == len(ids)


def rows_of(encoder: DocumentEncoder, texts: list[str]) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), ends.tolist()) for ids, ends in encoder(texts)]


def test_space_before_a_sentence_goes_with_it(tokenizer: PreTrainedTokenizerFast):
    text = "He was. Then — née — she was! “The end.”\n\nIt is."
    ids, ends = next(DocumentEncoder(tokenizer, "sentencex", "en")([text]))
    found = [tokenizer.decode(ids[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert found == ["He was.", " Then — née — she was!", " “The end.”", "\n\nIt is."]


@pytest.mark.parametrize("splitter", ["sentencex", "newline"])
def test_joined_sentences_all_begin_with_one_space(tokenizer: PreTrainedTokenizerFast, splitter):
    """Else a document's first sentence is known by its first token."""
    documents = ["He was.\n  He was.\n\n\tHe was. \n", "  Née in Paris.\nHe was. \n " * 3, "\n", "It is"]
    plain = DocumentEncoder(tokenizer, splitter, "en")
    encoder = DocumentEncoder(tokenizer, splitter, "en", joins_sentences=True, max_document_characters=60)
    assert encoder.fingerprint != plain.fingerprint
    rows = list(encoder(documents))
    found = [[tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise([0, *ends])] for ids, ends in rows]
    assert found == [[" He was."] * 3, [" Née in Paris.", " He was."] * 3, [], [" It is"]]
    encoder.byte_lengths = None
    assert rows_of(encoder, documents) == [(ids.tolist(), ends.tolist()) for ids, ends in rows]


def test_newline_splitter_ends_sentences_at_line_ends(tokenizer: PreTrainedTokenizerFast):
    _, ends = next(DocumentEncoder(tokenizer, "newline", "en")(["One. Two.\nThree."]))
    assert len(ends) == 2


def test_byte_lengths_and_offsets_find_the_same_sentence_ends(tokenizer, texts):
    by_bytes = DocumentEncoder(tokenizer, "sentencex", "en")
    by_offsets = DocumentEncoder(tokenizer, "sentencex", "en")
    by_offsets.byte_lengths = None
    documents = [*texts, "Née à Paris. 😀 Then! " * 5]
    assert rows_of(by_bytes, documents) == rows_of(by_offsets, documents)


def test_prefix_space_does_not_move_sentence_ends(texts):
    tokenizers = [
        RobertaTokenizerFast(
            **{
                name: value if name == "vocab" else [tuple(m) for m in value]
                for name, value in json.loads(
                    train_byte_level_bpe([texts], 350, 2, prefix, max_document_characters=10_000).to_str()
                )["model"].items()
                if name in ("vocab", "merges")
            },
            add_prefix_space=prefix,
        )
        for prefix in (True,)
    ]
    encoder = DocumentEncoder(tokenizers[0], "sentencex", "en")
    by_offsets = DocumentEncoder(tokenizers[0], "sentencex", "en")
    by_offsets.byte_lengths = None
    assert rows_of(encoder, texts) == rows_of(by_offsets, texts)


@pytest.mark.parametrize("do_lower_case", [True, False])
@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_vocabularies_of_bert_and_albert_survive_the_round_trip(texts, tmp_path: Path, kind: str, do_lower_case: bool):
    texts = [text.replace("was", "né") for text in texts]
    if kind == "wordpiece":
        trained = train_wordpiece([texts], 300, 2, do_lower_case, max_document_characters=10_000)
    else:
        trained = train_unigram([texts], 200, do_lower_case, max_document_characters=10_000)
    save_tokenizer(trained, tmp_path, False, model_max_length=64, do_lower_case=do_lower_case)
    check_saved_tokenizer(trained, tmp_path, texts[:20], False)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, BertTokenizerFast if kind == "wordpiece" else AlbertTokenizer)
    pair = loaded("He né.", "They had!")
    expected = "[CLS]hene.[SEP]theyhad![SEP]" if do_lower_case else "[CLS]Hené.[SEP]Theyhad![SEP]"
    assert loaded.decode(pair["input_ids"]).replace(" ", "") == expected
    assert pair["token_type_ids"][-1] == 1
    assert loaded.convert_tokens_to_ids(["[CLS]", "[SEP]", "[MASK]"]) == [2, 3, 4]
    other = train_wordpiece if kind == "wordpiece" else train_unigram
    smaller = other([texts[:9]], *([250, 2] if kind == "wordpiece" else [150]), do_lower_case, 10_000)
    with pytest.raises(RuntimeError, match="does not give the trained ids"):
        check_saved_tokenizer(smaller, tmp_path, texts[:20], False)


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_other_tokenizers_get_their_ends_from_offsets(tokenizer_dirs, kind: str):
    fast = load_tokenizer(str(tokenizer_dirs[kind]))
    ids, ends = next(DocumentEncoder(fast, "sentencex", "en")(["He was. Then she was!"]))
    tokens = fast.convert_ids_to_tokens(ids)
    assert tokens[ends[0] - 1] == "."
    assert ends[1] == len(tokens)


@pytest.mark.parametrize("limit", [50, 333])
def test_long_documents_are_encoded_in_pieces_with_the_same_rows(tokenizer, texts, limit: int):
    whole = DocumentEncoder(tokenizer, "newline", "en")
    pieces = DocumentEncoder(tokenizer, "newline", "en", max_document_characters=limit)
    documents = ["\n".join(texts[:20])]
    assert rows_of(whole, documents) == rows_of(pieces, documents)


def test_documents_are_the_same_in_batches_of_any_size(tokenizer, texts, monkeypatch):
    encoder = DocumentEncoder(tokenizer, "sentencex", "en", max_document_characters=100)
    whole = rows_of(encoder, texts)
    monkeypatch.setattr("recipe.data.document_encoder.ENCODED_CHARACTERS", 150)
    assert rows_of(encoder, texts) == whole


def test_ids_of_large_vocabularies_are_int32(tokenizer: PreTrainedTokenizerFast):
    encoder = DocumentEncoder(tokenizer, "sentencex", "en")
    assert next(encoder(["a"]))[0].dtype == np.uint16
    encoder.dtype = np.dtype(np.int32)
    assert next(encoder(["a"]))[0].dtype == np.int32


def test_missing_tokenizer_is_named(tmp_path: Path, tokenizer_dir: Path):
    shutil.copy(tokenizer_dir / "tokenizer_config.json", tmp_path)
    with pytest.raises(UserError, match=r"`tokenizer_name` is .*no vocabulary is there"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="tokenizer_name"):
        load_tokenizer(str(tmp_path / "nothing"))


def renumbered(source: Path, folder: Path, **ids: int) -> Path:
    """Copy a byte-level tokenizer, with other ids of some tokens and without those whose id is negative."""
    shutil.copytree(source, folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["vocab"] |= ids
    removed = {token for token, index in state["model"]["vocab"].items() if index < 0}
    state["model"]["vocab"] = {token: i for token, i in state["model"]["vocab"].items() if token not in removed}
    state["model"]["merges"] = [m for m in state["model"]["merges"] if not removed & {*m, "".join(m)}]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder


def test_ids_with_gaps_are_those_of_the_vocabulary(tmp_path: Path, tokenizer_dir: Path):
    ids = {"<mask>": 70_000, "e": 65_600, "Ġthe": -1}
    loaded = load_tokenizer(str(renumbered(tokenizer_dir, tmp_path / "gaps", **ids)))
    assert (len(loaded), loaded.mask_token_id) == (399, 70_000)
    encoder = DocumentEncoder(loaded, "sentencex", "en")
    [(found, ends)] = encoder(["me. Be"])
    assert (encoder.num_ids, encoder.dtype, found.max()) == (70_001, np.int32, 65_600)
    assert ends[-1] == len(found)


def test_ids_too_high_or_of_two_tokens_are_refused(tmp_path: Path, tokenizer_dir: Path):
    high = renumbered(tokenizer_dir, tmp_path / "high", e=10**9)
    with pytest.raises(UserError, match=r"whose ids go up to 1,000,000,000; renumber them below 16,777,216"):
        load_tokenizer(str(high))
    # Without an entry for it in the vocabulary, the library gives `<mask>` the number of the others.
    pruned = renumbered(tokenizer_dir, tmp_path / "pruned", **{"Ġthe": -1})
    with pytest.raises(UserError, match=r"and .* have one id, 398: .* write each added token, with its id, into"):
        load_tokenizer(str(pruned))


def test_documents_are_whole_whatever_the_tokenizer_was_used_for_before(tokenizer_dir: Path, texts: list[str]):
    """Found by the fuzz, seed 0, corpus:305 after glue:305."""
    tokenizer = load_tokenizer(str(tokenizer_dir))
    encoder = DocumentEncoder(tokenizer, "sentencex", "en")
    whole = [ids.tolist() for ids, _ in encoder(texts)]
    tokenizer(texts[0], truncation=True, padding="max_length", max_length=5)
    for used in (encoder, DocumentEncoder(tokenizer, "sentencex", "en")):
        assert [ids.tolist() for ids, _ in used(texts)] == whole


def with_added(source: Path, folder: Path, *added: AddedToken | str, special: bool = False) -> PreTrainedTokenizerFast:
    """Add tokens to a saved tokenizer, save it in another folder, and load it from there."""
    stock = AutoTokenizer.from_pretrained(source)
    stock.add_tokens(list(added), special_tokens=special)
    stock.save_pretrained(folder)
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("kind", ["roberta", "bert", "albert"])
@pytest.mark.parametrize("special", [False, True])
def test_own_special_tokens_keep_their_ids_and_roles_stay_text(tokenizer_dirs, tmp_path: Path, kind, special):
    """Also Unigram's, whose model finds its own pieces in the text, `[MASK]` and `<pad>` among them."""
    loaded = with_added(tokenizer_dirs[kind], tmp_path, "<url>", "<user>", "[CITE]", special=special)
    text = "he <url> was [CITE] and <s> [CLS] <mask> [MASK][SEP] <pad> [UNK]<unk> </s> by <user>. Then <url> she!"
    encoder = pickle.loads(pickle.dumps(DocumentEncoder(loaded, "sentencex", "en")))
    [(ids, ends)] = encoder([text])
    own = loaded.convert_tokens_to_ids(["<url>", "<user>", "[CITE]"])
    assert [index for index in ids if index in own] == [own[0], own[2], own[1], own[0]]
    assert not set(ids) & set(role_ids(loaded)) - {loaded.unk_token_id}
    assert loaded.convert_ids_to_tokens(ids[ends[0] - 1 : ends[0]]) == ["."]
    assert loaded(text)["input_ids"] == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]


PIECES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "he", "there", *"abdehkmnprstuw<>/"]
VOCAB = {token: index for index, token in enumerate([*PIECES, *(f"##{piece}" for piece in PIECES[7:])])}


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel(VOCAB, unk_token="<unk>"),
        models.WordPiece(VOCAB, unk_token="<unk>"),
        models.BPE(VOCAB, [("h", "e")], unk_token="<unk>", ignore_merges=True),
        models.BPE(VOCAB, [("h", "e")], unk_token="<unk>"),
        models.Unigram([(token, -1.0) for token in PIECES], unk_id=3),
    ],
    ids=["words", "pieces", "bpe-words", "bpe", "unigram"],
)
def test_words_of_the_text_that_are_tokens_with_a_role_stay_text(tmp_path: Path, model):
    """Words are cut at white space alone here, so that the models are asked for the tokens' own names."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    ids = [("<s>", VOCAB["<s>"]), ("</s>", VOCAB["</s>"])]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ids
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>", **roles)
    tokenizer.add_tokens([AddedToken("<url>", special=True)])
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    encoder = pickle.loads(pickle.dumps(DocumentEncoder(loaded, "newline", "en")))
    [(ids, _)] = encoder(["he <mask> was <s> </s> <pad> <unk> there <url> ☂"])
    assert not set(ids) & {0, 1, 2, 4}
    assert encoder.count_unknown(ids)
    assert ids[0] == VOCAB["he"]
    assert ids[-2:].tolist() == [loaded.convert_tokens_to_ids("<url>"), 3]


def save_with_roles(folder: Path, template: tuple[str, str] | None, **roles: str) -> str:
    """Save a tokenizer with these roles, and a template for one text and for two; return the folder's path."""
    backend = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    if template:
        single, pair = template
        ids = [(token, VOCAB[token]) for token in ("<s>", "</s>", "<pad>")]
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    roles = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"} | roles
    PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>", **roles).save_pretrained(folder)
    return str(folder)


TEMPLATE = "<s> $A </s>", "<s> $A </s> $B </s>"


@pytest.mark.parametrize(
    "template", [None, ("<s> $A", "<s> $A $B"), ("</s> $A <s>", TEMPLATE[1]), (TEMPLATE[0], "$A $B")]
)
def test_rows_of_the_tokenizer_itself_are_those_of_training(tmp_path: Path, template):
    with pytest.raises(UserError, match=r"of 'a' and not <s> … </s>, as blocks are: give it a post-processor"):
        load_tokenizer(save_with_roles(tmp_path, template))


@pytest.mark.parametrize(
    ("role", "token", "twin"),
    [
        ("pad_token", "</s>", "`pad_token` </s> is its `sep_token` too"),
        ("pad_token", "<mask>", "`pad_token` <mask> is its `mask_token` too"),
        ("cls_token", "<pad>", "`pad_token` <pad> is its `cls_token` too"),
    ],
)
def test_padding_and_mask_are_tokens_of_their_own(tmp_path: Path, role: str, token: str, twin: str):
    with pytest.raises(UserError, match=twin):
        load_tokenizer(save_with_roles(tmp_path, TEMPLATE, **{role: token}))
    load_tokenizer(save_with_roles(tmp_path / "right", TEMPLATE))


ADDED = [
    AddedToken("糖尿病", normalized=True),
    AddedToken("Übelkeit", lstrip=True, rstrip=True),
    AddedToken("µmol", rstrip=True),
    AddedToken("|", lstrip=True),
    AddedToken("naïve", single_word=True),
]
MEDICAL = "Er hat 糖尿病 and  Übelkeit . It was 8 µmol  in | blood, naïve. 糖尿病. Then she — née — went 😀! 😀 Was |? "


@pytest.mark.parametrize("kind", ["bytes", "prefix", "bytes without some", "lower", "bert", "albert"])
@pytest.mark.parametrize("joins_sentences", [False, True])
def test_sentence_ends_with_added_tokens(tokenizer_dirs, tmp_path: Path, kind: str, joins_sentences: bool):
    """Also of byte-level tokenizers with `add_prefix_space`, without all bytes, and with a normalizer."""
    source = Path(shutil.copytree(tokenizer_dirs.get(kind, tokenizer_dirs["roberta"]), tmp_path / "source"))
    state = json.loads((source / "tokenizer.json").read_text())
    if kind == "prefix":
        settings = json.loads((source / "tokenizer_config.json").read_text()) | {"add_prefix_space": True}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    if kind == "bytes without some":
        for character in "ÃĠ":
            state["model"]["vocab"][f"missing {character}"] = state["model"]["vocab"].pop(character)
        merges = [merge for merge in state["model"]["merges"] if not set("ÃĠ") & set("".join(merge))]
        state["model"] |= {"unk_token": "<unk>", "merges": merges}
    if kind == "lower":
        state["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "NFD"}]}
    (source / "tokenizer.json").write_text(json.dumps(state))
    if kind in ("bytes without some", "lower"):
        settings = json.loads((source / "tokenizer_config.json").read_text())
        (source / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "TokenizersBackend"}))
    loaded = with_added(source, tmp_path / "added", *ADDED)
    documents = [
        MEDICAL * 3,
        "It was. 糖尿病 it. Was it?",
        "糖尿病. 糖尿病. a",
        "|. Was",
        " He was. It is.",
        "Née. née",
    ]
    encoder = DocumentEncoder(loaded, "sentencex", "en", joins_sentences)
    assert encoder.byte_lengths is None or "bytes" in kind or kind == "prefix"
    rows = list(encoder(documents))
    for (ids, ends), document in zip(rows, documents, strict=True):
        text, sentence_ends = encoder.split_sentences(document)
        offsets = encoder.backend.encode(text, add_special_tokens=False).offsets
        reached = [max(end for _, end in offsets[:index]) for index in ends]
        assert len(ids) == len(offsets)
        # A sentence ends with the first token that reaches its end, and no other begins there.
        expected = []
        for sentence_end in sentence_ends:
            last = next((n for n, (_, end) in enumerate(offsets) if end >= sentence_end), len(offsets) - 1)
            while last + 1 < len(offsets) and offsets[last + 1][1] <= sentence_end:
                last += 1
            expected.append(last + 1)
        assert ends.tolist() == sorted({*expected, len(ids)}), (document, reached)


def test_sentence_never_ends_inside_a_character(texts, tmp_path: Path):
    """The offsets of the tokens of one character are all the same."""
    trained = train_byte_level_bpe([texts], 300, 2, add_prefix_space=False, max_document_characters=10_000)
    save_tokenizer(trained, tmp_path, add_prefix_space=False, model_max_length=64)
    loaded = load_tokenizer(str(tmp_path))
    encoder = DocumentEncoder(loaded, "sentencex", "zh")
    by_bytes = rows_of(encoder, ["他来了。她走了！好？", "😀。😀"])
    encoder.byte_lengths = None
    assert rows_of(encoder, ["他来了。她走了！好？", "😀。😀"]) == by_bytes
    [(ids, ends), _] = by_bytes
    assert loaded.decode(ids[: ends[0]]) == "他来了。"


@pytest.mark.parametrize(("language", "text"), [
    ("zh", "今天天气很好，我们去公园散步。他说：“你好吗？我很好。”是吗？（真的。）但是他不相信我……"),
    ("ja", "今日は天気がいい。「行きますか？はい。」と言った！（本当。）でも…"),
    ("en", 'He was (so. to speak) "there. Was he?" Dr. Who went. “No!” It is.\nThen'),
])  # fmt: skip
def test_long_lines_have_the_sentence_ends_of_the_whole(tokenizer, language: str, text: str):
    encoder = DocumentEncoder(tokenizer, "sentencex", language)
    long = "".join(text.replace("很好", "很" * (n % 50) + "好") for n in range(-(-23_000 // len(text))))
    assert len(long) > 2 * PIECE_CHARACTERS
    expected = find_ends(long, sentencex.segment(language, long))
    assert encoder.sentence_ends(long).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "text", ["字" * 30_000, "字" * 15_000 + "。" + "字" * 15_000 + "。字", " " * 25_000, "。" * 25_000]
)
def test_long_lines_without_sentences_come_to_an_end(tokenizer, text: str):
    ends = DocumentEncoder(tokenizer, "sentencex", "zh").sentence_ends(text)
    assert (np.diff(ends) > 0).all()
    assert ends.tolist() == find_ends(text, sentencex.segment("zh", text)).tolist()


@pytest.mark.parametrize("files", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_bare_files_are_the_tokenizer_of_roberta(tokenizer: PreTrainedTokenizerFast, tokenizer_dir, tmp_path, files):
    for file in files:
        shutil.copy(tokenizer_dir / file, tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert isinstance(loaded, RobertaTokenizerFast)
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.added_tokens_decoder[399].lstrip
    assert loaded("He <mask> there", "It is")["input_ids"] == tokenizer("He <mask> there", "It is")["input_ids"]


def test_bare_files_of_others_are_named_with_the_way_out(tokenizer_dirs, tmp_path):
    for kind in ("bert", "albert"):
        (tmp_path / kind).mkdir()
        shutil.copy(tokenizer_dirs[kind] / "tokenizer.json", tmp_path / kind)
    (tmp_path / "gpt2").mkdir()
    text = (tokenizer_dirs["roberta"] / "tokenizer.json").read_text().replace('"</s>"', '"<|endoftext|>"')
    (tmp_path / "gpt2" / "tokenizer.json").write_text(text)
    for kind in ("bert", "albert", "gpt2"):
        with pytest.raises(
            UserError, match=r"is no byte-level BPE with <s>, .*, as RoBERTa's .*; load it by its class"
        ):
            load_tokenizer(str(tmp_path / kind), "model_name_or_path")
    (tmp_path / "word").mkdir()
    shutil.copy(tokenizer_dirs["bert"] / "vocab.txt", tmp_path / "word")  # which does not say what is lower-cased
    with pytest.raises(UserError, match=r"`model_name_or_path` is .*, and no tokenizer.json is there, nor vocab.json"):
        load_tokenizer(str(tmp_path / "word"), "model_name_or_path")


@pytest.mark.parametrize("name", ["runs/tokenizer", "/nowhere/tokenizer", "a/b/tokenizer"])
def test_missing_folder_is_refused_without_asking_the_hub(tmp_path: Path, monkeypatch, name: str):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(UserError, match=f"`tokenizer_name` is {name}: no tokenizer there: there is no such folder"):
        load_tokenizer(name)
