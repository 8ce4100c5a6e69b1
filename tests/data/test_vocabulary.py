import tempfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from recipe.arguments import CorpusArguments, TokenizerArguments
from recipe.base.errors import UserError
from recipe.data import vocabulary
from recipe.data.vocabulary import VocabularyText, save_checked, train_vocabulary
from testing.helpers import write_jsonl


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
    assert {word: text.word_counts[word] for word in ("first", "second", "third")} == {
        "first": 2,
        "second": 2,
        "third": 0,
    }
    assert text.read_bytes == dict.fromkeys("ab", sum(map(len, texts)))


def test_tokenizer_has_its_name_once_it_has_passed_the_checks(args, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = VocabularyText(args.corpora, args.max_train_bytes)
    trained = train_vocabulary(args, text.batches())

    def fail(*_: object) -> None:
        raise RuntimeError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "check_saved_tokenizer", fail)
        with pytest.raises(RuntimeError, match="lost"):
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
    assert text.bytes_per_token(trained) == len("".join(text.sample).encode()) / sum(map(len, encoded))


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
