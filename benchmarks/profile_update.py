"""Where the time of an update goes, by torch.profiler: by group and kernel, and how long the GPU has nothing to do.

python benchmarks/profile_update.py --tokenizer runs/demo-tokenizer --corpora sample_data/novels.jsonl.gz --shape small

The options are those of throughput.py, and what is profiled is its side `ours`, after a warm-up. On a CPU operators
stand in for kernels.
"""

import argparse
import re
import tempfile
from collections import Counter
from pathlib import Path

import harness
from throughput import Bench, Side, parse
from torch.profiler import ProfilerActivity, profile

from recipe.base.errors import run_script
from recipe.run.hardware import device_name

# The groups of kernels, by what their names have in them; the first that fits counts.
GROUPS = {
    "copies": r"Memcpy|Memset|aten::(copy_|_to_copy|zero_|fill_)",
    "head, loss, optimizer, embeddings": r"softmax|nll_loss|embedding|[Oo]ptim|multi_tensor|adamw",
    "GELU": r"gelu",
    "attention": r"sdpa|flash|fmha|cudnn|attention|attend_in_sequences",
    "products": r"nvjet|gemm|cutlass|cublas|splitK|aten::(add|b)?mm$|mkldnn",
    "dropout, residual, norm": r"(for|back)ward_kernel|layer_norm|dropout",
}


def group_of(kernel: str) -> str:
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, kernel)), "the rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--rows", type=int, default=20, help="of the table of kernels")
    parser.add_argument("--output", type=Path)
    args = parse(parser)
    activities, by = [ProfilerActivity.CPU], "cpu"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        if bench.accelerator.device.type == "cuda":
            activities, by = [ProfilerActivity.CUDA], "device"
        train = bench.start(Side("ours", args.micro_batch, workers=args.workers, torch_compile=args.torch_compile))
        train(3)
        with profile(activities=activities) as profiler:
            seconds, tokens = train(args.updates)
        device = device_name(bench.accelerator.device)
    times = {entry.key: getattr(entry, f"self_{by}_time_total") / 1e6 for entry in profiler.key_averages()}
    groups: Counter[str] = Counter()
    for name, spent in times.items():
        groups[group_of(name)] += spent
    busy, per_micro_batch = sum(times.values()), 1e3 / (args.updates * args.accumulation)
    print(f"{device}: {args.updates} updates in {seconds:.2f} s, kernels and operators {busy:.2f} s")
    report = harness.header(args.corpora) | {"device": device, "updates": args.updates, "seconds": round(seconds, 3)}
    report |= {"micro_batch": args.micro_batch, "accumulation": args.accumulation, "dropout": args.dropout}
    report["tokens_per_second"] = round(tokens / seconds)
    report["ms a micro-batch"] = {}
    for group, spent in groups.most_common():
        report["ms a micro-batch"][group] = round(spent * per_micro_batch, 3)
        print(f"{spent / seconds:7.1%} {spent * per_micro_batch:10.2f} ms a micro-batch  {group}")
    if by == "device":
        report["idle share"] = round(1 - busy / seconds, 4)
        print(f"{report['idle share']:7.1%}  idle")
    report["share of the time"] = {}
    for name, spent in sorted(times.items(), key=lambda item: -item[1])[: args.rows]:
        report["share of the time"][name] = round(spent / seconds, 4)
        print(f"{spent / seconds:7.1%}  {name[:100]}")
    if args.output:
        harness.keep(args.output, f"{args.shape}, {args.precision}", report)


if __name__ == "__main__":
    run_script(main)
