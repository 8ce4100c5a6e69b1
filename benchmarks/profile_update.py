"""Where the time of an update goes: what takes longest by torch.profiler, and how long the GPU has nothing to do.

python benchmarks/profile_update.py --tokenizer runs/demo-tokenizer --corpora sample_data/novels.jsonl.gz --shape small

The options are those of throughput.py, and what is profiled is its side `ours`, after a warm-up.
"""

import argparse
import tempfile
import time
from pathlib import Path

import harness
from throughput import Bench, Side, parse
from torch.profiler import ProfilerActivity, profile

from recipe.run.hardware import device_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--rows", type=int, default=20, help="of the table")
    parser.add_argument("--output", type=Path)
    args = parse(parser)
    activities, by = [ProfilerActivity.CPU], "cpu"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        if bench.accelerator.device.type == "cuda":
            activities, by = [ProfilerActivity.CUDA], "device"
        update = bench.start(Side("ours", args.micro_batch, workers=args.workers, torch_compile=args.torch_compile))
        for _ in range(3):
            update()
        with profile(activities=activities) as profiler:
            started = time.perf_counter()
            for _ in range(args.updates):
                update()
            seconds = time.perf_counter() - started
        device = device_name(bench.accelerator.device)
    times = {entry.key: getattr(entry, f"self_{by}_time_total") / 1e6 for entry in profiler.key_averages()}
    longest = sorted(times.items(), key=lambda item: -item[1])[: args.rows]
    print(f"{device}: {args.updates} updates in {seconds:.2f} s, kernels and operators {sum(times.values()):.2f} s")
    for name, spent in longest:
        print(f"{spent / seconds:7.1%}  {name[:100]}")
    report = harness.header(args.corpora) | {"device": device, "updates": args.updates, "seconds": round(seconds, 3)}
    report["share of the time"] = {name: round(spent / seconds, 4) for name, spent in longest}
    if by == "device":
        report["idle share"] = round(1 - sum(times.values()) / seconds, 4)
        print(f"idle {report['idle share']:.1%}")
    if args.output:
        harness.keep(args.output, f"{args.shape}, {args.precision}", report)


if __name__ == "__main__":
    main()
