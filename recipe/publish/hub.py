"""Push checkpoints to the model hub while training, and fetch one to resume from.

1. `Publisher.publish` puts what the hub is to have of a checkpoint into `RUN_DIR/hub/step-00010000`: model, tokenizer,
   card, metrics. Large files are hard links, so this takes milliseconds and, as long as the checkpoint exists, no disk.
2. It starts the command below, which users run themselves for what is left over. The command pushes all folders that
   wait, the oldest first: a commit on `main` and a tag for each. A folder is removed once the hub has it.

The command is a process of its own, at low priority, because the library's requests have no time limit and a thread
that hangs keeps its process from ending. So no fault of the hub reaches training, and a crash of it loses no push.

python -m recipe.publish.hub runs/roberta-base
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
from filelock import FileLock
from huggingface_hub import HfApi, constants, set_client_factory, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from tqdm import tqdm

from recipe.arguments import PretrainArguments
from recipe.arguments.checks import check_repo_id
from recipe.base.errors import UserError, describe_error, did_you_mean, raising_damaged_file, run_script
from recipe.base.files import replace_folder, to_yaml, write_atomically
from recipe.publish.names import public_config, wants_private
from recipe.run.directory import (
    DOWNLOAD_FOLDER,
    HUB_SCHEME,
    STATE_FILES,
    checkpoint_path,
    checkpoint_step,
    read_config,
    read_step,
)

CARD_SUFFIX = "-card"  # of a folder that waits with a new card alone
GLUE_FILE = "glue.json"  # results of the weights beside it
REQUEST_SECONDS = 60  # without a byte, after which a request is given up
PATIENCE_SECONDS = 120  # of trying a push again, after which it waits for the next checkpoint
LAST_PUSH_SECONDS = 3600  # for which the end of a run waits for its last push
TRANSIENT_STATUSES = (408, 409, 412, 423, 429)  # and all from 500 on

Result = TypeVar("Result")
# Describes the hub's answer behind an error or, if there is none, the innermost cause.
reason = partial(describe_error, until=HfHubHTTPError)


def limit_requests() -> None:
    """Give requests of `huggingface_hub` in this process a time limit for each wait."""
    set_client_factory(lambda: httpx.Client(follow_redirects=True, timeout=REQUEST_SECONDS))


def refusal(error: BaseException | None) -> HfHubHTTPError | None:
    """Return the answer behind an error if by it the hub refuses the request, and None if trying again may help."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            return error if status < 500 and status not in TRANSIENT_STATUSES else None
        error = error.__cause__
    return None


def retrying(action: Callable[[], Result], what: str) -> Result:
    """Return the action's result; where the hub or the line fails, try again after 2, 4, … s, for PATIENCE_SECONDS."""
    started, wait = time.monotonic(), 2.0
    while True:
        try:
            return action()
        except Exception as error:
            if isinstance(error, UserError) or refusal(error) or time.monotonic() + wait > started + PATIENCE_SECONDS:
                raise
            print(f"{what}: {reason(error)}; trying again in {wait:.0f} s", flush=True)
        time.sleep(wait)
        wait *= 2


def waiting_step(path: Path) -> int | None:
    """Return the update of a folder that waits, a checkpoint's or a card's; None for any other folder."""
    return checkpoint_step(path.with_name(path.name.removesuffix(CARD_SUFFIX)))


def list_waiting(run: Path) -> list[Path]:
    """List the folders that are still to be pushed, the oldest first."""
    found = [(step, path) for path in (run / "hub").glob("step-*") if (step := waiting_step(path)) is not None]
    return [path for _, path in sorted(found) if path.is_dir()]


def describe_waiting(run: Path) -> list[str]:
    """Say in lines for the log what is not on the hub yet, and how to push it."""
    if not (names := [path.name for path in list_waiting(run)]):
        return []
    return [f"not on the hub yet: {', '.join(names)}, in {run / 'hub'}; push with: python -m recipe.publish.hub {run}"]


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name or, where the file system has no hard links, copy it."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def push(api: HfApi, config: dict[str, Any], folder: Path) -> str:
    """Commit a folder's files to `main`, tagged with its name if it is a checkpoint; return the repository's id."""
    if not folder.is_dir():
        raise UserError(f"{folder} is gone: removed, moved or unmounted; nothing more is pushed from there")
    private = wants_private(config, config["environment"]["hub_sources"])
    repo_id = api.create_repo(config["hub_model_id"], private=private, exist_ok=True).repo_id
    is_checkpoint = checkpoint_step(folder) is not None
    # Those of these files that the folder lacks belong to an earlier checkpoint.
    stale = [name for name in (*STATE_FILES, GLUE_FILE) if not (folder / name).exists()] if is_checkpoint else None
    commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=folder.name, delete_patterns=stale)
    if is_checkpoint:
        with suppress(RevisionNotFoundError):  # the tag exists if the run went back, or if an answer was lost
            api.delete_tag(repo_id, tag=folder.name)
        api.create_tag(repo_id, tag=folder.name, revision=commit.oid)
    return repo_id


def push_waiting(run: Path) -> None:
    """Push all folders that wait; one process at a time.

    Raises:
        UserError: the folder holds no run.
        Exception: the last try of a push failed, for whatever reason; its folder and the later ones still wait.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"RUN_DIR {run} holds no run: it has no config.yaml; name the `output_dir` of pretrain.py")
    config = read_config(run)
    if not list_waiting(run):
        print(f"nothing in {run} waits to be pushed")
        return
    limit_requests()
    api = HfApi()
    with FileLock(run / "hub" / ".lock"):
        while waiting := list_waiting(run):
            folder = waiting[0]
            repo_id = retrying(partial(push, api, config, folder), f"pushing {folder.name}")
            shutil.rmtree(folder)
            print(f"pushed {folder.name} to {repo_id}", flush=True)


def stage_card(run: Path) -> list[str]:
    """Stage a new card of the finished model for the next push, if the run is on the hub; say in lines what waits."""
    if not read_config(run)["push_to_hub"]:
        return []
    checkpoint = checkpoint_path(run / "hub", read_step(run))
    folder = checkpoint.with_name(checkpoint.name + CARD_SUFFIX)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("README.md", GLUE_FILE):
        if (run / "model" / name).is_file():
            shutil.copyfile(run / "model" / name, folder / name)
    return describe_waiting(run)


@dataclass
class Publisher:
    """Pushes a run's checkpoints in the background, from the main process and with `push_to_hub` only."""

    args: PretrainArguments  # with the repository's full id as `hub_model_id`
    is_main: bool
    save_tokenizer: Callable[[Path], object]  # into a folder
    build_card: Callable[[Path, Path], str]  # from the run's folder and a folder with the model

    def __post_init__(self) -> None:
        self.is_active = self.args.push_to_hub and self.is_main
        self.run = Path(self.args.output_dir)
        self.folder = self.run / "hub"
        self.log_file = self.folder / "log.txt"
        self.process: subprocess.Popen[bytes] | None = None
        self.logged = self.log_file.stat().st_size if self.log_file.exists() else 0  # bytes already shown

    def publish(self, checkpoint: Path, is_last: bool) -> None:
        """Stage a checkpoint and start a push, if `hub_strategy` asks for it; whatever fails is a warning."""
        if not self.is_active or (self.args.hub_strategy == "end" and not is_last):
            return
        try:
            self.stage(checkpoint)
            self.push()
        except Exception as error:  # no push is worth losing a run
            tqdm.write(f"warning: {checkpoint.name} is not pushed to the hub: {reason(error)}")

    def stage(self, checkpoint: Path) -> None:
        """Put what is to be pushed of a checkpoint into a folder.

        When more than `save_total_limit` folders would wait, the oldest but for the one being pushed are removed.
        """
        with replace_folder(self.folder / checkpoint.name) as folder:
            self.save_tokenizer(folder)
            for file in checkpoint.iterdir():
                if self.args.hub_strategy == "checkpoint" or file.name not in STATE_FILES:
                    link_or_copy(file, folder / file.name)
            for name in ("metrics.jsonl", "loss.png"):  # copied, since the run goes on changing them
                if (self.run / name).exists():
                    shutil.copyfile(self.run / name, folder / name)
            config = read_config(self.run)
            public = public_config(config, config["environment"]["hub_sources"])
            write_atomically(folder / "config.yaml", to_yaml(public))
            (folder / "README.md").write_text(self.build_card(self.run, folder), "utf-8")
        for surplus in list_waiting(self.run)[1 : -self.args.save_total_limit]:
            shutil.rmtree(surplus)
            tqdm.write(f"hub: {surplus.name} could not be pushed in time and makes room for later ones")

    def push(self) -> None:
        """Start a process that pushes all folders that wait, unless one is already pushing."""
        self.show_log()
        if self.process is not None and self.process.poll() is None:
            return
        # By which another Python finds this package, installed or not, from any working folder.
        search_path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "recipe.publish.hub", str(self.run.resolve())],
                env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": search_path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # signals to the training processes do not reach it
            )

    def show_log(self) -> None:
        """Show what the pushing processes have printed since the last call."""
        if self.log_file.exists():
            new = self.log_file.read_bytes()[self.logged :]
            self.logged += len(new)
            for line in new.decode(errors="replace").splitlines():
                tqdm.write(f"hub: {line}")

    def waiting(self) -> list[str]:
        """Say in lines for the log what is not on the hub yet when a run stops before its end."""
        return describe_waiting(self.run) if self.is_active else []

    def finish(self) -> list[str]:
        """Wait for the push that is under way; say in lines where the model is, and what is not on the hub yet."""
        if not self.is_active:
            return []
        if self.process is not None and self.process.poll() is None:
            tqdm.write(f"hub: pushing {', '.join(path.name for path in list_waiting(self.run))}")
            try:
                self.process.wait(LAST_PUSH_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.show_log()
        return [f"hub: {constants.ENDPOINT}/{self.args.hub_model_id}", *describe_waiting(self.run)]


def fetch_checkpoint(args: PretrainArguments) -> str | None:
    """Download the checkpoint that `resume_from_checkpoint` names on the hub, and its metrics, into the run's folder.

    Returns:
        `resume_from_checkpoint` or, if that is on the hub, the path of the copy, which is not verified yet. None if the
        run does not begin now, so that the hub is only asked whether the checkpoint exists.

    Raises:
        UserError: there is no such repository, revision or training state, or the hub cannot be reached.
    """
    uri, run = args.resume_from_checkpoint, Path(args.output_dir)
    if uri is None or not uri.startswith(HUB_SCHEME):
        return uri
    repo_id, _, revision = uri.removeprefix(HUB_SCHEME).partition("@")
    check_repo_id("resume_from_checkpoint", repo_id)
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"`resume_from_checkpoint` is {uri} and HF_HUB_OFFLINE is set; unset it, or give `latest`")
    limit_requests()
    api, revision = HfApi(), revision or "main"
    temporary = run / "checkpoints" / DOWNLOAD_FOLDER
    downloads = not (args.dry_run or args.prepare_only)
    needed = re.compile("|".join(["config.json", r"model[\w.-]*", *STATE_FILES, "metrics.jsonl"]))  # none in a folder

    def download() -> None:
        files = api.list_repo_files(repo_id, revision=revision)
        if lacking := [name for name in STATE_FILES if name not in files]:
            raise UserError(
                f"`resume_from_checkpoint` {uri} has no {', '.join(lacking)}: it was pushed without `hub_strategy: "
                "checkpoint`, as a model alone; go on from that by `model_name_or_path`"
            )
        if downloads:
            wanted = [name for name in files if needed.fullmatch(name)]
            snapshot_download(repo_id, revision=revision, local_dir=temporary, allow_patterns=wanted)

    try:
        retrying(download, f"downloading {uri}")
    except RevisionNotFoundError:
        tags = sorted(tag.name for tag in api.list_repo_refs(repo_id).tags)
        near = did_you_mean(revision, tags)
        raise UserError(f"`resume_from_checkpoint` {uri}: {repo_id} has {', '.join(tags) or 'no tags'}{near}") from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise UserError(f"`resume_from_checkpoint` {uri} cannot be downloaded: {reason(error)}") from None
    if not downloads:
        return None
    shutil.rmtree(temporary / ".cache", ignore_errors=True)  # what the library recorded of the download
    with raising_damaged_file(f"state.json of {uri}", "choose another checkpoint"):
        folder = checkpoint_path(run / "checkpoints", json.loads((temporary / "state.json").read_text("utf-8"))["step"])
    if (temporary / "metrics.jsonl").exists():
        (temporary / "metrics.jsonl").replace(run / "metrics.jsonl")
    return str(temporary.rename(folder))


def main() -> None:
    """Push what a run could not push."""
    parser = argparse.ArgumentParser(description="Push what a run could not push to the hub.")
    parser.add_argument("run_dir", type=Path, help="the `output_dir` of pretrain.py")
    run = parser.parse_args().run_dir
    os.nice(10)  # training comes first
    try:
        push_waiting(run)
    except UserError:
        raise
    except Exception as error:
        names = ", ".join(path.name for path in list_waiting(run))
        print(f"warning: not pushed: {names}: {reason(error)}", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
