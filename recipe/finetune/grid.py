"""The grid of jobs: which there are, how each is run, and how the best model of a task is kept."""

import gc
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipe.arguments import GlueArguments
from recipe.base.errors import UserError, describe_error
from recipe.base.files import replace_folder, write_atomically
from recipe.finetune.classifier import load_classifier
from recipe.finetune.finetuning import Finetuner, Outcome, encode_splits
from recipe.finetune.jobs import Job, Results
from recipe.finetune.progress import Progress
from recipe.finetune.tasks.glue import TASKS
from recipe.finetune.tasks.scoring import format_predictions
from recipe.run.launch import on_main


def plan_jobs(args: GlueArguments, tasks: dict[str, dict[str, Dataset]]) -> list[Job]:
    """List all jobs of the grid for these tasks and splits, the longest (by the training set's bytes) first."""
    jobs = []
    for name in tasks:
        task = TASKS[name]
        inits = ["pretrained", "mnli"] if args.init_from_mnli and task.takes_mnli else ["pretrained"]
        rates, batches = args.learning_rates or [task.learning_rate], args.batch_sizes or [task.batch_size]
        jobs += [Job(name, *setting) for setting in itertools.product(inits, rates, batches, args.seeds)]
    num_bytes = {name: splits["train"].data.nbytes for name, splits in tasks.items()}
    return sorted(jobs, key=lambda job: -num_bytes[job.task])


@dataclass
class Grid:
    """Runs jobs and keeps their results, and the best model and predictions of each task; `tasks` has their splits."""

    accelerator: Accelerator
    args: GlueArguments
    tokenizer: PreTrainedTokenizerBase
    tasks: dict[str, dict[str, Dataset]]

    def __post_init__(self) -> None:
        self.folder = Path(self.args.output_dir)
        self.models = self.folder / "models"  # the best of each task
        self.results = Results(self.folder)
        self.encoded = cache(
            lambda name: encode_splits(self.tasks[name], TASKS[name], self.tokenizer, self.args.max_seq_length)
        )

    def check_mnli(self, jobs: list[Job]) -> None:
        """Raise a `UserError` if jobs start from an MNLI model that is not there and that no job will make."""
        done, folder = self.results.read(), self.models / "mnli"
        makes = any(job.task == "mnli" and done.get(job, {}).get("state") != "done" for job in jobs)
        if any(job.init == "mnli" for job in jobs) and not makes and not folder.is_dir():
            raise UserError(
                f"`init_from_mnli` needs an MNLI model: add mnli to `tasks`, or put one into {folder} (jobs that ended "
                "before `init_from_mnli` was set have kept none)"
            )

    def run(self, jobs: list[Job], heartbeat: Callable[[int], None]) -> dict[Job, dict[str, Any]]:
        """Run all jobs that have no result yet, together with the other processes, until all have one.

        Args:
            heartbeat: called with the number of results, every second or so.

        Returns:
            the lines of results.jsonl.
        """
        is_alone = self.accelerator.num_processes == 1
        shared = [job for job in jobs if job.task in self.args.data_parallel_tasks and not is_alone]
        mnli = {job for job in jobs if job.task == "mnli"}
        epochs = self.args.num_train_epochs
        updates = {job: job.num_updates(len(self.tasks[job.task]["train"]), epochs) for job in jobs}
        with Progress(updates, self.results, heartbeat, self.accelerator.is_main_process) as progress:
            for job in shared:
                if job not in on_main(self.accelerator, self.results.read):
                    self.run_job(job, True, progress)
                self.accelerator.wait_for_everyone()
            # Another start may forget failed jobs at any time, also after the last job, and shared ones too.
            while not (records := self.results.read()).keys() >= set(jobs):
                # A job that starts from an MNLI model waits until that is the best that there will be.
                for job in self.results.claim(
                    jobs, lambda job: job.init != "mnli" or mnli <= self.results.read().keys(), progress.show_results
                ):
                    self.run_job(job, False, progress)
            progress.show_results()
        return records

    def run_job(self, job: Job, is_shared: bool, progress: Progress) -> None:
        """Run a job, from the model's files to its line in results.jsonl; failed jobs get one too.

        Raises:
            RuntimeError: the device is broken, or has no room in a job that other processes share.
        """
        task, finetuner = TASKS[job.task], Finetuner(self.accelerator, self.args, self.tokenizer, is_shared)
        started = time.perf_counter()
        is_writer = not is_shared or self.accelerator.is_main_process
        reason = None
        try:
            torch.manual_seed(job.seed)
            model = load_classifier(self.source(job), task, self.args.classifier_dropout, self.tokenizer.pad_token_id)
            # The best weights are of use if they are saved, or predict a test set.
            keeps = self.keeps_model(job.task) or any(task.splits[name].submission for name in self.tasks[job.task])
            outcome = finetuner.run(job, self.encoded(job.task), model, is_writer and keeps, progress)
        except (FloatingPointError, RuntimeError, UserError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if is_shared and not isinstance(error, FloatingPointError):
                raise  # the other processes wait for this one
            reason = describe_error(error)
        if not is_writer:
            return
        if reason:
            gc.collect()  # of the model, which the error referred to
            torch.zeros(1, device=self.accelerator.device).item()  # raises where the device is broken
            self.results.add(job, state="failed", reason=reason)
            progress.show_results()
            return
        if outcome.weights:
            self.keep_best(job, outcome, model)
        seconds = time.perf_counter() - started
        values = {name: value for name, value in vars(outcome).items() if name != "weights"}
        self.results.add(job, state="done", **values, seconds=round(seconds, 2), processes=finetuner.world_size)
        progress.show_results()

    def source(self, job: Job) -> str:
        """Name the model that a job starts from."""
        if job.init == "pretrained":
            return self.args.model_name_or_path
        if not (self.models / "mnli").is_dir():
            raise UserError("there is no MNLI model to start from: all its jobs failed")
        return str(self.models / "mnli")

    def keeps_model(self, task: str) -> bool:
        """Tell whether the best model of a task is saved."""
        return self.args.save_models or (task == "mnli" and self.args.init_from_mnli)

    def keep_best(self, job: Job, outcome: Outcome, model: PreTrainedModel) -> None:
        """Keep the model and its test predictions, if it is its task's best: of equals, the first in their order."""
        task, best_file = TASKS[job.task], self.folder / "best" / f"{job.task}.json"
        rank = [-outcome.metrics[task.metrics[0]], *asdict(job).values()]
        with self.results.lock(f"best-{job.task}"):
            if best_file.exists() and json.loads(best_file.read_text("utf-8"))["rank"] <= rank:
                return
            model.load_state_dict(outcome.weights)
            if self.keeps_model(job.task):
                with replace_folder(self.models / job.task) as temporary:
                    model.save_pretrained(temporary)
                    self.tokenizer.save_pretrained(temporary)
            alone = Finetuner(self.accelerator, self.args, self.tokenizer, is_shared=False)
            for name, split in self.encoded(job.task).items():
                if submission := task.splits[name].submission:
                    path = self.folder / "predictions" / submission
                    path.parent.mkdir(exist_ok=True)
                    write_atomically(path, format_predictions(task, alone.predict(task, split, model)))
            best_file.parent.mkdir(exist_ok=True)
            write_atomically(best_file, json.dumps({"rank": rank, "job": asdict(job)}) + "\n")
