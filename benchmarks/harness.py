"""What the benchmarks share: fresh processes, scripts, versions, JSON."""

import datetime
import json
import multiprocessing
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from accelerate.state import AcceleratorState, GradientState

from recipe.run.hardware import LIBRARIES, git_commit

ROOT = Path(__file__).parent.parent


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


class RunError(Exception):
    """A script failed or was stopped; the other runs go on."""


class Scripts:
    """Scripts of the project that run as child processes and are stopped together.

    Args:
        threads: OpenMP threads of each, unless the environment says how many.
    """

    def __init__(self, threads: int) -> None:
        self.environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        self.children: list[subprocess.Popen] = []

    def call(self, command: list[str], log: Path) -> None:
        """
        Raises:
            RunError: the command failed.
        """
        with log.open("a", encoding="utf-8") as file:
            # A group of its own, which a launcher's children are in too: `stop` reaches all of them.
            child = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            self.children.append(child)
            code = child.wait()
        if code:
            lines = [line for line in log.read_text("utf-8").splitlines() if line.strip()]
            raise RunError(f"exit status {code}: {lines[-1] if lines else 'no output'} (see {log})")

    def stop(self) -> None:
        """Have what runs save and end."""
        for child in self.children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)

    def run_all(self, run: Callable[[str, int], float], runs: list[tuple[str, int]], jobs: int) -> int:
        """Make each run of a name and a seed, `jobs` at a time; `run` returns the seconds that it took.

        Returns:
            how many failed, by a `RunError`.
        """
        pool, failed = ThreadPoolExecutor(jobs), 0
        futures = {pool.submit(run, *named): named for named in runs}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                name, seed = futures[future]
                try:
                    line = f"complete after {future.result():,.0f} s"
                except RunError as error:
                    failed += 1
                    line = f"failed: {error}"
                print(f"[{number}/{len(runs)}] {name}, seed {seed}: {line}", flush=True)
        except BaseException:  # asked to stop
            pool.shutdown(wait=False, cancel_futures=True)
            self.stop()
            raise
        return failed


def is_complete(folder: Path) -> bool:
    """Whether the run in a folder has come to its end."""
    status = folder / "status.json"
    return status.exists() and json.loads(status.read_text("utf-8"))["state"] == "complete"


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
