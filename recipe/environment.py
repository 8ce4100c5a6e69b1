"""What a run runs on and with."""

import platform
import re
import shutil
import subprocess
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
