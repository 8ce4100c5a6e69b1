"""GLUE results on model cards: that of the pretrained model, and one for each classifier that was kept.

Every number is in a file of finetune_glue.py: config.yaml, summary.json, results.jsonl, best/<task>.json.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from recipe.base.files import read_yaml, write_atomically
from recipe.finetune.jobs import Job, Results
from recipe.finetune.report import percent, points
from recipe.finetune.tasks.glue import TASKS
from recipe.publish.card import (
    RECIPE_TAG,
    Run,
    as_card,
    as_text,
    code_block,
    glue_result,
    table,
    two_columns,
    write_card,
)
from recipe.publish.hub import GLUE_FILE, stage_card


def add_glue_to_card(output_dir: Path) -> list[str]:
    """Write the cards of the classifiers and, with its results, of a run's pretrained model; return lines to log."""
    config = read_yaml(output_dir / "config.yaml")
    summary = json.loads((output_dir / "summary.json").read_text("utf-8"))
    model = Path(config["model_name_or_path"])
    run, lines = None, []
    if model.name == "model" and (model.parent / "metrics.jsonl").is_file():
        write_atomically(model / GLUE_FILE, json.dumps({"summary": summary, "config": config}, indent=1) + "\n")
        write_card(model.parent, model)
        lines += [f"model card: {model / 'README.md'}", *stage_card(model.parent)]
        run = Run(model.parent, model)
    for row in summary["tasks"]:
        folder, best = output_dir / "models" / row["task"], output_dir / "best" / f"{row['task']}.json"
        job = Job(**json.loads(best.read_text("utf-8"))["job"]) if folder.is_dir() and best.is_file() else None
        if job is not None and job.init == row["init"]:
            result = Results(output_dir).read()[job]
            write_atomically(folder / "README.md", build_classifier_card(folder, config, row, job, result, run))
            lines.append(f"model card: {folder / 'README.md'}")
    return lines


def build_classifier_card(
    folder: Path, config: dict[str, Any], row: dict[str, Any], job: Job, result: dict[str, Any], run: Run | None
) -> str:
    """Build the card of the model that a job has left in a folder, from the task's row and the job's result."""
    machine, task = config["environment"], TASKS[job.task]
    base = run.name if run else config["model_name_or_path"]
    is_on_hub = run.config["push_to_hub"] if run else not Path(base).exists()
    title = f"{run.title if run else Path(base).name}-{job.task}"
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
    name = json.dumps(str(folder), ensure_ascii=False)
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
