"""The model card of a run: every number in it is in a file of the run, and what was not run is not in it.

It is made from config.yaml (arguments, versions, commit), status.json (the update), metrics.jsonl (losses, corpora,
throughput), the model's config and weights and, beside them, glue.json (what finetune_glue.py got from these weights)
and average.json (of which updates they are the mean, with what `recipe.average` has evaluated).
"""

import json
import math
import shlex
import shutil
import statistics
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open

from recipe.arguments.phases import Timeline
from recipe.arguments.pretraining import describe_schedule
from recipe.base.errors import raising_damaged_file
from recipe.base.files import to_yaml, write_atomically
from recipe.base.formatting import format_count, format_duration
from recipe.finetune.report import format_notes, format_rows, row_title
from recipe.finetune.tasks.glue import TASKS
from recipe.publish.hub import GLUE_FILE
from recipe.publish.markdown import as_card, as_text, code_block, table, two_columns
from recipe.publish.names import public_config, public_name
from recipe.run.directory import AVERAGE_FILE, average_path, read_config, read_records, read_step

RECIPE_TAG = "roberta-pretraining-recipe"  # of all cards
MODEL_TITLES = {
    "roberta": "RoBERTa",
    "roberta-prelayernorm": "Pre-norm RoBERTa",
    "bert": "BERT",
    "albert": "ALBERT",
}
OBJECTIVE_TITLES = {
    "masked_lm": "masked language modelling",
    "next_sentence": "masked language modelling and next-sentence prediction",
    "sentence_order": "masked language modelling and sentence order",
}


def count_weights(model: Path) -> int:
    """Count the numbers in a folder's safetensors, tied ones once."""
    total = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def source(corpus: dict[str, Any], sources: list[str]) -> str:
    """Say where a corpus is from; of local files only the name is given."""
    if corpus["path"] not in sources:
        return f"local: {as_text(public_name(corpus['path'], sources))}"
    details = [as_text(corpus[name]) for name in ("config_name", "revision") if corpus[name]]
    link = f"[{as_text(corpus['path'])}](https://huggingface.co/datasets/{corpus['path']})"
    return link + (f" ({', '.join(details)})" if details else "")


def read_beside(model: Path, name: str) -> dict[str, Any] | None:
    """Read a JSON file beside the weights; None without it."""
    return json.loads((model / name).read_text("utf-8")) if (model / name).exists() else None


class Run:
    """A run as its files have it, and the folder of the weights that the card is for."""

    def __init__(self, path: Path, model: Path) -> None:
        self.path = path
        self.config = read_config(path)
        self.environment = self.config["environment"]
        self.sources = self.environment["hub_sources"]
        self.average = read_beside(model, AVERAGE_FILE)
        self.step = self.average["steps"][-1] if self.average else read_step(path)
        records = [record for record in read_records(path / "metrics.jsonl") if record["step"] <= self.step]
        self.training = [record for record in records if "tokens_per_second" in record]
        evaluations = [record for record in records if record.get("eval_loss") is not None]
        self.evaluation = evaluations[-1] if evaluations else None
        if self.average:
            self.evaluation = self.average["evaluation"]
        self.first_evaluation = evaluations[0] if len(evaluations) > 1 and not evaluations[0]["step"] else None
        self.architecture = json.loads((model / "config.json").read_text("utf-8"))
        self.parameters = count_weights(model)
        self.glue = read_beside(model, GLUE_FILE)
        corpora = self.config["eval_corpora"] or self.config["corpora"]
        self.held_out = ", ".join(corpus["name"] for corpus in corpora)

    @property
    def name(self) -> str:
        """Name the model for `from_pretrained`: its hub id or, from where the run's folder lies, its folder."""
        if self.average:
            return public_name(str(average_path(self.path, self.average["steps"])), [])
        return self.config["hub_model_id"] if self.config["push_to_hub"] else f"{public_name(str(self.path), [])}/model"

    @property
    def title(self) -> str:
        """Name the model in a heading."""
        if self.average:
            return self.name.replace("/averages/", " ")
        return self.name.split("/")[-1] if self.config["push_to_hub"] else public_name(str(self.path), [])

    @property
    def progress(self) -> str | None:
        """Say how far training is; None if it is complete."""
        hours = self.config["max_train_hours"] if self.config["schedule_by"] == "hours" else None
        used = self.training[-1]["train_seconds"] / 3600 if hours and self.training else 0.0
        if self.step >= self.config["max_steps"] or (hours and used >= hours):
            return None
        if hours:
            return f"{used:.3g} of {hours:g} hours are used, in {self.step:,} updates"
        return f"{self.step:,} of {self.config['max_steps']:,} updates are done"

    @property
    def base(self) -> str | None:
        """Name the model that training began with; None if its weights were new."""
        base = self.config["model_name_or_path"]
        return base and public_name(base, self.sources)


def metadata(run: Run) -> ModelCardData:
    """Build the card's YAML head."""
    config, results = run.config, []
    if run.evaluation:
        metrics = {"loss": (run.evaluation["eval_loss"], 4), "perplexity": (run.evaluation["eval_perplexity"], 3)}
        results += [
            EvalResult("fill-mask", "held-out", f"held-out text of {run.held_out}", metric, round(value, digits))
            for metric, (value, digits) in metrics.items()
            if value is not None
        ]
    for row in run.glue["summary"]["tasks"] if run.glue else []:
        if row["official"] and row["n"]:
            results += [glue_result(row, metric, value) for metric, value in row["metrics"].items()]
    return ModelCardData(
        language=config["language"],
        license=config["license"],
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=[RECIPE_TAG, config["model_type"], "masked-lm", "pretraining"],
        base_model=run.base if run.base in run.sources else None,  # the hub refuses all but ids
        datasets=[corpus["path"] for corpus in config["corpora"] if corpus["path"] in run.sources] or None,
        model_name=run.title,
        eval_results=results or None,
    )


def glue_result(row: dict[str, Any], metric: str, value: float) -> EvalResult:
    """Make a dev result an entry of `model-index`; `row` is the task's in summary.json."""
    task, split = TASKS[row["task"]], "validation_mismatched" if metric.endswith("_mm") else "validation"
    hub_config, hub_split = task.splits[split].hub
    return EvalResult(
        task_type="text-classification",
        dataset_type=task.hub_id,
        dataset_name=f"GLUE {row_title(row)}",
        dataset_config=hub_config,
        dataset_split=hub_split,
        metric_type=metric.removesuffix("_mm"),
        metric_value=round(value, 4),
    )


def introduction(run: Run) -> list[str]:
    """Say what the model is, and how far its training is."""
    config, shape = run.config, run.architecture
    origin = f"from {as_text(run.base)}" if run.base else "from scratch"
    lines = [
        f"# {as_text(run.title)}",
        f"{MODEL_TITLES[config['model_type']]} with {shape['num_hidden_layers']} layers of width "
        f"{shape['hidden_size']}, {shape['vocab_size']:,} vocabulary entries and {format_count(run.parameters)} "
        f"parameters, pretrained {origin} by {OBJECTIVE_TITLES[config['objective']]} after the recipe of "
        "[RoBERTa](https://arxiv.org/abs/1907.11692).",
    ]
    if run.average:
        *earlier, last = (f"{step:,}" for step in run.average["steps"])
        lines.append(f"Its weights are the mean of those after {', '.join(earlier)} and {last} updates.")
    elif run.progress:
        lines.append(f"**Training is under way:** {run.progress}.")
    return lines


def usage(run: Run) -> list[str]:
    """Show how to load the model."""
    space = "" if run.config["model_type"].startswith("roberta") else " "
    name = json.dumps(run.name, ensure_ascii=False)
    code = f'from transformers import pipeline\n\nfill_mask = pipeline("fill-mask", model={name})\n'
    code += f'fill_mask(f"The capital of France is{space}{{fill_mask.tokenizer.mask_token}}.")'
    lines = ["## How to use it", code_block(code, "python")]
    if run.config["push_to_hub"] and run.config["hub_strategy"] != "end" and not run.average:
        lines.append(
            f'Every checkpoint is a tag: `AutoModelForMaskedLM.from_pretrained("{run.name}", '
            f'revision="step-{run.step:08d}")`.'
        )
    lines.append("For a task of your own, fine-tune it as any model of its type.")
    return lines


def evaluation(run: Run) -> list[str]:
    """Report the held-out loss and the results on GLUE."""
    lines = []
    if last := run.evaluation:
        perplexity = "" if last["eval_perplexity"] is None else f", perplexity {last['eval_perplexity']:,.2f}"
        others = [f"{run.average['last_evaluation']['eval_loss']:.3f} without averaging"] if run.average else []
        others += [f"{first['eval_loss']:.3f} before the first"] if (first := run.first_evaluation) else []
        beside = f" ({', '.join(others)})" if others else ""
        held_out = f"blocks of {as_text(run.held_out)} that are not trained on"
        if run.config["eval_corpora"]:
            held_out = f"{as_text(run.held_out)}: text that is in none of the corpora's files"
        lines.append(
            f"Held-out loss {last['eval_loss']:.3f} nats a masked token{perplexity}, after {last['step']:,} updates"
            f"{beside}; a unigram model has {last['unigram_loss']:.3f}. Held out are {held_out}; "
            f"{run.config['eval_mlm_probability']:.0%} of the tokens are masked."
        )
        if "notice" in last:
            lines.append(f"**Not of use yet:** {last['notice']}.")
    if (run.path / "loss.png").exists():
        lines.append("![Loss over tokens](loss.png)")
    if run.glue:
        settings = run.glue["config"]
        lines += [
            "### GLUE",
            format_rows(run.glue["summary"]),
            "\n".join(format_notes(run.glue["summary"])),
            f"Fine-tuned for {settings['num_train_epochs']} epochs, {len(settings['seeds'])} seeds, on at most "
            f"{settings['max_seq_length']} tokens.",
        ]
    return ["## Results", *lines] if lines else []


def data(run: Run) -> list[str]:
    """Report what the model was trained on, and what was left out."""
    config = run.config
    seen = run.training[-1]["corpora"] if run.training else {}
    rows = [["corpus", "source", "weight", "tokens seen", "passes"]]
    for corpus in config["corpora"]:
        counts = seen.get(corpus["name"])
        weight = "its size" if corpus["weight"] is None else f"{corpus['weight']:g}"
        seen_columns = [f"{counts['tokens']:,}", f"{counts['passes']:.2f}"] if counts else ["–", "–"]
        rows.append([as_text(corpus["name"]), source(corpus, run.sources), weight, *seen_columns])
    dropped = {
        name: sum(counts.get(name, 0) for counts in seen.values())  # the streaming mode does not count copies
        for name in ("empty", "unreadable", "contaminated", "copies")
    }
    lines = ["## Training data", table(rows)]
    if shares := {name: counts["negative_pairs"] for name, counts in seen.items() if "negative_pairs" in counts}:
        kind = "are swapped" if config["packing"] == "sentence_order" else "have parts of two documents"
        listed = ", ".join(f"{share:.0%} ({name})" for name, share in shares.items())
        lines.append(f"Of the pairs, {listed} {kind}.")
    if any(dropped.values()):
        lines.append("Documents left out: " + ", ".join(f"{n:,} {name}" for name, n in dropped.items() if n) + ".")
    return lines


def procedure(run: Run) -> list[str]:
    """Report the objective, the schedule and the optimizer."""
    config = run.config
    blocks = f"{config['packing']}, {config['max_seq_length']} tokens"
    betas = f"{config['adam_beta1']:g} and {config['adam_beta2']:g}"
    rows = {
        "objective": OBJECTIVE_TITLES[config["objective"]],
        "masks": f"{config['masking']}, {config['mlm_probability']:.0%} of the tokens",
        "blocks": blocks,
        "batch": f"{config['train_batch_size']:,} blocks",
        "updates": f"{run.step:,} of {config['max_steps']:,}" if config["schedule_by"] == "steps" else f"{run.step:,}",
        "learning rate": describe_schedule(config),
        "AdamW": f"betas {betas}, epsilon {config['adam_epsilon']:g}, weight decay {config['weight_decay']:g}",
        "gradients": f"clipped to a norm of {config['max_grad_norm']:g}" if config["max_grad_norm"] else "not clipped",
        "seed": config["seed"],
    }
    if config["phases"]:
        timeline = Timeline.of_record(config)
        rows = {name: value for name, value in rows.items() if name != "batch"}
        rows["masks"] = config["masking"]
        rows["blocks"] = f"{config['packing']}, in phases"
        rows |= {f"phase {n + 1}": timeline.describe_phase(n) for n in range(len(timeline.bounds))}
    if changes := run.environment["changes"]:
        rows["changed on the way"] = "; ".join(
            f"after {one['step']:,} updates {one['name'].replace('_', ' ')} from {one['before']} to {one['after']}"
            for one in changes
        )
    if run.training:
        last = run.training[-1]
        rows["tokens seen"] = f"{last['tokens']:,}, padding ({last['padding_share']:.1%}) left out"
        if skipped := last["nonfinite_updates"] + last["overflows"]:
            rows["updates skipped"] = f"{skipped:,}, not finite"
    return ["## Training", two_columns(rows)]


def cost(run: Run) -> list[str]:
    """Report the hardware and what training took."""
    machine = run.environment
    rows = {
        "devices": f"{machine['num_processes']} × {machine['device']}",
        "precision": machine["mixed_precision"] if machine["mixed_precision"] != "no" else "float32",
    }
    if run.training:
        rate, mfu = (statistics.median(one[name] for one in run.training) for name in ("tokens_per_second", "mfu"))
        spans = zip(run.training, [0, *(one["step"] for one in run.training)], strict=False)
        seconds = sum((one["step"] - start) * one["seconds_per_update"] for one, start in spans)
        device_hours = seconds / 3600 * machine["num_processes"]
        rows |= {
            "throughput": f"{rate:,.0f} tokens/s, median",
            "MFU": f"{mfu:.0%} of what large matrix products sustain there, median",
            "peak memory": f"{run.training[-1]['peak_memory'] / 1e9:.1f} GB a process",
            "training time": f"{format_duration(seconds)} (h:min:s), {device_hours:.3g} device-hours",
        }
        if watts := machine.get("power_limit_watts"):
            rows["energy"] = (
                f"at most {device_hours * watts / 1000:.3g} kWh (estimate: {watts:g} W, the limit of a board, × "
                "device-hours; without host and cooling)"
            )
    return [
        "## Hardware and cost",
        two_columns(rows),
        "Devices and precision are of the last start; the time leaves out evaluation and checkpoints.",
    ]


def limits(run: Run) -> list[str]:
    """Say what the model is not for."""
    config = run.config
    lines = [
        f"- It has read text in one language ({as_text(config['language'])}) and was trained on at most "
        f"{config['max_seq_length']} tokens at a time.",
        "- It fills masks and is meant to be fine-tuned; it is no model for writing text or answering questions.",
        "- It repeats what its corpora say, prejudice about people and groups included, and knows nothing that is "
        "later than they are. Nothing of that has been measured: try it on your task, and with the people concerned in "
        "mind, before you rely on it.",
    ]
    if not config["decontaminate_against"]:
        lines.append("- The corpora have not been cleared of the sentences of any test set.")
    if not config["eval_corpora"] and run.evaluation:
        lines.append(
            "- Held-out blocks have neighbours from the same documents in training, so their loss flatters a little."
        )
    return ["## Limits and biases", "\n".join(lines)]


def reproduction(run: Run) -> list[str]:
    """Give the command, the versions and the config."""
    machine, config_text = run.environment, to_yaml(public_config(run.config, run.sources)).strip()
    command = (
        f"accelerate launch --num_processes {machine['num_processes']} --mixed_precision {machine['mixed_precision']} "
        "pretrain.py --config config.yaml"
    )
    if run.average:
        steps = ",".join(map(str, run.average["steps"]))
        command += f"\npython -m recipe.average {shlex.quote(public_name(str(run.path), []))} --steps {steps}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    commit = machine["git_commit"] or "not known: the code was in no git checkout"
    return [
        "## How to reproduce it",
        code_block(command, "bash"),
        "Of local files and folders only the names are given; the tokenizer lies beside these weights.",
        f"Commit of the recipe: {commit}. Python {machine['python']}, {versions}.",
        f"<details><summary>config.yaml</summary>\n\n{code_block(config_text, 'yaml')}\n\n</details>",
    ]


def build_card(path: Path, model: Path) -> str:
    """Build the card of a run and of its weights in `model`; a damaged file that it is made from is a `UserError`."""
    files = f"a file of {path} or {model} that the model card is made from (config.yaml, metrics.jsonl, config.json, …)"
    with raising_damaged_file(files, "repair it; only the card needs all of them"):
        run = Run(path, model)
        parts = (introduction, usage, evaluation, data, procedure, cost, limits, reproduction)
        sections = [section for part in parts for section in part(run)]
        return as_card(metadata(run), sections)


def write_card(path: Path, model: Path) -> None:
    """Write README.md and the plot that it shows beside the weights."""
    if (path / "loss.png").exists():
        shutil.copyfile(path / "loss.png", model / "loss.png")
    write_atomically(model / "README.md", build_card(path, model))
