"""Damage everything that the recipe reads at random: each case has to end in success or in a `UserError`, and soon.

python -m testing.faults.fuzz [--cases 10000] [--seed 0] [--targets config corpus]
python -m testing.faults.fuzz --only checkpoint:17     # one case, with its traceback

1. A target writes valid input into an empty folder, makes one to three random changes (`mutate` for values,
   `mutate_bytes` for files), and reads it by the functions that the scripts call.
2. The outcome is ok, refused (a `UserError`) or found: another exception, 30 s of CPU without an end, or something half
   written. A case is a function of (seed, target, number) and can be repeated alone.
"""

from testing.helpers import ROOT, SAMPLE, SMALL_MODEL, make_text, reset_accelerate  # first: sets the environment  # noqa: I001

import argparse
import contextlib
import copy
import csv
import datetime
import faulthandler
import gzip
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file, save_file

from recipe.run import checkpoint as ckpt
from recipe.publish import hub
from recipe.publish.card import write_card
from recipe.arguments import CorpusArguments, GlueArguments, PretrainArguments, TokenizerArguments
from recipe.base.errors import UserError
from recipe.base.hashing import file_checksum
from recipe.arguments.corpus_files import SUFFIXES, TABLES
from recipe.data.corpora import (
    Part,
    Source,
    check_corpus,
    corpus_bytes,
    open_source,
    sample_texts,
)
from recipe.data.readers import packing_of
from recipe.finetune.finetuning import encode_splits
from recipe.finetune.tasks.glue import TASKS, Task
from recipe.finetune.tasks.loading import load_task
from recipe.finetune.tasks.scoring import describe_data
from recipe.data.hygiene import Decontaminator
from recipe.run.metrics import TrainState
from recipe.modeling.model import build_config, build_model
from recipe.modeling.objectives import MaskedLMObjective
from recipe.modeling.optimizer import build_optimizer, build_scheduler
from recipe.data.packing import BlockFormat
from recipe.run.plots import plot_runs, read_curves
from recipe.run.directory import MANIFEST, list_checkpoints
from recipe.run.directory import RunDirectory
from recipe.data.integrity import Verification
from recipe.data.packed_corpus import PackedCorpus
from recipe.data.token_store import TokenStore
from recipe.data.document_encoder import DocumentEncoder
from recipe.data.tokenizer import load_tokenizer
from recipe.data.trainers import save_tokenizer, train_byte_level_bpe

CPU_SECONDS = 30  # that a case may take
WAIT_SECONDS = 10 * CPU_SECONDS  # and with what it waits for, however busy the machine
NESTED_BRACKETS = 20_000
ODD_BYTES = [
    b"\0",
    b"\xff",
    b"\xed\xa0\xbd",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n\n",
    b"\t",
    b'"',
    b"'",
    b"{",
    b": ",
    b"- ",
    b"#",
]
ODD_BYTES += [
    b"[" * NESTED_BRACKETS,
    b"9" * 5000,
    b"1e999",
    b"NaN",
    b"null",
    b"&a [*a]",
    b"!!python/object/apply:os.getpid []",
]
ODD_BYTES += ["\u2028".encode(), "\u202e\u0301".encode(), b"\x1b[31m", b"x" * 3_000_000]
ODD = [None, True, False, 0, 1, -1, 2, 0.5, -0.0, 10**6, 2**31, 2**63, 10**30, float("inf"), float("nan"), 1e-300]
ODD += [
    "",
    " ",
    "\0",
    "none",
    "null",
    "latest",
    "hub://a/b",
    "../../x",
    "/no/such/x",
    "~",
    "*",
    "[",
    "a/b/c",
    "é\u0301\u202e\U0001f600",
]
ODD += ["x" * 5000, "\ud800", "1e-4", "true", [], {}, [[]], [None], {"a": 1}, {"": None}, [1, 2], ["a", "a"], {1: 2}]
ODD += [datetime.date(2020, 1, 1)]


class HangError(BaseException):
    """A case takes too long. (It is no `Exception`, since some code catches these for good reasons.)"""


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Make one to three changes.

    They are: cut off, emptied, a bit flipped, a part removed, doubled or overwritten, odd bytes added, re-encoded.
    """
    for _ in range(rng.choice([1, 1, 2, 3])):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice([1, 1, 4, 40, 4000]))
        change = rng.randrange(9)
        if change == 0:
            data = data[:start]
        elif change == 1:
            data = data[:start] + data[end:]
        elif change == 2:
            data = data[:end] + data[start:]
        elif change == 3:
            data = data[:start] + rng.randbytes(end - start) + data[end:]
        elif change == 4:
            data = data[:start] + rng.choice(ODD_BYTES) + data[start:]
        elif change == 5 and rng.random() < 0.3:
            data = data.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-16-le", "utf-8-sig", "utf-32"]))
        elif change == 6 and rng.random() < 0.1:
            data = b""
        elif data:
            flipped = bytearray(data)
            flipped[min(start, len(data) - 1)] ^= 1 << rng.randrange(8)
            data = bytes(flipped)
    return data


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Find everything inside a value, as (dictionary or list, key or index)."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def mutate(value: Any, rng: random.Random, odd: list[Any] = ODD) -> Any:
    """Copy a value with one change somewhere inside: removed, replaced, renamed, wrapped, exchanged or altered."""
    value = copy.deepcopy(value)
    found = list(places(value))
    if not found or rng.random() < 0.03:
        return rng.choice(odd)
    holder, key = rng.choice(found)
    change = rng.randrange(12)
    if change == 0:
        del holder[key]
    elif change == 1 and isinstance(holder, dict):
        holder[rng.choice([f"{key}s", f"{key}"[:-1], "", "\0", 3, "../x"])] = holder.pop(key)
    elif change == 2:
        holder[key] = rng.choice([[holder[key]], {"a": holder[key]}, [holder[key]] * 2])
    elif change == 3:
        other, place = rng.choice(found)
        holder[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else other[place])
    elif change == 4 and isinstance(holder[key], str):
        holder[key] = mutate_bytes(holder[key].encode(), rng).decode(errors="replace")
    elif change == 4 and isinstance(holder[key], int | float):
        number = holder[key]
        holder[key] = rng.choice([-number, number + 1, number - 1, number * 10**9, number / 7, str(number)])
    else:  # most often by a value of the same type, since others are soon refused
        like = [other for other in odd if type(other) is type(holder[key])] if change < 10 else odd
        holder[key] = copy.deepcopy(rng.choice(like or odd))
    return value


@dataclass
class Material:
    """What is damaged, as it is before.

    Args:
        root: folder with a `tokenizer`, and the `run` of pretrain.py that used it.
    """

    root: Path

    def __post_init__(self) -> None:
        rng = random.Random(0)
        self.texts = [make_text(rng, rng.randint(1, 20)) for _ in range(60)]
        self.corpus = self.root / "text.jsonl"
        self.corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in self.texts), "utf-8")
        trained = train_byte_level_bpe([self.texts], 400, 2, add_prefix_space=False, max_document_characters=10_000)
        save_tokenizer(trained, self.root / "tokenizer", add_prefix_space=False, model_max_length=64)
        self.tokenizer = load_tokenizer(str(self.root / "tokenizer"))
        self.encoder = DocumentEncoder(self.tokenizer, "sentencex", "en")
        self.run = self.root / "run"
        values = {
            "output_dir": self.run,
            "tokenizer_name": self.root / "tokenizer",
            "corpora": json.dumps([{"name": "sample", "path": str(self.corpus)}]),
            "model_config": json.dumps(SMALL_MODEL),
            "token_store_dir": self.root / "stores",
            "max_seq_length": 32,
            "eval_blocks": 4,
            "dataloader_num_workers": 0,
            "max_steps": 4,
            "phases": "[{steps: 1, max_seq_length: 16, mlm_probability: 0.3}, {steps: 0.75, weights: {sample: 2}}]",
        }
        sizes = ("train_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size")
        values |= dict.fromkeys(sizes, 4) | dict.fromkeys(
            ("warmup_steps", "logging_steps", "eval_steps", "save_steps"), 2
        )
        run_script("pretrain", [f"--{name}={value}" for name, value in values.items()])
        self.model_config = build_config(SMALL_MODEL, None, self.tokenizer, 32)


@dataclass
class Case:
    """One case; its folder is empty and the working directory, the material must not be changed."""

    rng: random.Random
    folder: Path
    material: Material

    def damage(self, file: Path) -> None:
        """Damage a file: most often its bytes, else remove it or put a folder in its place."""
        kind = self.rng.random()
        if kind < 0.05:
            file.unlink()
        elif kind < 0.08:
            file.unlink()
            file.mkdir()
        else:
            file.write_bytes(mutate_bytes(file.read_bytes(), self.rng))


def run_script(name: str, arguments: list[str]) -> None:
    """Run a script's `main` in this process."""
    reset_accelerate()
    with mock.patch.object(sys, "argv", [f"{name}.py", *arguments]):
        importlib.import_module(name).main()


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


KINDS = {
    "tokenizer": ("train_tokenizer", TokenizerArguments),
    "pretrain": ("pretrain", PretrainArguments),
    "glue": ("finetune_glue", GlueArguments),
}


def fuzz_config(case: Case) -> None:
    """Damage the YAML and flags of a script, and run everything that it checks before it begins to work."""
    rng, root = case.rng, case.material.root
    kind, (script, cls) = rng.choice(list(KINDS.items()))
    values = yaml.safe_load(rng.choice(sorted((ROOT / "recipe" / "configs" / kind).glob("*.yaml"))).read_text("utf-8"))
    # What the config names exists, unless the changes below give it another name.
    local = {"corpora": [{"name": name, "path": str(case.material.corpus)} for name in "ab"], "output_dir": "out"}
    local |= {"tokenizer_name": str(root / "tokenizer"), "model_name_or_path": str(root / "run" / "model")}
    local |= {"glue_dir": str(SAMPLE / "glue"), "tasks": ["cola"], "max_seq_length": 16, "token_store_dir": "stores"}
    local |= {"model_config": SMALL_MODEL, "eval_corpora": [], "decontaminate_against": []}
    wanted = {f.name for f in fields(cls)} - ({"model_name_or_path"} if kind == "pretrain" else set())
    values |= {name: value for name, value in local.items() if name in wanted}
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2])):
        values = mutate(values, rng)
    parts = {"config.yaml": values}
    if isinstance(values, dict) and rng.random() < 0.3:
        changed = rng.sample(list(values), len(values) // 2)
        parts["overlay.yaml"] = {name: values[name] for name in changed}
    for file, part in parts.items():
        text = yaml.dump(part, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        Path(file).write_bytes(mutate_bytes(text, rng) if rng.random() < 0.15 else text)
    flags = []
    for _ in range(rng.choice([0, 0, 0, 0, 0, 1, 2])):
        name = rng.choice([f.name for f in fields(cls)])
        value = mutate(values.get(name), rng) if isinstance(values, dict) else rng.choice(ODD)
        flags.append(f"--{name}={json.dumps(value, default=str) if rng.random() < 0.5 else value}")
    flags = [
        mutate_bytes(flag.encode("utf-8", "surrogatepass"), rng).decode(errors="surrogateescape")
        if rng.random() < 0.2
        else flag
        for flag in flags
    ]
    flags = [flag.replace("\0", "")[:100_000] for flag in flags]  # as the system passes flags on
    before = contents(case.folder)
    run_script(script, [*(f"--config={file}" for file in parts), *flags, "--dry_run=true"])
    assert contents(case.folder) == before, "a dry run has written something"


def fuzz_corpus(case: Case) -> None:
    """Damage a local file of any format, and read it or, now and then, make a token store of it."""
    rng = case.rng
    suffix = rng.choice([*SUFFIXES, *TABLES * 4])
    path = Path(f"text{suffix}")
    records: Any = [{"text": text, "id": number} for number, text in enumerate(rng.sample(case.material.texts, 12))]
    if rng.random() < 0.5:
        for _ in range(3):
            records = mutate(records, rng)
            records = records if isinstance(records, list) else [records]
    if suffix.endswith(TABLES):
        write_table(path, records, rng)
    else:
        text = "\n".join(json.dumps(record, default=str, skipkeys=True) for record in records).encode()
        compress(path, mutate_bytes(text, rng) if rng.random() < 0.4 else text)
    if rng.random() < 0.5:
        case.damage(path)
    fields_of = {
        "sample_by": rng.choice(["document", "paragraph", "line"]),
        "text_column": rng.choice(["text"] * 9 + ["id"]),
    }
    corpus = CorpusArguments(name="c", path=rng.choice([str(path), "."]), **fields_of)
    check_corpus(corpus, rng.choice([0, 100]))
    assert corpus_bytes(corpus) >= 0
    source = open_source(corpus)
    for shard in range(source.num_shards):
        for _, text in source.read(shard, rng.choice([0, 0, 5]), rng.choice([Part(), Part(1, 3)])):
            if not isinstance(text, UserError):
                text.encode()
    list(sample_texts([corpus], 5000))
    if rng.random() < 0.15:
        store = TokenStore(corpus, case.material.encoder, Decontaminator([]), Path("stores"))
        try:
            store.build(0, None, rng.choice([0, 100]))
            packed = PackedCorpus(store, BlockFormat("full_sentences", 32, 0, 2, pair_special_tokens=4, seed=1))
            packed.build(0)
            assert all(len(packed.block(number).input_ids) for number in range(len(packed)))
        finally:
            assert not list(Path("stores").rglob(".*")), "half-written files stay"


def fuzz_store(case: Case) -> None:
    """Damage a file of a token store or of a view of it: it is refused or made again, and no other block comes out."""
    corpus = CorpusArguments(name="sample", path=str(case.material.corpus))
    shutil.copytree(case.material.root / "stores", "stores")

    def read_blocks() -> list[list[int]]:
        store = TokenStore(corpus, case.material.encoder, Decontaminator([]), Path("stores"))
        store.build(0, None, 0)
        packed = PackedCorpus(store, BlockFormat("full_sentences", 32, 0, 2, pair_special_tokens=4, seed=42))
        packed.build(0)
        blocks = [packed.block(number).input_ids.tolist() for number in range(len(packed))]
        verification = Verification(packed.files_of_others())
        verification.run(threading.Event())
        verification.report()
        return blocks

    before = read_blocks()
    files = [path for path in sorted(Path("stores").rglob("*")) if path.suffix in (".json", ".arrow", ".bin")]
    for _ in range(case.rng.choice([0, 1, 1, 2])):
        file = case.rng.choice(files)
        if file.is_file():
            case.damage(file)
    assert read_blocks() == before, "other blocks than were written"


def write_table(path: Path, records: Any, rng: random.Random) -> None:
    """Write a Parquet or Arrow file with the texts as strings or, now and then, as something else."""
    values = [record.get("text") if isinstance(record, dict) else record for record in records]
    kind = rng.choice([pa.string(), pa.string(), pa.string(), pa.large_string(), pa.string_view(), pa.binary(), None])
    texts = [value.encode(errors="replace").decode() if isinstance(value, str) else None for value in values]
    try:
        column = pa.array(values if kind is None else texts, kind)
    except (pa.ArrowException, UnicodeError, OverflowError, AttributeError):
        column = pa.array(texts)
    if kind is pa.binary():
        column = pa.array([mutate_bytes((text or "").encode(), rng) for text in texts], pa.binary())
        if rng.random() < 0.5:  # as writers do that check nothing
            column = pa.StringArray.from_buffers(len(column), *column.buffers()[1:])
    table = pa.table({rng.choice(["text"] * 9 + ["x"]): column, "id": range(len(values))})
    if path.suffix == ".parquet":
        codec = rng.choice(["snappy", "zstd", "none"])
        pq.write_table(table, path, row_group_size=rng.choice([2, 100]), compression=codec)
    else:
        with rng.choice([pa.ipc.new_stream, pa.ipc.new_file])(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=rng.choice([2, 100]))


def compress(path: Path, data: bytes) -> None:
    packing = packing_of(path.name)
    if packing == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes({".gz": gzip.compress, "": bytes}[packing](data))


def read_without_refusal(corpus: CorpusArguments) -> Source:
    """Open a corpus that there is no reason to refuse."""
    with contextlib.suppress(UserError):
        return open_source(corpus)
    raise AssertionError("refused without a reason")


def fuzz_links(case: Case) -> None:
    """Fill a corpus folder with links, copies of names and what is no text: each text has to be read once."""
    rng, folders, files = case.rng, [Path("corpus")], [Path()]
    expected, has_dangling = [], False
    folders[0].mkdir()
    for number in range(rng.randint(1, 12)):
        path = rng.choice(folders) / f"{rng.choice('abc')}{number}"
        kind = rng.choice(
            ("file", "file", "folder", "link", "link", "hard link", "empty", "unknown", "dangling", "hidden")
        )
        if kind == "folder":
            path.mkdir()
            folders.append(path)
        elif kind == "link":
            target = rng.choice([*folders, *files[1:]])
            path = path.with_suffix(".jsonl") if target in files else path
            path.symlink_to(rng.choice([target.absolute(), os.path.relpath(target, path.parent)]))
        elif kind == "hard link" and len(files) > 1:
            path.with_suffix(".jsonl").hardlink_to(rng.choice(files[1:]))
        elif kind == "empty":
            path.with_suffix(rng.choice((".jsonl", ".txt.gz", ".parquet"))).touch()
        elif kind == "unknown":
            path.with_suffix(rng.choice((".bz2", ".tmp", ".md"))).write_text("text", "utf-8")
        elif kind == "dangling" and rng.random() < 0.3:
            path.with_suffix(".jsonl").symlink_to("nowhere")
            has_dangling = True
        elif kind == "hidden":
            (path.parent / f".{path.name}.jsonl").write_text('{"text": "hidden"}\n', "utf-8")
        elif kind == "file":
            expected.append(f"text {number}")
            path = path.with_suffix(".jsonl")
            path.write_text(json.dumps({"text": expected[-1]}) + "\n", "utf-8")
            files.append(path)
    entrance = Path("entrance")
    entrance.symlink_to("corpus")
    corpus = CorpusArguments(
        name="c", path=rng.choice(["corpus", "entrance", "corpus/**", str(Path("corpus").absolute())])
    )
    may_be_refused = has_dangling or not expected or "**" in corpus.path  # a pattern names files of unknown kind
    source = open_source(corpus) if may_be_refused else read_without_refusal(corpus)
    texts = [text for shard in range(source.num_shards) for _, text in source.read(shard)]
    assert sorted(texts) == sorted(expected), f"{sorted(texts)} in place of {sorted(expected)}"
    assert not has_dangling, "a link that leads nowhere is passed over"


def fuzz_glue(case: Case) -> None:
    """Damage the TSVs of a task, and load them."""
    rng = case.rng
    name, task = rng.choice(list(TASKS.items()))
    for split in task.splits:
        write_tsv(task, split, rng)
    file = rng.choice(sorted(Path().rglob("*.tsv")))
    if rng.random() < 0.5:
        rows = list(csv.reader(io.StringIO(file.read_text("utf-8")), delimiter="\t", quoting=csv.QUOTE_NONE))
        rows = mutate(
            rows, rng, [*filter(lambda value: isinstance(value, str), ODD), "-1", "5.1", "nan", "inf", "2", []]
        )
        rows = [row if isinstance(row, list) else [row] for row in rows] if isinstance(rows, list) else []
        lines = ["\t".join(map(str, row)) for row in rows]
        file.write_text(rng.choice(["\n", "\n", "\r\n", "\r"]).join(lines), errors="surrogatepass", encoding="utf-8")
    else:
        case.damage(file)
    splits, _ = load_task(name, ".")
    describe_data(name, splits)
    if rng.random() < 0.04:
        encode_splits(splits, task, case.material.tokenizer, 16)


def write_tsv(task: Task, split: str, rng: random.Random) -> None:
    place, is_test = task.splits[split], split.startswith("test")
    columns = list(place.header) or ["index", *task.tsv_columns[: len(task.columns) if is_test else None]]
    rows = [] if place.header else [columns]
    for _ in range(5):
        label = rng.choice(task.tsv_labels or ("0.0", "2.5", "5.0"))
        is_label = {"label", task.tsv_columns[-1]} - {*task.tsv_columns[: len(task.columns)]}
        rows.append([label if column in is_label else make_text(rng, 1) for column in columns])
    file = Path(rng.choice(place.files))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map("\t".join, rows)) + "\n", "utf-8")


ODD_TENSORS = [torch.zeros(0), torch.ones(3, dtype=torch.int8), torch.full((2, 2), float("nan")), torch.zeros(1, 2**20)]


def fuzz_checkpoint(case: Case) -> None:
    """Damage the newest of two checkpoints, with checksums that fit the damage or not, and resume from it."""
    rng, folder = case.rng, case.folder / "checkpoints"
    shutil.copytree(case.material.run / "checkpoints", folder)
    older, newest = list_checkpoints(folder)
    saved = json.loads((newest / "state.json").read_text("utf-8"))
    whole = contents(newest)
    file = rng.choice(sorted(newest.iterdir()))
    if rng.random() < 0.5 and file.suffix == ".json":
        values = json.loads(file.read_text("utf-8"))
        for _ in range(rng.choice([1, 1, 2])):
            values = mutate(values, rng)
        file.write_text(json.dumps(values, default=str, skipkeys=True), errors="surrogatepass", encoding="utf-8")
    elif rng.random() < 0.7 and file.name == "optimizer.pt":
        tensors = torch.load(file, weights_only=True)
        torch.save(mutate(tensors, rng, [*ODD[:-1], *ODD_TENSORS]), file)
    elif rng.random() < 0.7 and file.name == "model.safetensors":
        tensors = mutate(load_file(file), rng, ODD_TENSORS)
        tensors = tensors if isinstance(tensors, dict) else {"x": tensors}
        save_file({str(name): value for name, value in tensors.items() if isinstance(value, torch.Tensor)}, file)
    else:
        case.damage(file)
    is_changed, fits = contents(newest) != whole, rng.random() < 0.6
    if fits and file.is_file() and file.name != MANIFEST:
        manifest = json.loads((newest / MANIFEST).read_text("utf-8"))
        manifest[file.name] = {"bytes": file.stat().st_size, "sha256": file_checksum(file)}
        (newest / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    before = contents(folder)
    try:
        path, state, _ = ckpt.open_checkpoint(folder, "latest", saved["identity"], saved["arguments"])
        if is_changed and not fits and file.name != MANIFEST:
            assert path == older, f"the damaged {path} is used"
        resume(path, state, case.material)
    finally:
        assert contents(folder) == before, "reading has changed something"


def resume(path: Path, saved: dict[str, Any], material: Material) -> None:
    """Do what pretrain.py does with an open checkpoint, and an update."""
    ckpt.check_identity(saved["identity"], saved["identity"], path)
    state = TrainState.restore(saved["train_state"], 1, path)
    objective = MaskedLMObjective(build_model(material.model_config, None), 0.15)
    optimizer = build_optimizer(objective, 1e-4, (0.9, 0.98), 1e-6, 0.01)
    ckpt.load_training_state(path, objective, optimizer, None)
    scheduler = build_scheduler(optimizer, "linear", {}, 2, 4, state.step)
    for parameter in objective.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    scheduler.step()
    state.count({"loss": (1.0, 1)}, torch.ones(len(state.corpora), 3).long().numpy(), 8, 1, None)
    assert state.blocks >= 0
    assert state.tokens >= 0
    state.take_means()


def fuzz_run(case: Case) -> None:
    """Damage the files of a run, and plot, publish or resume it."""
    rng, run = case.rng, case.folder / "run"
    shutil.copytree(case.material.run, run, ignore=shutil.ignore_patterns("checkpoints", "loss.png"))
    file = run / rng.choice(["config.yaml", "status.json", "metrics.jsonl", "model/config.json"])
    if rng.random() < 0.4:
        case.damage(file)
    elif file.suffix == ".yaml":
        file.write_text(
            yaml.dump(mutate(yaml.safe_load(file.read_text("utf-8")), rng)), errors="surrogatepass", encoding="utf-8"
        )
    elif file.suffix == ".json":
        file.write_text(
            json.dumps(mutate(json.loads(file.read_text("utf-8")), rng), default=str, skipkeys=True), "utf-8"
        )
    else:
        records = mutate([json.loads(line) for line in file.read_text("utf-8").splitlines()], rng)
        records = records if isinstance(records, list) else [records]
        file.write_text("".join(json.dumps(record, default=str, skipkeys=True) + "\n" for record in records), "utf-8")
    (run / "hub" / "step-00000004").mkdir(parents=True)
    card = run / "model" / "README.md"
    before = card.read_bytes()
    act = rng.randrange(4)
    if act == 0:
        curves = read_curves(run)
        if rng.random() < 0.3:
            plot_runs([curves], run / "loss.png")
    elif act == 1:
        try:
            write_card(run, run / "model")
        except UserError:
            assert card.read_bytes() == before, "a card half written"
            raise
    elif act == 2:
        with mock.patch.object(hub, "push", lambda api, config, folder: config["hub_model_id"]):
            hub.push_waiting(run)
        hub.stage_card(run)
    else:
        directory, lines = RunDirectory(run, True, []), run / "metrics.jsonl"
        before = lines.read_bytes() if lines.is_file() else None
        try:
            directory.cut_metrics(2)
        except UserError:
            assert lines.is_dir() or lines.read_bytes() == before, "metrics half written"
            raise


TARGETS: dict[str, Callable[[Case], None]] = {
    "config": fuzz_config,
    "corpus": fuzz_corpus,
    "links": fuzz_links,
    "store": fuzz_store,
    "glue": fuzz_glue,
    "checkpoint": fuzz_checkpoint,
    "run": fuzz_run,
}


def run_case(seed: int, target: str, number: int, material: Material, folder: Path) -> BaseException | None:
    """Run one case in an empty folder, and return the error that it ended with."""
    folder.mkdir()
    home = Path.cwd()
    os.chdir(folder)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.alarm(WAIT_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            TARGETS[target](Case(random.Random(f"{seed}:{target}:{number}"), folder, material))
    except SystemExit as end:  # --help ends so
        return end if end.code else None
    except (Exception, HangError) as error:
        return error
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.chdir(home)
        shutil.rmtree(folder)
    return None


def stop_case(number: int, _: Any) -> None:
    limit = f"{CPU_SECONDS} s of CPU" if number == signal.SIGPROF else f"{WAIT_SECONDS} s"
    raise HangError(f"no end after {limit}")


@contextlib.contextmanager
def prepared() -> Iterator[Callable[[int, str, int], BaseException | None]]:
    """Yield a function that runs the case of a seed, a target and a number."""
    earlier = {number: signal.signal(number, stop_case) for number in (signal.SIGALRM, signal.SIGPROF)}
    patches = [
        mock.patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true", "TQDM_DISABLE": "1"}),
        mock.patch("recipe.data.corpora.RETRY_SECONDS", ()),
        mock.patch("recipe.publish.hub.PATIENCE_SECONDS", 0),
        mock.patch("recipe.plan.matmul_flops", return_value=1e12),  # otherwise measured
    ]
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        for patch in patches:
            stack.enter_context(patch)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            material = Material(Path(root))
        try:
            yield lambda seed, target, number: run_case(seed, target, number, material, Path(root) / "case")
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
            reset_accelerate()


def fuzz(cases: int, seed: int, targets: list[str]) -> int:
    """Run cases of each target in turn, and print a table and the findings.

    Returns:
        the number of findings.
    """
    outcomes: dict[str, Counter[str]] = {target: Counter() for target in targets}
    findings = []
    with prepared() as run:
        for index in range(cases):
            target, number = targets[index % len(targets)], index // len(targets)
            # A case that crashes the process is the last one printed on a terminal. A log has every 500th only; the
            # same seed crashes again.
            if sys.stderr.isatty() or number % 500 == 0:
                print(f"\r{target}:{number} ", end="", file=sys.stderr, flush=True)
            started = time.perf_counter()
            error = run(seed, target, number)
            outcomes[target]["seconds"] += time.perf_counter() - started
            is_expected = error is None or isinstance(error, UserError)
            outcomes[target]["ok" if error is None else "refused" if is_expected else "found"] += 1
            if not is_expected:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(frame.filename).name}:{frame.lineno}"
                message = " ".join(str(error).split())[:200]
                findings.append(f"--seed {seed} --only {target}:{number}  {type(error).__name__} at {where}: {message}")
    print(f"\n{'target':<12}{'cases':>8}{'ok':>8}{'refused':>9}{'found':>7}{'seconds':>9}")
    for target, counts in outcomes.items():
        count = sum(counts[kind] for kind in ("ok", "refused", "found"))
        line = f"{target:<12}{count:>8}{counts['ok']:>8}{counts['refused']:>9}{counts['found']:>7}"
        print(f"{line}{counts['seconds']:>9.0f}")
    print("\n".join(findings))
    return len(findings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="in all, shared among the targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", metavar="TARGET:NUMBER", help="this case alone, with its traceback")
    args = parser.parse_args()
    faulthandler.enable()  # shows where the interpreter crashes
    if args.only is None:
        sys.exit(fuzz(args.cases, args.seed, args.targets) > 0)
    target, _, number = args.only.partition(":")
    with prepared() as run:
        error = run(args.seed, target, int(number))
    if error is None:
        print("ok")
    elif isinstance(error, UserError):
        print(f"refused: {error}")
    else:
        traceback.print_exception(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
