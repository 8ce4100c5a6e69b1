"""Nothing that the recipe reads can run code, and no name in it reaches a file elsewhere. What a checkpoint's own files
could do is in tests/test_checkpoint.py; that no token is left anywhere, in tests/test_hub.py."""

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recipe.arguments import CorpusArguments
from recipe.arguments.checks import check_repo_id
from recipe.base.errors import UserError
from recipe.data.hygiene import Decontaminator
from recipe.data.token_store import TokenStore
from recipe.data.tokenizer import DocumentEncoder
from recipe.finetune.finetuning import load_classifier
from recipe.finetune.tasks.glue import TASKS, check_tasks
from recipe.modeling.model import build_config, build_model
from testing.helpers import ROOT, SMALL_MODEL, Evil, write_jsonl
from testing.hub_server import Repo, serve
from tests.publish.test_hub import IMPORT, REPO, Client

SOURCES = [*ROOT.glob("*.py"), *(ROOT / "recipe").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
# Each runs what it is given, or what the file that it is given says.
RUNNING = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
RUNNING |= {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load", "joblib.load"}
RUNNING |= {"pd.read_pickle", "pandas.read_pickle", "torch.jit.load", "torch.hub.load", "shelve.open"}
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
            yield ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}


def test_nothing_that_is_read_is_run():
    assert len(SOURCES) > 30
    for file in SOURCES:
        assert "trust_remote_code" not in file.read_text(), file
        for name, keywords in calls(file):
            assert name not in RUNNING, f"{file}: {name}"
            keywords = {key: ast.unparse(value) for key, value in keywords.items()}
            assert keywords.get("allow_pickle", "False") == "False", f"{file}: {name}"
            assert keywords.get("shell", "False") == "False", f"{file}: {name}"
            if name.endswith("torch.load"):
                assert keywords.get("weights_only") == "True", f"{file}: {name}"


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


def test_architecture_with_code_of_its_own_is_refused(tokenizer, tmp_path: Path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd"}, "architectures": ["Odd"]} | SMALL_MODEL)
    )
    (tmp_path / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Odd: pass\n")
    with pytest.raises(UserError, match="model_"):
        build_config({}, str(tmp_path), tokenizer, 64)
    assert not (tmp_path / "ran").exists()
