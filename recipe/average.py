"""Average the weights of a run's checkpoints, and export the mean as a model, evaluated beside the last of them.

python -m recipe.average runs/roberta-base --last 5
python -m recipe.average runs/roberta-base --steps 8000,9000,10000

All flags of pretrain.py may follow, such as --per_device_eval_batch_size 8. The run may be training meanwhile.

1. The checkpoints have to be as they were written and of one experiment, by their manifests and states.
2. `average_weights` reads them tensor by tensor, so that memory holds two models: the mean, and the last one.
3. Both are evaluated on the run's held-out blocks. --eval_blocks 0 leaves that out, where the text is gone, say.
4. `RUN/averages/step-00010000-mean-of-5` gets model, tokenizer, card and average.json, complete or not at all.
"""

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recipe.arguments import PretrainArguments, identity_of, parse_config
from recipe.base.errors import UserError, describe_error, raising_damaged_file, require, run_script
from recipe.base.files import check_free_space, check_output_dir, replace_folder
from recipe.base.formatting import format_bytes, number
from recipe.base.model_files import describe_run_path
from recipe.base.progress import print_line
from recipe.data.batches import Rank, TrainingData
from recipe.data.modes import open_data
from recipe.data.preprocessor import Preprocessor
from recipe.data.tokenizer import load_tokenizer, tokenizer_checksum
from recipe.modeling.model import build_config, build_model, usable_length
from recipe.modeling.objectives import MaskedLMObjective
from recipe.monitoring import evaluate
from recipe.publish.card import write_card
from recipe.run.checkpoint import check_identity, find_fault, read_state
from recipe.run.directory import AVERAGE_FILE, average_path, checkpoint_step, list_checkpoints
from recipe.run.launch import start_accelerator
from recipe.run.metrics import TrainState, eval_record

LEAVE_OUT = "leave it out by --steps. A run that trains removes those beyond `save_total_limit`: raise that"


def parse_options(arguments: list[str] | None = None) -> tuple[Path, list[Path], PretrainArguments]:
    """Read the options of this command and those of the run, from `sys.argv[1:]` or the arguments given instead.

    Returns:
        the run's folder, its checkpoints to average, the oldest first, and its arguments.

    Raises:
        UserError: they are wrong, or there is no such run or checkpoint.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the `output_dir` of pretrain.py")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", type=int, help="number of checkpoints to average, the newest")
    which.add_argument("--steps", help="updates whose checkpoints to average, as in 8000,9000,10000")
    options, flags = parser.parse_known_args(arguments)
    run, config = options.run, options.run / "config.yaml"
    if not config.is_file():
        where = ", ".join(filter(None, ["it has no config.yaml", describe_run_path(run)]))
        raise UserError(f"RUN {run} is no run: {where}; name the `output_dir` of pretrain.py")
    paths = choose_checkpoints(run, options.last, options.steps)
    return run, paths, parse_config(PretrainArguments, "average", ["--config", str(config), *flags])


def choose_checkpoints(run: Path, last: int | None, steps: str | None) -> list[Path]:
    """Return the checkpoints to average, the oldest first; a `UserError` names those that there are."""
    found = {checkpoint_step(path): path for path in list_checkpoints(run / "checkpoints")}
    there = f"{run} has checkpoints of the updates {', '.join(map(str, found)) or 'none'}"
    kept = "a run keeps the newest `save_total_limit` (default: 3): raise it, and resume or train anew, to have more"
    if len(found) < 2:
        raise UserError(f"{there}, and a mean takes two or more; {kept}")
    if last is not None:
        require(last > 1, "--last", last, "a mean takes two or more")
        require(last <= len(found), "--last", last, f"{there}; {kept}")
        return list(found.values())[-last:]
    try:
        wanted = sorted(map(int, str(steps).split(",")))
    except ValueError:
        raise UserError(f"`--steps` is {steps}; write the updates with commas, as in 8000,9000,10000") from None
    require(len(wanted) > 1, "--steps", steps, "a mean takes two or more")
    require(len(set(wanted)) == len(wanted), "--steps", steps, "give each update once")
    require(found.keys() >= set(wanted), "--steps", steps, f"{there}; {kept}")
    return [found[step] for step in wanted]


def check_output(folder: Path, last: Path) -> None:
    """Raise a `UserError` if the folder holds something, or cannot be written, or its disk has no room for a model."""
    if folder.exists():
        raise UserError(f"{folder} is there already; remove it, or move it away, to average anew")
    check_output_dir(folder, "RUN")
    size = (last / "model.safetensors").stat().st_size
    check_free_space(folder, size, f"a model of {format_bytes(size)}", "free some")


def check_checkpoints(paths: list[Path]) -> dict[str, Any]:
    """Return the state of the last checkpoint; a `UserError` says which are damaged or, as a copy can be, of others."""
    for path in paths:
        if fault := find_fault(path):
            raise UserError(f"checkpoint {path} is damaged or gone ({fault}); {LEAVE_OUT}")
    *states, last = map(read_state, paths)
    expected = {name: value for name, value in last["identity"].items() if name != "stamps"}
    remedy = f"`now` is of {paths[-1].name}; average checkpoints of one run"
    for path, state in zip(paths[:-1], states, strict=True):
        check_identity(state["identity"], expected, path, remedy)
    return last


def average_weights(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Average the weights of checkpoints, summed in float64; the mean has the names and types of the weights.

    Raises:
        UserError: they differ in names, shapes or types, or are not finite.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path / "model.safetensors", "pt")) for path in paths]
        kinds = [{name: describe(file.get_slice(name)) for name in file.keys()} for file in files]  # noqa: SIM118
        for path, kind in zip(paths, kinds, strict=True):
            for name in sorted(kind.keys() | kinds[-1].keys()):
                if (one := kind.get(name, "missing")) != (other := kinds[-1].get(name, "missing")):
                    problem = f"{name} is {one} in {path} and {other} in {paths[-1]}, which are of different models"
                    raise UserError(f"{problem}; average checkpoints of one run")
        return {name: average_tensor(name, files, paths) for name in kinds[-1]}


def describe(tensor: Any) -> str:
    """Describe a tensor of a safetensors file, without reading it, by its type and shape."""
    return f"{tensor.get_dtype()} {tensor.get_shape()}"


def average_tensor(name: str, files: list[Any], paths: list[Path]) -> torch.Tensor:
    """Average a tensor over safetensors files, which are those of the checkpoints in `paths`."""
    total = torch.zeros((), dtype=torch.float64)
    for file, path in zip(files, paths, strict=True):
        tensor = file.get_tensor(name)
        if not tensor.isfinite().all():
            raise UserError(f"checkpoint {path}: {name} is not finite; {LEAVE_OUT}")
        total = total + tensor
    return (total / len(paths)).to(tensor.dtype)


def open_held_out(args: PretrainArguments, tokenizer: PreTrainedTokenizerFast) -> TrainingData:
    """Open the corpora as the run does, for their held-out blocks."""
    try:
        return open_data(args, Preprocessor(args, tokenizer), verifies=False)
    except UserError as error:
        raise UserError(
            f"no held-out blocks: {error}; or give --eval_blocks 0, to average without evaluation"
        ) from None


def evaluate_model(
    model: PreTrainedModel, data: TrainingData, accelerator: Accelerator, state: TrainState, unigram_loss: float
) -> dict[str, Any]:
    """Evaluate a model on the held-out blocks, by masked language modelling alone; return a record as metrics have."""
    objective = accelerator.prepare_model(MaskedLMObjective(model, data.args.masked_share), evaluation_mode=True)
    means, failure = evaluate(accelerator, objective, data.eval_batches(Rank()))
    if failure:
        raise failure
    return eval_record(state, {"loss": means[0]}, unigram_loss)


def export(
    run: Path, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, average: dict[str, Any]
) -> None:
    """Write a model as `save_pretrained` does, with what its card says of the average, and the card."""
    try:
        with replace_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / AVERAGE_FILE).write_text(json.dumps(average, indent=1) + "\n", "utf-8")
            write_card(run, temporary)
    except UserError:
        raise
    except Exception as error:  # each library has its own
        raise UserError(f"{folder} cannot be written ({describe_error(error)}); put that right") from error


def average_run(run: Path, paths: list[Path], args: PretrainArguments) -> None:
    """Average checkpoints of a run, evaluate and export the mean, and say what came of it."""
    last, steps = paths[-1], [checkpoint_step(path) or 0 for path in paths]
    folder = average_path(run, steps)
    accelerator = start_accelerator()
    require(accelerator.num_processes == 1, "num_processes", accelerator.num_processes, "run this without a launcher")
    print_line(f"averaging {', '.join(path.name for path in paths)} of {run}")
    named_by = "tokenizer_name" if args.tokenizer_name else "model_name_or_path"
    tokenizer = load_tokenizer(args.tokenizer_name or str(args.model_name_or_path), named_by)
    length_before = tokenizer.model_max_length if args.model_name_or_path else 0
    with raising_damaged_file(f"a checkpoint of {run}", LEAVE_OUT):
        check_output(folder, last)
        saved = check_checkpoints(paths)
        state = TrainState.restore(saved["train_state"], len(args.corpora), last)
        config = build_config({}, str(last), tokenizer, args.max_seq_length, args.model_type)
        model = build_model(config, str(last), args.predicts_pairs)
        weights = average_weights(paths)
    identity: dict[str, Any] = {"tokenizer": tokenizer_checksum(tokenizer)}
    data = open_held_out(args, tokenizer) if args.eval_blocks else None
    if data:
        identity |= identity_of(args) | {"data": data.identity()}
    check_identity(saved["identity"], identity, last, "give these fields, and text and tokenizer, as the run has them")
    tokenizer.model_max_length = usable_length(config, args.max_seq_length, length_before)
    average: dict[str, Any] = {"steps": steps, "evaluation": None, "last_evaluation": None}
    if data:
        unigram_loss = data.unigram_loss()
        average["last_evaluation"] = evaluate_model(model, data, accelerator, state, unigram_loss)
    model.load_state_dict(weights, strict=False)  # in place; tied ones are there once
    if data:
        average["evaluation"] = evaluate_model(model, data, accelerator, state, unigram_loss)
        losses = [number(average[name]["eval_loss"], ".4f") for name in ("evaluation", "last_evaluation")]
        print_line(f"held-out loss {losses[0]} of the mean, {losses[1]} of {last.name} alone")
    export(run, folder, model, tokenizer, average)
    print_line(f"model: {folder}")


if __name__ == "__main__":
    run_script(lambda: average_run(*parse_options()))
