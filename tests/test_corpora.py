import gzip
import json
from pathlib import Path

import pytest

from recipe.config import CorpusArguments, UserError
from recipe.corpora import check_corpus, corpus_bytes, local_files, open_corpus, sample_texts
from tests.conftest import SAMPLE, write_jsonl


def corpus(path: Path | str, **fields: object) -> CorpusArguments:
    return CorpusArguments(name="c", path=str(path), **fields)


def read(path: Path | str, streaming: bool, **fields: object) -> list[str]:
    return [row["text"] for row in open_corpus(corpus(path, **fields), streaming)]


@pytest.mark.parametrize("streaming", [True, False])
def test_formats_folders_and_globs(tmp_path: Path, streaming: bool):
    write_jsonl(tmp_path / "a.jsonl", ["one", "", "two\nlines"])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("\ufeffa whole file\n\nis one document")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n\n{"text": null}\n'))
    (tmp_path / "notes.md").write_text("not a corpus")
    everything = ["one", "two\nlines", "packed", "a whole file\n\nis one document"]
    assert read(tmp_path, streaming) == everything
    assert read(tmp_path / "*.jsonl*", streaming) == everything[:3]
    assert read(tmp_path / "a.jsonl", streaming) == everything[:2]


def test_other_text_column(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": 3}\n')
    assert read(tmp_path / "a.jsonl", streaming=True, text_column="body") == ["x"]


def test_changed_file_is_read_again(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    assert read(tmp_path, streaming=False) == ["one"]
    write_jsonl(tmp_path / "a.jsonl", ["another"])
    assert read(tmp_path, streaming=False) == ["another"]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "ok"}\n{"text": "broken\n', ["bad.jsonl, line 2", "not a JSON object"]),
        (b'{"text": "ok"}\n{"body": "x", "id": 1}\n', ["bad.jsonl, line 2", "'text'", "['body', 'id']", "text_column"]),
        (b'{"text": "ok"}\n\n{"text": "\xff"}\n', ["bad.jsonl, line 3", "UTF-8"]),
        (b'{"text": ["a"]}\n', ["bad.jsonl, line 1", "list, not text"]),
        (b'["text"]\n', ["bad.jsonl, line 1", "list where a JSON object"]),
        (b'{"text": "\\ud800"}\n', ["bad.jsonl, line 1", "surrogate"]),
    ],
)
def test_bad_line_is_named(tmp_path: Path, content: bytes, expected: list[str], streaming: bool):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "bad.jsonl", streaming)
    for part in expected:
        assert part in str(caught.value)


def test_bad_text_file_and_truncated_gzip_are_named(tmp_path: Path):
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=r"bad\.txt: not valid UTF-8 at byte 3"):
        read(tmp_path / "bad.txt", streaming=True)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "x" * 10_000}).encode())[:-20])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: not a complete gzip file"):
        read(tmp_path / "cut.jsonl.gz", streaming=True)


@pytest.mark.parametrize("path", ["no/such/folder/text.jsonl", "./nothing", "missing.jsonl", "/no/*.jsonl"])
def test_missing_path_is_named(path: str):
    with pytest.raises(UserError, match=r"`path` of corpus 'c'"):
        local_files(corpus(path))


def test_folder_without_text_and_empty_corpus_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="holds no file"):
        local_files(corpus(tmp_path))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no text"):
        check_corpus(corpus(tmp_path))
    with pytest.raises(UserError, match="holds no text"):
        open_corpus(corpus(tmp_path), streaming=False)


def test_unreachable_hub_data_set_is_named():
    assert local_files(corpus("somebody/books")) is None
    with pytest.raises(UserError, match=r"(?s)'c'.*somebody/books.*no local path has that name"):
        open_corpus(corpus("somebody/books"), streaming=True)


def test_sample_keeps_to_its_budget_and_weights(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for shard in range(4):
            write_jsonl(tmp_path / name / f"{shard}.jsonl", [f"{name}{shard} " + "x" * 97] * 200)
    corpora = [
        CorpusArguments(name="a", path=str(tmp_path / "a"), weight=3),
        CorpusArguments(name="b", path=str(tmp_path / "b"), weight=1),
    ]
    read_bytes = {"a": 0, "b": 0}
    shards: set[str] = set()
    for name, batch, size in sample_texts(corpora, 40_000):
        assert size == sum(len(text.encode()) for text in batch)
        read_bytes[name] += size
        shards |= {text[:2] for text in batch}
    assert read_bytes == {"a": 30_000, "b": 10_000}
    assert shards == {f"{name}{shard}" for name in "ab" for shard in range(4)}


def test_short_shard_leaves_its_share_to_later_ones(tmp_path: Path):
    write_jsonl(tmp_path / "0.jsonl", ["tiny"])
    write_jsonl(tmp_path / "1.jsonl", ["y" * 100] * 100)
    total = sum(size for _, _, size in sample_texts([corpus(tmp_path)], 1000))
    assert total == 1000


def test_gzip_counts_for_what_it_holds():
    size = sum(len(text.encode()) for text in read(SAMPLE, streaming=True))
    assert corpus_bytes(corpus(SAMPLE)) == pytest.approx(size, rel=0.2)
