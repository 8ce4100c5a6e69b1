"""What is stored is what was written, or it is said which file is not."""

import os
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.base.errors import UserError
from recipe.data import integrity
from recipe.data.batches import Rank, Resume
from recipe.data.cached import CachedData
from recipe.data.document_encoder import DocumentEncoder
from recipe.data.hygiene import Decontaminator
from recipe.data.integrity import StoredFile, Verification, note_file, read_json, write_json
from recipe.data.packed_corpus import PackedCorpus
from recipe.data.packing import BlockFormat
from recipe.data.preprocessor import Preprocessor
from recipe.data.token_store import TokenStore
from testing.helpers import never, wait_for, write_jsonl

FULL = BlockFormat("full_sentences", 32, 0, 2, pair_special_tokens=4, seed=1)


@pytest.fixture
def open_view(tmp_path: Path, texts, tokenizer, monkeypatch) -> Callable[[], PackedCorpus]:
    """Opens a view of a store of two shards, which is given by its folder."""
    monkeypatch.setattr("recipe.data.corpora.SHARD_BYTES", 1)
    (tmp_path / "text").mkdir()
    for number in range(2):
        write_jsonl(tmp_path / "text" / f"{number}.jsonl", texts[number * 30 : number * 30 + 30])
    encoder = DocumentEncoder(tokenizer, "sentencex", "en")

    def open_from(path: Path) -> PackedCorpus:
        corpus = CorpusArguments(name="c", path=str(path))
        store = TokenStore(corpus, encoder, Decontaminator([]), tmp_path / "stores")
        store.build(0, None, 0)
        packed = PackedCorpus(store, FULL)
        packed.build(0)
        return packed

    made = open_from(tmp_path / "text")
    assert not made.files_of_others(), "what this process has just written is not read again"
    return lambda: open_from(made.store.path)


def fault_of(open_view: Callable[[], PackedCorpus]) -> str | None:
    """Open a view and compare its files; return what is wrong."""
    try:
        verification = Verification(open_view().files_of_others())
        verification.run(threading.Event())
        verification.report()
    except UserError as error:
        return str(error)
    return None


def test_any_changed_byte_is_found(open_view):
    """In any file of the store and its view: by opening it, or by comparing it."""
    rng = random.Random(0)
    root = open_view().store.path
    files = [path for path in root.rglob("*") if path.suffix in (".json", ".arrow", ".bin")]
    assert len(files) == 1 + 2 * (2 + 4)
    assert fault_of(open_view) is None
    for file in files:
        whole = file.read_bytes()
        for place in [0, len(whole) - 1, *rng.choices(range(len(whole)), k=20)]:
            changed = bytes([whole[place] ^ rng.randint(1, 255)])
            file.write_bytes(whole[:place] + changed + whole[place + 1 :])
            assert str(file) in (fault_of(open_view) or ""), f"byte {place} of {file}"
        file.write_bytes(whole)
    assert fault_of(open_view) is None


@pytest.mark.parametrize("name", ["segments.bin", "block_ends.bin", "labels.bin", "shard-00001.arrow"])
def test_cut_and_grown_files_are_named_before_they_are_read(open_view, name: str):
    file = [file.path for file in open_view().files_of_others() if file.path.name == name][-1]
    size = file.stat().st_size
    for other in (0, size // 16 * 8, size + 8):
        os.truncate(file, other)
        with pytest.raises(
            UserError, match=rf"{name} is damaged .* {other:,} bytes, and had {size:,} .*; copy it again"
        ):
            open_view()


def test_file_that_is_cut_while_it_is_mapped_is_not_read(open_view):
    packed = open_view()
    os.truncate(packed.store.arrow(0), 100)
    with pytest.raises(UserError, match=r"shard-00000\.arrow is damaged .*it has 100 bytes"):
        packed.block(0)


@pytest.mark.parametrize(
    ("table", "value", "problem"),
    [
        ("block_ends", -1, r"block_ends\.bin .*block 3 has the segments from \d+ to -1"),
        ("block_ends", 10**9, r"block_ends\.bin .*block 3 has the segments from \d+ to 1000000000"),
        ("labels", 5, r"labels\.bin .*it holds the label 5"),
        ("start", 10**9, r"segments\.bin .*reaches beyond the tokens"),
        ("start", -5, r"segments\.bin .*reaches beyond the tokens"),
        ("length", 10**9, r"segments\.bin .*reaches beyond the tokens"),
        ("length", 500, r"segments\.bin .*it makes a block of \d+ tokens, not of 32 at the most"),
        ("ids", 60_000, r"shard-00000\.arrow .*it holds ids from 0 to 60000, and there are 400"),
    ],
)
def test_damaged_block_is_named_before_it_is_trained_on(open_view, table: str, value: int, problem: str):
    """It would end the process, or a kernel of the GPU, before the checksums are compared."""
    packed = open_view()
    blocks = packed.shards[0]
    block_ends, labels, segments, ids = (
        np.array(array) for array in (blocks.block_ends, blocks.labels, blocks.segments, blocks.units[0])
    )
    blocks.block_ends, blocks.labels, blocks.segments, blocks.units = block_ends, labels, segments, [ids]
    segment = int(block_ends[2])
    packed.block(3)
    if table in segments.dtype.names:
        segments[table][segment] = value
    else:
        place = segments["start"][segment] if table == "ids" else 3
        {"block_ends": block_ends, "labels": labels, "ids": ids}[table][place] = value
    with pytest.raises(UserError, match=problem):
        packed.block(3)


def test_view_of_another_store_is_refused(open_view):
    """A shard that was copied again, repaired, does not fit what was packed of the damaged one."""
    packed = open_view()
    notes = [packed.store.arrow(shard).with_suffix(".json") for shard in range(2)]
    write_json(notes[1], read_json(notes[1]) | {"sha256": "0" * 64})
    with pytest.raises(UserError, match=r"shard-00001/counts\.json is damaged .*it is of another .*shard-00001\.arrow"):
        open_view()


def test_store_of_an_earlier_version_is_named(open_view):
    store = open_view().store
    (store.path / "store.json").write_text('{"made_with": "0", "num_shards": 2}')
    with pytest.raises(UserError, match=r"store\.json is damaged .*it has no checksum, as those of earlier versions"):
        open_view()


def make_files(folder: Path) -> list[StoredFile]:
    files = []
    for number in range(3):
        (folder / f"{number}").write_bytes(bytes([number]) * 1000)
        files.append(StoredFile.of_note(folder / f"{number}", note_file(folder / f"{number}")))
    return files


def test_verification_ends_with_the_run_and_says_how_far_it_was(tmp_path: Path, monkeypatch, capsys):
    reached, go_on = threading.Event(), threading.Event()
    real = integrity.file_checksum

    def slow(path: Path, before_piece: Callable[[], None]) -> str:
        if path.name == "1":
            reached.set()
            go_on.wait()
        return real(path, before_piece)

    verification = Verification(make_files(tmp_path))
    monkeypatch.setattr(integrity, "file_checksum", slow)
    monkeypatch.setattr(integrity, "STOP_SECONDS", 0)
    with verification.running():
        reached.wait()
        assert pickle.loads(pickle.dumps(verification)).verified == 1
        verification.report()
    go_on.set()
    assert capsys.readouterr().out.count("1 KB of 3 KB were compared with their checksums, and match") == 1
    with verification.running():  # after a rollback
        wait_for(lambda: verification.verified == 3)
        verification.report()
        verification.report()
    assert capsys.readouterr().out.count("3 files, 3 KB, match their checksums") == 1
    (tmp_path / "2").write_bytes(b"3" * 1000)
    verification = Verification(verification.files)
    with verification.running():  # no update comes after the fault is found
        wait_for(lambda: verification.fault)
    assert "warning: the token store's" in capsys.readouterr().out


@pytest.fixture
def settings(tmp_path: Path, tokenizer, tokenizer_dir, corpus_file) -> tuple[PretrainArguments, Preprocessor]:
    args = PretrainArguments(
        output_dir="unused",
        tokenizer_name=str(tokenizer_dir),
        corpora=[CorpusArguments(name="sample", path=str(corpus_file))],
        token_store_dir=str(tmp_path),
        max_seq_length=32,
        eval_blocks=4,
        train_batch_size=4,
        per_device_train_batch_size=4,
        dataloader_num_workers=0,
    )
    return args, Preprocessor(args, tokenizer)


def test_fault_that_is_found_ends_training_at_the_next_update(tmp_path: Path, settings):
    args, preprocessor = settings
    CachedData(args, preprocessor, 0)
    data = CachedData(args, preprocessor, 0)
    updates = data.train_updates(Rank(), Resume(), 1000, never)
    next(updates)
    wait_for(lambda: data.verification.verified == 4)
    assert not CachedData(args, preprocessor, 1, verifies=False).verification.files
    updates.close()
    arrow = next(tmp_path.glob("*/*.arrow"))
    whole = bytearray(arrow.read_bytes())
    whole[len(whole) // 3 // 2 * 2] ^= 1  # in the middle of the ids: the lower byte of one
    arrow.write_bytes(whole)
    again = CachedData(args, preprocessor, 0)
    updates = (wait_for(lambda: again.verification.fault) for _ in again.train_updates(Rank(), Resume(), 1000, never))
    with pytest.raises(UserError, match=r"shard-00000\.arrow is damaged .*SHA-256.*updates since this start may have"):
        list(updates)
    args.prepare_only = True
    with pytest.raises(UserError, match=r"SHA-256 of what was written\); copy it again"):
        CachedData(args, preprocessor, 0)


def test_damage_that_a_worker_meets_is_one_line(tmp_path: Path, settings):
    args, preprocessor = settings
    args.dataloader_num_workers = 1
    data = CachedData(args, preprocessor, 0)
    os.truncate(next(tmp_path.glob("*/*.arrow")), 100)
    with pytest.raises(UserError, match=r"^the token store's .*shard-00000\.arrow is damaged [^\n]*$"):
        next(data.train_updates(Rank(), Resume(), 5, never))
