"""The paper's comparisons at a scale of one's own: pretraining and GLUE of each row with several seeds, as a table.

python benchmarks/ablations.py --table masking format systems --scale tiny --jobs 2 --data corpora --glue_dir glue

1. A row is a config of `recipe/configs/pretrain/ablations`; a row of several tables runs once.
2. A scale, `benchmarks/scales/*.yaml`, makes it smaller: it divides numbers of all rows by the same (so that they keep
   their ratios), sets options in which the rows do not differ, and has smaller texts in the corpora's places.
3. Each run is `train_tokenizer.py`, where there is no such tokenizer yet, `pretrain.py` and `finetune_glue.py`, in a
   folder with their configs and log. The same command goes on with what is not complete.
4. A table, a JSON file and a plot for each comparison, of the runs that are complete.
"""

import argparse
import glob
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from ablation_report import write_report
from ablation_tables import TABLES, Table

from recipe.config import (
    CorpusArguments,
    GlueArguments,
    PretrainArguments,
    TokenizerArguments,
    UserError,
    did_you_mean,
    parse_config,
    report_user_errors,
    require,
    to_yaml,
)
from recipe.corpora import sample_texts
from recipe.run_directory import write_atomically

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "recipe/configs/pretrain/ablations"
TOKENIZERS = ROOT / "recipe/configs/tokenizer"
SCALES = Path(__file__).parent / "scales"
LARGEST_ROUNDING = 0.01  # share of a number that a division may take to make it whole


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of `model_config` as fields of their own, dotted."""
    values = dict(values)
    return values | {f"model_config.{name}": value for name, value in values.pop("model_config", {}).items()}


def unflatten(values: dict[str, Any]) -> dict[str, Any]:
    nested = {name: value for name, value in values.items() if "." not in name}
    inner = {name.split(".")[1]: value for name, value in values.items() if "." in name}
    return nested | ({"model_config": inner} if inner else {})


def read_config(cls: type, path: Path) -> dict[str, Any]:
    return flatten(asdict(parse_config(cls, "", ["--config", str(path)])))


def read_rows() -> dict[str, dict[str, Any]]:
    """The options of each row, flat."""
    return {path.stem: read_config(PretrainArguments, path) for path in sorted(ROWS.glob("*.yaml"))}


class Scale:
    """What a run of a row differs in from the row's config.

    Args:
        path: a file of `benchmarks/scales`.
        data: what stands for `{data}` in its paths.

    Raises:
        UserError: the file has other sections than these.
    """

    def __init__(self, path: Path, data: str | None) -> None:
        self.path = path
        given = yaml.safe_load(path.read_text())
        if unknown := given.keys() - {"launch", "corpora", "eval_corpora", "tokenizer", "pretrain", "glue"}:
            raise UserError(f"{path} has a section {sorted(unknown)[0]!r}, which a scale does not know")
        self.launch = given["launch"]
        self.corpora, self.eval_corpora = given.get("corpora", {}), given.get("eval_corpora", {})
        self.tokenizer, self.pretrain, self.glue = (given.get(name, {}) for name in ("tokenizer", "pretrain", "glue"))
        for name, corpus in (self.corpora | self.eval_corpora).items():
            if "{data}" in corpus["path"]:
                if data is None:
                    raise UserError(f"{path}: the path of corpus {name!r} is {corpus['path']}; say by --data what {{data}} is")
                corpus["path"] = corpus["path"].format(data=Path(data).resolve())
                if not glob.glob(corpus["path"]):
                    raise UserError(f"--data {data}: there is no {corpus['path']} for corpus {name!r}; see {path}")

    def check(self, tables: list[Table], rows: dict[str, dict[str, Any]]) -> None:
        """
        Raises:
            UserError: a number that no row has is divided, or an option is set that does not exist or that the rows of
                one of the tables differ in.
        """
        known = {name for values in rows.values() for name in values} | {f.name for f in fields(PretrainArguments)}
        for section in ("divide", "override"):
            for name in self.pretrain.get(section, {}):
                if name not in known:
                    raise UserError(f"{self.path}: no row has `{name}`, which `{section}` names{did_you_mean(name, known)}")
        for name in self.pretrain.get("override", {}):
            for table in tables:
                if name in table.varies:
                    raise UserError(
                        f"{self.path}: `override` sets `{name}`, which tells the rows of {table.title!r} apart; "
                        "`divide` it, or leave it as it is"
                    )
        for row in self.pretrain.get("equal_tokens", {}):
            if row not in rows:
                raise UserError(f"{self.path}: `equal_tokens` names {row!r}, which is no row{did_you_mean(row, rows)}")

    def divide(self, values: dict[str, Any], changes: dict[str, Any], what: str) -> dict[str, Any]:
        """The values with the numbers divided and the options set; whole numbers stay whole.

        Raises:
            UserError: a number that does not divide without changing the ratios.
        """
        divided = {}
        for name, divisor in changes.get("divide", {}).items():
            if values.get(name) is None:
                continue
            divided[name] = exact = values[name] / divisor
            if isinstance(values[name], int):
                divided[name] = round(exact)
                if abs(divided[name] - exact) > LARGEST_ROUNDING * exact:
                    raise UserError(f"{self.path}: `{name}` of {what}, {values[name]:,}, is no whole number divided by {divisor}")
        return values | divided | changes.get("override", {})

    def place(self, corpora: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
        """This scale's text in the place of each corpus of that name.

        Raises:
            UserError: it has none for one of them.
        """
        if missing := [corpus["name"] for corpus in corpora if self.corpora and corpus["name"] not in self.corpora]:
            raise UserError(f"{self.path}: `corpora` has no {missing[0]!r}, which a row reads")
        return [self.corpus(c["name"], self.corpora[c["name"]], folder) if self.corpora else c for c in corpora]

    def corpus(self, name: str, given: dict[str, Any], folder: Path) -> dict[str, Any]:
        return {"name": name, "path": str(folder / f"{name}.jsonl") if "max_bytes" in given else given["path"]}

    def sample(self, folder: Path) -> None:
        """Write the texts that are cut to `max_bytes`."""
        for name, given in (self.corpora | self.eval_corpora).items():
            path = folder / f"{name}.jsonl"
            if "max_bytes" in given and not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                corpus = CorpusArguments(name=name, path=given["path"])
                texts = [text for _, batch, _ in sample_texts([corpus], given["max_bytes"]) for text in batch]
                write_atomically(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


class Study:
    """The runs of some tables at a scale, below one folder.

    Args:
        folder: of this scale's runs.
        scale: their scale.
        glue_dir: GLUE's TSVs; None: from the hub.
        threads: OpenMP threads of a run.
    """

    def __init__(self, folder: Path, scale: Scale, glue_dir: str | None, threads: int) -> None:
        self.folder = folder.resolve()
        self.scale = scale
        self.glue_dir = str(Path(glue_dir).resolve()) if glue_dir else None
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.children: list[subprocess.Popen] = []
        self.tokenizers: dict[str, Path] = {}  # config of each that is needed, by its folder

    def run_folder(self, row: str, seed: int) -> Path:
        return self.folder / row / f"seed-{seed}"

    def plan(self, row: str, values: dict[str, Any], seed: int) -> None:
        """Write the configs of a run and of its tokenizer.

        Raises:
            UserError: they do not make sense, or the folder holds a run of others.
        """
        folder, corpora = self.run_folder(row, seed), self.folder / "corpora"
        values = self.scale.divide(values, self.scale.pretrain, row)
        if row in (blocks := self.scale.pretrain.get("equal_tokens", {})):
            values["train_batch_size"] = blocks[row]
        eval_corpora = [self.scale.corpus(name, given, corpora) for name, given in self.scale.eval_corpora.items()]
        values |= {
            "output_dir": str(folder / "pretrain"),
            "tokenizer_name": self.plan_tokenizer(values["tokenizer_name"]),
            "corpora": self.scale.place(values["corpora"], corpora),
            "eval_corpora": eval_corpora or values["eval_corpora"],
            "token_store_dir": str(self.folder / "token_stores"),
            "seed": seed,
            "resume_from_checkpoint": "latest",
        }
        settle(folder / "pretrain.yaml", values, PretrainArguments)
        glue = read_config(GlueArguments, ROOT / self.scale.glue["config"]) | self.scale.glue.get("override", {})
        glue |= {
            "output_dir": str(folder / "glue"),
            "model_name_or_path": str(folder / "pretrain" / "model"),
            "glue_dir": self.glue_dir,
            "seeds": [1000 * seed + number for number in glue["seeds"]],
        }
        settle(folder / "glue.yaml", glue, GlueArguments)

    def plan_tokenizer(self, output_dir: str) -> str:
        """The folder of this scale's tokenizer in place of the one of a shipped config."""
        for path in TOKENIZERS.glob("*.yaml"):
            values = read_config(TokenizerArguments, path)
            if values["output_dir"] == output_dir:
                break
        else:
            raise UserError(f"`tokenizer_name` {output_dir} is the `output_dir` of no config in {TOKENIZERS}")
        folder = self.folder / "tokenizers" / path.stem
        values = self.scale.divide(values, self.scale.tokenizer, path.stem)
        values |= {
            "output_dir": str(folder),
            "corpora": self.scale.place(values["corpora"], self.folder / "corpora"),
        }
        self.tokenizers[str(folder)] = folder.with_suffix(".yaml")
        settle(folder.with_suffix(".yaml"), values, TokenizerArguments)
        return str(folder)

    def train_tokenizers(self) -> None:
        for folder, config in self.tokenizers.items():
            if not (Path(folder) / "tokenizer.json").exists():
                self.call([sys.executable, "train_tokenizer.py", "--config", str(config)], config.with_suffix(".log"))

    def run(self, row: str, seed: int) -> float:
        """Pretrain and fine-tune.

        Returns:
            seconds that it took.

        Raises:
            RunError: a script failed, or was stopped.
        """
        folder, started = self.run_folder(row, seed), time.perf_counter()
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", self.scale.launch]
        for step, script in (("pretrain", "pretrain.py"), ("glue", "finetune_glue.py")):
            if not is_complete(folder / step):
                self.call([*launcher, script, "--config", str(folder / f"{step}.yaml")], folder / f"{step}.log")
            if not is_complete(folder / step):
                raise RunError(f"{script} was stopped")
        return time.perf_counter() - started

    def call(self, command: list[str], log: Path) -> None:
        """
        Raises:
            RunError: the command failed.
        """
        with log.open("a") as file:
            # In a group of its own, which a launcher's children are in too, and which `stop` can reach as a whole.
            child = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            self.children.append(child)
            code = child.wait()
        if code:
            last = ([line for line in log.read_text().splitlines() if line.strip()] or [""])[-1]
            raise RunError(f"exit status {code}: {last} (see {log})")

    def stop(self) -> None:
        """Have all that runs save and end."""
        for child in self.children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)


class RunError(Exception):
    """A script failed; the other runs go on."""


def is_complete(folder: Path) -> bool:
    status = folder / "status.json"
    return status.exists() and json.loads(status.read_text())["state"] == "complete"


def settle(path: Path, values: dict[str, Any], cls: type) -> None:
    """Write a config, checked, or find it there as it was before.

    Raises:
        UserError: it does not make sense, or there is another.
    """
    values = unflatten(values)
    if path.exists():
        before = yaml.safe_load(path.read_text())
        if changed := [name for name in values if values[name] != before.get(name)]:
            raise UserError(
                f"{path} has `{changed[0]}` {before.get(changed[0])}, and now it would be {values[changed[0]]}; choose "
                "another --output, or remove that folder to run it anew"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    draft.write_text(to_yaml(values))
    parse_config(cls, "", ["--config", str(draft)])
    draft.rename(path)


def run_all(study: Study, runs: list[tuple[str, int]], jobs: int) -> int:
    """Every run, `jobs` at a time.

    Returns:
        how many failed.
    """
    failed = 0
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(study.run, *run): run for run in runs}
        for number, future in enumerate(as_completed(futures), 1):
            row, seed = futures[future]
            try:
                line = f"complete, {future.result():,.0f} s"
            except RunError as error:
                failed += 1
                line = f"failed: {error}"
            print(f"[{number}/{len(runs)}] {row}, seed {seed}: {line}", flush=True)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        study.stop()
        raise
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scales = sorted(path.stem for path in SCALES.glob("*.yaml"))
    parser.add_argument("--table", nargs="+", choices=list(TABLES), required=True)
    parser.add_argument("--scale", choices=scales, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--data", help="folder of the texts of a scale that has some in the corpora's places")
    parser.add_argument("--glue_dir", help="folder of GLUE's TSVs; without it, from the hub")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the tables")
    parser.add_argument("--dry_run", action="store_true", help="check everything, write the configs and stop")
    args = parser.parse_args()
    for name in ("seeds", "jobs"):
        require(getattr(args, name) >= 1, f"--{name}", getattr(args, name), "give 1 or more")
    scale, rows = Scale(SCALES / f"{args.scale}.yaml", args.data), read_rows()
    tables = {name: TABLES[name] for name in args.table}
    scale.check(list(tables.values()), rows)
    study = Study(args.output / args.scale, scale, args.glue_dir, max(1, (os.cpu_count() or 1) // args.jobs))
    # Seed by seed, so that whatever time there is gives whole tables.
    runs = [(row, seed) for seed in range(1, args.seeds + 1) for row in dict.fromkeys(r for t in tables.values() for r in t.rows)]
    for row, seed in runs:
        study.plan(row, rows[row], seed)
    print(f"{scale.path}:\n{scale.path.read_text()}")
    print(f"{len(runs)} runs in {study.folder}, {args.jobs} at a time", flush=True)
    if args.dry_run:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    scale.sample(study.folder / "corpora")
    study.train_tokenizers()
    failed = run_all(study, runs, args.jobs)
    for name, table in tables.items():
        configs = {row: yaml.safe_load((study.run_folder(row, 1) / "pretrain.yaml").read_text()) for row in table.rows}
        folders = {row: [study.run_folder(row, seed) for seed in range(1, args.seeds + 1)] for row in table.rows}
        ...
    if failed:
        sys.exit(f"error: {failed} of {len(runs)} runs failed; the same command tries them again")


if __name__ == "__main__":
    with report_user_errors():
        main()
