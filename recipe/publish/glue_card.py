"""GLUE results on model cards: that of the pretrained model, and one for each classifier that was kept.

Every number is in a file of finetune_glue.py: config.yaml, summary.json, results.jsonl, best/<task>.json.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from recipe.arguments import GlueArguments
from recipe.base.errors import require
from recipe.base.files import read_yaml, write_atomically
from recipe.finetune.jobs import Job, Results
from recipe.finetune.report import percent, points
from recipe.finetune.tasks.glue import TASKS
from recipe.publish.card import RECIPE_TAG, Run, glue_result, write_card
from recipe.publish.hub import GLUE_FILE, stage_card
from recipe.publish.markdown import as_card, as_text, code_block, table, two_columns
from recipe.publish.names import public_name


def run_of(model: str) -> Path | None:
    """Return the folder of the run whose model this is; None for any other model."""
    path, files = Path(model), ("config.yaml", "status.json", "metrics.jsonl")
    is_average = path.parent.name == "averages"
    run = path.parents[1] if is_average else path.parent
    return run if (is_average or path.name == "model") and all((run / name).is_file() for name in files) else None


def check_card(args: GlueArguments) -> None:
    """Raise a `UserError` if the card that is to be updated is not that of a run."""
    problem = f"true, and `model_name_or_path` {args.model_name_or_path} is not the `model` or an average of a run"
    is_there = not args.update_model_card or run_of(args.model_name_or_path) is not None
    require(is_there, "update_model_card", problem, "leave it out")


def write_cards(output_dir: Path) -> list[str]:
    """Write the cards of the classifiers and, if that is asked for, of the model with its results; return log lines."""
    config = read_yaml(output_dir / "config.yaml")
    summary = json.loads((output_dir / "summary.json").read_text("utf-8"))
    model, path, lines = Path(config["model_name_or_path"]), run_of(config["model_name_or_path"]), []
    if path and config["update_model_card"]:
        settings = {name: config[name] for name in ("num_train_epochs", "seeds", "max_seq_length")}
        write_atomically(model / GLUE_FILE, json.dumps({"summary": summary, "config": settings}, indent=1) + "\n")
        write_card(path, model)
        lines += [f"model card: {model / 'README.md'}", *(stage_card(path) if model.name == "model" else [])]
    elif path:
        lines.append(f"the same command with --update_model_card true adds this table to {model / 'README.md'}")
    run = Run(path, model) if path else None
    for row in summary["tasks"]:
        folder, best = output_dir / "models" / row["task"], output_dir / "best" / f"{row['task']}.json"
        job = Job(**json.loads(best.read_text("utf-8"))["job"]) if folder.is_dir() and best.is_file() else None
        if job is not None and job.init == row["init"]:
            result = Results(output_dir).read()[job]
            write_atomically(folder / "README.md", build_classifier_card(config, row, job, result, run))
            lines.append(f"model card: {folder / 'README.md'}")
    return lines


def build_classifier_card(
    config: dict[str, Any], row: dict[str, Any], job: Job, result: dict[str, Any], run: Run | None
) -> str:
    """Build the card of the model that a job has left in a folder, from the task's row and the job's result."""
    machine, task = config["environment"], TASKS[job.task]
    sources = machine["hub_sources"]
    base = run.name if run else public_name(config["model_name_or_path"], sources)
    is_on_hub = (run.config["push_to_hub"] and not run.average) if run else base in sources
    title = f"{run.title if run else base.split('/')[-1]}-{job.task}"
    results = [glue_result(row, metric, value) for metric, value in result["metrics"].items()]
    head = ModelCardData(
        language="en",
        license=run.config["license"] if run else None,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=[RECIPE_TAG, "glue", job.task],
        base_model=base if is_on_hub else None,
        datasets=[task.hub_id] if row["official"] else None,
        model_name=title,
        eval_results=results if row["official"] else None,
    )
    name = json.dumps(f"{public_name(config['output_dir'], [])}/models/{job.task}", ensure_ascii=False)
    code = f'from transformers import pipeline\n\nclassify = pipeline("text-classification", model={name})'
    answers = f"labels {', '.join(task.labels)}" if task.labels else f"a similarity, divided by {task.scale:g}"
    versions = ", ".join(f"{library} {version}" for library, version in machine["versions"].items())
    remarks = "This model was chosen by its dev result, which flatters it: the median is the fairer figure."
    if not row["official"]:
        remarks += " The data is not the official one: not to be compared with published results."
    betas = f"{config['adam_beta1']:g} and {config['adam_beta2']:g}"
    settings = {
        "started from": as_text(base) + (", by way of its best MNLI model" if job.init == "mnli" else ""),
        "learning rate": f"{job.learning_rate:g} after {config['warmup_ratio']:.0%} of warmup, then linearly to zero",
        "batch": f"{job.batch_size} examples of at most {config['max_seq_length']} tokens",
        "epochs": f"{config['num_train_epochs']}, of which number {result['best_epoch']} was the best",
        "AdamW": f"betas {betas}, epsilon {config['adam_epsilon']:g}, weight decay {config['weight_decay']:g}",
        "seed": job.seed,
        "time": f"{result['seconds']:,.0f} s on {result['processes']} × {machine['device']}",
    }
    sections = [
        f"# {as_text(title)}",
        f"A classifier for {task.title} of [GLUE](https://gluebenchmark.com), fine-tuned from {as_text(base)} by the "
        "protocol of [RoBERTa](https://arxiv.org/abs/1907.11692).",
        "## How to use it",
        code_block(code, "python"),
        f"It answers with {answers}.",
        "## Results on the dev set",
        table(result_rows(row, result, config["compare_with"])),
        remarks,
        "## Fine-tuning",
        two_columns(settings),
        "## Limits and biases",
        "It knows the one task, as its annotators saw it, and inherits what the pretrained model has from its corpora; "
        "neither has been measured on other text.",
        "## How to reproduce it",
        f"`finetune_glue.py` with the settings above. Commit of the recipe: {machine['git_commit'] or 'not known'}. "
        f"Python {machine['python']}, {versions}.",
    ]
    return as_card(head, sections)


def result_rows(row: dict[str, Any], result: dict[str, Any], compare_with: str) -> list[list[str]]:
    """List each metric in percent: this model, the median and, for the first, the majority and what is published."""
    rows = [["metric", "this model", f"median (n = {row['n']})", "majority", f"roberta.{compare_with}"]]
    for metric, value in result["metrics"].items():
        known = [percent(row["majority"]), points(row["published"])] if metric == row["metric"] else ["–", "–"]
        rows.append([metric, percent(value), percent(row["metrics"][metric]), *known])
    return rows
