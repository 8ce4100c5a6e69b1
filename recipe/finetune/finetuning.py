"""One fine-tuning run on a GLUE task: a stock classifier, the paper's schedule, the best epoch.

1. `encode_splits` tokenises a task once, for all jobs of the process.
2. `epoch_batches` orders an epoch: rows of like length share a batch, so that little of it is padding.
3. `Finetuner.run` trains, evaluates after every epoch and returns the metrics of the best.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipe.arguments import GlueArguments
from recipe.finetune.classifier import pad_rows
from recipe.finetune.jobs import Job
from recipe.finetune.progress import Progress
from recipe.finetune.tasks.glue import TASKS, Task
from recipe.finetune.tasks.scoring import score
from recipe.modeling.optimizer import build_optimizer, build_scheduler

POOL_BATCHES = 100  # batches whose rows are sorted by length together


@dataclass(frozen=True)
class EncodedSplit:
    """A tokenised split."""

    rows: Dataset  # the columns that the model takes, unpadded
    lengths: np.ndarray  # (rows,) numbers of tokens
    labels: np.ndarray  # (rows,) ids, or scores divided by the task's scale; empty for a test split


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    metrics: dict[str, float]  # dev metrics of the best epoch
    best_epoch: int  # from 1
    epochs: list[dict[str, float]]  # mean training loss and dev metrics of each
    weights: dict[str, torch.Tensor]  # the best epoch's, on the CPU; empty unless asked for


def encode_splits(
    splits: dict[str, Dataset], task: Task, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> dict[str, EncodedSplit]:
    """Tokenise splits; longer examples are cut, the longer sentence of a pair first."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [batch[name] for name in ("sentence1", "sentence2") if name in batch]
        return tokenizer(*texts, truncation=True, max_length=max_seq_length)

    encoded = {}
    for name, split in splits.items():
        rows = split.map(encode, batched=True, remove_columns=split.column_names)
        lengths = np.array([len(ids) for ids in rows["input_ids"]])
        labels = np.array(split["label"][:] if "label" in split.column_names else [])
        labels = labels.astype(np.float32) / np.float32(task.scale) if task.is_regression else labels.astype(np.int64)
        encoded[name] = EncodedSplit(rows, lengths, labels)
    return encoded


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Batch all rows once, rows of like length together, in a random order that is a function of (seed, epoch)."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * POOL_BATCHES):
        pool = order[start : start + batch_size * POOL_BATCHES]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


@dataclass
class Finetuner:
    """Trains classifiers and predicts by them, all processes the same model if it is shared, else each its own."""

    accelerator: Accelerator
    args: GlueArguments
    tokenizer: PreTrainedTokenizerBase
    is_shared: bool

    def __post_init__(self) -> None:
        self.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index if self.is_shared else 0
        self.world_size: int = self.accelerator.num_processes if self.is_shared else 1

    def run(
        self,
        job: Job,
        splits: dict[str, EncodedSplit],
        model: PreTrainedModel,
        keeps_weights: bool,
        progress: Progress | None = None,
    ) -> Outcome:
        """Train a model of `load_classifier` in place for `num_train_epochs`, and evaluate it after each.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        args, task, train = self.args, TASKS[job.task], splits["train"]
        model.to(self.device)
        module = self.accelerator.prepare_model(model) if self.is_shared else model
        if self.rank:
            torch.manual_seed(job.seed + (self.rank << 48))  # other rows, other dropout
        betas = (args.adam_beta1, args.adam_beta2)
        optimizer = build_optimizer(model, job.learning_rate, betas, args.adam_epsilon, args.weight_decay)
        steps = job.num_updates(len(train.lengths), args.num_train_epochs)
        scheduler = build_scheduler(optimizer, "linear", {}, math.ceil(args.warmup_ratio * steps), steps, 0)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.accelerator.mixed_precision == "fp16")
        epochs: list[dict[str, float]] = []
        weights: dict[str, torch.Tensor] = {}
        for epoch in range(args.num_train_epochs):
            module.train()
            loss_sum = torch.zeros((), device=self.device)
            batches = epoch_batches(train.lengths, job.batch_size, job.seed, epoch)
            for number, rows in enumerate(batches, start=1):
                loss_sum += self.backward(module, task, train, rows, scaler)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                optimizer.zero_grad()
                if progress:
                    seen = number * job.batch_size / self.world_size
                    where = f"{epoch + 1} of {args.num_train_epochs}"
                    progress.step(job, epoch * len(batches) + number, where, loss_sum, seen)
            loss = float(self.accelerator.reduce(loss_sum, "sum") if self.is_shared else loss_sum) / len(train.lengths)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the training loss of epoch {epoch + 1} is {loss}")
            epochs.append({"loss": loss} | self.evaluate(task, splits, module))
            best = max(range(epoch + 1), key=lambda number: epochs[number][task.metrics[0]])  # of equals the first
            if keeps_weights and best == epoch:
                weights = {key: tensor.to("cpu", copy=True) for key, tensor in model.state_dict().items()}
        metrics = {key: value for key, value in epochs[best].items() if key != "loss"}
        return Outcome(metrics, best + 1, epochs, weights)

    def backward(
        self, module: nn.Module, task: Task, split: EncodedSplit, rows: np.ndarray, scaler: torch.amp.GradScaler
    ) -> torch.Tensor:
        """Add the gradients of a batch's mean loss, in micro-batches; return the sum over this process's rows."""
        loss_function = nn.functional.mse_loss if task.is_regression else nn.functional.cross_entropy
        own = rows[self.rank :: self.world_size]
        # The last batch may have no row for this process, which has to take part all the same.
        weight, own = (1.0, own) if len(own) else (0.0, rows[:1])
        scale = weight * self.world_size / len(rows)  # the gradients are averaged over the processes
        loss_sum = torch.zeros((), device=self.device)
        parts = np.array_split(own, math.ceil(len(own) / self.args.per_device_train_batch_size))
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(module):
                labels = torch.from_numpy(split.labels[part]).to(self.device)
                loss = loss_function(self.logits(module, split, part), labels, reduction="sum")
                scaler.scale(loss * scale).backward()
                loss_sum += loss.detach() * weight
        return loss_sum

    def logits(self, module: nn.Module, split: EncodedSplit, rows: np.ndarray) -> torch.Tensor:
        """Compute (rows, labels) float32, (rows,) in a regression."""
        batch = pad_rows(split.rows[rows], self.tokenizer)
        with self.accelerator.autocast():
            logits = module(**batch.to(self.device)).logits
        return logits.float().squeeze(-1)

    def evaluate(self, task: Task, splits: dict[str, EncodedSplit], module: nn.Module) -> dict[str, float]:
        """Compute the metrics of all dev splits; the names of MNLI's second end in `_mm`."""
        metrics: dict[str, float] = {}
        for name, ending in (("validation", ""), ("validation_mismatched", "_mm")):
            if split := splits.get(name):
                references = split.labels * task.scale if task.is_regression else split.labels
                scores = score(task, self.predict(task, split, module), references)
                metrics |= {f"{metric}{ending}": value for metric, value in scores.items()}
        return metrics

    @torch.no_grad()
    def predict(self, task: Task, split: EncodedSplit, module: nn.Module) -> np.ndarray:
        """Predict (rows,) label ids, or scores on the task's scale, on all processes that share the model."""
        module.eval()
        own = np.argsort(split.lengths, kind="stable")[self.rank :: self.world_size]
        size = self.args.per_device_eval_batch_size
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        logits = [self.logits(module, split, part) for part in parts]
        answers = [part * task.scale if task.is_regression else part.argmax(-1) for part in logits]
        predicted = [(own, torch.cat(answers).cpu().numpy() if answers else np.empty(0, np.int64))]
        predicted = gather_object(predicted) if self.is_shared else predicted
        rows = np.concatenate([rows for rows, _ in predicted])
        assert np.array_equal(np.sort(rows), np.arange(len(split.lengths))), "every row is predicted once"
        return np.concatenate([answers for _, answers in predicted])[np.argsort(rows)]
