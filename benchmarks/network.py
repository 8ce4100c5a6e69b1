"""Bytes that an update sends from each process, counted on a loopback device of its own, against the arithmetic.

python benchmarks/network.py --output benchmarks/results/network.json

Two processes on gloo and the CPU, in a network namespace where nothing else sends anything. (Accelerate does not engage
FSDP on a CPU by itself, and torch refuses the bf16 hook there: both are engaged by hand.)
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from harness import header, to_json
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from transformers import RobertaConfig, RobertaForMaskedLM

from recipe.base.errors import run_script
from recipe.modeling.model import ROBERTA_DEFAULTS, count_parameters
from recipe.modeling.objectives import MaskedLMObjective
from recipe.modeling.optimizer import build_optimizer
from recipe.run.launch import set_up_fsdp, start_accelerator
from recipe.session import prepare
from recipe.training import train_step

SIZES = {"num_hidden_layers": 6, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
ENGINES = ("ddp", "ddp, bf16 gradients", "fsdp2", "fsdp2, bf16")
UPDATES = 4
ALONE = 'ip link set lo up && exec "$@"'


def bytes_sent() -> int:
    """Over loopback, by all processes of the namespace."""
    [line] = re.findall(r"lo:(.*)", Path("/proc/self/net/dev").read_text("utf-8"))
    return int(line.split()[8])


def as_on_gpus(state: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    return bf16_compress_hook(state, bucket)


def expected(engine: str, accumulation: int, parameters: int, in_layers: int, processes: int) -> float:
    """Bytes that each process sends in an update, by the ring: a sum over processes is scattered and gathered.

    Gloo does so for FSDP2's gradients too, of which a process needs its part alone; NCCL sends half as much for them.
    """
    share = (processes - 1) / processes
    if engine.startswith("ddp"):
        return 2 * share * parameters * (2 if "bf16" in engine else 4)
    weights = parameters + in_layers  # what is outside of the layers is gathered once, layers for each pass
    return share * (accumulation * weights * (2 if "bf16" in engine else 4) + 2 * parameters * 4)


def measure(engine: str, accumulation: int) -> dict[str, Any]:
    accelerator = start_accelerator()
    if engine.startswith("fsdp2"):
        shared = accelerator.state._shared_state
        shared |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": FullyShardedDataParallelPlugin()}
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # which it takes over again and again
        set_up_fsdp(accelerator)
    objective = MaskedLMObjective(RobertaForMaskedLM(RobertaConfig(**ROBERTA_DEFAULTS, **SIZES)), 0.15)
    parameters = count_parameters(objective)
    in_layers = count_parameters(objective.model.roberta.encoder)
    adamw = build_optimizer(objective, 1e-4, (0.9, 0.98), 1e-6, 0.01)
    objective, optimizer = prepare(accelerator, objective, adamw)
    if engine == "ddp, bf16 gradients":
        objective.register_comm_hook(None, as_on_gpus)
    ids = torch.randint(10, 1000, (1, 16))
    batch = {"input_ids": ids, "labels": ids.where(ids < 200, -100), "position_ids": torch.arange(2, 18)[None]}
    batch["labels"][0, 0] = 7

    def update() -> None:
        result = train_step(accelerator, objective, optimizer, [batch] * accumulation, [16], 0.0)
        assert result.isfinite().all()

    update()  # DDP makes its buckets anew after the first
    accelerator.wait_for_everyone()
    before = bytes_sent()
    for _ in range(UPDATES):
        update()
    accelerator.wait_for_everyone()
    sent = (bytes_sent() - before) / UPDATES / accelerator.num_processes
    arithmetic = expected(engine, accumulation, parameters, in_layers, accelerator.num_processes)
    return {
        "parameters": parameters,
        "megabytes_sent_by_each_process": sent / 1e6,
        "by_arithmetic": arithmetic / 1e6,
        "ratio": sent / arithmetic,
    }


def print_measured() -> None:
    """Measure in one of the processes that `main` has launched, of which the first prints."""
    measured = measure(*json.loads(os.environ["MEASURE"]))
    if os.environ["RANK"] == "0":
        print(json.dumps(measured))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    report = header([])
    for engine in ENGINES:
        for accumulation in (1, 4):
            environment = os.environ | {
                "ACCELERATE_USE_CPU": "true",
                "ACCELERATE_MIXED_PRECISION": "bf16" if engine == "fsdp2, bf16" else "no",
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "FSDP_VERSION": "2",
                "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
                "MEASURE": json.dumps([engine, accumulation]),
            }
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
            command = [
                "unshare",
                "--map-root-user",
                "--net",
                "sh",
                "-c",
                'ip link set lo up && exec "$@"',
                "_",
                *launch,
            ]
            result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, encoding="utf-8")
            name = f"{engine}, {accumulation} micro-batch{'es' if accumulation > 1 else ''}"
            report[name] = json.loads(result.stdout.splitlines()[-1])
            print(name, report[name])
    arguments.output.write_text(to_json(report) + "\n", "utf-8")


if __name__ == "__main__":
    run_script(print_measured if "MEASURE" in os.environ else main)
