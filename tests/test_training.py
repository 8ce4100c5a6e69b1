import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import BertConfig, BertForPreTraining, RobertaConfig, RobertaForMaskedLM

from recipe.data.batches import Counts, UpdateData
from recipe.data.masking import DynamicMaskingCollator
from recipe.modeling.memory import full_rows, largest_micro_batch
from recipe.modeling.model import ROBERTA_DEFAULTS
from recipe.modeling.objectives import MaskedLMObjective, NextSentenceObjective
from recipe.modeling.optimizer import build_optimizer
from recipe.monitoring import Outcome, Update
from recipe.run.stopping import StopRequest
from recipe.training import next_update, seed_dropout, train_step
from testing.helpers import PYTHONPATH, ROOT, SMALL_MODEL, reset_accelerate
from tests.data.test_masking import make_examples

LENGTH = 32


def make_batches(tokenizer, micro_batch: int) -> list[dict[str, torch.Tensor]]:
    """Eight rows of unlike lengths, and so of unlike counts of masked tokens."""
    collator = DynamicMaskingCollator(tokenizer, max_seq_length=LENGTH)
    examples = [make_examples(tokenizer, 8, length=8 + 3 * n)[n] for n in range(8)]
    batches = [collator(examples[i : i + micro_batch]) for i in range(0, 8, micro_batch)]
    return [{name: tensor for name, tensor in batch.items() if name != "rows"} for batch in batches]


def take_step(accelerator, objective, optimizer, micro_batches, max_grad_norm) -> tuple[Outcome, int]:
    """What an update does, and the masked tokens of all processes."""
    masked = sum((batch["labels"] != -100).sum() for batch in micro_batches)
    masked = int(accelerator.reduce(masked, "sum"))
    return outcome(
        accelerator, train_step(accelerator, objective, optimizer, micro_batches, [masked], max_grad_norm)
    ), masked


def outcome(accelerator, result: torch.Tensor) -> Outcome:
    return Update(UpdateData([], Counts(1)), Counts(1), 0.0, 0.0, result).wait(accelerator.scaler is not None)


def make_model(tokenizer) -> RobertaForMaskedLM:
    torch.manual_seed(0)
    sizes = SMALL_MODEL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return RobertaForMaskedLM(RobertaConfig(**ROBERTA_DEFAULTS, **sizes, vocab_size=len(tokenizer)))


class KeepGradients(torch.optim.Optimizer):
    """Takes no step, and keeps the gradients that it would have taken it with, unless it is told to leave them out."""

    def __init__(self, parameters):
        super().__init__(list(parameters), {"lr": 1.0})
        self.gradients: list[torch.Tensor] | None = None

    def step(self, closure=None):
        if not self.found_inf:
            self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def stock_gradients(tokenizer) -> tuple[float, list[torch.Tensor]]:
    model = make_model(tokenizer)
    loss = model(**make_batches(tokenizer, 8)[0]).loss
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, two in zip(ours, theirs, strict=True):
        assert (one - two).abs().max() <= 1e-5 * two.abs().max() + 1e-9


def step_in_this_process(accelerator, tokenizer, micro_batches, model=None):
    objective = MaskedLMObjective(model or make_model(tokenizer), 0.15)
    keeper = KeepGradients(objective.parameters())
    prepared, optimizer = accelerator.prepare(objective, keeper)
    update, masked = take_step(accelerator, prepared, optimizer, micro_batches, 0.0)
    return update, keeper.gradients, update.sums[0] / masked


@pytest.mark.parametrize("micro_batch", [8, 4, 2, 1])
def test_gradients_are_those_of_one_big_batch_through_the_stock_loss(accelerator, tokenizer, micro_batch):
    loss, expected = stock_gradients(tokenizer)
    update, gradients, mean = step_in_this_process(accelerator, tokenizer, make_batches(tokenizer, micro_batch))
    assert mean == pytest.approx(loss, rel=1e-5)
    assert update.skipped is None
    assert_close(gradients, expected)
    norm = torch.cat([g.flatten() for g in expected]).norm().item()
    assert update.grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("micro_batch", [8, 2, 1])
def test_gradients_of_both_losses_are_those_of_one_big_stock_batch(accelerator, tokenizer, micro_batch):
    """Micro-batches have unlike shares of the masked tokens and of the pairs; some have no pair."""
    sizes = SMALL_MODEL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(**sizes, vocab_size=len(tokenizer)))
    pair_label = torch.tensor([0, 1, 1, -100, 0, 1, -100, -100])
    [whole] = make_batches(tokenizer, 8)
    stock = model(**whole, next_sentence_label=pair_label).loss
    stock.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    objective = NextSentenceObjective(model, 0.15)
    keeper = KeepGradients(objective.parameters())
    prepared, optimizer = accelerator.prepare(objective, keeper)
    batches = [
        {name: rows[i : i + micro_batch] for name, rows in (whole | {"pair_label": pair_label}).items()}
        for i in range(0, 8, micro_batch)
    ]
    divisors = [int((whole["labels"] != -100).sum()), 5, 5]
    update = outcome(accelerator, train_step(accelerator, prepared, optimizer, batches, divisors, 0.0))
    loss, pair_loss, accuracy = (total / count for total, count in zip(update.sums, divisors, strict=True))
    assert loss + pair_loss == pytest.approx(stock.item(), rel=1e-5)
    assert 0 <= accuracy <= 1
    assert_close(keeper.gradients, expected)


def test_accumulation_set_by_the_launcher_changes_nothing(monkeypatch, tokenizer):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    reset_accelerate()
    accelerator = Accelerator()
    assert accelerator.gradient_accumulation_steps == 3
    _, gradients, _ = step_in_this_process(accelerator, tokenizer, make_batches(tokenizer, 2))
    reset_accelerate()
    assert_close(gradients, stock_gradients(tokenizer)[1])


TWO_PROCESSES = """
import atexit, sys
import torch
from recipe.base.errors import run_script
from recipe.data.tokenizer import load_tokenizer
from recipe.run.launch import start_accelerator
from tests.test_training import make_batches, step_in_this_process

def main():
    accelerator = start_accelerator()
    assert accelerator.num_processes == 2
    tokenizer = load_tokenizer(sys.argv[1])
    batches = make_batches(tokenizer, int(sys.argv[3]))[accelerator.process_index :: 2]
    _, gradients, mean = step_in_this_process(accelerator, tokenizer, batches)
    if accelerator.is_main_process:
        torch.save({"loss": mean, "gradients": gradients}, sys.argv[2])

# The last to run at the exit.
atexit.register(lambda: print("grouped " if torch.distributed.is_initialized() else "alone ", end=""))
run_script(main)
"""


@pytest.mark.parametrize("micro_batch", [pytest.param(4, marks=pytest.mark.long), 1])
def test_two_processes_give_the_gradients_of_one(tokenizer, tokenizer_dir: Path, tmp_path: Path, micro_batch: int):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out.pt"
    command = [*launch, script, tokenizer_dir, out, str(micro_batch)]
    run = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert run.stdout == "alone alone "
    found = torch.load(out, weights_only=True)
    loss, expected = stock_gradients(tokenizer)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert_close(found["gradients"], expected)


def test_clipping_keeps_the_direction(accelerator, tokenizer):
    objective = MaskedLMObjective(make_model(tokenizer), 0.15)
    keeper = KeepGradients(objective.parameters())
    prepared, optimizer = accelerator.prepare(objective, keeper)
    update, _ = take_step(accelerator, prepared, optimizer, make_batches(tokenizer, 4), 0.01)
    assert update.grad_norm > 0.01
    assert torch.cat([g.flatten() for g in keeper.gradients]).norm().item() == pytest.approx(0.01, rel=1e-3)


def spoil(model: RobertaForMaskedLM, value: float) -> RobertaForMaskedLM:
    with torch.no_grad():
        model.lm_head.bias[7] = value
    return model


def test_nonfinite_loss_never_reaches_the_optimizer(accelerator, tokenizer):
    model = spoil(make_model(tokenizer), float("nan"))
    update, gradients, _ = step_in_this_process(accelerator, tokenizer, make_batches(tokenizer, 4), model)
    assert update.skipped == "nonfinite"
    assert gradients is None


@pytest.fixture
def fp16_accelerator(monkeypatch: pytest.MonkeyPatch):
    """As accelerate sets fp16 up on a GPU; on a CPU it leaves out the scaler."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()
    accelerator = Accelerator(mixed_precision="fp16")
    accelerator.native_amp = True
    yield accelerator
    reset_accelerate()


def losses_and_norms(accelerator, tokenizer, scaler) -> list[tuple[float, float]]:
    accelerator.scaler = scaler
    objective = MaskedLMObjective(make_model(tokenizer), 0.15)
    prepared, optimizer = accelerator.prepare(objective, build_optimizer(objective, 1e-3, (0.9, 0.98), 1e-6, 0.0))
    updates = [take_step(accelerator, prepared, optimizer, make_batches(tokenizer, 2), 0.5)[0] for _ in range(5)]
    assert {update.skipped for update in updates} == {None}
    accelerator.free_memory()
    return [(update.sums[0], update.grad_norm) for update in updates]


def test_gradient_scaler_changes_nothing(fp16_accelerator, tokenizer):
    plain = losses_and_norms(fp16_accelerator, tokenizer, torch.amp.GradScaler("cpu", enabled=False))
    scaled = losses_and_norms(fp16_accelerator, tokenizer, torch.amp.GradScaler("cpu", init_scale=1024.0))
    for one, two in zip(plain, scaled, strict=True):
        assert one == pytest.approx(two, rel=1e-3)


def test_overflow_is_left_to_the_scaler_and_counted_apart(fp16_accelerator, tokenizer):
    fp16_accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    objective = MaskedLMObjective(make_model(tokenizer), 0.15)
    raw = build_optimizer(objective, 1e-3, (0.9, 0.98), 1e-6, 0.0)
    prepared, optimizer = fp16_accelerator.prepare(objective, raw)
    before = copy.deepcopy(prepared.state_dict())
    update, _ = take_step(fp16_accelerator, prepared, optimizer, make_batches(tokenizer, 4), 0.0)
    assert update.skipped == "overflow"
    assert fp16_accelerator.scaler.get_scale() == 2.0**126
    assert all(torch.equal(before[name], value) for name, value in prepared.state_dict().items())


def test_infinite_loss_with_finite_gradients_never_reaches_the_optimizer(fp16_accelerator, tokenizer):
    fp16_accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    batches = make_batches(tokenizer, 4)
    label = batches[0]["labels"][batches[0]["labels"] != -100][0]
    model = make_model(tokenizer)
    with torch.no_grad():
        model.lm_head.bias[label] = float("-inf")
    objective = MaskedLMObjective(model, 0.15)
    raw = build_optimizer(objective, 1e-3, (0.9, 0.98), 1e-6, 0.01)
    prepared, optimizer = fp16_accelerator.prepare(objective, raw)
    before = copy.deepcopy(prepared.state_dict())
    for _ in range(2):  # the scaler, too, is ready for the next update
        update, _ = take_step(fp16_accelerator, prepared, optimizer, batches, 0.0)
        assert update.skipped == "nonfinite"
    assert all(torch.equal(before[name], value) for name, value in prepared.state_dict().items())


def test_update_that_is_left_out_leaves_no_trace(accelerator, tokenizer):
    """Weights, moments and their count of steps are as if it had not been made, and so is the update after it."""

    def train(spoiled: list[bool]) -> list[torch.Tensor]:
        objective = MaskedLMObjective(make_model(tokenizer), 0.15)
        raw = build_optimizer(objective, 1e-3, (0.9, 0.98), 1e-6, 0.01)
        prepared, optimizer = accelerator.prepare(objective, raw)
        for is_spoiled in spoiled:
            hook = objective.register_forward_hook(
                lambda module, given, made, factor=math.nan if is_spoiled else 1.0: (made[0] * factor, made[1])
            )
            update, _ = take_step(accelerator, prepared, optimizer, make_batches(tokenizer, 4), 0.5)
            assert update.skipped == ("nonfinite" if is_spoiled else None)
            hook.remove()
        moments = [tensor for state in raw.state.values() for tensor in state.values()]
        return [*objective.parameters(), *moments]

    for one, two in zip(train([False, False]), train([True, False, True, False, True]), strict=True):
        assert torch.equal(one, two)


def test_no_host_waits_for_an_update(accelerator, tokenizer):
    """With tensors that have no contents, whatever asks for some raises: `item`, `tolist`, `bool`, `numpy`."""
    batches = make_batches(tokenizer, 4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        objective = MaskedLMObjective(make_model(tokenizer), 0.15)
        raw = build_optimizer(objective, 1e-3, (0.9, 0.98), 1e-6, 0.01)
        given = [{name: mode.from_tensor(tensor) for name, tensor in batch.items()} for batch in batches]
        result = train_step(accelerator, objective, AcceleratedOptimizer(raw, device_placement=False), given, [40], 0.5)
        update = Update(UpdateData([], Counts(1)), Counts(1), 0.0, 0.0, result)
        assert result.shape == (2,)
        assert len(raw.state) == len(list(objective.parameters()))  # a step was taken
        with pytest.raises(DataDependentOutputException):
            update.wait(has_scaler=False)


def test_stop_request_is_heard_before_the_next_update():
    request, run = StopRequest(), SimpleNamespace(check_held=lambda: None)
    session = SimpleNamespace(accelerator=None, args=SimpleNamespace(corpora=[None]), run=run)
    watchdog = SimpleNamespace(at=lambda place: None)
    share = UpdateData([], Counts(1))
    updates = iter([share, share])
    local, counts, _ = next_update(session, updates, request, watchdog, 1500)
    assert local is share
    assert counts["milliseconds"] == 1500
    request.reason = "SIGTERM"
    local, counts, failure = next_update(session, updates, request, watchdog, 0)
    assert (local, counts["stopping"], failure) == (None, 1, None)


def test_dropout_is_a_function_of_seed_update_and_rank():
    draws = {}
    for key in [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0)]:
        seed_dropout(*key)
        draws[key] = torch.rand(3)
        seed_dropout(*key)
        assert torch.equal(torch.rand(3), draws[key])
    assert len({tuple(values.tolist()) for values in draws.values()}) == 4


def test_same_learning_as_the_stock_loop(accelerator, tokenizer):
    """50 updates on the same batches, each by its own loss and step."""
    objective = MaskedLMObjective(make_model(tokenizer), 0.15)
    stock = make_model(tokenizer)
    adamw, theirs = (build_optimizer(module, 1e-3, (0.9, 0.98), 1e-6, 0.01) for module in (objective, stock))
    objective, optimizer = accelerator.prepare(objective, adamw)
    collator = DynamicMaskingCollator(tokenizer, max_seq_length=LENGTH)
    losses: list[tuple[float, float]] = []
    for number in range(50):
        batch = collator(make_examples(tokenizer, 8, length=LENGTH - number % 3, seed=number % 2))
        del batch["rows"]
        halves = [{name: rows[half] for name, rows in batch.items()} for half in (slice(0, 4), slice(4, 8))]
        update, masked = take_step(accelerator, objective, optimizer, halves, 0.0)
        loss = stock(**batch).loss
        loss.backward()
        theirs.step()
        theirs.zero_grad()
        losses.append((update.sums[0] / masked, loss.item()))
    assert max(abs(a - b) for a, b in losses) <= 1e-4
    assert losses[-1][1] < losses[0][1] - 0.3


class FitsThreeRows(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels, **batch):
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("tried to allocate")
        return self.model(input_ids, labels=labels).loss, (labels != -100).sum()


def test_largest_micro_batch_is_found_by_trying(tokenizer):
    model, device = make_model(tokenizer), torch.device("cpu")

    def make_batch(rows: int) -> dict[str, torch.Tensor]:
        return full_rows(rows, LENGTH, 0.15)

    assert largest_micro_batch(FitsThreeRows(model), make_batch, [1, 2, 4], device, 1000) == 2
    assert largest_micro_batch(FitsThreeRows(model), make_batch, [4], device, 1000) is None
    assert all(parameter.grad is None for parameter in model.parameters())
