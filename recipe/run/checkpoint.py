"""Checkpoints: complete or absent, verified before use, a plain model inside, the same for every engine.

1. `CheckpointWriter.copy`: weights and moments are copied to host memory, whole however the engine splits them up.
   Training waits for this, and goes on.
2. `CheckpointWriter.start`: a background thread calls `save_checkpoint`, which writes to a temporary folder, syncs the
   files to disk, puts in a manifest of sizes and checksums last, and renames the folder into place.
3. What a crash leaves is a temporary folder, or a folder whose manifest does not match: the one before it is used.

    step-00010000/
      config.json, model.safetensors   the model, loadable by `from_pretrained`
      optimizer.pt                     optimizer by parameter names, gradient scaler, lanes and what the objective
                                       trains beside the model; tensors and plain values only
      state.json                       update, counters, the arguments and identity of the run
      manifest.json                    size and SHA-256 of each of the above
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipe.base.errors import UserError, raising_damaged_file
from recipe.base.files import nearest_existing_parent, sync
from recipe.run.directory import MANIFEST, PREFIX, STATE_FILES, checkpoint_path, list_checkpoints

FORMAT = 4
REQUIRED = {"config.json", "model.safetensors", "optimizer.pt", "state.json"}
BYTES_PER_PARAMETER = 12  # weight and two moments, in float32


def archive_later_checkpoints(folder: Path, step: int) -> None:
    """After going back to `step`, rename later checkpoints to `abandoned-…`, so that `latest` is of this branch."""
    for path in list_checkpoints(folder):
        if path.name > checkpoint_path(folder, step).name:
            path.rename(path.with_name(f"abandoned-{time.time_ns()}-{path.name}"))


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_space(folder: Path, num_parameters: int, limit: int) -> str:
    """What the checkpoints of a run will take.

    Args:
        folder: where they lie.
        num_parameters: of the model; each has a weight and two moments in a checkpoint, in float32.
        limit: checkpoints to keep; while one is written there is one more.

    Raises:
        UserError: they do not fit on the disk.
    """
    size, there = BYTES_PER_PARAMETER * num_parameters, nearest_existing_parent(folder)
    taken = sum(file.stat().st_size for path in list_checkpoints(folder) for file in path.iterdir())
    needed, free = (limit + 1) * size - taken, shutil.disk_usage(there).free
    text = f"{limit} + 1 checkpoints of {size / 1e9:.2f} GB in {folder}, {free / 1e9:.1f} GB free"
    if needed > free:
        raise UserError(f"`save_total_limit` is {limit}: {text}; lower it, free some, or choose another `output_dir`")
    return text


def training_state(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and moments by parameter names, tied ones once, as they lie where the engine trains them."""
    weights, moments = get_state_dict(objective, optimizer)
    kept, every = (
        {name.removeprefix("module.") for name, _ in objective.named_parameters(remove_duplicate=once)}  # DDP's prefix
        for once in (True, False)
    )
    weights = {name: tensor for name, tensor in weights.items() if name not in every - kept}
    return {"weights": weights, "optimizer": moments["state"]}


def copy_to_host(values: Any, earlier: Any = None, keep: bool = True) -> Any:
    """Nested dictionaries with their tensors copied to host memory, whole, one after the other.

    Args:
        values: where tensors are split up among processes, all of them have to call this.
        earlier: a copy of the like that is not needed any more, whose memory is used. (To get hold of new memory takes
            several times as long as to copy.)
        keep: whether this process wants the copy.
    """
    if isinstance(values, dict):
        return {name: copy_to_host(value, earlier and earlier[name], keep) for name, value in values.items()}
    if isinstance(values, DTensor):
        values = values.full_tensor()
    if not keep:
        return None
    if earlier is None:
        earlier = torch.empty_like(values, device="cpu")
    return earlier.copy_(values)


def save_checkpoint(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    tensors: dict[str, Any],
    state: dict[str, Any],
    limit: int,
) -> Path:
    """Write one checkpoint, then delete the oldest beyond `limit`.

    Args:
        folder: where checkpoints of the run lie.
        step: completed updates.
        model: whose config is saved.
        weights: of the model, by name.
        tensors: state dicts of tensors and plain values, read back with `weights_only=True`.
        state: plain values.
        limit: checkpoints to keep.

    Raises:
        Exception: what a full disk or the like makes of it, of one library or another; nothing is left of it then.
    """
    final = checkpoint_path(folder, step)
    temporary = folder / f".{final.name}"
    for leftover in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(leftover)
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary, state_dict=weights)
        torch.save(tensors, temporary / "optimizer.pt")
        (temporary / "state.json").write_text(json.dumps(state | {"format": FORMAT, "step": step}, indent=1))
        files = sorted(temporary.iterdir())
        manifest = {file.name: {"bytes": file.stat().st_size, "sha256": checksum(file)} for file in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for file in temporary.iterdir():
            sync(file)
        if final.exists():  # a torn one, or the same update once more after a resume from an earlier one
            shutil.rmtree(final)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder)
    for old in list_checkpoints(folder)[:-limit]:
        shutil.rmtree(old)
    return final


class CheckpointWriter:
    """Writes checkpoints in a background thread, one at a time. As a context, waits at its end for the one in flight.

    One that cannot be written, on a full disk for example, is reported; the run goes on, with the one before it kept.

    Args:
        log: called with a line, from the thread.
        last: the newest complete checkpoint.

    Attributes:
        failure: why the newest one could not be written, or None.
        seconds: that the newest one took, with what came after it; 0 before there is one.
        copied: weights and moments in host memory, 12 bytes a parameter, as of the newest one.
    """

    def __init__(self, log: Callable[[str], None], last: Path | None) -> None:
        self.log = log
        self.last = last
        self.failure: str | None = None
        self.seconds = 0.0
        self.thread: Thread | None = None
        self.copied: dict[str, Any] | None = None

    def copy(self, objective: nn.Module, optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any] | None:
        """`training_state` in host memory, where training does not touch it, until the next call.

        Waits for the checkpoint in flight, so that there is never more than one copy. All processes have to call this;
        those that do not `keep` it get None.
        """
        self.wait()
        copied = copy_to_host(training_state(objective, optimizer), self.copied, keep)
        self.copied = copied if keep else None
        return self.copied

    def start(self, step: int, write: Callable[[], Path], then: Callable[[Path], None]) -> None:
        """Have a checkpoint written, once the one before it is.

        Args:
            step: completed updates.
            write: returns its path.
            then: called with the path when it is complete.
        """
        self.wait()
        # A daemon, since a second SIGINT ends the process at once.
        self.thread = Thread(target=self.run, args=(step, write, then), daemon=True)
        self.thread.start()

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()

    def run(self, step: int, write: Callable[[], Path], then: Callable[[Path], None]) -> None:
        started = time.monotonic()
        try:
            self.last, self.failure = write(), None
        except Exception as error:  # each library has its own
            self.failure = f"{type(error).__name__}: {error}"
            self.log(f"warning: no checkpoint of update {step:,}: {self.failure}; the last one is {self.last}")
            return
        try:
            then(self.last)
        except Exception as error:  # the checkpoint is whole, whatever a plot or a push ran into
            self.log(f"warning: after the checkpoint of update {step:,}: {type(error).__name__}: {error}")
        self.seconds = time.monotonic() - started

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not KeyboardInterrupt:
            self.wait()


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if missing := sorted(REQUIRED - manifest.keys()):
            return f"{MANIFEST} lacks {', '.join(missing)}"
        for name, expected in manifest.items():
            if name != Path(name).name or not (path / name).is_file():
                return f"{MANIFEST} names {name!r}, which is no file there"
            if (path / name).stat().st_size != expected["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes, not {expected['bytes']}"
            if checksum(path / name) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def find_checkpoint(folder: Path, wanted: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from.

    Args:
        folder: where checkpoints of the run lie.
        wanted: `latest`, or the path of one.

    Returns:
        its path, None where `latest` finds none; and warnings about damaged ones that were passed over.

    Raises:
        UserError: the named one is missing or damaged, or there are only damaged ones.
    """
    if wanted != "latest":
        path = Path(wanted)
        if not path.is_dir():
            raise UserError(f"`resume_from_checkpoint` {wanted}: there is no such checkpoint")
        if fault := find_fault(path):
            raise UserError(f"`resume_from_checkpoint` {wanted} is damaged: {fault}; choose another or `latest`")
        return path, []
    warnings = []
    for path in reversed(list_checkpoints(folder)):
        fault = find_fault(path)
        if fault is None:
            return path, warnings
        warnings.append(f"checkpoint {path} is damaged ({fault}); using the one before it")
    if warnings:
        raise UserError(f"every checkpoint in {folder} is damaged: {'; '.join(warnings)}; remove them to start afresh")
    return None, []


def read_state(path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: a checkpoint of another format.
    """
    with raising_damaged_file(path / "state.json", remedy(path)):
        state = json.loads((path / "state.json").read_text())
        found = state["format"]
    if found != FORMAT:
        raise UserError(f"checkpoint {path} has format {found}; this code reads format {FORMAT}")
    return state


def remedy(path: Path) -> str:
    """Of a checkpoint whose checksums fit and whose contents are wrong all the same."""
    return f"remove {path} to go on from the one before it"


def check_identity(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """
    Raises:
        UserError: listing every field that defines the experiment and differs.
    """
    different = [name for name in current if saved.get(name) != current[name]]
    if different:
        lines = [f"  `{name}`: {saved.get(name)} before, {current[name]} now" for name in different]
        raise UserError(
            f"{path} is of another experiment:\n"
            + "\n".join(lines)
            + "\ngive these the values of before, or start anew in another `output_dir`"
        )


def describe_changes(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """A line for each argument that differs from the checkpoint's and may."""
    return [
        f"changed since the checkpoint: `{name}` {saved.get(name)} -> {value}"
        for name, value in current.items()
        # The repository's full name is found out later, and stands in the last line of the log.
        if saved.get(name) != value and name not in ("resume_from_checkpoint", "hub_model_id")
    ]


def open_checkpoint(
    folder: Path, wanted: str | None, identity: dict[str, Any], arguments: dict[str, Any]
) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Find the checkpoint to resume from and check that it is of the same experiment.

    Args:
        folder: where checkpoints of the run lie.
        wanted: `latest`, a path, or None for none.
        identity, arguments: of the run now.

    Returns:
        its path (None where none is wanted or `latest` finds none), its state, and lines for the log.

    Raises:
        UserError: see `find_checkpoint`, `read_state`, `check_identity`; or it is past `max_steps`.
    """
    path, lines = find_checkpoint(folder, wanted) if wanted else (None, [])
    if path is None:
        return None, {}, lines
    state = read_state(path)
    with raising_damaged_file(path / "state.json", remedy(path)):
        if wrong := [name for name in ("train_state", "identity", "arguments") if not isinstance(state[name], dict)]:
            raise ValueError(f"{', '.join(wrong)} without names and values")
        if type(state["step"]) is not int or state["step"] != state["train_state"]["step"]:
            raise ValueError(f"`step` is {state['step']!r} and that of `train_state` {state['train_state']['step']!r}")
    check_identity(state["identity"], identity, path)
    if state["step"] > arguments["max_steps"]:
        raise UserError(f"`max_steps` ({arguments['max_steps']}) is less than the updates done in {path}")
    lines += describe_changes(state["arguments"], arguments)
    return path, state, [*lines, f"resuming from {path}: {state['step']:,} of {arguments['max_steps']:,} updates done"]


def load_tensors(path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: a damaged file, or one with objects that would have to run code.
    """
    with raising_damaged_file(path / "optimizer.pt", remedy(path)):
        return torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)


def load_training_state(
    path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> dict[str, Any]:
    """Weights, moments and scale of a checkpoint, split up as the engine does. Learning rate, decay and the like stay
    as they are now: they may change.

    Args:
        objective, optimizer: as the engine trains them.

    Returns:
        the lanes of a streamed run, if it was one.

    Raises:
        UserError: files whose checksums fit and whose contents are of something else.
    """
    tensors = load_tensors(path)
    now = training_state(objective, optimizer)
    groups = get_optimizer_state_dict(objective, optimizer)["param_groups"]  # with the settings of now
    options = StateDictOptions(full_state_dict=True, strict=False)  # tied weights are there once
    with raising_damaged_file(path / "model.safetensors", remedy(path)):
        weights = {f"model.{name}": tensor for name, tensor in load_file(path / "model.safetensors").items()}
        check_shapes(weights, {name: tensor for name, tensor in now["weights"].items() if name.startswith("model.")})
    with raising_damaged_file(path / "optimizer.pt", remedy(path)):
        weights |= tensors["beside_model"]
        check_shapes(weights, now["weights"])
        check_shapes(*map(flatten, (tensors["optimizer"], now["optimizer"])))
    set_model_state_dict(objective, weights, options=options)
    del weights, now  # copies on the device among them
    moments = {"state": tensors["optimizer"], "param_groups": groups}
    set_optimizer_state_dict(objective, optimizer, moments, options=options)
    if scaler is not None and "scaler" in tensors:
        with raising_damaged_file(path / "optimizer.pt", remedy(path)):
            scaler.load_state_dict(tensors["scaler"])
    return tensors.get("lanes", {})


def flatten(moments: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{kind} of {name}": tensor for name, kinds in moments.items() for kind, tensor in kinds.items()}


def check_shapes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name in found.keys() | expected.keys():
        one, two = (list(tensors[name].shape) if name in tensors else "none" for tensors in (found, expected))
        if one != two:
            raise ValueError(f"the shape of {name} is {one}, not {two}")


def export_model(folder: Path, checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model of a checkpoint and its tokenizer, as `save_pretrained` leaves them, replaced as a whole."""
    temporary = folder.with_name(f".{folder.name}")
    if temporary.exists():
        shutil.rmtree(temporary)
    shutil.copytree(checkpoint, temporary, ignore=shutil.ignore_patterns(*STATE_FILES))
    tokenizer.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
