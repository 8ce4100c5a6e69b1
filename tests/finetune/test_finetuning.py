import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from recipe.arguments import GlueArguments
from recipe.finetune.classifier import load_classifier, load_glue_tokenizer
from recipe.finetune.finetuning import Finetuner, encode_splits, epoch_batches
from recipe.finetune.jobs import Job
from recipe.finetune.tasks.glue import TASKS
from recipe.finetune.tasks.loading import load_task
from testing.glue_data import write_mnli, write_rte, write_stsb
from testing.helpers import PATIENCE_SECONDS, PYTHONPATH, ROOT


def arguments(tmp_path: Path, model: Path, **changes: object) -> GlueArguments:
    values = {"output_dir": str(tmp_path / "out"), "model_name_or_path": str(model), "glue_dir": str(tmp_path)}
    values |= {"num_train_epochs": 2, "max_seq_length": 32, "per_device_eval_batch_size": 5}
    return GlueArguments(**values | changes)


@pytest.fixture
def dropless_model(small_model: Path, tmp_path: Path) -> Path:
    """The small model with a config without dropout."""
    folder = shutil.copytree(small_model, tmp_path / "dropless")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=700), st.integers(1, 8), st.integers(0, 3))
def test_every_row_is_in_one_batch_of_an_epoch(lengths: list[int], batch_size: int, epoch: int):
    batches = epoch_batches(np.array(lengths), batch_size, 1, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    again = epoch_batches(np.array(lengths), batch_size, 1, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_batches_hold_rows_of_like_length_in_another_order_each_epoch():
    lengths = np.random.default_rng(0).integers(5, 100, 3200)
    batches = epoch_batches(lengths, 32, 1, 0)
    padded = sum(len(rows) * lengths[rows].max() for rows in batches)
    assert padded < 1.05 * lengths.sum()
    longest = [lengths[rows].max() for rows in batches]
    assert longest != sorted(longest)
    for other in (epoch_batches(lengths, 32, 1, 1), epoch_batches(lengths, 32, 2, 0)):
        assert not all(np.array_equal(a, b) for a, b in zip(batches, other, strict=True))


@pytest.mark.parametrize(("name", "write"), [("rte", write_rte), ("stsb", write_stsb)])
def test_same_learning_as_a_plain_loop(accelerator, small_model: Path, tmp_path: Path, name: str, write):
    """A dozen lines over the stock classifier, with the same seed, order and settings; dropout is on."""
    write(tmp_path)
    task, args = TASKS[name], arguments(tmp_path, small_model, per_device_train_batch_size=8)
    tokenizer = load_glue_tokenizer(str(small_model), 32)
    raw, _ = load_task(name, str(tmp_path))
    splits = encode_splits(raw, task, tokenizer, 32)
    torch.manual_seed(3)
    model = load_classifier(str(small_model), task)
    job = Job(name, "pretrained", 1e-3, 8, 3)
    ours = Finetuner(accelerator, args, tokenizer, is_shared=False).run(job, splits, model, keeps_weights=False)

    stock_tokenizer = AutoTokenizer.from_pretrained(small_model)
    torch.manual_seed(3)
    stock = AutoModelForSequenceClassification.from_pretrained(
        small_model, num_labels=max(1, len(task.labels)), problem_type="regression" if task.is_regression else None
    )
    groups = [[p for p in stock.parameters() if p.ndim > 1], [p for p in stock.parameters() if p.ndim == 1]]
    groups = [{"params": p, "weight_decay": d} for p, d in zip(groups, (0.1, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    scheduler = get_linear_schedule_with_warmup(optimizer, 1, 10)
    losses = []
    for epoch in range(2):
        stock.train()
        total = 0.0
        for rows in epoch_batches(splits["train"].lengths, 8, 3, epoch):
            part = raw["train"][rows]
            texts = part["sentence1"], part["sentence2"]
            # To a multiple of 8 as ours, since dropout's draws go by shape.
            batch = stock_tokenizer(*texts, padding=True, pad_to_multiple_of=8, return_tensors="pt")
            labels = torch.tensor(part["label"])
            loss = stock(**batch, labels=labels / task.scale if task.is_regression else labels).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.item() * len(rows)
        losses.append(total / len(raw["train"]))
    assert [epoch["loss"] for epoch in ours.epochs] == pytest.approx(losses, abs=1e-4)
    stock.eval()
    dev = raw["validation"][:]
    with torch.no_grad():
        logits = stock(**stock_tokenizer(dev["sentence1"], dev["sentence2"], padding=True, return_tensors="pt")).logits
    if task.is_regression:
        expected = np.corrcoef(logits[:, 0], dev["label"])[0, 1]
    else:
        expected = (logits.argmax(-1) == torch.tensor(dev["label"])).float().mean().item()
    assert ours.epochs[-1][task.metrics[0]] == pytest.approx(expected, abs=1e-4)


def test_micro_batches_make_no_difference(accelerator, dropless_model: Path, tmp_path: Path):
    write_rte(tmp_path)
    task, tokenizer = TASKS["rte"], load_glue_tokenizer(str(dropless_model), 32)
    splits = encode_splits(load_task("rte", str(tmp_path))[0], task, tokenizer, 32)
    curves = []
    for size in (8, 3):
        args = arguments(tmp_path, dropless_model, per_device_train_batch_size=size)
        torch.manual_seed(0)
        model = load_classifier(str(dropless_model), task)
        finetuner = Finetuner(accelerator, args, tokenizer, is_shared=False)
        outcome = finetuner.run(Job("rte", "pretrained", 1e-3, 8, 0), splits, model, keeps_weights=False)
        curves.append([epoch["loss"] for epoch in outcome.epochs])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_best_epoch_counts_and_its_weights_are_kept(accelerator, small_model: Path, tmp_path: Path):
    write_rte(tmp_path, train=320, dev=40)
    task, tokenizer = TASKS["rte"], load_glue_tokenizer(str(small_model), 32)
    splits = encode_splits(load_task("rte", str(tmp_path))[0], task, tokenizer, 32)
    args = arguments(tmp_path, small_model, num_train_epochs=8)
    torch.manual_seed(0)
    model = load_classifier(str(small_model), task)
    finetuner = Finetuner(accelerator, args, tokenizer, is_shared=False)
    outcome = finetuner.run(Job("rte", "pretrained", 3e-3, 8, 0), splits, model, keeps_weights=True)
    scores = [epoch["accuracy"] for epoch in outcome.epochs]
    assert outcome.metrics == {"accuracy": max(scores)}
    assert outcome.best_epoch == scores.index(max(scores)) + 1
    assert max(scores) > 0.9  # the sentences tell their label
    model.load_state_dict(outcome.weights)
    found = finetuner.predict(task, splits["validation"], model)
    assert (found == splits["validation"].labels).mean() == max(scores)


def test_scores_are_predicted_on_their_own_scale(accelerator, small_model: Path, tmp_path: Path):
    write_stsb(tmp_path, train=320)
    task, tokenizer = TASKS["stsb"], load_glue_tokenizer(str(small_model), 32)
    splits = encode_splits(load_task("stsb", str(tmp_path))[0], task, tokenizer, 32)
    assert set(splits["train"].labels.tolist()) == {0.0, 1.0}
    args = arguments(tmp_path, small_model, num_train_epochs=8)
    torch.manual_seed(0)
    model = load_classifier(str(small_model), task)
    finetuner = Finetuner(accelerator, args, tokenizer, is_shared=False)
    outcome = finetuner.run(Job("stsb", "pretrained", 3e-3, 8, 0), splits, model, keeps_weights=False)
    assert outcome.metrics["pearson"] > 0.9
    found = finetuner.predict(task, splits["train"], model)
    assert found.max() > 3


def test_diverged_training_is_an_error(accelerator, small_model: Path, tmp_path: Path):
    write_rte(tmp_path)
    task, tokenizer = TASKS["rte"], load_glue_tokenizer(str(small_model), 32)
    splits = encode_splits(load_task("rte", str(tmp_path))[0], task, tokenizer, 32)
    model = load_classifier(str(small_model), task)
    finetuner = Finetuner(accelerator, arguments(tmp_path, small_model), tokenizer, is_shared=False)
    with pytest.raises(FloatingPointError, match="the training loss of epoch 1 is nan"):
        finetuner.run(Job("rte", "pretrained", 1e30, 8, 0), splits, model, keeps_weights=False)


SHARED = """
import json, sys
import torch
from recipe.arguments import GlueArguments
from recipe.base.errors import run_script
from recipe.finetune.classifier import load_classifier, load_glue_tokenizer
from recipe.finetune.finetuning import Finetuner, encode_splits
from recipe.finetune.jobs import Job
from recipe.finetune.tasks.glue import TASKS
from recipe.finetune.tasks.loading import load_task
from recipe.run.launch import start_accelerator

def main():
    folder, model, out = sys.argv[1:]
    accelerator = start_accelerator()
    args = GlueArguments(output_dir=out, model_name_or_path=model, num_train_epochs=2, per_device_eval_batch_size=3)
    tokenizer = load_glue_tokenizer(model, 32)
    splits = encode_splits(load_task("mnli", folder)[0], TASKS["mnli"], tokenizer, 32)
    torch.manual_seed(5)
    classifier = load_classifier(model, TASKS["mnli"])
    job = Job("mnli", "pretrained", 1e-3, 8, 5)
    outcome = Finetuner(accelerator, args, tokenizer, is_shared=True).run(job, splits, classifier, False)
    if accelerator.is_main_process:
        json.dump(outcome.epochs, open(out, "w"))

run_script(main)
"""


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3])
def test_shared_job_ends_as_that_of_one_process(accelerator, dropless_model: Path, tmp_path: Path, processes: int):
    """57 rows in batches of 8 leave one row for the last batch; 16 and 18 dev rows."""
    write_mnli(tmp_path, train=57, dev=16)
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    out = tmp_path / "epochs.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    command = [*launch, script, tmp_path, dropless_model, out]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=PATIENCE_SECONDS)
    found = json.loads(out.read_text())
    tokenizer = load_glue_tokenizer(str(dropless_model), 32)
    splits = encode_splits(load_task("mnli", str(tmp_path))[0], TASKS["mnli"], tokenizer, 32)
    torch.manual_seed(5)
    model = load_classifier(str(dropless_model), TASKS["mnli"])
    finetuner = Finetuner(accelerator, arguments(tmp_path, dropless_model), tokenizer, is_shared=False)
    expected = finetuner.run(Job("mnli", "pretrained", 1e-3, 8, 5), splits, model, keeps_weights=False).epochs
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
