"""Training that pushes every checkpoint, to a hub that fails in all ways, against training that pushes nothing.

python benchmarks/hub_push.py --tokenizer_name runs/demo-tokenizer --output benchmarks/results/hub_push.json

Both sides train recipe/configs/pretrain/tiny.yaml for `--max_steps` updates, in turns. Compared are the losses, which
must be equal, and the updates/s while training; the hub is tests/hub_server.py, on the same machine.
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
from pathlib import Path

import harness

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.hub_server import Fault, HubServer, serve  # noqa: E402

FAULTS = {
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


def train(args: argparse.Namespace, folder: Path, url: str | None) -> tuple[list[float], float, str, float]:
    """Losses, updates/s by the median window, the log, and seconds from start to end of the process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB")}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_write", "no_proxy": "*"}
    flags = ["--config", "recipe/configs/pretrain/tiny.yaml", f"--output_dir={folder / 'run'}"]
    flags += [f"--tokenizer_name={args.tokenizer_name}", f"--max_steps={args.max_steps}", "--warmup_steps=10"]
    flags += [f"--save_steps={args.save_steps}", "--eval_steps=100000", "--eval_blocks=0", "--logging_steps=5"]
    flags += ["--expected_loss=null", "--token_store_dir", str(args.stores)]
    if url is not None:
        environment["HF_ENDPOINT"] = url
        flags += ["--push_to_hub=true", "--hub_model_id=ann/run", "--hub_strategy=checkpoint"]
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "pretrain.py", *flags], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if result.returncode:
        sys.exit(result.stdout + result.stderr)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rate = 1 / statistics.median(line["seconds_per_update"] for line in lines)
    return [line["loss"] for line in lines], rate, result.stdout, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer_name", required=True)
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--save_steps", type=int, default=50)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--rounds", type=int, default=1, help="with each fault")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    args.stores = folder / "stores"
    rows, expected = {}, None
    for name in args.faults:
        ratios = []
        for number in range(args.rounds):
            losses, alone, _, _ = train(args, folder / f"{name}-{number}-alone", None)
            expected = expected or losses
            with serve(folder / "nothing") as server:
                server.faults = [Fault(**vars(fault)) for fault in FAULTS[name]]
                if name == "revoked":
                    threading.Thread(target=revoke_later, args=[server], daemon=True).start()
                url = "http://127.0.0.1:9" if name == "down" else server.url
                losses_too, pushing, log, seconds = train(args, folder / f"{name}-{number}", url)
                repo = server.repos.get("ann/run")
                pushed = sorted(repo.tags) if repo else []
            waiting = sorted(path.name for path in (folder / f"{name}-{number}" / "run" / "hub").glob("step-*"))
            named = [step for step in waiting if step in log.rpartition("not on the hub yet")[2]]
            ratios.append(pushing / alone)
            print(
                f"{name}: {pushing:.2f} updates/s against {alone:.2f}, {pushing / alone:.3f}; {len(pushed)} pushed",
                flush=True,
            )
            if losses != expected or losses_too != expected:
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
            args.output.write_text(harness.to_json(harness.header([]) | {"max_steps": args.max_steps, "faults": rows}))


if __name__ == "__main__":
    main()
