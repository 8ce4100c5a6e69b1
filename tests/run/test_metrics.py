import math

import numpy as np
import pytest

from recipe.base.formatting import format_count, format_duration
from recipe.run.metrics import Stopwatch, TrainState, eval_record, format_eval_line, format_train_line, train_record


def test_window_is_the_mean_over_tokens_and_leaves_out_skipped_updates():
    state = TrainState()
    seen = np.array([[2, 60, 1], [1, 40, 3]])
    state.count({"loss": (10.0, 2)}, seen, 50, 1, None)
    state.count({"loss": (math.nan, 5)}, seen, 50, 1, "nonfinite")
    state.count({"loss": (2.0, 4)}, seen, 50, 1, None)
    state.count({"loss": (1.0, 4)}, seen, 50, 1, "overflow")
    assert state.corpora == [[8, 240, 4], [4, 160, 12]]
    assert state.blocks == 12
    assert state.padding_share == pytest.approx(1 / 3)
    assert (state.step, state.tokens, state.nonfinite_updates, state.overflows) == (4, 400, 1, 1)
    assert state.take_means() == {"loss": 2.0}
    state.count({"loss": (1.0, 4)}, seen, 50, 1, "nonfinite")
    assert state.take_means() == {"loss": None}


def test_skipped_updates_in_a_row_are_counted():
    state = TrainState()
    for skipped in ("nonfinite", "nonfinite", None, "overflow", "nonfinite"):
        state.count({"loss": (1.0, 1)}, np.array([[1, 1, 1]]), 1, 1, skipped)
    assert state.skipped_in_a_row == 2


def test_digest_tells_the_order_of_updates():
    digests = []
    for order in [(1, 2, 3), (2, 1, 3), (1, 2, 3)]:
        state = TrainState()
        for digest in order:
            state.count({"loss": (1.0, 1)}, np.array([[1, 1, 1]]), 1, digest, None)
        digests.append(state.data_digest)
    assert digests[0] == digests[2] != digests[1]


def test_eval_record_has_the_perplexity_of_its_loss():
    record = eval_record(TrainState(step=3), {"loss": 2.0, "next_sentence_accuracy": 0.75}, 6.5)
    assert record["eval_loss"] == 2.0
    assert record["eval_perplexity"] == pytest.approx(math.exp(2))
    assert "next sentence accuracy 0.750" in format_eval_line(record, 10)
    assert eval_record(TrainState(), {"loss": math.inf}, 6.5)["eval_loss"] is None


def test_lines_are_aligned():
    state = TrainState(step=5, corpora=[[1000, 234_567, 9], [2000, 1_000_000, 9]], positions=3000 * 512)
    state.window = {"loss": [30.0, 10]}
    watch = Stopwatch()
    watch.count(1000, watch.started + 0.5)
    corpora = {
        name: {"blocks": blocks, "passes": passes} for name, blocks, passes in (("a", 1000, 2), ("b", 2000, 0.5))
    }
    rates = watch.rates(1 / 1e6) | {"peak_memory": 12_345_678_901}
    record = train_record(state, {"learning_rate": 6e-4, "grad_norm": 1.25}, rates, corpora)
    assert (record["tokens_per_second"], record["mfu"], record["seconds_per_update"]) == (2000, 0.002, 0.5)
    assert "memory 12.3 GB" in format_train_line(record, 100_000)
    assert record["epoch"] == 1.0
    assert record["padding_share"] == pytest.approx(1 - 1_234_567 / (3000 * 512), abs=1e-4)
    line = format_train_line(record, 100_000)
    assert "step      5/100000" in line
    assert "loss  3.000" in line
    assert "1.23M tokens" in line
    later = format_train_line(record | {"step": 99_999, "loss": None, "grad_norm": None}, 100_000)
    assert line.index("grad norm") == later.index("grad norm")
    assert line.index("tokens/s") == later.index("tokens/s")
    unknown = {"step": 1, "eval_loss": 1.0, "eval_perplexity": None, "unigram_loss": 6.0}
    assert format_eval_line(unknown, 10).split("perplexity")[1].split()[0] == "none"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1234, "1.23K"), (5.5e6, "5.5M"), (1.26e21, "1.26e+21"), (2e12, "2T")]
)
def test_counts_are_short(number, text):
    assert format_count(number) == text


def test_durations():
    assert format_duration(59.6) == "0:01:00"
    assert format_duration(90_061) == "1d 1:01:01"


def test_wait_for_data_belongs_to_its_own_update(monkeypatch: pytest.MonkeyPatch):
    """The data of the next update has been waited for by the time that an update is counted."""
    now = iter([0.0, 1.0, 4.0, 9.0])
    monkeypatch.setattr("recipe.run.metrics.time.monotonic", lambda: next(now))
    watch = Stopwatch(0.0)
    for _ in range(2):
        with watch.waiting():
            pass
    watch.count(1000, 4.0)
    assert watch.rates(1.0)["data_wait_share"] == 0.25
    watch = watch.go_on()
    watch.count(1000, 10.0)
    assert watch.rates(1.0)["data_wait_share"] == pytest.approx(5 / 6, abs=1e-4)


def test_pauses_do_not_count():
    watch = Stopwatch()
    before = watch.started
    with watch.paused():
        pass
    assert watch.started > before
