"""What the benchmarks share: fresh processes, versions, JSON."""

import datetime
import json
import multiprocessing
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from accelerate.state import AcceleratorState, GradientState

from recipe.run.hardware import LIBRARIES, git_commit


def resolve(paths: list[str]) -> list[str]:
    """Absolute where there is such a file or folder; hub ids stay."""
    return [str(Path(path).resolve()) if Path(path).exists() else path for path in paths]


def header(corpora: list[str]) -> dict[str, Any]:
    """What a result was measured with; the command without the folders of absolute paths, which are the machine's."""
    arguments = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]),
        "date": str(datetime.date.today()),
        "commit": git_commit(),
        "corpora": [Path(path).name for path in corpora],
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }


def resident_megabytes() -> float:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak_resident_megabytes() -> float:
    """Of this process so far. (`getrusage` would give a child its parent's peak.)"""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text("utf-8"))[1]) * 1024 / 1e6


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def to_json(values: dict[str, Any]) -> str:
    """Indented, with lists of numbers on one line."""
    lines = json.dumps(values, indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), lines)


def keep(path: Path, name: str, report: dict[str, Any]) -> None:
    """Put a report into a file of several, in place of an earlier one of that name and, if it has one, GPU."""
    if not report.get("device", "CPU").startswith("CPU"):
        name = f"{name}, {report['device']}"
    reports = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(reports | {name: report}) + "\n", "utf-8")


def reset_accelerate() -> None:
    """Have the next `Accelerator` of this process choose its precision anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
