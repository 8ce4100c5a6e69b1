"""Kill runs of pretrain.py at random moments until they are complete, and compare them with an undisturbed run.

python -m testing.faults.storm --kills 100 --seed 0

The runs train tiny models on one process and on two, in turns, and push to a hub on this machine. A rank, all ranks or
the launcher get SIGKILL or SIGTERM: while starting, training, evaluating, saving or pushing. Afterwards no process may
be left and every file of the run must be readable; then the run is resumed. In the end every line of metrics.jsonl,
with the digest of all blocks and masks, and every weight must be those of the undisturbed run, bit for bit.

(They can be: without dropout, two processes with a micro-batch each add the same two gradients as one process with both
micro-batches, and the factor of two that DDP divides by is exact. Held-out blocks make two micro-batches too.)
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from recipe.data.tokenizer import save_tokenizer, train_byte_level_bpe
from recipe.run.checkpoint import find_checkpoint
from recipe.run.directory import checkpoint_path, read_config, read_records
from testing.hub_server import HubServer, serve

ROOT = Path(__file__).parents[2]
EVAL_STEPS, SAVE_STEPS = 7, 5
MOMENTS = ("starting", "training", "evaluating", "saving", "pushing")
UPLOADS = ("/preupload/", "PUT ", "/commit/", "/tag/")
# Values that depend on the machine.
TIMED = {"tokens_per_second", "mfu", "peak_memory", "data_wait_share", "seconds_per_update"}


def build_flags(folder: Path, max_steps: int) -> dict[str, Any]:
    """Build the flags of a small run; its text and tokenizer are made first."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ta", "ro", "mi", "lu") for b in ("n", "ber", "sti", "ka")]
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 200))).capitalize() + "." for _ in range(300)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    trained = train_byte_level_bpe([texts], 300, 2, add_prefix_space=False, max_document_characters=10_000)
    save_tokenizer(trained, folder / "tokenizer", add_prefix_space=False, model_max_length=64)
    return {
        "corpora": json.dumps([{"name": "text", "path": str(folder / "text.jsonl")}]),
        "tokenizer_name": folder / "tokenizer",
        "token_store_dir": folder / "stores",
        "model_config": '{"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, '
        '"intermediate_size": 32, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}',
        "max_seq_length": 32,
        "train_batch_size": 8,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 32,
        "eval_blocks": 64,
        "max_steps": max_steps,
        "warmup_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "eval_steps": EVAL_STEPS,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "resume_from_checkpoint": "latest",
    }


def start(flags: dict[str, Any], processes: int, environment: dict[str, str], log: Path) -> subprocess.Popen:
    """Start pretrain.py on the CPU, by torchrun if on several processes, with its output in a file."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "pretrain.py"]
    with log.open("w") as out:
        return subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in flags.items())],
            cwd=ROOT,
            env=environment | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """List the process and all below it, none if it has ended. (torchrun's ranks are sessions of their own.)"""
    with suppress(psutil.NoSuchProcess):
        if process.poll() is None:
            return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return []


def kill(members: list[psutil.Process], number: signal.Signals = signal.SIGKILL) -> None:
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.send_signal(number)


class Storm:
    """Runs that are killed, one after the other, until there are enough kills.

    Attributes:
        killed: numbers of kills by (signal, target, moment).
        failures: descriptions of what should not have happened.
    """

    def __init__(self, folder: Path, seed: int, max_steps: int, hub: HubServer) -> None:
        self.folder, self.hub, self.log = folder, hub, folder / "log.txt"
        self.rng = random.Random(seed)
        self.flags = build_flags(folder, max_steps)
        self.killed: Counter[tuple[str, str, str]] = Counter()
        self.runs = self.requests = 0  # requests to the hub before the last start
        self.failures: list[str] = []
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB")} | {
            "HF_HOME": str(folder / "home"),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_write",
            "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "*",
        }

    def undisturbed(self) -> Path:
        run = self.folder / "undisturbed"
        if start(self.flags | {"output_dir": run}, 1, self.environment, self.log).wait():
            raise RuntimeError(self.log.read_text())
        return run

    def strike(self, kills: int) -> None:
        """Kill runs until there are enough kills, and let the last run end."""
        whole = self.undisturbed()
        while self.killed.total() < kills:
            self.runs += 1
            run = self.folder / f"run-{self.runs}"
            flags = self.flags | {"output_dir": run, "push_to_hub": "true", "hub_model_id": f"ann/run-{self.runs}"}
            while not self.is_complete(run):
                processes, self.requests = self.rng.choice((1, 2)), len(self.hub.requests)
                process = start(flags, processes, self.environment, self.log)
                before = self.killed.total()
                if before < kills:
                    self.kill_some_time(process, processes, run)
                failed = process.wait()
                self.check_readable(run)
                if self.killed.total() == before and failed:
                    raise RuntimeError(self.log.read_text())
            self.compare(whole, run)

    def kill_some_time(self, process: subprocess.Popen, processes: int, run: Path) -> None:
        chosen = self.rng.choices(MOMENTS, weights=(1, 3, 3, 3, 3))[0]
        self.wait_for(chosen, process, run)
        members = family(process)
        if not members:
            return  # the run was complete before
        targets = {"all ranks": members[:1]}
        if processes > 1:
            with suppress(psutil.NoSuchProcess):
                ranks = members[0].children()
                targets = {"launcher": members[:1]}
                if ranks:
                    targets |= {"one rank": [self.rng.choice(ranks)], "all ranks": ranks}
        target = self.rng.choice(list(targets))
        number = self.rng.choice((signal.SIGKILL, signal.SIGTERM))
        moment = self.moment(run) if chosen != "starting" else chosen
        kill(targets[target], number)
        _, left = psutil.wait_procs(members, timeout=600)
        if left:
            self.failures.append(f"{len(left)} processes left after {number.name} to {target}")
            kill(left)
        self.killed[number.name, target, moment] += 1
        if number == signal.SIGTERM and chosen != "starting":
            self.check_preempted(run, target)
        print(f"{self.killed.total():4}  {number.name} to {target}, {moment}", flush=True)

    def wait_for(self, moment: str, process: subprocess.Popen, run: Path) -> None:
        """Wait until the run is at that moment, or has ended."""
        if moment == "starting":
            time.sleep(self.rng.uniform(0, 6))
            return
        begun, metrics, status = time.time(), run / "metrics.jsonl", run / "status.json"
        requests, wait = self.requests, self.rng.uniform(0, 1)
        while process.poll() is None:
            written = [file.stat().st_mtime if file.exists() else 0 for file in (metrics, status)]
            if written[0] > written[1] > begun:  # there is a line after the status that a start writes first
                if wait > 0:  # so that it is not always the first such moment
                    time.sleep(wait)
                    wait = 0
                pushing = any(part in request for request in self.hub.requests[requests:] for part in UPLOADS)
                if moment in ("training", self.moment(run)) or (moment == "pushing" and pushing):
                    return
                requests = len(self.hub.requests)
            time.sleep(0.002)

    def moment(self, run: Path) -> str:
        """Tell what the run is doing, as far as it can be seen from outside."""
        last = self.hub.requests[self.requests :][-1:]
        if list((run / "checkpoints").glob(".step-*")):
            return "saving"
        with suppress(OSError, ValueError, IndexError):
            line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
            if "loss" in line and not line["step"] % EVAL_STEPS:
                return "evaluating"
        return "pushing" if last and any(part in last[0] for part in UPLOADS[:3]) else "training"

    def check_preempted(self, run: Path, target: str) -> None:
        """Check that a run that was asked to stop has saved, or was complete."""
        status = json.loads((run / "status.json").read_text())
        if status["state"] != "complete" and status["step"] < self.flags["max_steps"]:
            if status["state"] != "preempted" or not checkpoint_path(run / "checkpoints", status["step"]).is_dir():
                self.failures.append(f"SIGTERM to {target}: {status}")
            elif target != "launcher" and "Traceback" in (
                log := self.log.read_text()
            ):  # the launcher's own is torchrun's
                self.failures.append(f"SIGTERM to {target}: {log[log.index('Traceback') :][:1000]}")

    def check_readable(self, run: Path) -> None:
        """Check that everything the run has left can be read, and that its start found nothing damaged."""
        try:
            if (run / "status.json").exists():
                json.loads((run / "status.json").read_text())
                read_config(run)
            read_records(run / "metrics.jsonl")
            _, warnings = find_checkpoint(run / "checkpoints", "latest")
        except Exception as error:  # any error is a finding
            warnings = [f"{type(error).__name__}: {error}"]
        self.failures += warnings + [line for line in self.log.read_text().splitlines() if "is damaged" in line]

    def is_complete(self, run: Path) -> bool:
        status = run / "status.json"
        return status.exists() and json.loads(status.read_text())["state"] == "complete"

    def compare(self, whole: Path, run: Path) -> None:
        lines, others = (read_records(path / "metrics.jsonl") for path in (whole, run))
        for line in lines + others:
            for name in TIMED:
                line.pop(name, None)
        if len(lines) != len(others):
            self.failures.append(f"{run.name}: {len(others)} lines of metrics.jsonl in place of {len(lines)}")
        for line, other in zip(lines, others, strict=False):
            if names := [name for name in line.keys() | other.keys() if line.get(name) != other.get(name)]:
                shown = "; ".join(f"{name} {line.get(name)}, {other.get(name)}" for name in names)
                self.failures.append(f"{run.name}, update {line['step']}: {shown}")
                break
        one, two = (load_file(path / "model" / "model.safetensors") for path in (whole, run))
        if one.keys() != two.keys() or not all(torch.equal(one[name], two[name]) for name in one):
            self.failures.append(f"{run}: other weights")

    def table(self) -> Iterator[str]:
        yield f"{'signal':9}{'to':11}" + "".join(f"{moment:>12}" for moment in MOMENTS)
        for number in ("SIGKILL", "SIGTERM"):
            for target in ("one rank", "all ranks", "launcher"):
                counts = [self.killed[number, target, moment] for moment in MOMENTS]
                yield f"{number:9}{target:11}" + "".join(f"{count:>12}" for count in counts)


@contextmanager
def brewing(seed: int, max_steps: int) -> Iterator[Storm]:
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder) / "nothing") as hub:
        yield Storm(Path(folder), seed, max_steps, hub)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=400, help="updates of each run")
    args = parser.parse_args()
    with brewing(args.seed, args.max_steps) as storm:
        storm.strike(args.kills)
        print(f"seed {args.seed}: {storm.killed.total()} kills in {storm.runs} runs of {args.max_steps} updates")
        print("\n".join(storm.table()))
        print("\n".join(storm.failures) or "every run ended as the undisturbed one, bit for bit; nothing unreadable")
        sys.exit(bool(storm.failures))


if __name__ == "__main__":
    main()
