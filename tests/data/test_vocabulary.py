import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from recipe.arguments import CorpusArguments, PretrainArguments, TokenizerArguments, parse_config
from recipe.base.errors import UserError
from recipe.data import vocabulary
from recipe.data.trainers import count_words, find_lost_words
from recipe.data.vocabulary import VocabularyText, describe_vocabulary, save_checked, train_vocabulary
from testing.helpers import ROOT, write_jsonl
from train_tokenizer import next_command


@pytest.fixture
def args(corpus_file: Path, tmp_path: Path) -> TokenizerArguments:
    corpora = [CorpusArguments(name="sample", path=str(corpus_file))]
    return TokenizerArguments(output_dir=str(tmp_path / "tokenizer"), corpora=corpora, vocab_size=400)


def test_only_the_beginning_of_each_corpus_is_kept_for_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vocabulary, "COUNTED_BYTES", 1_500_000)
    monkeypatch.setattr(vocabulary, "COMPARED_TEXTS", 2)
    monkeypatch.setattr(vocabulary, "COMPARED_CHARACTERS", 10)
    texts = [f" first {'x' * 1_000_000}", f" second {'x' * 1_000_000}", f" third {'x' * 1_000_000}"]
    corpora = [CorpusArguments(name=name, path=str(write_jsonl(tmp_path / f"{name}.jsonl", texts))) for name in "ab"]
    text = VocabularyText(corpora, 10_000_000)
    assert [size for batch in text.batches() for size in map(len, batch)] == [len(one) for one in texts] * 2
    assert text.sample == [" first xxx", " first xxx"]  # of the first batch, which a text of 1 MB fills
    assert [beginning[:7] for beginning in text.beginnings] == [" first ", " second"] * 2
    assert text.read_bytes == dict.fromkeys("ab", sum(map(len, texts)))


def test_tokenizer_has_its_name_once_it_has_passed_the_checks(args, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = VocabularyText(args.corpora, args.max_train_bytes)
    trained = train_vocabulary(args, text.batches())

    def fail(*_: object) -> None:
        raise RuntimeError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "check_saved_tokenizer", fail)
        with pytest.raises(RuntimeError, match=r"lost; the vocabulary is kept in .*/\.unchecked"):
            save_checked(args, trained, text)
    assert [path.name for path in (tmp_path / "tokenizer").iterdir()] == [".unchecked"]
    assert (tmp_path / "tokenizer" / ".unchecked" / "tokenizer.json").exists()
    (tmp_path / "tokenizer" / ".unchecked" / "vocab.txt").write_text("of another kind")
    save_checked(args, trained, text)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    files = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    assert {path.name for path in (tmp_path / "tokenizer").iterdir()} == files
    assert len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer")) == 400
    encoded = trained.encode_batch(text.sample, add_special_tokens=False)
    assert text.measure(trained) == (len("".join(text.sample).encode()) / sum(map(len, encoded)), 0)


def test_tokenizer_is_not_lost_where_its_folder_cannot_be_written(args, tmp_path: Path, monkeypatch):
    text = VocabularyText(args.corpora, args.max_train_bytes)
    trained = train_vocabulary(args, text.batches())
    (tmp_path / "tokenizer").write_text("a file that has come in the meantime")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    with pytest.raises(
        UserError, match=r"`output_dir` .*tokenizer cannot be written \(.*; the tokenizer is in "
    ) as caught:
        save_checked(args, trained, text)
    assert (tmp_path / "tokenizer").is_file()
    [folder] = (tmp_path / "elsewhere").iterdir()
    assert str(folder) in str(caught.value)
    assert len(AutoTokenizer.from_pretrained(folder)) == 400


SCRIPTS = {
    "superscripts": "CO₂ and H₂O in 5 km² or m³, x² n° 1ˢᵗ. The don't of it's 1990s ½ cup. ",
    "hindi": "यह हिन्दी में लिखा हुआ है। मैं विद्यार्थी हूँ और किताबें पढ़ता हूँ। ",
    "chinese": "今天 天气 很好 ， 我们 去 公园 散步 。 他 不 相信 我 。 ",
    "chinese-joined": "今天天气很好，我们去公园散步。他不相信我。",
    "arabic": "ذَهَبَ الوَلَدُ إلى المدرسةِ. هذا كِتابٌ جميلٌ. ",
    "thai": "ฉัน ไป โรงเรียน ทุกวัน และ กิน ข้าว ",
    "vietnamese": "Tôi đang học tiếng Việt ở Hà Nội. ",  # with combining marks
    "code": "def f(x_1): return x_1 ** 2 != '___' # ---- ",
}


@pytest.mark.parametrize("kind", ["byte_level_bpe", "wordpiece", "unigram"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_common_word_is_missed_in_any_script(args, tmp_path: Path, kind: str, script: str):
    corpus = CorpusArguments(name="a", path=str(write_jsonl(tmp_path / "a.jsonl", [SCRIPTS[script] * 20] * 50)))
    args = replace(args, corpora=[corpus], tokenizer_type=kind, vocab_size=2000)
    text = VocabularyText(args.corpora, args.max_train_bytes)
    trained = train_vocabulary(args, text.batches())
    save_checked(args, trained, text)
    *warnings, last = describe_vocabulary(args, trained, text)
    assert last.startswith(f"{args.output_dir}: ")
    assert all("was enough for only" in line for line in warnings)
    words = count_words(trained, text.beginnings)
    assert words.most_common(1)[0][1] >= (50 if (kind, script) == ("unigram", "chinese-joined") else 1000)


def test_lost_words_cost_no_vocabulary(args, tmp_path: Path):
    text = VocabularyText(args.corpora, args.max_train_bytes)
    trained = train_vocabulary(args, text.batches())
    text.beginnings = [" zyzzyva ₂née" * 1000]
    save_checked(args, trained, text)
    assert len(AutoTokenizer.from_pretrained(args.output_dir)) == 400
    assert "warning: the common words [' zyzzyva'] did not become single tokens" in "\n".join(
        describe_vocabulary(args, trained, text)
    )
    assert find_lost_words(trained, count_words(trained, [" the the the"] * 100)) == []


def test_characters_that_do_not_fit_are_named_with_the_number_needed(args, tmp_path: Path):
    characters = "".join(chr(number) for number in range(0x4E00, 0x4E00 + 600))
    corpus = CorpusArguments(name="zh", path=str(write_jsonl(tmp_path / "zh.jsonl", [characters] * 5)))
    args = replace(args, corpora=[corpus], tokenizer_type="unigram")
    text = VocabularyText(args.corpora, args.max_train_bytes)
    with pytest.raises(UserError, match=r"`vocab_size` is 400, .* which are 607 with the special tokens"):
        train_vocabulary(args, text.batches())
    assert train_vocabulary(replace(args, vocab_size=607), text.batches()).get_vocab_size() <= 607
    args = replace(args, tokenizer_type="wordpiece")
    text = VocabularyText(args.corpora, args.max_train_bytes)
    trained = train_vocabulary(args, text.batches())
    save_checked(args, trained, text)
    [warning, _] = describe_vocabulary(args, trained, text)
    assert "`vocab_size` is 400, and the characters of the text alone need 605 entries" in warning


def test_unknown_characters_are_told(args, tmp_path: Path):
    """WordPiece knows the thousand commonest."""
    texts = ["".join(chr(number) for number in range(0x4E00, 0x4E00 + 1000)), "的一" * 1000]
    corpus = CorpusArguments(name="zh", path=str(write_jsonl(tmp_path / "zh.jsonl", texts)))
    args = replace(args, corpora=[corpus], tokenizer_type="wordpiece", vocab_size=2500)
    text = VocabularyText(args.corpora, args.max_train_bytes)
    lines = describe_vocabulary(args, train_vocabulary(args, text.batches()), text)
    assert any("of the tokens of the first texts are unknown" in line for line in lines)


@pytest.mark.parametrize(
    ("kind", "entries", "model_type"),
    [
        ("byte_level_bpe", 400, "roberta"),
        ("wordpiece", 400, "bert"),
        ("unigram", 400, "albert"),
        ("byte_level_bpe", 50_265, "roberta"),
        ("unigram", 30_000, "albert"),
    ],
)
def test_next_command_trains_on_the_same_text(args, monkeypatch, kind: str, entries: int, model_type: str):
    corpora = [
        CorpusArguments(name="it's", path="a b/ü.jsonl", text_column="body"),
        CorpusArguments(name="b", path="c/d"),
    ]
    args = replace(args, corpora=corpora, tokenizer_type=kind)
    monkeypatch.chdir(ROOT)
    python, script, *options = shlex.split(next_command(args, entries))
    assert (python, script) == ("python", "pretrain.py")
    monkeypatch.setattr(sys, "argv", [script, *options])
    parsed = parse_config(PretrainArguments, "")
    assert (parsed.corpora, parsed.tokenizer_name, parsed.model_type) == (corpora, args.output_dir, model_type)
    assert parsed.dry_run
    assert parsed.model_config["num_hidden_layers"] == (3 if entries == 400 else 12)
