"""The hardware and software of a run: devices, their speed and memory, versions, commit."""

import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "sentencex", "numpy")
SERIES_SECONDS, NUM_SERIES = 0.1, 3  # of matrix products


def output_of(*command: str) -> str:
    """Run a command in the folder of this code; what it prints is empty where there is no such command."""
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", check=False
        ).stdout
    except OSError:
        return ""


def git_commit() -> str | None:
    """Find the commit of this code, `-dirty` if files differ from it; None outside a git checkout or without git."""
    return output_of("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip() or None


def power_limit() -> float | None:
    """Ask the driver how many watts the first GPU's board may draw; None if there is no answer."""
    printed = output_of("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits")
    watts = re.match(r"\d+(\.\d+)?", printed)
    return float(watts[0]) if watts else None


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Describe what a run runs in: engine, precision, world size, device, versions and commit."""
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
    """Name the device; results of benchmarks are kept and found again under this name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def matmul_flops(device: torch.device, precision: str) -> float:
    """Measure the FLOP/s that large matrix products sustain in accelerate's `precision`, which count as 100 % MFU.

    As in training, the numbers are random (a GPU's power limit lets products of ones run 17 % faster, seen on an H200),
    many products follow each other without a wait, and a GPU has worked for a while before. The best of some series
    counts, since other processes may take a part of a CPU; all of it takes some tenths of a second. float32 products
    run as they do in training, on TF32 units too if torch is set to use them.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 1024 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)  # one of its own, so that training draws what it would
    a, b = torch.randn(2, size, size, dtype=dtype, device=device, generator=generator)
    out = torch.empty_like(a)

    def measure(products: int) -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b, out=out)
        synchronize(device)
        return time.perf_counter() - started

    measure(1)  # libraries are loaded
    products = math.ceil(SERIES_SECONDS / measure(1))
    if device.type == "cuda":
        measure(3 * products)
    best = min(measure(products) for _ in range(NUM_SERIES))
    return 2 * size**3 * products / best


def peak_memory(device: torch.device) -> int:
    """Return the bytes that this process had in use at its peak, on the device if it has memory of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
