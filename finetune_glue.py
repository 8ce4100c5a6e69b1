"""Fine-tune a model on GLUE by the paper's protocol and print the dev results beside the published ones.

accelerate launch finetune_glue.py --config recipe/configs/glue/base.yaml --model_name_or_path runs/roberta-base/model
"""

import recipe.run.stopping  # noqa: F401  first of all: it records the launcher and the time

# isort: split
import time
from dataclasses import asdict
from pathlib import Path

from recipe.arguments import GlueArguments, identity_of, parse_config
from recipe.base.errors import run_script
from recipe.base.files import check_output_dir, read_yaml
from recipe.finetune.tasks.glue import TASKS, check_tasks, find_files


def main() -> None:
    args = parse_config(GlueArguments, __doc__)
    names = args.tasks or list(TASKS)
    check_tasks("tasks", names)
    check_tasks("data_parallel_tasks", args.data_parallel_tasks)
    check_output_dir(Path(args.output_dir))
    if args.glue_dir:
        for name in names:
            find_files(TASKS[name], args.glue_dir)

    # Imported only here, since they load torch: options that are wrong are refused without waiting for it.
    import datasets
    import transformers

    from recipe.finetune.classifier import check_classifier, load_glue_tokenizer
    from recipe.finetune.grid import Grid, plan_jobs
    from recipe.finetune.report import check_failures, describe_jobs, summarise, write_report
    from recipe.finetune.tasks.loading import load_task
    from recipe.finetune.tasks.scoring import describe_data
    from recipe.publish.glue_card import check_card, write_cards
    from recipe.publish.names import hub_models
    from recipe.run.checkpoint import check_identity
    from recipe.run.hardware import environment
    from recipe.run.launch import open_run, start_accelerator

    # Otherwise there is a bar for each file, and a report on the new head for each job.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    accelerator = start_accelerator()
    run = open_run(args.output_dir, accelerator)
    started = time.perf_counter()
    tokenizer = load_glue_tokenizer(args.model_name_or_path, args.max_seq_length, args.tokenizer_name)
    check_card(args)
    widest = max((TASKS[name] for name in names), key=lambda task: len(task.columns))
    checksum = {"model_checksum": check_classifier(args.model_name_or_path, widest, tokenizer, args.max_seq_length)}
    if run.config_file.exists():
        saved = read_yaml(run.config_file)
        check_identity(saved | (saved.get("environment") or {}), identity_of(args) | checksum, run.path)

    tasks, data = {}, {}
    for name in names:
        tasks[name], warnings = load_task(name, args.glue_dir)
        data[name] = describe_data(name, tasks[name])
        for warning in warnings:
            accelerator.print(f"warning: {warning}")
    jobs = plan_jobs(args, tasks)
    grid = Grid(accelerator, args, tokenizer, tasks)
    grid.check_mnli(jobs)
    accelerator.print(describe_jobs(jobs, tasks, grid.results.read(), args.num_train_epochs))
    if args.dry_run:
        return

    beside = checksum | {"hub_sources": hub_models(args.model_name_or_path)}
    run.write_config(asdict(args), environment(accelerator) | beside)
    try:
        with run.noting_failure():
            if accelerator.is_main_process:
                grid.results.forget_failures()
            run.write_status("running", len(grid.results.read()))
            accelerator.wait_for_everyone()
            records = grid.run(jobs, run.heartbeat)
            if not accelerator.is_main_process:
                return

            summary = summarise(records, jobs, data, args.compare_with)
            hours = (time.perf_counter() - started) / 3600
            print("\n".join(write_report(run.path, summary, hours, args.model_name_or_path)))
            check_failures(records, jobs, grid.results.file)
            lines = write_cards(run.path)
            run.write_status("complete", len(jobs))
            print("\n".join(lines))
    except KeyboardInterrupt:
        accelerator.print(f"{run.step or 0:,} of {len(jobs):,} jobs have a result; the same command runs the others")
        raise


if __name__ == "__main__":
    run_script(main)
