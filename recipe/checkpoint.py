"""Checkpoints: complete or absent, verified before use, a plain model inside.

A checkpoint is written to a temporary folder, its files synced to disk, a manifest of sizes and checksums last, and
then renamed into place. What a crash leaves is a temporary folder, or a folder whose manifest does not match: the one
before it is used.

    step-00010000/
      config.json, model.safetensors   the model, loadable by `from_pretrained`
      optimizer.pt                     optimizer, gradient scaler, lanes and what the objective trains beside the model;
                                       tensors and plain values only
      state.json                       update, counters, the arguments and identity of the run
      manifest.json                    size and SHA-256 of each of the above
"""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipe.config import UserError, existing

FORMAT = 2
MANIFEST = "manifest.json"
PREFIX = "step-"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"{PREFIX}{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by update, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def set_aside_later(folder: Path, step: int) -> None:
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
    size, there = 12 * num_parameters, existing(folder)
    taken = sum(file.stat().st_size for path in list_checkpoints(folder) for file in path.iterdir())
    needed, free = (limit + 1) * size - taken, shutil.disk_usage(there).free
    text = f"{limit} + 1 checkpoints of {size / 1e9:.2f} GB in {folder}, {free / 1e9:.1f} GB free"
    if needed > free:
        raise UserError(f"`save_total_limit` is {limit}: {text}; lower it, free some, or choose another `output_dir`")
    return text


def sync(path: Path) -> None:
    """Have a file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(
    folder: Path, step: int, model: PreTrainedModel, tensors: dict[str, Any], state: dict[str, Any], limit: int
) -> Path:
    """Write one checkpoint, then delete the oldest beyond `limit`.

    Args:
        folder: where checkpoints of the run lie.
        step: completed updates.
        model: saved with its config.
        tensors: state dicts of tensors and plain values, read back with `weights_only=True`.
        state: plain values.
        limit: checkpoints to keep.
    """
    final = checkpoint_path(folder, step)
    temporary = folder / f".{final.name}"
    for leftover in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
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
    sync(folder)
    for old in list_checkpoints(folder)[:-limit]:
        shutil.rmtree(old)
    return final


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, expected in manifest.items():
            if (path / name).stat().st_size != expected["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes, not {expected['bytes']}"
            if checksum(path / name) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
    state = json.loads((path / "state.json").read_text())
    if state["format"] != FORMAT:
        raise UserError(f"checkpoint {path} has format {state['format']}; this code reads format {FORMAT}")
    return state


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
    check_identity(state["identity"], identity, path)
    if state["step"] > arguments["max_steps"]:
        raise UserError(f"`max_steps` ({arguments['max_steps']}) is less than the updates done in {path}")
    lines += describe_changes(state["arguments"], arguments)
    return path, state, [*lines, f"resuming from {path}: {state['step']:,} of {arguments['max_steps']:,} updates done"]


def load_weights(path: Path, model: PreTrainedModel) -> None:
    load_model(model, path / "model.safetensors")


def load_tensors(path: Path) -> dict[str, Any]:
    return torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)


def load_optimizer(
    path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> dict[str, Any]:
    """Moments and scale of a checkpoint, and the objective's weights beside the model's. Learning rate, decay and the
    like stay as they are now: they may change.

    Returns:
        the lanes of a streamed run, if it was one.
    """
    tensors = load_tensors(path)
    objective.load_state_dict(tensors.get("beside_model", {}), strict=False)
    optimizer.load_state_dict(tensors["optimizer"] | {"param_groups": optimizer.state_dict()["param_groups"]})
    if scaler is not None and "scaler" in tensors:
        scaler.load_state_dict(tensors["scaler"])
    return tensors.get("lanes", {})


def export_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A plain `save_pretrained` of model and tokenizer, replaced as a whole."""
    temporary = folder.with_name(f".{folder.name}")
    if temporary.exists():
        shutil.rmtree(temporary)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
