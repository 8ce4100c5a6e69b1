import gzip
import json
import random
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipe.arguments import CorpusArguments
from recipe.arguments.corpus_files import local_files
from recipe.base.errors import UserError
from recipe.data.corpora import (
    LocalSource,
    Part,
    SourceError,
    check_corpus,
    corpus_bytes,
    open_source,
    sample_texts,
    source_fingerprint,
)
from testing.helpers import SAMPLE, write_jsonl


def corpus(path: Path | str, **fields: object) -> CorpusArguments:
    return CorpusArguments(name="c", path=str(path), **fields)


def read(path: Path | str, **fields: object) -> list[str]:
    """All documents; what is malformed raises."""
    source = open_source(corpus(path, **fields))
    found = [text for shard in range(source.num_shards) for _, text in source.read(shard)]
    for text in found:
        if isinstance(text, UserError):
            raise text
    return [text for text in found if text]


def compress(path: Path, data: bytes) -> Path:
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes(gzip.compress(data))
    return path


def write_table(path: Path, texts: list[str | None], column: str = "text", rows: int = 3) -> Path:
    table = pa.table({"id": list(range(len(texts))), column: texts})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
    else:
        opened = pa.ipc.new_stream if path.stem.endswith("stream") else pa.ipc.new_file
        with opened(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return path


def test_formats_folders_and_globs(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", ["one", "", "two\nlines"])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("\ufeffa whole file\n\nis one document")
    compress(tmp_path / "c.jsonl.gz", b'{"text": "packed"}\n\n{"text": null}\n')
    compress(tmp_path / "d.jsonl.zst", b'{"text": "closely"}\n')
    compress(tmp_path / "e.txt.gz", b"and more closely")
    write_table(tmp_path / "f.parquet", ["in", None, "groups", "of", "rows"])
    write_table(tmp_path / "g.arrow", ["in", "batches", "of", "rows"])
    write_table(tmp_path / "h-stream.arrow", ["in", "a", "stream"])
    (tmp_path / "notes.md").write_text("not a corpus")
    everything = ["one", "two\nlines", "packed", "closely", "and more closely", "in", "groups", "of", "rows"]
    everything += ["in", "batches", "of", "rows", "in", "a", "stream", "a whole file\n\nis one document"]
    assert read(tmp_path) == everything
    assert read(tmp_path / "*.jsonl*") == everything[:4]
    assert read(tmp_path / "a.jsonl") == everything[:2]


TEXT_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.uint32(), pa.large_string()),
]


@pytest.mark.parametrize("name", ["a.arrow", "stream.arrow", "a.parquet"])
@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_no_flipped_bit_of_a_table_sends_the_reader_astray(tmp_path: Path, name: str, kind: pa.DataType):
    """Arrow's files have no checksums, and a position in one that is wrong may lie outside of it. (`corpus_bytes` is
    left out: pyarrow ends the process where a Parquet column's size statistics are wrong, which nothing can catch.)"""
    texts = pa.array(["some words é", "", None, "more and more words of text " * 3])
    texts = (texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts).cast(kind)
    path = write_table(tmp_path / name, texts)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 1 if kind == pa.string() else 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            read(path)
        except UserError:
            refused += 1
    assert refused > 20


def test_linked_files_are_what_their_names_say(tmp_path: Path):
    """As in the hub's cache and in data version control, where the target's name says nothing."""
    (tmp_path / "blobs").mkdir()
    write_jsonl(tmp_path / "blobs" / "0a1b2c", ["one", "two"])
    (tmp_path / "data" / "linked").mkdir(parents=True)
    (tmp_path / "data" / "shard.jsonl").symlink_to(tmp_path / "blobs" / "0a1b2c")
    (tmp_path / "more").mkdir()
    write_jsonl(tmp_path / "more" / "b.jsonl", ["three"])
    (tmp_path / "data" / "sub").symlink_to(tmp_path / "more")
    assert read(tmp_path / "data") == ["one", "two", "three"]
    assert len(read(tmp_path / "data" / "**" / "**" / "*.jsonl")) == 3


def test_folder_of_save_to_disk_is_read_without_its_descriptions_and_caches(tmp_path: Path):
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(saved)
    before = set(saved.iterdir())
    datasets.load_from_disk(saved).map(lambda row: {"text": row["text"] + "!"}, load_from_cache_file=False)
    assert any("cache-" in path.name for path in set(saved.iterdir()) - before), "the copy lies beside the data"
    assert read(saved) == ["one", "two"]
    assert read(saved / "*.arrow") == ["one", "two"]


def test_split_of_a_dataset_dict_is_read_whatever_its_name(tmp_path: Path):
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test", "unlabelled")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
    for name in splits:
        assert read(tmp_path / "dict", split=name) == [name]
    with pytest.raises(UserError, match=r"has the splits test, train, unlabelled by .*, not dev \(`split`\)"):
        read(tmp_path / "dict", split="dev")


LAYOUTS = {
    "numbered": [
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
        "data/extra-00000-of-00001.jsonl",
    ],
    "folders": ["train/a.jsonl", "training-2/b.jsonl", "x/dev/c.jsonl", "y/my test/d.jsonl", "notes.jsonl"],
    "files": ["train.jsonl", "b-train-1.jsonl", "val_0.jsonl", "eval.jsonl", "latest.jsonl"],
    "folders before files": ["train/test.jsonl", "valid/train.jsonl", "train.jsonl"],
    "both": ["train-test.jsonl", "train.jsonl"],
    "words in words": ["trains.jsonl", "pretrain.jsonl", "contest.jsonl", "devil/x.jsonl"],
    "only one": ["test/a.jsonl", "test/b.jsonl"],
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("split", ["train", "validation", "test", "extra"])
def test_folder_has_the_splits_that_load_dataset_finds(tmp_path: Path, names: list[str], split: str):
    for name in names:
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "here" / name, [name])
    try:
        cache = str(tmp_path / "cache")
        expected = datasets.load_dataset(str(tmp_path / "here"), split=split, streaming=True, cache_dir=cache)
    except ValueError as error:
        assert "Bad split" in str(error)  # noqa: PT017
        with pytest.raises(UserError, match=r"not .* \(`split`\); the pattern .*\*\* takes|is no folder with"):
            read(tmp_path / "here", split=split)
    else:
        assert sorted(read(tmp_path / "here", split=split)) == sorted(row["text"] for row in expected)
    assert sorted(read(tmp_path / "here" / "**")) == sorted(names), "a pattern takes all"


def test_shards_of_small_files_are_not_too_many(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("recipe.data.corpora.SHARD_BYTES", 1)
    monkeypatch.setattr("recipe.data.corpora.MAX_SHARDS", 5)
    for number in range(50):
        (tmp_path / f"{number:02}.txt").write_text("x" * 10)
    assert open_source(corpus(tmp_path)).num_shards == 5
    assert len(read(tmp_path)) == 50


def test_paragraphs_of_a_text_file(tmp_path: Path):
    (tmp_path / "a.txt").write_text("\n\none\nline\n\n \ntwo\n")
    assert [text.strip() for text in read(tmp_path, sample_by="paragraph")] == ["one\nline", "two"]
    assert len(read(tmp_path)) == 1


ENDS = {"unix": "\n", "windows": "\r\n", "old mac": "\r"}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_line_ends_of_a_text_are_line_feeds(tmp_path: Path, name: str, end: str):
    lines = ["\ufeffone", "é two", "", "", "three\tand so on\x0b\x0c\x85\u2028", "four"]
    data = end.join(lines).encode()
    (tmp_path / name).write_bytes(data) if name == "a.txt" else compress(tmp_path / name, data)
    lines[0] = "one"
    assert read(tmp_path) == ["\n".join(lines)]
    assert read(tmp_path, sample_by="paragraph") == ["one\né two\n", "\n".join(lines[4:])]
    assert read(tmp_path, sample_by="line") == [line for line in lines if line]


def test_last_line_needs_no_end(tmp_path: Path):
    for content in ("one\r\ntwo", "one\r\ntwo\r\n"):
        (tmp_path / "a.txt").write_bytes(content.encode())
        assert read(tmp_path, sample_by="line") == ["one", "two"]


def test_json_lines_may_end_in_carriage_returns(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert read(tmp_path) == ["one", "two"]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a-stream.arrow"])
def test_text_of_any_type_is_read_and_nulls_are_empty(tmp_path: Path, name: str, kind: pa.DataType):
    values = ["one", None, "two é", "one"]
    encoded = pa.array(values).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(values)
    write_table(tmp_path / name, encoded.cast(kind))
    write_table(tmp_path / f"b{Path(name).suffix}", pa.nulls(3))
    assert read(tmp_path) == ["one", "two é", "one"]
    source = open_source(corpus(tmp_path))
    assert [number for number, _ in source.read(0, 2)] == list(range(2, 7)), "nulls are numbered"
    check_corpus(corpus(tmp_path))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_column_that_is_there_twice_is_named(tmp_path: Path, name: str):
    write_table(tmp_path / name, ["x"])
    table = pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError, match=rf"{name} has 2 columns 'text'; rename all but one, or set `text_column`"):
        read(tmp_path)


def test_other_text_column(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": 3}\n')
    write_table(tmp_path / "b.parquet", ["y"], column="body")
    assert read(tmp_path, text_column="body") == ["x", "y"]


ALL_FORMATS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.parquet", "a.arrow", "a-stream.arrow"]


@pytest.mark.parametrize("name", ALL_FORMATS)
@pytest.mark.parametrize("in_one_shard_with_another", [False, True])
def test_reading_begins_at_any_record_and_takes_any_part(tmp_path: Path, name: str, in_one_shard_with_another: bool):
    texts = [f"document {n}" for n in range(25)]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if name.endswith((".parquet", ".arrow")):
        write_table(tmp_path / name, texts)
    elif name == "a.txt":
        (tmp_path / name).write_text("\n\n".join(texts))
    elif name == "a.jsonl":
        (tmp_path / name).write_bytes(data)
    else:
        compress(tmp_path / name, data)
    if in_one_shard_with_another:
        write_jsonl(tmp_path / "b.jsonl", ["behind"])
        texts += ["behind"]
    source = open_source(corpus(tmp_path, sample_by="paragraph"))
    assert source.num_shards == 1
    whole = [(number, text.strip()) for number, text in source.read(0)]
    assert whole == list(enumerate(texts))
    for first in (0, 1, 3, 7, 24, 25, 40):
        assert [(n, text.strip()) for n, text in source.read(0, first)] == whole[first:]
    for part in (Part(0, 2), Part(1, 3)):
        expected = [(n, text) for n, text in whole if n >= 5 and n % part.of == part.number]
        assert [(n, text.strip()) for n, text in source.read(0, 5, part)] == expected


def test_small_files_are_one_shard_and_large_ones_are_each_their_own(tmp_path: Path, monkeypatch):
    for number, size in enumerate([10, 20, 500, 5, 600, 700]):
        (tmp_path / f"{number}.txt").write_text("x" * size)
    monkeypatch.setattr("recipe.data.corpora.SHARD_BYTES", 400)
    source = open_source(corpus(tmp_path))
    assert [[Path(file).stem for file in shard] for shard in source.shards] == [["0", "1"], ["2"], ["3"], ["4"], ["5"]]
    assert source.shard_bytes == (30, 500, 5, 600, 700)


def test_fingerprint_changes_with_the_files(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    first = source_fingerprint(corpus(tmp_path))
    assert source_fingerprint(corpus(tmp_path)) == first
    assert source_fingerprint(corpus(tmp_path, text_column="body")) != first
    write_jsonl(tmp_path / "a.jsonl", ["another"])
    assert source_fingerprint(corpus(tmp_path)) != first


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "ok"}\n{"text": "broken\n', ["bad.jsonl, line 2", "is not a JSON object"]),
        (b'{"text": "ok"}\n{"body": "x", "id": 1}\n', ["bad.jsonl, line 2", "'text'", "['body', 'id']", "text_column"]),
        (b'{"text": "ok"}\n\n{"text": "\xff"}\n', ["bad.jsonl, line 3", "UTF-8"]),
        (b'{"text": ["a"]}\n', ["bad.jsonl, line 1", "list, not text"]),
        (b'["text"]\n', ["bad.jsonl, line 1", "is a list, not a JSON object"]),
        (b'{"text": "\\ud800"}\n', ["bad.jsonl, line 1", "surrogate"]),
    ],
)
def test_bad_line_is_named_and_the_others_are_read(tmp_path: Path, content: bytes, expected: list[str]):
    (tmp_path / "bad.jsonl").write_bytes(content + b'{"text": "after"}\n')
    with pytest.raises(UserError) as caught:
        read(tmp_path / "bad.jsonl")
    for part in expected:
        assert part in str(caught.value)
    assert [text for _, text in open_source(corpus(tmp_path)).read(0)][-1] == "after"


def test_bad_text_is_named(tmp_path: Path):
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=r"bad\.txt, document 1 is not valid UTF-8 at byte 3"):
        read(tmp_path / "bad.txt")
    values = pa.array([b"good", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"text": values}), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=r"bad\.parquet, row 2 is not valid UTF-8"):
        read(tmp_path / "bad.parquet")


@pytest.mark.parametrize("name", [name for name in ALL_FORMATS if name not in ("a.jsonl", "a.txt")])
@pytest.mark.parametrize("harm", ["truncated", "garbage"])
def test_damaged_file_is_named(tmp_path: Path, name: str, harm: str):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=300)) for _ in range(30)]
    path = tmp_path / name
    if name.endswith((".parquet", ".arrow")):
        write_table(path, texts)
    else:
        compress(path, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if harm == "truncated" else b"garbage" * 20)
    with pytest.raises(UserError, match=f"{name} is damaged or incomplete"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("harm", ["header", "cut", "garbage", "zeros", "last byte"])
def test_damaged_later_member_is_named(tmp_path: Path, name: str, harm: str):
    """A file of several streams is never taken for the first of them."""
    members = [f'{{"text": "document {n}"}}\n'.encode() * 100 for n in range(3)]
    first, second, third = (compress(tmp_path / f"{n}{name[1:]}", data).read_bytes() for n, data in enumerate(members))
    harmed = {
        "header": first + b"\0" + second[1:] + third,
        "cut": first + second + third[: len(third) // 2],
        "garbage": first + second + third + b"and so on" * 9,
        "zeros": first + second + third + bytes(512),
        "last byte": first + second + third[:-1],
    }
    path = tmp_path / name
    path.write_bytes(first + second + third)
    assert len(read(path)) == 300
    path.write_bytes(harmed[harm])
    with pytest.raises(UserError, match=f"{name} is damaged or incomplete"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.txt.gz", "a.parquet", "a.arrow"])
def test_giant_record_is_named_and_not_unpacked(tmp_path: Path, name: str, monkeypatch):
    monkeypatch.setattr("recipe.data.readers.MAX_RECORD_BYTES", 100_000)
    path, giant = tmp_path / name, "x" * 90_000_000
    if name.endswith((".parquet", ".arrow")):
        write_table(path, ["small", giant], rows=1)
    elif ".txt" in name:
        data = f"small\n\n{giant}".encode()
        compress(path, data) if name.endswith(".gz") else path.write_bytes(data)
    else:
        data = f'{{"text": "small"}}\n{{"text": "{giant}"}}\n'.encode()
        path.write_bytes(data) if name == "a.jsonl" else compress(path, data)
    place = {"jsonl": "line 2", "txt": "document 1", "parquet": "a row of row group 2", "arrow": "row 2"}
    expected = f"{name}, {place[name.split('.')[1]]} has more than 100 KB, or than fits into memory; part it"
    tracemalloc.start()
    with pytest.raises(UserError, match=expected):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 5e6 or name == "a.arrow", "memory that Python has taken"
    tracemalloc.stop()
    if ".txt" in name:
        with pytest.raises(UserError, match=f"{name}, document 2 has more than 100 KB"):
            read(path, sample_by="paragraph")


def test_lack_of_memory_is_told_with_the_file(tmp_path: Path, monkeypatch):
    def fail(*_: object, **__: object) -> str:
        raise MemoryError

    monkeypatch.setattr("recipe.data.readers.parse_line", fail)
    with pytest.raises(UserError, match=r"a\.jsonl, line 1 or 2 has more than 1 GB, or than fits into memory"):
        read(write_jsonl(tmp_path / "a.jsonl", ["one"]))


def test_column_of_another_type_is_named(tmp_path: Path):
    for name in ("a.parquet", "a.arrow"):
        path = write_table(tmp_path / name, ["x"])
        with pytest.raises(UserError, match=rf"{name}: column 'id' is int64, not text; set the corpus's `text_column`"):
            read(path, text_column="id")
        with pytest.raises(UserError, match=rf"{name} has no column 'body' among \['id', 'text'\]"):
            read(path, text_column="body")


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


def test_unreachable_hub_data_set_is_named():
    assert local_files(corpus("somebody/books")) is None
    with pytest.raises(UserError, match=r"(?s)'c'.*somebody/books.*no local path has that name"):
        open_source(corpus("somebody/books"))


class FailingSource(LocalSource):
    """Fails whenever the countdown is over."""

    failures = 0

    def records(self, shard, first, part):
        for index, text in super().records(shard, first, part):
            if self.failures and index >= 2:
                self.failures -= 1
                raise ConnectionError("the line is down")
            yield index, text


def test_source_that_fails_is_opened_again_where_it_was(tmp_path: Path, monkeypatch, capsys):
    waits = []
    monkeypatch.setattr("recipe.data.corpora.RETRY_SECONDS", (1, 5, 30))
    monkeypatch.setattr("recipe.base.workers.STOP_WAITING.wait", waits.append)
    path = write_jsonl(tmp_path / "a.jsonl", [f"document {n}" for n in range(5)])
    source = FailingSource(corpus(path), [path])
    source.failures = 3
    assert [text for _, text in source.read(0)] == [f"document {n}" for n in range(5)]
    assert waits == [1, 5, 30]
    assert "corpus 'c'" in capsys.readouterr().out
    source.failures = 100
    with pytest.raises(SourceError, match=r"corpus 'c'.*shard 0, record 2 cannot be read, after 3 retries: Connection"):
        list(source.read(0))


def test_sample_keeps_to_its_budget_and_weights(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("recipe.data.corpora.SHARD_BYTES", 1)
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


def test_short_shard_leaves_its_share_to_later_ones(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("recipe.data.corpora.SHARD_BYTES", 1)
    write_jsonl(tmp_path / "0.jsonl", ["tiny"])
    write_jsonl(tmp_path / "1.jsonl", ["y" * 100] * 100)
    total = sum(size for _, _, size in sample_texts([corpus(tmp_path)], 1000))
    assert total == 1000


def test_gzip_counts_for_what_it_holds():
    size = sum(len(text.encode()) for text in read(SAMPLE))
    assert corpus_bytes(corpus(SAMPLE)) == pytest.approx(size, rel=0.2)


def test_categories_may_be_views(tmp_path: Path):
    words = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1], pa.int16()), pa.array(["no", "yes"], pa.string_view()))
    assert read(write_table(tmp_path / "a.arrow", words)) == ["yes", "no", "yes"]


def test_column_named_like_the_field_of_a_struct_is_read(tmp_path: Path):
    table = pa.table({"meta": [{"text": "inner"}] * 2, "meta.text": ["one", "two"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_column="meta.text") == ["one", "two"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.arrow"])
def test_text_alone_counts(tmp_path: Path, name: str):
    """Neither other columns nor escapes: by these sizes corpora without weights are mixed in streams."""
    texts = [f"{n} " + "中" * 300 for n in range(1000)]
    rows = [{"html": "<p>" * 1000 + str(n), "text": text} for n, text in enumerate(texts)]
    if name == "a.arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write(table)
    else:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert corpus_bytes(corpus(tmp_path)) == pytest.approx(sum(len(text.encode()) for text in texts), rel=0.1)


def test_parquet_counts_for_its_text_column_alone(tmp_path: Path):
    texts = [f"{n} " + "x" * 997 for n in range(100)]
    pq.write_table(pa.table({"text": texts, "more": texts}), tmp_path / "a.parquet", use_dictionary=False)
    assert corpus_bytes(corpus(tmp_path)) == pytest.approx(100_000, rel=0.1)
