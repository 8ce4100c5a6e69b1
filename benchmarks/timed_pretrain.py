"""`pretrain.py` with the CPU seconds of training in every evaluation, for machines whose cores have other work too.

python benchmarks/timed_pretrain.py --config recipe/configs/pretrain/tiny.yaml

`cpu_seconds` in metrics.jsonl is of all threads of the process since its first evaluation, without evaluations. It
does not outlive the process, so such a run is not to be resumed.
"""

import time
from typing import Any

import harness  # noqa: F401  makes the project importable

import pretrain
from recipe import monitoring
from recipe.base.errors import run_script


class CpuClock:
    """Counts the CPU seconds between evaluations."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.started: float | None = None  # when training went on, by `time.process_time`

    def evaluate(self, log: monitoring.TrainingLog) -> Exception | None:
        """`TrainingLog.evaluate`, which is not counted."""
        if self.started is not None:
            self.seconds += time.process_time() - self.started
        failure = evaluate(log)
        self.started = time.process_time()
        return failure

    def eval_record(self, *arguments: Any) -> dict[str, Any]:
        """`eval_record` with the CPU seconds so far."""
        return eval_record(*arguments) | {"cpu_seconds": round(self.seconds, 2)}


evaluate, eval_record = monitoring.TrainingLog.evaluate, monitoring.eval_record

if __name__ == "__main__":
    clock = CpuClock()
    monitoring.TrainingLog.evaluate = lambda log: clock.evaluate(log)
    monitoring.eval_record = clock.eval_record
    run_script(pretrain.main)
