"""Training that pushes every checkpoint, to a hub that fails in all ways, beside training that pushes nothing.

python benchmarks/hub_push.py --tokenizer_name runs/demo-tokenizer --output benchmarks/results/hub_push.json

Both sides train recipe/configs/pretrain/tiny.yaml for `--max_steps` updates at the same time, each on half of the
cores, which they exchange from round to round; what pushes shares the cores of the side that it pushes for. Compared
are the losses, which must be equal, and the updates/s over all of the training. `neither` pushes on no side: what is
left of the machine's noise. The hub is testing/hub_server.py, on the same machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import harness

from testing.hub_server import Fault, HubServer, serve

ROOT = Path(__file__).parent.parent

FAULTS = {
    "neither": [],
    "none": [],
    "500": [Fault(500, "POST .*/preupload/", times=3)],
    "429": [Fault(429, "POST .*/commit/", times=2)],
    "cut": [Fault("cut", "PUT /lfs/", times=3)],
    "hang": [Fault("hang", "PUT /lfs/", times=1)],
    "revoked": [],
    "down": [],
}


def revoke_later(server: HubServer) -> None:
    """The token is good until the first checkpoint is there."""
    while not any("/tag/" in request for request in server.requests):
        time.sleep(0.1)
    server.tokens.clear()


def start(
    args: argparse.Namespace, folder: Path, cores: set[int], url: str | None, *more: str
) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB")}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_write", "no_proxy": "*"}
    environment |= {"OMP_NUM_THREADS": str(len(cores))}
    flags = ["--config", "recipe/configs/pretrain/tiny.yaml", f"--output_dir={folder / 'run'}"]
    flags += [f"--tokenizer_name={args.tokenizer_name}", f"--max_steps={args.max_steps}", "--warmup_steps=10"]
    flags += [f"--save_steps={args.save_steps}", "--eval_steps=100000", "--eval_blocks=0", "--logging_steps=5"]
    flags += ["--expected_loss=null", "--token_store_dir", str(args.stores), *more]
    if url is not None:
        environment["HF_ENDPOINT"] = url
        flags += ["--push_to_hub=true", "--hub_model_id=ann/run", "--hub_strategy=checkpoint", "--license=mit"]
    folder.mkdir()
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "pretrain.py", *flags],
            env=environment,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(os.sched_setaffinity, 0, cores),
        )


def finish(process: subprocess.Popen[bytes], folder: Path) -> tuple[list[float], float, str]:
    """Losses, updates/s over all of the training, and the log."""
    process.wait()
    log = (folder / "log.txt").read_text("utf-8")
    if process.returncode:
        sys.exit(log)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line["loss"] for line in lines], 1 / statistics.mean(line["seconds_per_update"] for line in lines), log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer_name", required=True)
    parser.add_argument("--max_steps", type=int, default=450)
    parser.add_argument("--save_steps", type=int, default=150)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--rounds", type=int, default=2, help="with each fault")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    args.stores = folder / "stores"
    every = sorted(os.sched_getaffinity(0))
    halves = set(every[::2]), set(every[1::2])
    if not halves[1]:
        sys.exit("two sides need two cores, and there is one")
    if start(args, folder / "prepare", set(every), None, "--prepare_only=true").wait():
        sys.exit((folder / "prepare" / "log.txt").read_text("utf-8"))
    rows = {}
    for name in args.faults:
        ratios = []
        for number in range(args.rounds):
            beside, pushing = folder / f"{name}-{number}-beside", folder / f"{name}-{number}"
            ours, others = halves[number % 2], halves[1 - number % 2]
            with serve(folder / "nothing") as server:
                server.faults = [Fault(**vars(fault)) for fault in FAULTS[name]]
                if name == "revoked":
                    threading.Thread(target=revoke_later, args=[server], daemon=True).start()
                url = {"neither": None, "down": "http://127.0.0.1:9"}.get(name, server.url)
                started = time.perf_counter()
                sides = start(args, beside, others, None), start(args, pushing, ours, url)
                losses, alone, _ = finish(sides[0], beside)
                losses_too, rate, log = finish(sides[1], pushing)
                seconds = time.perf_counter() - started
                repo = server.repos.get("ann/run")
                pushed = sorted(repo.tags) if repo else []
            waiting = sorted(path.name for path in (pushing / "run" / "hub").glob("step-*"))
            named = [step for step in waiting if step in log.rpartition("not on the hub yet")[2]]
            ratios.append(round(rate / alone, 4))
            print(
                f"{name}: {rate:.2f} updates/s beside {alone:.2f}, {ratios[-1]:.3f}; {len(pushed)} pushed",
                flush=True,
            )
            if losses_too != losses:
                sys.exit(f"{name}: other losses")
            if named != waiting:
                sys.exit(f"{name}: {waiting} wait, {named} are named")
        rows[name] = {
            "updates_per_second_ratio": ratios,
            "pushed": pushed,
            "named": named,
            "seconds": round(seconds, 1),
        }
        if args.output:
            args.output.write_text(harness.to_json(harness.header([]) | {"faults": rows}), "utf-8")


if __name__ == "__main__":
    main()
