"""Pushing to the hub and resuming from it, against a server on this machine that speaks the hub's API."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from tests.conftest import ROOT, command_line, learning
from tests.hub_server import Fault, HubServer, Repo, serve

REPO = "ann/run"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with serve(tmp_path / "datasets") as server:
        yield server


class Client:
    """Commands of a machine whose hub is the local server."""

    def __init__(self, url: str, home: Path, token: str | None = "hf_write") -> None:
        ours = ("HF_", "ACCELERATE_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}
        self.environment |= {"HF_DATASETS_CACHE": os.environ["HF_DATASETS_CACHE"], "ACCELERATE_USE_CPU": "true"}
        self.environment |= {"PYTHONPATH": str(ROOT)} | ({"HF_TOKEN": token} if token else {})

    def run(self, *command: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, command)],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def pretrain(self, flags: dict[str, object]) -> subprocess.CompletedProcess:
        return self.run("pretrain.py", *command_line(flags))

    def push(self, run: Path, seconds: float) -> subprocess.CompletedProcess:
        """`python -m recipe.hub`, with less patience."""
        code = "import recipe.hub as hub; hub.REQUEST_SECONDS = hub.PATIENCE_SECONDS = {}; hub.main()"
        return self.run("-c", code.format(seconds), run)


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub.url, tmp_path / "home")


@pytest.fixture
def push_flags(flags: dict[str, object]) -> dict[str, object]:
    return flags | {"push_to_hub": "true", "save_steps": 2, "hub_strategy": "checkpoint"}


def on_hub(hub: HubServer, revision: str) -> dict[str, bytes]:
    repo = hub.repos[REPO]
    return repo.commits[repo.find(revision)]


LOAD = """
import sys
from transformers import AutoModelForMaskedLM, AutoTokenizer
repo, revision, target = sys.argv[1:]
AutoModelForMaskedLM.from_pretrained(repo, revision=revision).save_pretrained(target)
AutoTokenizer.from_pretrained(repo, revision=revision).save_pretrained(target)
"""


def test_every_checkpoint_is_a_model_on_the_hub_and_a_place_to_go_on_from(hub, client, push_flags, tmp_path):
    result = client.pretrain(push_flags | {"save_total_limit": 3})
    assert result.returncode == 0, result.stderr
    assert "not on the hub" not in result.stdout
    run, repo = tmp_path / "run", hub.repos[REPO]
    assert list(repo.tags) == ["step-00000002", "step-00000004", "step-00000006"]
    assert repo.find("main") == repo.tags["step-00000006"]
    assert not list((run / "hub").glob("step-*"))
    for tag in repo.tags:
        loaded = client.run("-c", LOAD, REPO, tag, tmp_path / tag)
        assert loaded.returncode == 0, loaded.stderr
        there, here = (
            load_file(folder / "model.safetensors") for folder in (tmp_path / tag, run / "checkpoints" / tag)
        )
        assert there.keys() == here.keys()
        assert all(torch.equal(there[name], here[name]) for name in here)
        assert f"{int(tag[5:])} of 6" in on_hub(hub, tag)["README.md"].decode()
    assert (run / "model" / "README.md").read_bytes() == on_hub(hub, "main")["README.md"]

    on_hub(hub, "step-00000002")["optimizer.pt"] += b"!"
    damaged = {"output_dir": tmp_path / "damaged", "resume_from_checkpoint": f"hub://{REPO}@step-00000002"}
    result = client.pretrain(push_flags | damaged)
    assert result.returncode == 2
    assert "is damaged: optimizer.pt has" in result.stderr

    # A run that goes on does not push into another one's repository.
    other = push_flags | {"output_dir": tmp_path / "other", "seed": 1, "save_steps": 6}
    assert client.pretrain(other | {"push_to_hub": "false"}).returncode == 0
    result = client.pretrain(other | {"hub_model_id": REPO, "resume_from_checkpoint": "latest"})
    assert result.returncode == 2
    assert f"`hub_model_id` {REPO} holds another experiment, with other values of seed" in result.stderr

    # Another machine, with an empty folder, goes on from the second of the three.
    again = push_flags | {"output_dir": tmp_path / "again", "hub_model_id": "ann/again"}
    again |= {"resume_from_checkpoint": f"hub://{REPO}@step-00000004"}
    result = client.pretrain(again)
    assert result.returncode == 0, result.stderr
    assert learning(tmp_path / "again" / "metrics.jsonl") == learning(run / "metrics.jsonl")
    there, here = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "again", run))
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_no_fault_reaches_training_and_all_is_pushed(hub, client, push_flags, tmp_path):
    alone = client.pretrain(push_flags | {"push_to_hub": "false"})
    assert alone.returncode == 0, alone.stderr
    shutil.move(tmp_path / "run", tmp_path / "alone")
    hub.faults = [
        Fault(500, "POST .*/preupload/", times=2),
        Fault(429, "POST .*/commit/", times=1),
        Fault("cut", "PUT /lfs/", times=2),
        Fault("cut", "POST .*/tag/", times=1),
    ]
    result = client.pretrain(push_flags)
    assert result.returncode == 0, result.stderr
    assert not any(fault.times for fault in hub.faults)
    assert "trying again" in result.stdout
    assert learning(tmp_path / "run" / "metrics.jsonl") == learning(tmp_path / "alone" / "metrics.jsonl")
    for tag in ("step-00000002", "step-00000004", "step-00000006"):
        there = load(on_hub(hub, tag)["model.safetensors"])
        here = load_file(tmp_path / "alone" / "checkpoints" / tag / "model.safetensors")
        assert all(torch.equal(there[name], here[name]) for name in here)


def test_what_is_refused_on_the_way_waits_and_is_pushed_later(hub, client, push_flags, tmp_path):
    hub.faults = [Fault(401, "POST .*/commit/")]  # the token is revoked once training is under way
    result = client.pretrain(push_flags)
    assert result.returncode == 0, result.stderr
    assert "warning: not pushed: step-00000002" in result.stdout
    assert f"push with: python -m recipe.hub {tmp_path / 'run'}" in result.stdout
    waiting = [f"step-{step:08d}" for step in (2, 4, 6)]
    assert f"not on the hub yet: {', '.join(waiting)}" in result.stdout
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert any(file.name == "log.txt" for file in files)
    assert not any(b"hf_write" in file.read_bytes() for file in files)  # the token
    assert "hf_write" not in result.stdout + result.stderr
    hub.faults = []
    result = client.push(tmp_path / "run", 60)
    assert result.returncode == 0, result.stderr
    assert list(hub.repos[REPO].tags) == waiting
    assert "nothing" in client.push(tmp_path / "run", 60).stdout


def test_a_hub_that_hangs_is_given_up(hub, client, push_flags, tmp_path):
    hub.faults = [Fault(403, "POST .*/preupload/")]
    assert client.pretrain(push_flags | {"hub_strategy": "end"}).returncode == 0
    hub.faults = [Fault("hang", "PUT /lfs/")]
    started = time.monotonic()
    result = client.push(tmp_path / "run", 1)
    assert result.returncode == 1
    assert "not pushed: step-00000006" in result.stdout
    assert time.monotonic() - started < 60


def test_least_recent_of_what_waits_makes_room(hub, client, push_flags, tmp_path):
    hub.faults = [Fault(403, "POST .*/commit/")]
    result = client.pretrain(push_flags | {"save_steps": 1, "save_total_limit": 2})
    assert result.returncode == 0, result.stderr
    for step in (2, 3, 4):
        assert f"step-{step:08d} could not be pushed in time" in result.stdout
    assert "not on the hub yet: step-00000001, step-00000005, step-00000006" in result.stdout


def test_hub_that_is_down_is_a_warning(client, flags, tmp_path):
    nowhere = Client("http://127.0.0.1:9", tmp_path / "home")
    result = nowhere.pretrain(flags | {"push_to_hub": "true", "hub_model_id": REPO, "dry_run": "true"})
    assert result.returncode == 0, result.stderr
    assert "warning: the hub cannot be reached" in result.stdout


@pytest.fixture
def others(hub: HubServer) -> None:
    """A token that may only read, and repositories of somebody else and of an organisation of ours."""
    hub.tokens["hf_read"] = ("ann", "read", [])
    for name in ("bob/theirs", "lab/ours"):
        hub.repos[name] = Repo(private=False)
        hub.repos[name].commit("main", {"model.safetensors": b"weights"}, "a model")
    hub.repos["lab/ours"].tags["step-00000002"] = hub.repos["lab/ours"].branches["main"]


IMPORT = "import sys; from recipe.config import parse_config; from recipe.hub import *\n"


@pytest.mark.parametrize(
    ("token", "repo_id", "expected"),
    [
        (None, "run", ["`push_to_hub` needs a token", "hf auth login"]),
        ("hf_gone", "run", ["the hub refuses the token", "Invalid user token", "give a valid token"]),
        ("hf_read", "run", ["needs a token that may write", "role read"]),
        ("hf_write", "bob/theirs", ["refuses `hub_model_id` bob/theirs", "403", "namespace of yours"]),
        ("hf_write", "bob/none", ["refuses `hub_model_id` bob/none", "403", "namespace of yours"]),
        ("hf_write", "lab/ours", ["lab/ours already holds files", "hub://lab/ours"]),
        ("hf_write", "a/b/c", ["`hub_model_id` is 'a/b/c'", "user/name"]),
    ],
)
def test_right_to_push_is_checked(hub, others, tmp_path, token, repo_id, expected):
    code = IMPORT + "with report_user_errors(): check_access(sys.argv[1], None, {}, True, False)"
    result = Client(hub.url, tmp_path / "home", token).run("-c", code, repo_id)
    assert result.returncode == 2, result.stderr
    for part in expected:
        assert part in result.stderr


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("hub://lab/ours@step-0000002", ["has step-00000002", "did you mean `step-00000002`?"]),
        ("hub://lab/ours", ["has no optimizer.pt", "hub_strategy: checkpoint"]),
        ("hub://lab/nothing", ["hub://lab/nothing cannot be downloaded"]),
        ("hub://lab/a/b", ["`resume_from_checkpoint` is 'lab/a/b'"]),
    ],
)
def test_checkpoint_that_is_not_on_the_hub_is_named(others, client, flags, tmp_path, uri, expected):
    code = IMPORT + "args = parse_config(PretrainArguments, '')\nwith report_user_errors(): fetch_checkpoint(args)"
    result = client.run("-c", code, *command_line(flags | {"resume_from_checkpoint": uri}))
    assert result.returncode == 2, result.stderr
    for part in expected:
        assert part in result.stderr
    assert not (tmp_path / "run").exists()


def test_training_does_not_begin_without_the_right_to_push(hub, push_flags, tmp_path):
    hub.tokens["hf_write"] = ("ann", "read", [])
    result = Client(hub.url, tmp_path / "home").pretrain(push_flags)
    assert result.returncode == 2
    assert "role read" in result.stderr
    assert not (tmp_path / "run").exists()


def test_folder_that_is_no_run_is_named(client, tmp_path):
    result = client.run("-m", "recipe.hub", tmp_path)
    assert result.returncode == 2
    assert f"{tmp_path} holds no run" in result.stderr
