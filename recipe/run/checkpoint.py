"""Checkpoints: complete or absent, verified before use, a plain model inside, the same for every engine.

1. `CheckpointWriter.copy`: weights and moments are copied to host memory, whole however the engine shards them.
   Training waits for this, and goes on.
2. `CheckpointWriter.start`: a background thread calls `save_checkpoint`, which writes a temporary folder with a
   manifest of sizes and checksums, and puts it in its place once it is on the disk.
3. After a crash there is a temporary folder, or a folder whose manifest does not match: the checkpoint before is used.

`torch.distributed.checkpoint.async_save` would do 1 and 2 in fewer lines, and cannot promise 3, nor one format that any
engine and `from_pretrained` read.

    step-00010000/
      config.json, model.safetensors   the model, loadable by `from_pretrained`
      optimizer.pt                     optimizer by parameter names, gradient scaler, lanes and what the objective
                                       trains beside the model; tensors and plain values only
      state.json                       update, counters, arguments and identity of the run
      manifest.json                    size and SHA-256 of each of the above
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
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

from recipe.arguments.phases import Timeline
from recipe.arguments.pretraining import MILLISECONDS
from recipe.base.errors import UserError, describe_error, raising_damaged_file
from recipe.base.files import check_free_space, read_json, replace_folder
from recipe.base.hashing import file_checksum
from recipe.base.model_files import describe_run_path
from recipe.base.progress import print_line
from recipe.run.directory import MANIFEST, STATE_FILES, checkpoint_path, checkpoint_step, list_checkpoints

FORMAT = 6
REQUIRED_FILES = {"config.json", "model.safetensors", "optimizer.pt", "state.json"}
# The arguments that may change at a resume and that weights depend on.
PROCEDURE = ["max_steps", "learning_rate", "warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"]
PROCEDURE += ["max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "schedule_by"]
SAME_OR_ANEW = "give these fields their values of before, or start anew in another `output_dir`"
BYTES_PER_PARAMETER = 12  # weight and two moments, in float32


def archive_later_checkpoints(folder: Path, step: int) -> list[str]:
    """Rename checkpoints later than `step` to `abandoned-…`, so that `latest` is of the branch that goes on from it.

    The newest come first: a process that is killed in between leaves none without those before it.

    Returns:
        lines for the log.
    """
    later = [path for path in reversed(list_checkpoints(folder)) if (checkpoint_step(path) or 0) > step]
    for path in later:
        path.rename(path.with_name(f"abandoned-{time.time_ns()}-{path.name}"))
    names = ", ".join(path.name for path in later)
    return [f"set aside as abandoned-… in {folder}, where nothing removes them: {names}"] if later else []


def check_space(folder: Path, num_parameters: int, limit: int) -> str:
    """Check the disk for the `limit` checkpoints of a run, and the one more that there is while it is written."""
    size = BYTES_PER_PARAMETER * num_parameters
    taken = sum(file.stat().st_size for path in list_checkpoints(folder) for file in path.iterdir())
    contents = f"{limit} + 1 checkpoints of {size / 1e9:.2f} GB"
    remedy = f"`save_total_limit` is {limit}: lower it, free some, or choose another `output_dir`"
    return check_free_space(folder, (limit + 1) * size - taken, contents, remedy)


def training_state(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return weights and moments by parameter names, tied ones once, on the devices where the engine trains them."""
    weights, moments = get_state_dict(objective, optimizer)
    kept, every = (dict(objective.named_parameters(remove_duplicate=once)) for once in (True, False))
    tied = {name.removeprefix("module.") for name in every.keys() - kept.keys()}  # DDP's prefix
    weights = {name: tensor for name, tensor in weights.items() if name not in tied}
    return {"weights": weights, "optimizer": moments["state"]}


def copy_to_host(values: Any, earlier: Any = None, keep: bool = True) -> Any:
    """Copy the tensors of nested dictionaries to host memory, whole, one after the other.

    If tensors are sharded, all processes have to call this; those that do not `keep` the copy get None. The memory of
    an `earlier` copy is used again, since to allocate it takes several times as long as to copy.
    """
    if isinstance(values, dict):
        return {name: copy_to_host(value, earlier and earlier[name], keep) for name, value in values.items()}
    if isinstance(values, DTensor):
        values = values.full_tensor()
    if not keep:
        return None
    return (torch.empty_like(values, device="cpu") if earlier is None else earlier).copy_(values)


def save_checkpoint(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    tensors: dict[str, Any],
    state: dict[str, Any],
    limit: int,
) -> Path:
    """Write one checkpoint, with `tensors` that `weights_only=True` loads, then delete the oldest beyond `limit`.

    Raises:
        Exception: the disk is full, for example; each library has its own. Nothing is left of the checkpoint then.
    """
    for leftover in folder.glob(".step-*"):
        remove_old(leftover)
    path = checkpoint_path(folder, step)  # a damaged one may be there, or the same update before a resume
    with replace_folder(path) as temporary:
        model.save_pretrained(temporary, state_dict=weights)
        torch.save(tensors, temporary / "optimizer.pt")
        (temporary / "state.json").write_text(json.dumps(state | {"format": FORMAT, "step": step}, indent=1), "utf-8")
        files = sorted(temporary.iterdir())
        manifest = {file.name: {"bytes": file.stat().st_size, "sha256": file_checksum(file)} for file in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
    for old in list_checkpoints(folder)[:-limit]:
        remove_old(old)
    return path


def remove_old(folder: Path) -> None:
    """Remove a folder that is needed no more; one that cannot be removed, or is a link, is a warning."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        print_line(f"warning: {folder} cannot be removed ({describe_error(error)}); remove it, which only takes room")


class CheckpointWriter:
    """A background thread that writes one checkpoint at a time; leaving the context waits for the one in flight.

    A checkpoint that cannot be written, on a full disk for example, is reported with `log`; the run goes on, and the
    checkpoint before it is kept.
    """

    def __init__(self, log: Callable[[str], None], last: Path | None) -> None:
        self.log = log
        self.last = last  # the newest complete checkpoint
        self.failure: str | None = None  # why the newest one could not be written
        self.seconds = 0.0  # that the newest one took, with what came after it
        self.copied: dict[str, Any] | None = None  # its weights and moments in host memory, 12 bytes a parameter
        self.thread: Thread | None = None

    def copy(self, objective: nn.Module, optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any] | None:
        """Copy `training_state` to host memory, where training does not change it until the next call.

        This waits for the checkpoint in flight, so that there is never more than one copy. See `copy_to_host`.
        """
        self.wait()
        copied = copy_to_host(training_state(objective, optimizer), self.copied, keep)
        self.copied = copied if keep else None
        return self.copied

    def start(self, step: int, write: Callable[[], Path], then: Callable[[Path], None]) -> None:
        """Start to `write` a checkpoint, once the one before is written; `then` gets its path when it is complete."""
        self.wait()
        self.thread = Thread(target=self.run, args=(step, write, then), daemon=True)  # a second SIGINT does not wait
        self.thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint in flight."""
        if self.thread is not None:
            self.thread.join()

    def run(self, step: int, write: Callable[[], Path], then: Callable[[Path], None]) -> None:
        """Write a checkpoint in the thread, and do what comes after it."""
        started = time.monotonic()
        try:
            self.last, self.failure = write(), None
        except Exception as error:  # each library has its own
            self.failure = describe_error(error)
            last = self.last or "not there yet"
            self.log(f"warning: no checkpoint of update {step:,}: {self.failure}; the last one is {last}")
            return
        try:
            then(self.last)
        except Exception as error:  # the checkpoint is complete, whatever a plot or a push ran into
            self.log(f"warning: after the checkpoint of update {step:,}: {describe_error(error)}")
        self.seconds = time.monotonic() - started

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not KeyboardInterrupt:
            self.wait()


def find_fault(path: Path) -> str | None:
    """Find what is wrong with a checkpoint; None if nothing is."""
    try:
        manifest = read_json(path / MANIFEST)
        if missing := sorted(REQUIRED_FILES - manifest.keys()):
            return f"{MANIFEST} lacks {', '.join(missing)}"
        for name, expected in manifest.items():
            if name != Path(name).name or not (path / name).is_file():
                return f"{MANIFEST} names {name!r}, which is no file there"
            if (path / name).stat().st_size != expected["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes, not {expected['bytes']}"
            if file_checksum(path / name) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return describe_error(error)
    return None


def find_checkpoint(folder: Path, resume_from: str) -> tuple[Path | None, list[str]]:
    """Find the checkpoint to resume from, by its path or as the `latest`; a damaged or missing one is a `UserError`.

    Returns:
        Its path, None where `latest` finds none; and warnings about damaged checkpoints that are later.
    """
    if resume_from != "latest":
        path = Path(resume_from)
        if not path.is_dir():
            raise UserError(f"`resume_from_checkpoint` {resume_from}: there is no such checkpoint")
        if not any((path / name).exists() for name in STATE_FILES):
            problem = ", ".join(filter(None, ["not a checkpoint of this recipe", describe_run_path(path)]))
            remedy = "give `latest`, or the path of a checkpoint"
            if (path / "config.json").is_file():
                remedy = "to train on from its weights, with a new schedule, give it as `model_name_or_path`"
            raise UserError(f"`resume_from_checkpoint` {resume_from} is {problem}; {remedy}")
        if fault := find_fault(path):
            raise UserError(f"`resume_from_checkpoint` {resume_from} is damaged: {fault}; choose another or `latest`")
        return path, []
    damaged: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        if not (fault := find_fault(path)):
            return path, [f"warning: {line}; the one before it is used" for line in damaged]
        damaged.append(f"checkpoint {path} is damaged ({fault})")
    if damaged:
        raise UserError(f"every checkpoint in {folder} is damaged: {'; '.join(damaged)}; remove them to start anew")
    return None, []


def read_state(path: Path) -> dict[str, Any]:
    """Read state.json of a checkpoint, and refuse another format."""
    with reading(path, "state.json") as file:
        state = read_json(file)
        if state["format"] != FORMAT:
            raise UserError(f"checkpoint {path} has format {state['format']}, and this code reads format {FORMAT}")
    return state


@contextmanager
def reading(path: Path, name: str) -> Iterator[Path]:
    """Yield a file of a checkpoint; errors name it as damaged, whose checksum matches and whose contents are wrong."""
    with raising_damaged_file(path / name, f"remove {path} to resume from the one before it"):
        yield path / name


def check_identity(saved: dict[str, Any], current: dict[str, Any], path: Path, remedy: str = SAME_OR_ANEW) -> None:
    """Refuse a run if fields that define the experiment differ from what was saved at `path`; list them all."""
    if lines := list(differences(saved, current)):
        raise UserError("\n".join([f"{path} is of another experiment:", *lines, remedy]))


def check_phases(state: dict[str, Any], arguments: dict[str, Any], path: Path) -> None:
    """Refuse a run whose phases make an update otherwise that is done in the checkpoint at `path`."""
    with reading(path, "state.json"):
        before, now = Timeline.of_record(state["arguments"]), Timeline.of_record(arguments)
        done = state["step"] + state["train_state"]["updates_left_out"]
        update = before.differs_at(now, done)
    if update is not None:
        was, would_be = (t.describe_phase(t.at(update).phase - 1) for t in (before, now))
        raise UserError(
            f"{path} is of another experiment: update {update + 1:,}, which is done, was of a phase with {was}, and "
            f"would be of one with {would_be}; give `phases` that leave the first {done:,} updates as they were"
        )


def differences(saved: dict[str, Any], current: dict[str, Any], of: str = "") -> Iterator[str]:
    """Describe, a line each, the current fields that differ from the saved ones, also within fields of fields."""
    for name, now in current.items():
        before = saved.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from differences(before, dict.fromkeys(before) | now, f" of `{name}`")
        elif before != now:
            yield f"  `{name}`{of}: {before} before, {now} now"


def describe_changes(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """List the arguments that differ from the checkpoint's, as they may."""
    return [
        f"changed since the checkpoint: `{name}` {saved.get(name)} -> {value}"
        for name, value in current.items()
        # The repository's full name is known later only, and stands in the last line of the log.
        if saved.get(name) != value and name not in ("resume_from_checkpoint", "hub_model_id")
    ]


def procedure_changes(saved: dict[str, Any], current: dict[str, Any]) -> list[dict[str, Any]]:
    """List what has changed at each resume of how the weights are trained, from the state of a checkpoint.

    Returns:
        A `step`, a `name`, and the values `before` and `after`, for each field that changed then; `current` are the
        arguments of now. None without a checkpoint.
    """
    if not saved:
        return []
    before = saved["arguments"]
    procedure = [*PROCEDURE, "max_train_hours"] if current["schedule_by"] == "hours" else PROCEDURE
    changed = [name for name in procedure if name in before and before[name] != current[name]]
    new = [{"step": saved["step"], "name": name, "before": before[name], "after": current[name]} for name in changed]
    return saved.get("changes", []) + new


def open_checkpoint(
    folder: Path, resume_from: str | None, identity: dict[str, Any], arguments: dict[str, Any]
) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Find the checkpoint to resume from, if any, and check that it has the identity of the run.

    Returns:
        Its path (None to start anew, or where `latest` finds none), its state, and lines for the log.

    Raises:
        UserError: it is damaged, of another format or experiment, or past `max_steps` or the hours of the schedule.
    """
    path, lines = find_checkpoint(folder, resume_from) if resume_from else (None, [])
    if path is None:
        return None, {}, lines
    state = read_state(path)
    with reading(path, "state.json"):
        if wrong := [name for name in ("train_state", "identity", "arguments") if not isinstance(state[name], dict)]:
            raise ValueError(f"{', '.join(wrong)} without names and values")
        if not isinstance(state.get("changes", []), list):
            raise ValueError("`changes` is no list")
        if type(state["step"]) is not int or state["step"] != state["train_state"]["step"]:
            raise ValueError(f"`step` is {state['step']!r} and that of `train_state` {state['train_state']['step']!r}")
        hours = state["train_state"]["train_milliseconds"] / MILLISECONDS
    check_identity(state["identity"], identity, path)
    check_phases(state, arguments, path)
    if state["step"] > arguments["max_steps"]:
        raise UserError(f"`max_steps` ({arguments['max_steps']}) is less than the updates done in {path}; give more")
    done = f"{state['step']:,} of {arguments['max_steps']:,} updates done"
    if arguments["schedule_by"] == "hours":
        limit = arguments["max_train_hours"]
        done += f", {hours:.3g} of {limit:g} hours used"
        is_other = limit != state["arguments"].get("max_train_hours")  # a complete run has used a little more
        if is_other and hours > limit:
            raise UserError(f"`max_train_hours` ({limit:g}) is less than what {path} has used, {hours:.3g}; give more")
    lines += describe_changes(state["arguments"], arguments)
    return path, state, [*lines, f"resuming from {path}: {done}"]


def load_training_state(
    path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> dict[str, Any]:
    """Load weights, moments and loss scale of a checkpoint into what the engine trains, sharded as the engine does it.

    Learning rate, weight decay and the like stay as they are now, since they may change.

    Returns:
        The lanes of a streamed run; none of another.

    Raises:
        UserError: the checksums of the files match, and their contents are something else, or would have to run code.
    """
    now = training_state(objective, optimizer)
    groups = get_optimizer_state_dict(objective, optimizer)["param_groups"]  # with the settings of now
    options = StateDictOptions(full_state_dict=True, strict=False)  # since the checkpoint has tied weights once
    with reading(path, "model.safetensors") as file:
        weights: dict[str, Any] = {f"model.{name}": tensor for name, tensor in load_file(file).items()}
        check_shapes(weights, {name: tensor for name, tensor in now["weights"].items() if name.startswith("model.")})
    with reading(path, "optimizer.pt") as file:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        weights |= tensors["beside_model"]
        check_shapes(weights, now["weights"])
        check_shapes(name_moments(tensors["optimizer"]), name_moments(now["optimizer"]))
        if scaler is not None and "scaler" in tensors:
            scaler.load_state_dict(tensors["scaler"])
    set_model_state_dict(objective, weights, options=options)
    del weights, now  # since copies on the device are among them
    moments = {"state": tensors["optimizer"], "param_groups": groups}
    set_optimizer_state_dict(objective, optimizer, moments, options=options)
    return tensors.get("lanes", {})


def name_moments(moments: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Name each moment by its kind and parameter."""
    return {f"{kind} of {name}": tensor for name, kinds in moments.items() for kind, tensor in kinds.items()}


def check_shapes(saved: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raise a ValueError for a tensor that is missing, unexpected or of another shape than expected."""
    for name in saved.keys() | expected.keys():
        one, two = (list(tensors[name].shape) if name in tensors else "none" for tensors in (saved, expected))
        if one != two:
            raise ValueError(f"the shape of {name} is {one}, not {two}")


def export_model(folder: Path, checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the model of a checkpoint and its tokenizer to a folder as `save_pretrained` does, replaced as a whole."""
    with replace_folder(folder) as temporary:
        shutil.copytree(checkpoint, temporary, ignore=shutil.ignore_patterns(*STATE_FILES), dirs_exist_ok=True)
        tokenizer.save_pretrained(temporary)
