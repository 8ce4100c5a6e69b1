"""Pushing to the hub and resuming from it, against a server on this machine that speaks the hub's API."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load, load_file

from recipe.base.files import to_yaml
from recipe.publish.hub import Publisher, list_waiting
from recipe.publish.names import public_config
from testing.helpers import PATIENCE_SECONDS, PYTHONPATH, ROOT, command_line, learning, wait_for
from testing.hub_server import Fault, HubServer, Repo, serve

REPO = "ann/run"


IMPORT = """from recipe.arguments import *
from recipe.base.errors import *
from recipe.publish.hub import *
from recipe.publish.rights import *
"""


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
        self.environment |= {"PYTHONPATH": PYTHONPATH} | ({"HF_TOKEN": token} if token else {})

    def run(self, *command: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, command)],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    def pretrain(self, flags: dict[str, object]) -> subprocess.CompletedProcess:
        return self.run("pretrain.py", *command_line(flags))

    def push(self, run: Path, seconds: float) -> subprocess.CompletedProcess:
        """`python -m recipe.publish.hub`, with less patience."""
        code = "import recipe.publish.hub as hub; hub.REQUEST_SECONDS = hub.PATIENCE_SECONDS = {}; hub.main()"
        return self.run("-c", code.format(seconds), run)


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub.url, tmp_path / "home")


@pytest.fixture
def push_flags(flags: dict[str, object]) -> dict[str, object]:
    return flags | {"push_to_hub": "true", "save_steps": 2, "hub_strategy": "checkpoint", "license": "mit"}


def on_hub(hub: HubServer, revision: str) -> dict[str, bytes]:
    repo = hub.repos[REPO]
    return repo.commits[repo.find(revision)]


def assert_no_token(folder: Path, result: subprocess.CompletedProcess) -> None:
    """The token is in no file of the run, of the library's cache, nor in what was printed."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if b"hf_write" in file.read_bytes()]
    assert "hf_write" not in result.stdout + result.stderr


LOAD = """
import sys
from transformers import AutoModelForMaskedLM, AutoTokenizer
repo, folder, *revisions = sys.argv[1:]
for revision in revisions:
    AutoModelForMaskedLM.from_pretrained(repo, revision=revision).save_pretrained(f"{folder}/{revision}")
    AutoTokenizer.from_pretrained(repo, revision=revision).save_pretrained(f"{folder}/{revision}")
"""


def test_pushing_process_loads_no_torch():
    """It would take five seconds of a core from training, at each checkpoint."""
    code = (
        "import sys, recipe.publish.hub; sys.exit(bool({'torch', 'transformers', 'accelerate'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.long
def test_every_checkpoint_is_a_model_on_the_hub_and_a_place_to_go_on_from(hub, client, push_flags, tmp_path):
    result = client.pretrain(push_flags | {"save_total_limit": 3})
    assert result.returncode == 0, result.stderr
    assert "not on the hub" not in result.stdout
    assert_no_token(tmp_path, result)
    run, repo = tmp_path / "run", hub.repos[REPO]
    assert list(repo.tags) == ["step-00000002", "step-00000004", "step-00000006"]
    assert repo.find("main") == repo.tags["step-00000006"]
    assert not list((run / "hub").glob("step-*"))
    loaded = client.run("-c", LOAD, REPO, tmp_path, *repo.tags)
    assert loaded.returncode == 0, loaded.stderr
    for tag in repo.tags:
        there, here = (
            load_file(folder / "model.safetensors") for folder in (tmp_path / tag, run / "checkpoints" / tag)
        )
        assert there.keys() == here.keys()
        assert all(torch.equal(there[name], here[name]) for name in here)
        assert f"{int(tag[5:])} of 6" in on_hub(hub, tag)["README.md"].decode()
    assert (run / "model" / "README.md").read_bytes() == on_hub(hub, "main")["README.md"]

    # A tag of another name beside it, as docs/budgets.md sets those of words.
    code = f"import huggingface_hub; huggingface_hub.create_tag('{REPO}', tag='chck_1M', revision='step-00000002')"
    result = client.run("-c", code)
    assert result.returncode == 0, result.stderr
    assert repo.tags["chck_1M"] == repo.tags["step-00000002"]

    on_hub(hub, "step-00000002")["optimizer.pt"] += b"!"
    damaged = {"output_dir": tmp_path / "damaged", "resume_from_checkpoint": f"hub://{REPO}@step-00000002"}
    result = client.pretrain(push_flags | damaged)
    assert result.returncode == 2
    assert "is damaged: optimizer.pt has" in result.stderr

    # Another machine, with an empty folder, goes on from the second of the three.
    again = push_flags | {"output_dir": tmp_path / "again", "hub_model_id": "ann/again"}
    again |= {"resume_from_checkpoint": f"hub://{REPO}@step-00000004"}
    result = client.pretrain(again)
    assert result.returncode == 0, result.stderr
    assert learning(tmp_path / "again" / "metrics.jsonl") == learning(run / "metrics.jsonl")
    there, here = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "again", run))
    assert all(torch.equal(there[name], here[name]) for name in here)
    assert (tmp_path / "home" / "hub").is_dir()
    assert_no_token(tmp_path, result)


@pytest.mark.long
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


@pytest.mark.long
def test_what_is_refused_on_the_way_waits_and_is_pushed_later(hub, client, push_flags, tmp_path):
    hub.faults = [Fault(401, "POST .*/commit/")]  # the token is revoked once training is under way
    result = client.pretrain(push_flags)
    assert result.returncode == 0, result.stderr
    assert "warning: not pushed: step-00000002" in result.stdout
    assert f"push with: python -m recipe.publish.hub {tmp_path / 'run'}" in result.stdout
    waiting = [f"step-{step:08d}" for step in (2, 4, 6)]
    assert f"not on the hub yet: {', '.join(waiting)}" in result.stdout
    assert (tmp_path / "run" / "hub" / "log.txt").exists()
    assert_no_token(tmp_path, result)
    hub.faults = []
    result = client.push(tmp_path / "run", 60)
    assert result.returncode == 0, result.stderr
    assert list(hub.repos[REPO].tags) == waiting
    assert "waits to be pushed" in client.push(tmp_path / "run", 60).stdout


@pytest.fixture
def waiting_run(tmp_path: Path) -> Path:
    """A run whose last checkpoint is not on the hub yet."""
    run = tmp_path / "run"
    (run / "hub" / "step-00000006").mkdir(parents=True)
    (run / "hub" / "step-00000006" / "model.safetensors").write_bytes(b"weights")
    (run / "config.yaml").write_text("{push_to_hub: true, hub_model_id: run, hub_private_repo: true}")
    return run


@pytest.mark.long
@pytest.mark.parametrize("request_that_hangs", ["POST /api/repos", "POST .*preupload", "PUT /lfs/", "POST .*/commit/"])
def test_a_hub_that_hangs_is_given_up(hub, client, waiting_run, request_that_hangs):
    hub.faults = [Fault("hang", request_that_hangs)]
    result = client.push(waiting_run, 0.5)
    assert result.returncode == 1
    assert "not pushed: step-00000006: " in result.stdout
    hub.faults = []
    assert client.push(waiting_run, 60).returncode == 0
    assert hub.repos[REPO].private
    assert on_hub(hub, "step-00000006")["model.safetensors"] == b"weights"


def test_answer_that_is_lost_makes_no_second_commit(hub, client, waiting_run):
    hub.faults = [Fault("cut", "POST .*/tag/", times=1)]
    result = client.push(waiting_run, 60)
    assert result.returncode == 0
    assert "trying again" in result.stdout
    assert list(hub.repos[REPO].messages.values()) == ["initial commit", "step-00000006"]


def test_folder_that_is_gone_is_not_pushed_again_and_again(hub, client, waiting_run):
    code = "import recipe.publish.hub as hub; hub.list_waiting = lambda run: [run / 'hub' / 'step-7']; hub.main()"
    result = client.run("-c", code, waiting_run)
    assert result.returncode
    assert "step-7 is gone: removed, moved or unmounted" in result.stderr
    assert "trying again" not in result.stdout


def test_training_state_of_an_earlier_checkpoint_does_not_stay_beside_a_model(hub, client, waiting_run):
    hub.repos[REPO] = Repo(private=False)
    hub.repos[REPO].commit("main", {"optimizer.pt": b"old", "glue.json": b"old", "NOTES.md": b"the user's"}, "before")
    assert client.push(waiting_run, 60).returncode == 0
    assert set(on_hub(hub, "main")) == {"NOTES.md", "model.safetensors"}


def test_oldest_of_what_waits_makes_room_but_for_what_is_being_pushed(tmp_path, capsys):
    args = SimpleNamespace(push_to_hub=True, output_dir=tmp_path, hub_strategy="every_save", save_total_limit=2)
    publisher = Publisher(args, True, lambda folder: None, lambda run, model: "card")
    (tmp_path / "config.yaml").write_text("corpora: [{name: own, path: /home/jane/clinic/notes.jsonl}]")
    for step in range(1, 7):
        checkpoint = tmp_path / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"weights")
        (checkpoint / "optimizer.pt").write_bytes(b"moments")
        publisher.stage(checkpoint)
    assert [path.name[-1] for path in list_waiting(tmp_path)] == ["1", "5", "6"]
    printed = capsys.readouterr().out
    assert all(f"step-{step:08d} could not be pushed in time" in printed for step in (2, 3, 4))
    staged = list_waiting(tmp_path)[-1]
    assert {file.name for file in staged.iterdir()} == {"README.md", "config.yaml", "model.safetensors"}
    assert "path: notes.jsonl" in (staged / "config.yaml").read_text()
    assert "jane" not in (staged / "config.yaml").read_text()
    assert (staged / "model.safetensors").samefile(checkpoint / "model.safetensors")  # takes no disk


CHECK = (
    IMPORT
    + """
with report_user_errors():
    args = parse_config(PretrainArguments, '')
    print(check_push(args, is_fresh=not args.resume_from_checkpoint))
"""
)


def test_hub_that_is_down_is_a_warning(push_flags, tmp_path):
    client = Client("http://127.0.0.1:9", tmp_path / "home")
    result = client.run("-c", CHECK, *command_line(push_flags | {"hub_model_id": REPO}))
    assert result.returncode == 0, result.stderr
    assert "warning: the hub cannot be reached" in result.stdout


def test_disk_that_is_full_is_a_warning(tmp_path, capsys, monkeypatch):
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recipe.publish.hub.Publisher.stage", no_room)
    args = SimpleNamespace(push_to_hub=True, output_dir=tmp_path, hub_strategy="every_save", save_total_limit=2)
    Publisher(args, True, lambda folder: None, lambda run, model: "card").publish(tmp_path / "step-00000001", False)
    assert "warning: step-00000001 is not pushed to the hub: OSError" in capsys.readouterr().out


@pytest.fixture
def others(hub: HubServer) -> None:
    """A token that may only read, and repositories of somebody else and of an organisation of ours."""
    hub.tokens["hf_read"] = ("ann", "read", [])
    for name in ("bob/theirs", "lab/ours"):
        hub.repos[name] = Repo(private=False)
        hub.repos[name].commit("main", {"model.safetensors": b"weights"}, "a model")
    hub.repos["lab/ours"].tags["step-00000002"] = hub.repos["lab/ours"].branches["main"]


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
def test_right_to_push_is_checked(hub, others, push_flags, tmp_path, token, repo_id, expected):
    client = Client(hub.url, tmp_path / "home", token)
    result = client.run("-c", CHECK, *command_line(push_flags | {"hub_model_id": repo_id}))
    assert result.returncode == 2, result.stderr
    for part in expected:
        assert part in result.stderr


def test_repository_of_another_experiment_is_left_alone(hub, client, push_flags, finished_run):
    hub.repos["lab/ours"] = Repo(private=False)
    hub.repos["lab/ours"].commit("main", {"config.yaml": (finished_run / "config.yaml").read_bytes()}, "a model")
    again = push_flags | {"hub_model_id": "lab/ours", "resume_from_checkpoint": "latest", "hub_private_repo": "false"}
    result = client.run("-c", CHECK, *command_line(again))
    assert result.returncode == 0, result.stderr
    assert "('lab/ours', [])" in result.stdout
    result = client.run("-c", CHECK, *command_line(again | {"seed": 2}))
    assert result.returncode == 2
    assert "`hub_model_id` lab/ours holds another experiment, with other values of seed" in result.stderr


def test_config_that_was_pushed_with_names_is_of_the_same_experiment(hub, client, push_flags, finished_run):
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    hub.repos[REPO] = Repo(private=True)
    hub.repos[REPO].commit("main", {"config.yaml": to_yaml(public_config(config, [])).encode()}, "a model")
    result = client.run("-c", CHECK, *command_line(push_flags | {"resume_from_checkpoint": "latest"}))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("given", "is_private"), [({}, True), ({"hub_private_repo": "false"}, False), ({"hub_private_repo": "true"}, True)]
)
def test_repository_of_local_text_is_private_unless_that_is_not_wanted(hub, client, push_flags, given, is_private):
    result = client.run("-c", CHECK, *command_line(push_flags | given))
    assert result.returncode == 0, result.stderr
    assert hub.repos[REPO].private == is_private
    told = "the repository is private, since it is of local text (sample): see `hub_private_repo`"
    assert (told in result.stdout) == (not given)
    hub.repos[REPO].private = False
    result = client.run("-c", CHECK, *command_line(push_flags | given))
    assert result.returncode == (2 if is_private else 0)
    assert ("`hub_model_id` ann/run is public, and `hub_private_repo` is true" in result.stderr) == is_private


def test_licence_is_asked_for_before_a_push(client, push_flags):
    result = client.run("-c", CHECK, *command_line(push_flags | {"license": "null"}))
    assert result.returncode == 2
    assert "`license` is missing; `push_to_hub` is true: name the licence of the weights" in result.stderr


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


@pytest.mark.long
def test_training_does_not_begin_without_the_right_to_push(hub, push_flags, tmp_path):
    hub.tokens["hf_write"] = ("ann", "read", [])
    result = Client(hub.url, tmp_path / "home").pretrain(push_flags)
    assert result.returncode == 2
    assert "role read" in result.stderr
    assert not (tmp_path / "run").exists()


def test_folder_that_is_no_run_is_named(client, tmp_path):
    result = client.run("-m", "recipe.publish.hub", tmp_path)
    assert result.returncode == 2
    assert f"{tmp_path} holds no run" in result.stderr


@pytest.mark.long
def test_killed_download_goes_on_by_the_same_command_alone(hub, client, flags, tmp_path):
    result = client.pretrain(flags | {"save_steps": 2})
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    files = {path.name: path.read_bytes() for path in (run / "checkpoints" / "step-00000002").iterdir()}
    hub.repos[REPO] = Repo(private=False)
    hub.repos[REPO].commit("main", files | {"metrics.jsonl": (run / "metrics.jsonl").read_bytes()}, "pushed")
    hub.faults = [Fault("hang", "GET .*optimizer.pt")]
    again = flags | {"output_dir": tmp_path / "again", "resume_from_checkpoint": f"hub://{REPO}"}
    command = [sys.executable, "pretrain.py", *command_line(again)]
    with subprocess.Popen(command, env=client.environment, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: any("GET" in request and "optimizer.pt" in request for request in hub.requests))
        process.kill()
    hub.faults = []
    refused = client.pretrain(again | {"resume_from_checkpoint": "latest"})
    assert refused.returncode == 2
    assert "is a download that has not ended; give the same hub:// address again" in refused.stderr
    result = client.pretrain(again)
    assert result.returncode == 0, result.stderr
    assert learning(tmp_path / "again" / "metrics.jsonl") == learning(run / "metrics.jsonl")
