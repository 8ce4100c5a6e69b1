"""What phases, pre-norm, schedules and averaging give a small budget: a deep narrow model trained with each.

python benchmarks/budgets.py --data corpora --jobs 2

1. `benchmarks/budgets.yaml` holds what all runs have in common, the paper's flat setting, and the arms, each with only
   what tells it apart.
2. Each run is `timed_pretrain.py`, on one thread, after `train_tokenizer.py`. All arms train on as many tokens.
3. At other learning rates some arms run once, to show that theirs was chosen.
4. An arm whose tokens take another time than those of `flat` is run once more, with all steps scaled so that it takes
   the same: CPU seconds of training, by the medians over seeds.
5. `recipe.average` makes the means of checkpoints that the setting names.
6. A table, a JSON file and a plot of the runs that are complete. The same command goes on with those that are not;
   where one has been stopped, it begins anew.
"""

import argparse
import itertools
import json
import math
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import harness
import torch
import yaml
from ablation_report import rows_of, spread
from ablations import Options, write_config
from matplotlib.figure import Figure

from recipe.arguments import PretrainArguments, TokenizerArguments
from recipe.base.errors import UserError, did_you_mean, require, run_script
from recipe.base.formatting import format_count
from recipe.run.directory import AVERAGE_FILE, average_path
from recipe.run.hardware import device_name
from recipe.run.plots import COLOURS, LINE_STYLES

SETTING = Path(__file__).with_suffix(".yaml")
FLAT = "flat"  # the arm that the others are compared with
MARGIN = 0.3  # nats under the unigram model's loss where a run counts as off the plateau
SAME_TIME = 0.05  # part by which an arm's time may differ from that of `flat` without a run of its own
END_DIGITS = {"eval_loss": 3, "cpu_seconds": 0}
AXES = ("step", "tokens", "cpu_seconds")  # of a curve, beside `eval_loss`


class Experiment:
    """Runs of the arms, in one folder.

    Args:
        folder: of the runs.
        setting: a YAML file, as `budgets.yaml`.
        data: what stands for `{data}` in it, the folder with the folders of the corpora.
    """

    def __init__(self, folder: Path, setting: Path, data: str) -> None:
        require(Path(data).is_dir(), "--data", data, "name the folder that holds the folders of the corpora")
        self.folder, self.setting = folder.resolve(), setting
        given = yaml.safe_load(setting.read_text("utf-8").replace("{data}", str(Path(data).resolve())))
        self.tokenizer, self.common, self.arms = given["tokenizer"], given["run"], given["arms"]
        self.averages = given.get("averages", {})
        self.sweep = {
            f"{arm}, rate {rate}": self.arms[arm] | {"learning_rate": rate}
            for arm, rates in given.get("rates", {}).items()
            for rate in rates
        }
        self.scripts = harness.Scripts(threads=1)

    def run_folder(self, arm: str, seed: int, budget: str) -> Path:
        """Folder of a run with its config and log; `budget` is `tokens` or `time`."""
        return self.folder / arm / f"equal-{budget}-seed-{seed}"

    def plan(self, arm: str, seed: int, budget: str = "tokens", factor: float = 1.0) -> None:
        """Write the config of a run, all of its steps times `factor`.

        Raises:
            UserError: it makes no sense, or the run has begun with another.
        """
        folder = self.run_folder(arm, seed, budget)
        options = scale_steps(self.common | (self.arms | self.sweep)[arm], factor)
        options |= {f"model_config.{name}": value for name, value in options.pop("model_config").items()}
        options |= {
            "output_dir": str(folder / "pretrain"),
            "tokenizer_name": str(self.folder / "tokenizer"),
            "token_store_dir": str(self.folder / "token_stores"),
            "seed": seed,
        }
        write_config(PretrainArguments, folder / "pretrain.yaml", options)

    def train_tokenizer(self) -> None:
        folder = self.folder / "tokenizer"
        if not (folder / "tokenizer.json").exists():
            options = self.tokenizer | {"output_dir": str(folder), "corpora": self.common["corpora"]}
            write_config(TokenizerArguments, folder.with_suffix(".yaml"), options)
            config = str(folder.with_suffix(".yaml"))
            self.scripts.call([sys.executable, "train_tokenizer.py", "--config", config], folder.with_suffix(".log"))

    def run(self, arm: str, seed: int, budget: str = "tokens") -> float:
        """Train, unless that is done.

        Returns:
            seconds that it took.

        Raises:
            RunError: training failed or was stopped.
        """
        folder, started = self.run_folder(arm, seed, budget), time.perf_counter()
        if not harness.is_complete(folder / "pretrain"):
            shutil.rmtree(folder / "pretrain", ignore_errors=True)  # stopped, with its CPU seconds lost
            command = [sys.executable, "benchmarks/timed_pretrain.py", "--config", str(folder / "pretrain.yaml")]
            self.scripts.call(command, folder / "pretrain.log")
        if not harness.is_complete(folder / "pretrain"):
            raise harness.RunError("it was stopped")
        return time.perf_counter() - started

    def run_at_equal_time(self, arm: str, seed: int) -> float:
        return self.run(arm, seed, "time")

    def average(self, name: str, seed: int) -> float:
        """Average checkpoints of a run, unless that is done; returned and raised is what `run` does."""
        started, folder, steps = time.perf_counter(), *self.averaged(name, seed)
        if not average_path(folder, steps).exists():
            command = [sys.executable, "-m", "recipe.average", str(folder), "--steps", ",".join(map(str, steps))]
            self.scripts.call(command, folder.with_name("average.log"))
        return time.perf_counter() - started

    def averaged(self, name: str, seed: int) -> tuple[Path, list[int]]:
        """Folder of the run, and updates of the checkpoints, that a mean is of."""
        arm, shares = self.averages[name]["arm"], self.averages[name]["shares"]
        max_steps = (self.common | self.arms[arm])["max_steps"]
        return self.run_folder(arm, seed, "tokens") / "pretrain", [round(share * max_steps) for share in shares]

    def measure_averages(self, name: str, seeds: int) -> list[dict[str, Any]]:
        """Held-out losses of the means that there are: `mean`, of the `last` of its checkpoints, at the run's `end`."""
        measured = []
        for seed in range(1, seeds + 1):
            folder, steps = self.averaged(name, seed)
            if (file := average_path(folder, steps) / AVERAGE_FILE).exists():
                average = json.loads(file.read_text("utf-8"))
                losses = {"mean": average["evaluation"]["eval_loss"], "last": average["last_evaluation"]["eval_loss"]}
                measured.append({"seed": seed, **losses, "end": measure_run(folder)["end"]["eval_loss"]})
        return measured

    def plan_equal_times(self, seeds: int) -> list[tuple[str, int]]:
        """Plan a run of each seed for each arm that takes another time than `flat`, unless it is planned already.

        Returns:
            arm and seed of each.
        """
        measured = {arm: self.measure(arm, seeds) for arm in self.arms}
        seconds = {
            arm: statistics.median(run["end"]["cpu_seconds"] for run in runs) for arm, runs in measured.items() if runs
        }
        planned = []
        for seed, (arm, spent) in itertools.product(range(1, seeds + 1), seconds.items()):
            factor = seconds[FLAT] / spent if FLAT in seconds else 1.0
            if abs(factor - 1) > SAME_TIME:
                planned.append((arm, seed))
                if not (self.run_folder(arm, seed, "time") / "pretrain.yaml").exists():
                    self.plan(arm, seed, "time", factor)
        return planned

    def measure(self, arm: str, seeds: int, budget: str = "tokens") -> list[dict[str, Any]]:
        """What the complete runs of an arm came to, see `measure_run`, each with its `seed`."""
        folders = {seed: self.run_folder(arm, seed, budget) / "pretrain" for seed in range(1, seeds + 1)}
        return [{"seed": seed} | measure_run(folder) for seed, folder in folders.items() if harness.is_complete(folder)]


def scale_steps(options: Options, factor: float) -> Options:
    """Multiply the numbers of updates; shares of the run, below 1, stay as they are."""
    return {
        name: round(value * factor) if name.endswith("_steps") and value >= 1 else value
        for name, value in options.items()
    }


def measure_run(folder: Path) -> dict[str, Any]:
    """What a complete run came to.

    Returns:
        `unigram_loss`; `curve`, by name of the axis and `eval_loss` a list with a value for each evaluation; `crossing`
        on each axis, interpolated, where the loss is `MARGIN` under the unigram model's for the first time, or None;
        `end` of the curve.
    """
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "eval_loss" in record]
    unigram_loss = records[0]["unigram_loss"]
    curve = {name: [record[name] for record in records] for name in (*AXES, "eval_loss")}
    return {
        "unigram_loss": unigram_loss,
        "crossing": find_crossing(curve, unigram_loss - MARGIN),
        "end": {name: values[-1] for name, values in curve.items()},
        "curve": curve | {"eval_loss": [round(loss, 4) for loss in curve["eval_loss"]]},
    }


def find_crossing(curve: dict[str, list[float]], threshold: float) -> dict[str, float] | None:
    """Return where a curve, see `measure_run`, first reaches a loss, by axis; None if it does not."""
    losses = curve["eval_loss"]
    after = next((number for number, loss in enumerate(losses) if loss <= threshold), None)
    if not after:  # at the very start nothing is learnt yet
        return None
    part = (losses[after - 1] - threshold) / (losses[after - 1] - losses[after])
    return {name: curve[name][after - 1] + part * (curve[name][after] - curve[name][after - 1]) for name in AXES}


class Report:
    """Table and plot of the arms.

    Args:
        tokens, times: of each arm what its runs at equal tokens and at equal time came to, see `measure_run`; of an
            arm that takes as long as `flat`, the latter are the former.
        averages: by name what means of checkpoints came to, see `Experiment.measure_averages`.
        sweep: of arms at other rates, as `tokens`.
    """

    def __init__(
        self,
        tokens: dict[str, list[dict[str, Any]]],
        times: dict[str, list[dict[str, Any]]],
        averages: dict[str, list[dict[str, Any]]],
        sweep: dict[str, list[dict[str, Any]]],
    ) -> None:
        self.tokens = {arm: runs for arm, runs in tokens.items() if runs}
        self.times = times
        self.averages = {name: means for name, means in averages.items() if means}
        self.sweep = {arm: runs for arm, runs in sweep.items() if runs}

    def crossings(self, arm: str, axis: str) -> str:
        """Median and range of where the runs have left the plateau, and how many have not."""
        values = sorted(run["crossing"][axis] if run["crossing"] else math.inf for run in self.tokens[arm])
        median, reached = statistics.median_low(values), [show(value) for value in values if value < math.inf]
        missing = f"{len(values) - len(reached)} of {len(values)}"
        if median == math.inf:
            return f"not reached by {missing}" if reached else "not reached"
        span = f" ({reached[0]} to {reached[-1]})" if len(reached) > 1 else ""
        return f"{show(median)}{span}" + (f", not reached by {missing}" if len(reached) < len(values) else "")

    def to_markdown(self, head: str) -> str:
        head_line = ["", "runs", "updates until off the plateau", "tokens", "CPU seconds"]
        lines = [[*head_line, "loss at equal tokens", "CPU seconds", "loss at equal time", "tokens"]]
        for arm, runs in self.tokens.items():
            ends, timed = [run["end"] for run in runs], [run["end"] for run in self.times[arm]]
            at_tokens = [spread([end[name] for end in ends], digits) for name, digits in END_DIGITS.items()]
            at_time = [spread([end["eval_loss"] for end in timed], 3)]
            at_time.append(format_count(statistics.median(end["tokens"] for end in timed)))
            lines.append([arm, str(len(runs)), *(self.crossings(arm, axis) for axis in AXES), *at_tokens, *at_time])
        columns = ("mean", "last", "end")
        means = [["mean of checkpoints", "runs", "loss of the mean", "of its last checkpoint", "at the end of the run"]]
        for name, measured in self.averages.items():
            losses = [spread([mean[column] for mean in measured], 3) for column in columns]
            means.append([name, str(len(measured)), *losses])
        rates = [["other rates", "loss at equal tokens"]]
        rates += [[arm, spread([run["end"]["eval_loss"] for run in runs], 3)] for arm, runs in self.sweep.items()]
        unigram = spread([run["unigram_loss"] for runs in self.tokens.values() for run in runs], 3)
        notes = [
            "Losses are held out, in nats. Medians over runs with a seed each, and their range. A run is off the "
            f"plateau where its loss is {MARGIN} nats under that of a unigram model on the same tokens, {unigram}; "
            "found on a straight line between two evaluations, in the runs at equal tokens.",
            "CPU seconds are of training alone, without evaluations, on one thread; other work ran beside it, which "
            "makes them longer by some percent.",
        ]
        tables = ["\n".join(rows_of(table)) for table in (lines, means, rates) if len(table) > 1]
        return "\n\n".join([head, *tables, "\n".join(notes)]) + "\n"

    def plot(self, path: Path) -> None:
        """Held-out loss over tokens and over CPU seconds, a line for each run."""
        figure = Figure(figsize=(13, 5.5), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        sides = [(self.tokens, "tokens", "tokens, as many in all runs"), (self.times, "cpu_seconds", "CPU seconds")]
        for axes, (arms, axis, label) in zip(panels, sides, strict=True):
            styles = itertools.cycle(itertools.product(LINE_STYLES[:2], COLOURS))
            for (arm, runs), (style, colour) in zip(arms.items(), styles, strict=False):
                for number, run in enumerate(runs):
                    name = None if number else arm
                    curve = run["curve"]
                    axes.plot(curve[axis], curve["eval_loss"], style, color=colour, linewidth=1, alpha=0.8, label=name)
            unigram = statistics.mean(run["unigram_loss"] for runs in arms.values() for run in runs)
            axes.axhline(unigram, color="grey", linestyle=":", label="unigram model")
            axes.axhline(unigram - MARGIN, color="grey", linewidth=0.8, label=f"{MARGIN} nats under it")
            axes.xaxis.set_major_formatter(lambda value, _: show(value))
            axes.set(xlabel=label, ylim=(None, unigram + MARGIN))
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("held-out loss (nats a token)")
        panels[0].legend(fontsize=8)
        figure.savefig(path, dpi=110)


def show(value: float) -> str:
    """A number of updates, tokens or seconds."""
    return format_count(value) if value >= 10_000 else f"{value:,.0f}"


def write_results(stem: Path, experiment: Experiment, seeds: int) -> None:
    """Markdown, JSON and plot of the runs that are complete."""
    tokens = {arm: experiment.measure(arm, seeds) for arm in experiment.arms}
    sweep = {arm: experiment.measure(arm, 1) for arm in experiment.sweep}
    times = {arm: experiment.measure(arm, seeds, "time") or tokens[arm] for arm in experiment.arms}
    if not any(tokens.values()):
        return
    averages = {name: experiment.measure_averages(name, seeds) for name in experiment.averages}
    report = Report(tokens, times, averages, sweep)
    details = harness.header([corpus["path"] for corpus in experiment.common["corpora"]])
    device = device_name(torch.device("cpu"))
    text = report.to_markdown(f"`{details['command']}`, on {device}, a run on one thread.")
    print(f"\n{text}")
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(text, "utf-8")
    details |= {"device": device, "setting": yaml.safe_load(experiment.setting.read_text("utf-8"))}
    details |= {"equal tokens": tokens, "equal time": {arm: runs for arm, runs in times.items() if runs != tokens[arm]}}
    details |= {"averages": averages, "other rates": sweep}
    stem.with_suffix(".json").write_text(harness.to_json(details) + "\n", "utf-8")
    report.plot(stem.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the folders `books` and `wikipedia`")
    parser.add_argument("--setting", type=Path, default=SETTING, help="a YAML file like budgets.yaml")
    parser.add_argument("--arms", nargs="+", help="some of the setting; all without it")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("runs/budgets"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=harness.ROOT / "benchmarks/results", help="folder of the table")
    parser.add_argument("--dry_run", action="store_true", help="write the runs' configs, which checks them, and stop")
    args = parser.parse_args()
    for name in ("seeds", "jobs"):
        require(getattr(args, name) >= 1, f"--{name}", getattr(args, name), "give 1 or more")
    experiment = Experiment(args.output, args.setting, args.data)
    for arm in (arms := args.arms or list(experiment.arms)):
        if arm not in experiment.arms:
            raise UserError(f"--arms {arm}: there is no such arm{did_you_mean(arm, experiment.arms)}")

    # Seed by seed, so that whatever time there is gives whole tables.
    runs = [(arm, seed) for seed in range(1, args.seeds + 1) for arm in arms]
    runs += [(arm, 1) for arm in experiment.sweep if not args.arms]
    for run in runs:
        experiment.plan(*run)
    if args.dry_run:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    experiment.train_tokenizer()
    failed = experiment.scripts.run_all(experiment.run, runs, args.jobs)
    timed = [run for run in experiment.plan_equal_times(args.seeds) if run[0] in arms]
    failed += experiment.scripts.run_all(experiment.run_at_equal_time, timed, args.jobs)
    means = [(name, seed) for name, mean in experiment.averages.items() for arm, seed in runs if arm == mean["arm"]]
    failed += experiment.scripts.run_all(experiment.average, means, args.jobs)
    write_results(args.results / "budgets", experiment, args.seeds)
    if failed:
        sys.exit(
            f"error: {failed} of {len(runs) + len(timed) + len(means)} runs failed; the same command tries them again"
        )


if __name__ == "__main__":
    run_script(main)
