"""Nothing that the recipe reads can run code, and no name in it reaches a file elsewhere. What a checkpoint's own files
could do is in tests/test_checkpoint.py; that no token is left anywhere, in tests/test_hub.py."""

import ast
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.arguments.checks import check_repo_id
from recipe.base.errors import UserError
from recipe.base.model_files import check_model_files
from recipe.data.document_encoder import DocumentEncoder
from recipe.data.hygiene import Decontaminator
from recipe.data.token_store import TokenStore
from recipe.data.tokenizer import load_tokenizer
from recipe.finetune.classifier import load_classifier, load_glue_tokenizer
from recipe.finetune.tasks.glue import TASKS, check_tasks
from recipe.modeling.model import LOADING, build_config, build_model
from recipe.publish.hub import fetch_checkpoint
from testing.helpers import ROOT, Evil, write_jsonl
from testing.hub_server import Repo, serve
from tests.publish.test_hub import IMPORT, REPO, Client

SOURCES = [*ROOT.glob("*.py"), *(ROOT / "recipe").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
# Each runs what it is given, or what the file that it is given says.
RUNNING = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
RUNNING |= {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load", "joblib.load"}
RUNNING |= {"pd.read_pickle", "pandas.read_pickle", "torch.jit.load", "torch.hub.load", "shelve.open"}
# Of transformers and datasets: each asks whether it may run a repository's code, or does so, unless told.
LOADERS = {"from_pretrained", "from_config", "pipeline", "load_dataset", "load_dataset_builder"}
NAMES = [
    "../../evil",
    "..",
    ".",
    "/evil",
    "a/b",
    "a\0b",
    "x" * 5000,
    "é" * 300,
    "\ud800",
    "",
    " ",
    "~",
    "$HOME",
    "`id`",
]


def calls(file: Path) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """(dotted name, keywords) of each call in a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg or f"**{ast.unparse(k.value)}": k.value for k in node.keywords}


def test_nothing_that_is_read_is_run():
    assert len(SOURCES) > 30
    for file in SOURCES:
        for name, keywords in calls(file):
            assert name not in RUNNING, f"{file}: {name}"
            keywords = {key: ast.unparse(value) for key, value in keywords.items()}
            assert keywords.get("allow_pickle", "False") == "False", f"{file}: {name}"
            assert keywords.get("shell", "False") == "False", f"{file}: {name}"
            if name.endswith("torch.load"):
                assert keywords.get("weights_only") == "True", f"{file}: {name}"
            if name.split(".")[-1] in LOADERS:
                assert keywords.get("trust_remote_code") == "False" or "**LOADING" in keywords, f"{file}: {name}"
            if name.endswith("from_pretrained") and "model" in name.lower():
                assert "**LOADING" in keywords, f"{file}: {name}"
    assert LOADING["trust_remote_code"] is False
    assert LOADING["weights_only"] is True


def test_weights_of_a_stranger_do_not_run(small_model: Path, tokenizer, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((small_model / "config.json").read_bytes())
    torch.save({"roberta.embeddings": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        build_model(build_config({}, str(folder), tokenizer, 64), str(folder))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_classifier(str(folder), TASKS["rte"])
    assert not (tmp_path / "ran").exists()


def files_outside(folder: Path, *inside: str) -> set[str]:
    return {str(path) for path in folder.rglob("*") if path.relative_to(folder).parts[0] not in inside}


def test_corpora_are_stored_in_their_folder_whatever_their_names(tmp_path: Path, tokenizer):
    encoder = DocumentEncoder(tokenizer, "newline", "en")
    path = write_jsonl(tmp_path / "text.jsonl", ["some text"])
    before = files_outside(tmp_path, "stores")
    for name in NAMES:
        store = TokenStore(CorpusArguments(name=name, path=str(path)), encoder, Decontaminator([]), tmp_path / "stores")
        store.build(0, None, 0)
        assert store.path.resolve().parent == tmp_path / "stores"
        assert store.is_complete
    assert files_outside(tmp_path, "stores") == before


def test_run_stays_in_its_folder_whatever_its_corpora_are_called(run_pretrain, flags, texts, tmp_path: Path):
    corpora = [
        {"name": name, "path": str(write_jsonl(tmp_path / f"{number}.jsonl", texts))}
        for number, name in enumerate(["../../evil", "/evil", "a\0b", "x" * 5000, "| a |\n<b>"])
    ]
    before = files_outside(tmp_path, "run", "stores")
    run_pretrain(
        flags
        | {"corpora": json.dumps(corpora), "token_store_dir": tmp_path / "stores", "max_steps": 2, "eval_blocks": 5}
    )
    assert files_outside(tmp_path, "run", "stores") == before
    assert not Path("/evil").exists()


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_hub_and_of_tasks_are_checked(name: str):
    with pytest.raises(UserError, match="`tasks`: there is no task"):
        check_tasks("tasks", [name])
    if name != "a/b":
        with pytest.raises(UserError, match="`hub_model_id` is"):
            check_repo_id("hub_model_id", name)


def test_repository_cannot_write_outside_the_run(flags, tmp_path: Path):
    """The real hub has no such names; whoever pretends to be it may."""
    files = dict.fromkeys(("config.json", "model.safetensors", "optimizer.pt", "manifest.json"), b"{}")
    files["state.json"] = json.dumps({"step": "../../../evil"}).encode()
    evil = ["model/../../../../evil.safetensors", "../evil.json", "model-x/evil.safetensors", "/evil", "model.py"]
    with serve(tmp_path / "datasets") as server:
        server.repos[REPO] = Repo(private=False)
        server.repos[REPO].commit("main", files | dict.fromkeys(evil, b"evil"), "bad")
        command = (
            IMPORT + "args = parse_config(PretrainArguments, '')\nwith report_user_errors(): fetch_checkpoint(args)"
        )
        arguments = [f"--{name}={value}" for name, value in flags.items()]
        client = Client(server.url, tmp_path / "home")
        result = client.run("-c", command, *arguments, f"--resume_from_checkpoint=hub://{REPO}")
    assert result.returncode == 2, result.stderr
    assert "state.json of hub://ann/run is damaged" in result.stderr
    assert not [path for path in tmp_path.rglob("*evil*") if "home" not in path.parts]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {".from-hub"}
    assert not any("evil" in name for _, _, names in os.walk(tmp_path / "run") for name in names)


LOADED_BY: dict[str, Callable[[str], object]] = {
    "model": lambda folder: build_config({}, folder, None, 64),
    "tokenizer": load_tokenizer,
    "classifier": lambda folder: load_glue_tokenizer(folder, 64),
}


@pytest.fixture
def change(small_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a copy of the small model with other values in a JSON file of its own."""

    def make(name: str, **values: object) -> Path:
        folder = Path(shutil.copytree(small_model, tmp_path / "model", dirs_exist_ok=True))
        before = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(before | values))
        return folder

    return make


@pytest.mark.parametrize("load", LOADED_BY.values(), ids=LOADED_BY)
@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("config.json", {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd"}}, "`auto_map`"),
        ("config.json", {"auto_map": {"AutoModelForMaskedLM": "odd.Odd"}}, "`auto_map`"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["odd.Odd", None]}}, "`auto_map`"),
        ("tokenizer_config.json", {"tokenizer_class": "Odd", "auto_map": ["odd.Odd", None]}, "`auto_map`"),
        ("config.json", {"attn_implementation": "somebody/kernel"}, "`attn_implementation: 'somebody/kernel'`"),
        ("config.json", {"sub": {"_attn_implementation": "flash_attention_2"}}, "`_attn_implementation: 'flash_"),
        ("config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "`quantization_config`"),
        ("adapter_config.json", {"base_model_name_or_path": "somebody/base"}, "an adapter, which is not loaded"),
    ],
)
def test_what_would_run_code_or_load_another_repository_is_refused(change, monkeypatch, load, file, values, expected):
    folder = change(file, **values)
    (folder / "odd.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Odd: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # a yes to whoever asks
    with pytest.raises(UserError, match=rf"_name(_or_path)?`: .*/{file}.*{re.escape(expected)}"):
        load(str(folder))
    assert not (folder / "ran").exists()


def test_repository_on_the_hub_is_checked_before_more_of_it_is_fetched(tmp_path: Path):
    config = json.dumps({"auto_map": {"AutoConfig": "odd.Odd"}}).encode()
    code = "from recipe.base.model_files import *\nfrom recipe.base.errors import *\n"
    code += f"with report_user_errors(): check_model_files('tokenizer_name', '{REPO}', 'tokenizer')"
    with serve(tmp_path / "datasets") as server:
        client = Client(server.url, tmp_path / "home")
        absent = client.run("-c", code)
        server.repos[REPO] = Repo(private=False)
        files = {"odd.py": b"", "model.safetensors": b"", "tokenizer.json": b"{}"}
        server.repos[REPO].commit("main", files, "good")
        good = client.run("-c", code)
        server.repos[REPO].commit("main", files | {"config.json": config}, "bad")
        bad = client.run("-c", code)
    assert [result.returncode for result in (absent, good, bad)] == [2, 0, 2]
    assert f"`tokenizer_name` is {REPO}: no tokenizer there, as a folder or on the hub" in absent.stderr
    assert "config.json names (`auto_map`) code of its repository, which is never run" in bad.stderr
    fetched = {path.name for path in (tmp_path / "home").rglob("*") if path.is_symlink()}
    assert fetched == {"config.json", "tokenizer.json"}


def test_offline_hub_is_named(tmp_path: Path):
    for option, name in (("tokenizer_name", "ann/tokenizer"), ("model_name_or_path", "ann/model")):
        with pytest.raises(UserError, match=rf"`{option}` is {name}: no \w+ there.*; HF_HUB_OFFLINE is set: unset it"):
            check_model_files(option, name, name.removeprefix("ann/"))
    args = PretrainArguments(
        output_dir=str(tmp_path / "run"),
        corpora=[CorpusArguments(name="a", path="a.jsonl")],
        tokenizer_name="x",
        resume_from_checkpoint="hub://ann/run",
    )
    with pytest.raises(UserError, match=r"`resume_from_checkpoint` is hub://ann/run and HF_HUB_OFFLINE is set; unset"):
        fetch_checkpoint(args)


@pytest.mark.parametrize("load", LOADED_BY.values(), ids=LOADED_BY)
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_hidden_layers": 10**8}, "`num_hidden_layers` is 100000000; give 1 to 256"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0; give 1 to 256"),
        ({"model_type": "qwen3", "num_hidden_layers": 10**8}, "`num_hidden_layers` is 100000000; give 1 to 256"),
        ({"model_type": "albert", "inner_group_num": 256}, "`inner_group_num` is 256; give 1 to 4"),
        ({"num_labels": 10**9}, "`num_labels` is 1000000000; give 0 to 4,096"),
        ({"vocab_size": 10**9}, "`vocab_size` is 1000000000; give 1 to 16,777,216"),
        ({"max_position_embeddings": 10**18}, "`max_position_embeddings` is 1000000000000000000; give 0 to"),
        ({"part": [{"hidden_size": -1}]}, "`hidden_size` is -1; give 1 to"),
        ({"hidden_dropout_prob": float("nan")}, "`hidden_dropout_prob` is nan; give a finite number"),
    ],
)
def test_sizes_of_a_stranger_are_bounded_before_anything_is_built(change, load, values, expected):
    with pytest.raises(UserError, match=rf"config\.json: {re.escape(expected)}"):
        load(str(change("config.json", **values)))


@pytest.mark.parametrize("load", LOADED_BY.values(), ids=LOADED_BY)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_files_of_a_stranger_that_are_deep_or_large_are_named(change, load, file):
    folder = change(file)
    os.truncate(folder / file, 2**40)
    with pytest.raises(UserError, match=rf"/{file} has 1.1 TB, and no more than"):
        load(str(folder))
    (folder / file).write_text("[" * 50_000)
    if file != "tokenizer.json" or load is not LOADED_BY["model"]:  # of which a model has no need
        with pytest.raises(UserError, match="RecursionError"):
            load(str(folder))


def test_model_that_no_machine_holds_is_refused_before_it_is_built(change, run_pretrain, flags):
    sizes = {"hidden_size": 2**22, "intermediate_size": 2**22, "num_hidden_layers": 256, "num_attention_heads": 2}
    with pytest.raises(UserError, match=r"`model_name_or_path`: the weights take .* TB, and this machine has"):
        load_glue_tokenizer(str(change("config.json", **sizes)), 64)
    with pytest.raises(UserError, match=r"`model_config`: the weights take .* TB, and this machine has"):
        run_pretrain(flags | {"model_config": json.dumps(sizes)})
