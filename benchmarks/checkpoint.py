"""How long training pauses for a checkpoint, written in the background against written at once.

python benchmarks/checkpoint.py --output benchmarks/results/checkpoint.json
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import header, in_child, peak_resident_megabytes, resident_megabytes, to_json
from transformers import RobertaConfig, RobertaForMaskedLM

from recipe.modeling.model import ROBERTA_DEFAULTS, count_parameters
from recipe.modeling.objectives import MaskedLMObjective
from recipe.modeling.optimizer import build_optimizer
from recipe.run.checkpoint import BYTES_PER_PARAMETER, CheckpointWriter, save_checkpoint

SIZES = {
    "base": {},
    "small": {"num_hidden_layers": 6, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
}


def measure(size: str, repeats: int, folder: str) -> dict[str, Any]:
    """Seconds of each repeat, synchronous and asynchronous in turn; the longest that the main thread stood still while
    the other one wrote.
    """
    model = RobertaForMaskedLM(RobertaConfig(**ROBERTA_DEFAULTS, **SIZES[size]))
    objective = MaskedLMObjective(model, 0.15)
    optimizer = build_optimizer(objective, 1e-4, (0.9, 0.98), 1e-6, 0.01)
    for parameter in objective.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    writer, path = CheckpointWriter(print, None), Path(folder)
    resident = resident_megabytes()
    first_copy = 0.0
    seconds: dict[str, list[float]] = {"synchronous": [], "pause": [], "written_after": [], "longest_standstill": []}
    for number in range(repeats):
        for is_background in (False, True):
            start = time.perf_counter()
            copied = writer.copy(objective, optimizer, keep=True)
            first_copy = first_copy or time.perf_counter() - start
            weights = {name.removeprefix("model."): tensor for name, tensor in copied["weights"].items()}

            def write(step: int = 2 * number + is_background, weights: dict = weights, copied: dict = copied) -> Path:
                return save_checkpoint(path, step, model, weights, {"optimizer": copied["optimizer"]}, {}, 1)

            writer.start(number, write, lambda path: None)
            if not is_background:
                writer.wait()
                seconds["synchronous"].append(time.perf_counter() - start)
                continue
            seconds["pause"].append(time.perf_counter() - start)
            longest, last = 0.0, time.perf_counter()
            while writer.thread.is_alive():
                time.sleep(0.001)
                longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
            seconds["written_after"].append(last - start)
            seconds["longest_standstill"].append(longest)
            assert writer.failure is None
    parameters = count_parameters(model)
    return {
        "parameters": parameters,
        "checkpoint_megabytes": sum(file.stat().st_size for file in writer.last.iterdir()) / 1e6,
        "copy_megabytes": BYTES_PER_PARAMETER * parameters / 1e6,
        "added_resident_megabytes": resident_megabytes() - resident,
        "peak_resident_megabytes": peak_resident_megabytes(),
        "first_copy_seconds": first_copy,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "pause_of_writing": statistics.median(
            pause / (after - pause) for pause, after in zip(seconds["pause"], seconds["written_after"], strict=True)
        ),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to measure; default: the one for temporary files")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    report = header([])
    for size in arguments.sizes:
        folder = tempfile.mkdtemp(dir=arguments.folder)
        try:
            report[size] = in_child(measure, size, arguments.repeats, folder)
        finally:
            shutil.rmtree(folder)
        print(size, report[size]["median_seconds"], f"pause {report[size]['pause_of_writing']:.1%} of the writing")
    arguments.output.write_text(to_json(report) + "\n", "utf-8")


if __name__ == "__main__":
    main()
