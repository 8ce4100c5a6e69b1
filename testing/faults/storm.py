"""Disturb runs of pretrain.py at random moments until they are complete, and compare them with an undisturbed run.

python -m testing.faults.storm --disturbances 100 --seed 0

The runs train tiny models on one process and on two, in turns, and push to a hub on this machine; many of them have
lost their standard output. While they start, train, evaluate, save or push, they are

- killed: a rank, all ranks, the launcher or a data worker get SIGKILL, SIGTERM or SIGHUP;
- started a second time in the same folder;
- stopped, with another start taking over before they go on;
- moved away, with their folder, and back once they have noticed;
- given a damaged token store, which they have to name.

Beside their checkpoints lie copies that nobody may touch, and in the corpus folder links that lead in circles. After
each of these no process may be left and every file of the run must be readable; then the run is resumed. In the end
every line of metrics.jsonl, with the digest of all blocks and masks, and every weight must be those of the undisturbed
run, bit for bit: two processes that wrote at once would leave a line twice.

(They can be: without dropout, two processes with a micro-batch each add the same two gradients as one process with both
micro-batches, and the factor of two that DDP divides by is exact. Held-out blocks make two micro-batches too.)
"""

import argparse
import json
import os
import random
import shutil
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

from recipe.data.trainers import save_tokenizer, train_byte_level_bpe
from recipe.run.checkpoint import find_checkpoint
from recipe.run.directory import checkpoint_path, read_config, read_records
from testing.hub_server import HubServer, serve

ROOT = Path(__file__).parents[2]
EVAL_STEPS, SAVE_STEPS = 7, 5
MOMENTS = ("starting", "training", "evaluating", "saving", "pushing")
UPLOADS = ("/preupload/", "PUT ", "/commit/", "/tag/")
KINDS = {"signal": 8, "second start": 1, "takeover": 1, "moved away": 1, "damaged store": 1}  # and how often
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
END_SECONDS = 600  # for which the end of a process is waited for
# Values that depend on the machine, and a mark of resumes.
TIMED = {"resumed_from", "seconds_to_first_update", "tokens_per_second", "mfu", "peak_memory", "data_wait_share"}
TIMED |= {"seconds_per_update", "train_seconds"}


def build_flags(folder: Path, max_steps: int) -> dict[str, Any]:
    """Build the flags of a small run; its text and tokenizer are made first."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ta", "ro", "mi", "lu") for b in ("n", "ber", "sti", "ka")]
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 200))).capitalize() + "." for _ in range(300)]
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    (corpus / "empty.jsonl").touch()
    (corpus / "again").symlink_to(corpus)
    (corpus / "same.jsonl").symlink_to("text.jsonl")
    trained = train_byte_level_bpe([texts], 300, 2, add_prefix_space=False, max_document_characters=10_000)
    save_tokenizer(trained, folder / "tokenizer", add_prefix_space=False, model_max_length=64)
    return {
        "corpora": json.dumps([{"name": "text", "path": str(corpus)}]),
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


def start(
    flags: dict[str, Any], processes: int, environment: dict[str, str], log: Path, output: str = "log"
) -> subprocess.Popen:
    """Start pretrain.py on the CPU, by torchrun if on several processes.

    Standard error goes to the log, and standard output too, to a full disk or to a closed pipe.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "pretrain.py"]
    with log.open("w", encoding="utf-8") as err, open("/dev/full", "w", encoding="utf-8") as full:
        process = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in flags.items())],
            cwd=ROOT,
            env=environment | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout={"log": err, "full": full, "closed": subprocess.PIPE}[output],
            stderr=err,
            start_new_session=True,
        )
    if process.stdout:
        process.stdout.close()
    return process


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """List the process and all below it, none if it has ended. (torchrun's ranks are sessions of their own.)"""
    with suppress(psutil.NoSuchProcess):
        if process.poll() is None:
            return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return []


def data_workers(rank: psutil.Process) -> list[psutil.Process]:
    """List the processes that read ahead for a rank, which it has forked; none if it has ended."""
    with suppress(psutil.NoSuchProcess):
        return [child for child in rank.children() if child.cmdline() == rank.cmdline()]
    return []


def is_rank(member: psutil.Process) -> bool:
    """Tell whether a process trains, and neither launches nor reads ahead nor pushes."""
    with suppress(psutil.NoSuchProcess):
        line, parent = member.cmdline(), member.parent()
        return (
            "pretrain.py" in line
            and "torch.distributed.run" not in line
            and (parent is None or parent.cmdline() != line)
        )
    return False


def kill(members: list[psutil.Process], number: signal.Signals = signal.SIGKILL) -> None:
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.send_signal(number)


class Storm:
    """Runs that are disturbed, one after the other, until there are enough disturbances.

    Attributes:
        done: numbers of disturbances by (kind or signal, target, moment).
        failures: descriptions of what should not have happened.
    """

    def __init__(self, folder: Path, seed: int, max_steps: int, hub: HubServer) -> None:
        self.folder, self.hub, self.log = folder, hub, folder / "log.txt"
        self.rng = random.Random(seed)
        self.flags = build_flags(folder, max_steps)
        self.done: Counter[tuple[str, str, str]] = Counter()
        self.runs = self.requests = 0  # requests to the hub before the last start
        self.failures: list[str] = []
        self.shown = 0  # of these
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
            raise RuntimeError(self.log.read_text("utf-8"))
        return run

    def start(self, run: Path, log: Path, processes: int | None = None) -> subprocess.Popen:
        """Start or resume a run, with its output in the log or lost."""
        flags = self.flags | {"output_dir": run, "push_to_hub": "true", "hub_model_id": f"ann/{run.name}"}
        flags |= {"license": "mit"}
        output = self.rng.choices(("log", "full", "closed"), weights=(2, 1, 1))[0]
        return start(flags, processes or self.rng.choice((1, 2)), self.environment, log, output)

    def strike(self, disturbances: int) -> None:
        """Disturb runs until there are enough disturbances, and let the last run end."""
        whole = self.undisturbed()
        while self.done.total() < disturbances:
            self.runs += 1
            run = self.folder / f"run-{self.runs}"
            copies = 0
            while not self.is_complete(run):
                before = self.done.total()
                kind = self.rng.choices(list(KINDS), weights=list(KINDS.values()))[0] if before < disturbances else ""
                if kind == "damaged store":
                    self.damage_store(run)
                self.requests = len(self.hub.requests)
                process = self.start(run, self.log)
                if kind == "signal":
                    self.send_signal(process, run)
                elif kind in ("second start", "takeover"):
                    self.start_again(process, run, takes_over=kind == "takeover")
                elif kind == "moved away":
                    self.move_away(process, run)
                failed = process.wait(END_SECONDS)
                self.check_readable(run)
                if self.done.total() == before and failed:
                    raise RuntimeError(self.log.read_text("utf-8"))
                for failure in self.failures[self.shown :]:
                    print(failure, flush=True)
                self.shown = len(self.failures)
                if self.done.total() > before:
                    print(f"{self.done.total():4}  {', '.join(self.last)}", flush=True)
                    copies += self.copy_checkpoint(run)
            self.compare(whole, run)
            if len(list((run / "checkpoints").glob("*-best"))) != copies:
                self.failures.append(f"{run.name}: a copy beside the checkpoints is gone")

    def record(self, kind: str, target: str, moment: str) -> None:
        """Count a disturbance."""
        self.last = kind, target, moment
        self.done[self.last] += 1

    def copy_checkpoint(self, run: Path) -> bool:
        """Put a copy of a checkpoint beside it, now and then; it is named as if it were a later one."""
        found = sorted((run / "checkpoints").glob("step-????????"))
        copy = run / "checkpoints" / "step-99999999-best"
        if not found or copy.exists():
            return False
        shutil.copytree(found[0], copy)
        return True

    def send_signal(self, process: subprocess.Popen, run: Path) -> None:
        """Kill a rank, all ranks, the launcher or a data worker at some moment."""
        chosen = self.rng.choices(MOMENTS, weights=(1, 3, 3, 3, 3))[0]
        self.wait_for(chosen, process, run)
        members = family(process)
        if not members:
            return  # the run was complete before
        ranks = [member for member in members if is_rank(member)] or members[:1]
        targets = {"all ranks": ranks, "one rank": [self.rng.choice(ranks)]}
        if members[0] not in ranks:
            targets["launcher"] = members[:1]
        if workers := [worker for rank in ranks for worker in data_workers(rank)]:
            targets["a worker"] = [self.rng.choice(workers)]
        target = self.rng.choice(list(targets))
        number = signal.SIGKILL if target == "a worker" else self.rng.choice(SIGNALS)
        moment = self.moment(run) if chosen != "starting" else chosen
        kill(targets[target], number)
        self.await_end(process, members, f"{number.name} to {target}")
        self.record(number.name, target, moment)
        if chosen != "starting":
            if target == "a worker":
                self.check_saved(run, "failed", "dataloader_num_workers", target)
            elif number != signal.SIGKILL:
                self.check_saved(run, "preempted", "", target)

    def start_again(self, process: subprocess.Popen, run: Path, takes_over: bool) -> None:
        """Start the run a second time while it trains; or while it is stopped and its lock has run out."""
        self.wait_for("training", process, run)
        members, log = family(process), self.folder / "second.txt"
        if not members:
            return
        if takes_over:
            kill(members, signal.SIGSTOP)
            (run / ".lock").unlink(missing_ok=True)
        begun = time.time()
        second = self.start(run, log)
        if takes_over:
            status = run / "status.json"
            while second.poll() is None and not (status.exists() and status.stat().st_mtime > begun):
                time.sleep(0.01)
            time.sleep(self.rng.uniform(0, 2))
            kill(members, signal.SIGCONT)
            self.await_end(process, members, "a takeover")
            if "is now in use by" not in (text := self.log.read_text("utf-8")) and process.returncode:
                self.failures.append(f"taken over, and ended with: {text[-1000:]}")
        # The second start is refused, or goes on once the first has ended.
        second.wait(END_SECONDS)
        text = log.read_text("utf-8")
        if second.returncode and "is in use by process" not in text:
            self.failures.append(f"a second start ended with: {text[-1000:]}")
        self.record("takeover" if takes_over else "second start", "all ranks", "training")

    def move_away(self, process: subprocess.Popen, run: Path) -> None:
        """Move the run's folder away until its processes have ended."""
        self.wait_for("training", process, run)
        if not (members := family(process)):
            return
        away = run.rename(run.with_name(f"{run.name}-away"))
        self.await_end(process, members, "a move of the folder")
        if process.returncode:
            self.record("moved away", "folder", "training")
        if run.exists():  # a checkpoint was being written or staged; nothing else is
            self.failures += [f"{path} made anew" for path in run.iterdir() if path.name not in ("checkpoints", "hub")]
            shutil.rmtree(run)
        away.rename(run)

    def damage_store(self, run: Path) -> None:
        """Damage a file of the token store, which a start has to name, and mend it again."""
        files = [file for file in (self.folder / "stores").rglob("*") if file.suffix in (".arrow", ".bin", ".json")]
        file = self.rng.choice([file for file in sorted(files) if file.stat().st_size])
        whole = file.read_bytes()
        at = self.rng.randrange(len(whole))
        flipped = bytes([whole[at] ^ 1 << self.rng.randrange(8)])
        file.write_bytes(self.rng.choice([whole[:at], whole[:at] + flipped + whole[at + 1 :], bytes(len(whole))]))
        process = self.start(run, self.log)
        failed = process.wait(END_SECONDS)
        file.write_bytes(whole)
        if not failed or str(file) not in self.log.read_text("utf-8"):
            self.failures.append(f"{file} was damaged at byte {at}: {self.log.read_text('utf-8')[-1000:]}")
        self.record("damaged store", file.suffix, "starting")

    def await_end(self, process: subprocess.Popen, members: list[psutil.Process], what: str) -> None:
        """Wait for the end of a start's processes; those that are left are a failure."""
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)  # before psutil does, which would keep the exit status to itself
        _, left = psutil.wait_procs(members, timeout=END_SECONDS)
        if left:
            self.failures.append(f"{len(left)} processes left after {what}")
            kill(left)

    def wait_for(self, moment: str, process: subprocess.Popen, run: Path) -> None:
        """Wait until the run is at that moment, or has ended."""
        if moment == "starting":
            time.sleep(self.rng.uniform(0, 6))
            return
        begun, metrics, status = time.time(), run / "metrics.jsonl", run / "status.json"
        requests, wait, least = self.requests, self.rng.uniform(0, 1), sys.maxsize
        while process.poll() is None:
            has_begun = status.exists() and status.stat().st_mtime > begun
            size = metrics.stat().st_size if metrics.exists() else 0
            least = min(least, size) if has_begun else sys.maxsize
            if size > least:  # this start has added a line to what it has kept of the file
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
            line = json.loads((run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
            if "loss" in line and not line["step"] % EVAL_STEPS:
                return "evaluating"
        return "pushing" if last and any(part in last[0] for part in UPLOADS[:3]) else "training"

    def check_saved(self, run: Path, state: str, reason: str, target: str) -> None:
        """Check that a run that was asked to stop, or whose worker is gone, has saved its last update."""
        status, log = json.loads((run / "status.json").read_text("utf-8")), self.log.read_text("utf-8")
        if status["state"] == "complete" or status["step"] == self.flags["max_steps"]:
            return
        is_saved = not status["step"] or checkpoint_path(run / "checkpoints", status["step"]).is_dir()
        if status["state"] != state or reason not in str(status["reason"]) or not is_saved:
            self.failures.append(f"{self.last}: {status}")
        elif 'pretrain.py", line' in log:  # of a traceback; torchrun has one of its own for a rank that fails
            self.failures.append(f"{self.last}: {log[log.index('Traceback') :][:2000]}")

    def check_readable(self, run: Path) -> None:
        """Check that everything the run has left can be read, and that its start found nothing damaged."""
        try:
            if (run / "status.json").exists():
                json.loads((run / "status.json").read_text("utf-8"))
                read_config(run)
            read_records(run / "metrics.jsonl")
            _, warnings = find_checkpoint(run / "checkpoints", "latest")
        except Exception as error:  # any error is a finding
            warnings = [f"{type(error).__name__}: {error}"]
        self.failures += warnings + [line for line in self.log.read_text("utf-8").splitlines() if "is damaged" in line]

    def is_complete(self, run: Path) -> bool:
        status = run / "status.json"
        return status.exists() and json.loads(status.read_text("utf-8"))["state"] == "complete"

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
        yield f"{'':15}{'to':11}" + "".join(f"{moment:>12}" for moment in MOMENTS)
        for kind, target in sorted({key[:2] for key in self.done}):
            counts = [self.done[kind, target, moment] for moment in MOMENTS]
            yield f"{kind:15}{target:11}" + "".join(f"{count:>12}" for count in counts)


@contextmanager
def brewing(seed: int, max_steps: int) -> Iterator[Storm]:
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder) / "nothing") as hub:
        yield Storm(Path(folder), seed, max_steps, hub)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disturbances", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=400, help="updates of each run")
    args = parser.parse_args()
    with brewing(args.seed, args.max_steps) as storm:
        storm.strike(args.disturbances)
        print(f"seed {args.seed}: {storm.done.total()} disturbances in {storm.runs} runs of {args.max_steps} updates")
        print("\n".join(storm.table()))
        print(
            "\n".join(storm.failures)
            or "every run ended as the undisturbed one, bit for bit; nothing unreadable, no second writer"
        )
        sys.exit(bool(storm.failures))


if __name__ == "__main__":
    main()
