"""Score the answers to a task, by scikit-learn and scipy, and write them for gluebenchmark.com."""

import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from recipe.finetune.tasks.glue import TASKS, Task, is_official


def correlation(measure: Callable[..., Any], references: np.ndarray, predictions: np.ndarray) -> float:
    """Correlate, with 0 where all predictions are equal, as `matthews_corrcoef` has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(np.nan_to_num(measure(references, predictions).statistic))


SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews_correlation": matthews_corrcoef,
    "pearson": partial(correlation, pearsonr),
    "spearman": partial(correlation, spearmanr),
}


def score(task: Task, predictions: npt.ArrayLike, references: npt.ArrayLike) -> dict[str, float]:
    """Compute the task's metrics from label ids, or from scores."""
    dtype = np.float64 if task.is_regression else np.int64
    pair = np.asarray(references, dtype), np.asarray(predictions, dtype)
    return {metric: float(SCORES[metric](*pair)) for metric in task.metrics}


def describe_data(name: str, splits: dict[str, Dataset]) -> dict[str, Any]:
    """Say what the report needs to know of a task's data, and what needs no model.

    Returns:
        `official`, and `majority`: the first metric of always giving the commonest answer of the training set, or its
        mean in a regression.
    """
    task, labels, references = TASKS[name], splits["train"]["label"][:], splits["validation"]["label"][:]
    answer = statistics.mean(labels) if task.is_regression else statistics.mode(labels)
    scores = score(task, [answer] * len(references), references)
    return {"official": is_official(name, splits), "majority": scores[task.metrics[0]]}


def format_predictions(task: Task, predictions: np.ndarray) -> str:
    """Format label ids or scores for the site's zip: by name where labels have names, scores within their range."""
    if task.is_regression:
        values = [f"{value:.3f}" for value in np.clip(predictions, 0, task.scale)]
    else:
        values = [task.tsv_labels[label] for label in predictions]
    return "index\tprediction\n" + "".join(f"{index}\t{value}\n" for index, value in enumerate(values))
