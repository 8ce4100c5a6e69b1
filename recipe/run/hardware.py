"""What a run runs on and with."""

import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "sentencex", "numpy")


def git_commit() -> str | None:
    """The commit of this code, `-dirty` if files differ from it; None outside a git checkout or without git."""
    if shutil.which("git") is None:
        return None
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None


def power_limit() -> float | None:
    """Watts that a GPU's board may draw, of the first; None without nvidia-smi or where it does not know."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    watts = re.match(r"\d+(\.\d+)?", result.stdout)
    return float(watts[0]) if watts else None


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What a run runs on and with: engine, precision, processes, device, versions, commit."""
    device = accelerator.device
    return {
        "distributed_type": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "power_limit_watts": power_limit() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "git_commit": git_commit(),
    }


def device_name(device: torch.device) -> str:
    """What results are kept under and found again."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def matmul_flops(device: torch.device, precision: str) -> float:
    """FLOP/s that a large matrix product reaches here, in what accelerate calls the precision: what 100 % MFU is of.

    The best of several, which takes some tenths of a second. float32 products run as they do in training, on TF32 units
    too if torch was told to use them.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, dtype=dtype, device=device)
    b, out = torch.ones_like(a), torch.empty_like(a)
    best = math.inf
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has had in use at most, on the device if it has memory of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
