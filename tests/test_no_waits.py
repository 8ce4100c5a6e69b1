"""What a CPU cannot show: that the host of a GPU waits for nothing in an update or between two."""

import pytest
import torch
from accelerate import Accelerator

from recipe.base.workers import one_ahead
from recipe.data.batches import Counts, UpdateData
from recipe.modeling.objectives import MaskedLMObjective
from recipe.modeling.optimizer import build_optimizer, build_scheduler
from recipe.monitoring import Update
from recipe.training import preparation, seed_dropout, train_step
from testing.helpers import never, reset_accelerate
from tests.test_training import make_batches, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_host_of_a_gpu_waits_for_nothing(tokenizer, precision: str):
    """The third of six updates has no number, and is left out."""
    reset_accelerate()
    accelerator = Accelerator(mixed_precision=precision)
    objective = MaskedLMObjective(make_model(tokenizer), 0.15)
    raw = build_optimizer(objective, 1e-3, (0.9, 0.98), 1e-6, 0.01)
    prepared, optimizer = accelerator.prepare(objective, raw)
    scheduler = build_scheduler(raw, "linear", {}, 2, 10, 0)
    batches = make_batches(tokenizer, 4)
    masked = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    shares = map(preparation(objective, accelerator.device), [UpdateData(batches, Counts(1))] * 6)
    updates = one_ahead(shares, never)
    enqueued = []
    try:
        for number in range(6):
            share = next(updates)
            if number == 1:  # the first update makes moments, and loads kernels
                torch.cuda.set_sync_debug_mode("error")
            seed_dropout(0, number, 0)
            factor = float("nan") if number == 2 else 1.0
            hook = objective.register_forward_hook(lambda module, given, made, by=factor: (made[0] * by, made[1]))
            result = train_step(accelerator, prepared, optimizer, share.micro_batches, [masked], 0.5)
            hook.remove()
            scheduler.step()
            enqueued.append(Update(share, share.counts, 0.0, 0.0, result))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        updates.close()
    outcomes = [update.wait(accelerator.scaler is not None) for update in enqueued]
    reset_accelerate()
    assert all(tensor.is_cuda for batch in share.micro_batches for tensor in batch.values())
    assert torch.equal(share.micro_batches[0]["labels"].cpu(), batches[0]["labels"])
    assert enqueued[0].result.is_pinned()
    assert [outcome.skipped for outcome in outcomes if outcome.skipped != "overflow"].count("nonfinite") == 1
    assert outcomes[2].skipped == "nonfinite"
    if precision != "fp16":  # whose scale begins so high that the first updates overflow
        assert [outcome.skipped for outcome in outcomes] == [None, None, "nonfinite", None, None, None]
        assert outcomes[5].sums[0] < outcomes[0].sums[0]
        assert {float(state["step"]) for state in raw.state.values()} == {5.0}
