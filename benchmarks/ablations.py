"""The paper's comparisons at a scale of one's own: pretraining and GLUE of each row with several seeds, as a table.

python benchmarks/ablations.py --table masking format systems --scale tiny --jobs 2 --data corpora --glue_dir glue

1. A row is an overlay of `recipe/configs/pretrain/ablations` on a complete config; a row of several tables runs once.
2. A scale, `benchmarks/scales/*.yaml`, makes it smaller: it divides numbers of all rows by the same (so that they keep
   their ratios), sets options in which the rows do not differ, and has smaller texts in the corpora's places.
3. Each run is `pretrain.py` and `finetune_glue.py`, after `train_tokenizer.py` for the vocabularies that are needed, in
   a folder with their configs and logs. The same command goes on with what is not complete.
4. A table, a JSON file and a plot of each comparison, of the runs that are complete.
"""

import argparse
import glob
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import harness
import torch
import yaml
from ablation_report import Comparison, measure_run
from ablation_tables import BASES, TABLES, Table

from recipe.arguments import CorpusArguments, GlueArguments, PretrainArguments, TokenizerArguments, parse_config
from recipe.base.errors import UserError, did_you_mean, require, run_script
from recipe.base.files import to_yaml, write_atomically
from recipe.data.corpora import sample_texts
from recipe.run.hardware import device_name

ROOT = harness.ROOT
ROWS = ROOT / "recipe/configs/pretrain/ablations"
TOKENIZERS = ROOT / "recipe/configs/tokenizer"
SCALES = Path(__file__).parent / "scales"
SECTIONS = ("launch", "corpora", "eval_corpora", "tokenizer", "pretrain", "glue")
LARGEST_ROUNDING = 0.01  # share of a number that rounding may change it by after a division

Options = dict[str, Any]  # by name, those of the model as `model_config.hidden_size`


def read_config(cls: type, *paths: Path) -> Options:
    """Read the options of a YAML file with its overlays, checked and flat."""
    values = asdict(parse_config(cls, "", [f"--config={path}" for path in paths]))
    model = values.pop("model_config", {})
    return values | {f"model_config.{name}": value for name, value in model.items()}


def write_config(cls: type, path: Path, options: Options) -> None:
    """The options as a YAML file, or find it there as it would be written.

    Raises:
        UserError: they do not make sense, or the file has others.
    """
    values = {name: value for name, value in options.items() if "." not in name}
    if model := {name.split(".")[1]: value for name, value in options.items() if "." in name}:
        values["model_config"] = model
    draft = path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(to_yaml(values), "utf-8")
    new = read_config(cls, draft)
    if not path.exists():
        draft.rename(path)
        return
    draft.unlink()
    before = read_config(cls, path)
    if changed := [name for name in new if new[name] != before.get(name)]:
        raise UserError(
            f"{path} has `{changed[0]}` {before.get(changed[0])}, which would be {new[changed[0]]} now; choose "
            f"another --output, or remove {path.parent} to run it anew"
        )


def read_rows() -> dict[str, Options]:
    return {row: read_config(PretrainArguments, *files_of(row)) for row in BASES}


def files_of(row: str) -> tuple[Path, Path]:
    """Return the complete config that a row stands on, and the row's overlay."""
    return ROWS.parent / f"{BASES[row]}.yaml", ROWS / f"{row}.yaml"


class Scale:
    """What the runs differ in from the configs of their rows.

    Args:
        path: a YAML file.
        data: what stands for `{data}` in it.

    Raises:
        UserError: there is no such file, it has a section that no scale has, or a text is not there.
    """

    def __init__(self, path: Path, data: str | None) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"--scale {path}: there is no such scale or file")
        given = yaml.safe_load(path.read_text("utf-8"))
        if unknown := [name for name in given if name not in SECTIONS]:
            raise UserError(f"{path}: there is no section `{unknown[0]}`{did_you_mean(unknown[0], SECTIONS)}")
        self.launch, self.glue = given["launch"], given["glue"]
        self.tokenizer, self.pretrain = given.get("tokenizer", {}), given.get("pretrain", {})
        self.corpora, self.eval_corpora = given.get("corpora", {}), given.get("eval_corpora", {})
        for name, corpus in (self.corpora | self.eval_corpora).items():
            if "{data}" in corpus["path"]:
                if data is None:
                    raise UserError(f"{path}: corpus {name!r} is at {corpus['path']}; say by --data what {{data}} is")
                corpus["path"] = corpus["path"].format(data=Path(data).resolve())
                if not glob.glob(corpus["path"]):
                    raise UserError(f"--data {data}: there is no {corpus['path']}, as {path} has it for {name!r}")

    def check(self, tables: list[Table], rows: dict[str, Options]) -> None:
        """
        Raises:
            UserError: it changes what no row has, or sets what tells the rows of one of the tables apart.
        """
        known = {name for options in rows.values() for name in options}
        for section in ("divide", "override"):
            for name in self.pretrain.get(section, {}):
                if name not in known:
                    hint = did_you_mean(name, known)
                    raise UserError(f"{self.path}: `{section}` names `{name}`, which no row has{hint}")
        for row in self.pretrain.get("equal_tokens", {}):
            if row not in rows:
                raise UserError(f"{self.path}: `equal_tokens` names `{row}`, which is no row{did_you_mean(row, rows)}")
        for name in self.pretrain.get("override", {}):
            for table in tables:
                if name in table.varies:
                    raise UserError(
                        f"{self.path}: `override` sets `{name}`, which tells rows apart that are compared "
                        f"({table.title}); `divide` it, if it is a number, or leave it out"
                    )

    def shrink(self, options: Options, changes: dict[str, Options], what: str) -> Options:
        """The options with some divided, which whole numbers stay whole after, and some set.

        Raises:
            UserError: a whole number is too small to be divided so.
        """
        options = dict(options)
        for name, divisor in changes.get("divide", {}).items():
            if name in options:
                exact = options[name] / divisor
                is_whole = isinstance(options[name], int)
                if is_whole and abs(round(exact) - exact) > LARGEST_ROUNDING * exact:
                    raise UserError(
                        f"{self.path}: `divide` makes `{name}` of {what} {options[name]:,} / {divisor} = {exact:g}, "
                        "which is no whole number; choose another divisor"
                    )
                options[name] = round(exact) if is_whole else exact
        return options | changes.get("override", {})

    def replace(self, corpora: list[Options], folder: Path) -> list[Options]:
        """This scale's text in the place of each corpus, if it has any.

        Raises:
            UserError: it has some, and none for this corpus.
        """
        if not self.corpora:
            return corpora
        for corpus in corpora:
            if corpus["name"] not in self.corpora:
                raise UserError(f"{self.path}: `corpora` lacks {corpus['name']!r}, which a config reads")
        return [self.locate(corpus["name"], self.corpora[corpus["name"]], folder) for corpus in corpora]

    def locate(self, name: str, corpus: Options, folder: Path) -> Options:
        return {"name": name, "path": str(folder / f"{name}.jsonl") if "max_bytes" in corpus else corpus["path"]}

    def sample(self, folder: Path) -> None:
        """Write the texts that are cut to `max_bytes`."""
        for name, corpus in (self.corpora | self.eval_corpora).items():
            path = folder / f"{name}.jsonl"
            if "max_bytes" in corpus and not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                whole = CorpusArguments(name=name, path=corpus["path"])
                texts = [text for _, batch, _ in sample_texts([whole], corpus["max_bytes"]) for text in batch]
                write_atomically(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


class Study:
    """Runs of rows at a scale, in one folder.

    Args:
        folder: of the runs.
        scale: of all of them.
        glue_dir: GLUE's TSVs; None: from the hub.
        threads: OpenMP threads of a run, unless the environment says how many.
    """

    def __init__(self, folder: Path, scale: Scale, glue_dir: str | None, threads: int) -> None:
        self.folder = folder.resolve()
        self.corpora = self.folder / "corpora"
        self.scale = scale
        self.glue_dir = str(Path(glue_dir).resolve()) if glue_dir else None
        self.scripts = harness.Scripts(threads)
        self.tokenizers: set[Path] = set()  # that the runs need

    def run_folder(self, row: str, seed: int) -> Path:
        return self.folder / row / f"seed-{seed}"

    def plan(self, row: str, options: Options, seed: int) -> None:
        """Write the configs of a run and its tokenizer.

        Raises:
            UserError: they do not make sense, or the run has begun with others.
        """
        folder, scale = self.run_folder(row, seed), self.scale
        options = scale.shrink(options, scale.pretrain, row)
        options["train_batch_size"] = blocks = scale.pretrain.get("equal_tokens", {}).get(
            row, options["train_batch_size"]
        )
        most = min(blocks, options["per_device_train_batch_size"])
        options["per_device_train_batch_size"] = next(size for size in range(most, 0, -1) if not blocks % size)
        held_out = [scale.locate(name, corpus, self.corpora) for name, corpus in scale.eval_corpora.items()]
        options |= {
            "output_dir": str(folder / "pretrain"),
            "tokenizer_name": self.plan_tokenizer(options["tokenizer_name"]),
            "corpora": scale.replace(options["corpora"], self.corpora),
            "eval_corpora": held_out or options["eval_corpora"],
            "token_store_dir": str(self.folder / "token_stores"),
            "seed": seed,
            "resume_from_checkpoint": "latest",
        }
        write_config(PretrainArguments, folder / "pretrain.yaml", options)
        options = read_config(GlueArguments, ROOT / scale.glue["config"]) | scale.glue.get("override", {})
        options |= {
            "output_dir": str(folder / "glue"),
            "model_name_or_path": str(folder / "pretrain" / "model"),
            "glue_dir": self.glue_dir,
            "seeds": [1000 * seed + number for number in options["seeds"]],
        }
        write_config(GlueArguments, folder / "glue.yaml", options)

    def plan_tokenizer(self, output_dir: str) -> str:
        """Write the config of a shipped tokenizer at this scale.

        Args:
            output_dir: of the shipped config.

        Returns:
            its folder here.
        """
        shipped = {path.stem: read_config(TokenizerArguments, path) for path in TOKENIZERS.glob("*.yaml")}
        [name] = [name for name, options in shipped.items() if options["output_dir"] == output_dir]
        folder = self.folder / "tokenizers" / name
        if folder not in self.tokenizers:
            options = self.scale.shrink(shipped[name], self.scale.tokenizer, name)
            options |= {"output_dir": str(folder), "corpora": self.scale.replace(options["corpora"], self.corpora)}
            write_config(TokenizerArguments, folder.with_suffix(".yaml"), options)
            self.tokenizers.add(folder)
        return str(folder)

    def train_tokenizers(self) -> None:
        for folder in sorted(self.tokenizers):
            if not (folder / "tokenizer.json").exists():
                config = str(folder.with_suffix(".yaml"))
                self.scripts.call(
                    [sys.executable, "train_tokenizer.py", "--config", config], folder.with_suffix(".log")
                )

    def run(self, row: str, seed: int) -> float:
        """Pretrain and fine-tune.

        Returns:
            seconds that it took.

        Raises:
            RunError: a script failed or was stopped.
        """
        folder, started = self.run_folder(row, seed), time.perf_counter()
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", self.scale.launch]
        for step, script in (("pretrain", "pretrain.py"), ("glue", "finetune_glue.py")):
            if not harness.is_complete(folder / step):
                print(f"{row}, seed {seed}: {script} begins, log: {folder / step}.log", flush=True)
                config = str(folder / f"{step}.yaml")
                self.scripts.call([*launcher, script, "--config", config], folder / f"{step}.log")
            if not harness.is_complete(folder / step):
                raise harness.RunError(f"{script} was stopped")
        return time.perf_counter() - started


def write_results(stem: Path, command: str, table: Table, study: Study, seeds: int) -> None:
    """Markdown, JSON and plot of a table, of the runs that are complete."""
    configs = {row: read_config(PretrainArguments, study.run_folder(row, 1) / "pretrain.yaml") for row in table.rows}
    runs: dict[str, list[dict[str, Any]]] = {row: [] for row in table.rows}
    for row in table.rows:
        for seed in range(1, seeds + 1):
            if harness.is_complete(study.run_folder(row, seed) / "glue"):
                runs[row].append({"seed": seed} | measure_run(study.run_folder(row, seed)))
    if not any(runs.values()):
        return
    stem.parent.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(table, configs, runs)
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    text = comparison.to_markdown(f"# {table.title}\n\n`{command}`, on {device}.")
    print(f"\n{text}")
    stem.with_suffix(".md").write_text(text, "utf-8")
    report = harness.header([]) | {"command": command, "device": device}
    report["scale"] = yaml.safe_load(study.scale.path.read_text("utf-8"))
    report["options"] = {
        row: {name: config.get(name) for name in sorted(table.varies)}
        | {"tokenizer_name": Path(config["tokenizer_name"]).name}
        for row, config in configs.items()
    }
    stem.with_suffix(".json").write_text(harness.to_json(report | {"runs": runs}) + "\n", "utf-8")
    comparison.plot(stem.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scales = " | ".join(sorted(path.stem for path in SCALES.glob("*.yaml")))
    parser.add_argument("--table", nargs="+", choices=list(TABLES), required=True)
    parser.add_argument("--scale", required=True, help=f"{scales}, or a YAML file like theirs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--data", help="folder of the texts, for scales that bring their own")
    parser.add_argument("--glue_dir", help="folder of GLUE's TSVs; without it, from the hub")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the tables")
    parser.add_argument("--dry_run", action="store_true", help="check everything, write the runs' configs and stop")
    args = parser.parse_args()
    for name in ("seeds", "jobs"):
        require(getattr(args, name) >= 1, f"--{name}", getattr(args, name), "give 1 or more")

    shipped = SCALES / f"{args.scale}.yaml"
    scale, rows = Scale(shipped if shipped.is_file() else Path(args.scale), args.data), read_rows()
    scale.check([TABLES[name] for name in args.table], rows)
    study = Study(args.output / scale.path.stem, scale, args.glue_dir, max(1, (os.cpu_count() or 1) // args.jobs))
    names = dict.fromkeys(row for table in args.table for row in TABLES[table].rows)
    # Seed by seed, so that whatever time there is gives whole tables.
    runs = [(row, seed) for seed in range(1, args.seeds + 1) for row in names]
    for row, seed in runs:
        study.plan(row, rows[row], seed)
    print(f"{len(runs)} runs as {scale.path} says, in {study.folder}, {args.jobs} at a time", flush=True)
    if args.dry_run:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    scale.sample(study.corpora)
    study.train_tokenizers()
    failed = study.scripts.run_all(study.run, runs, args.jobs)
    for name in args.table:
        command = f"python benchmarks/ablations.py --table {name} --scale {scale.path.stem} --seeds {args.seeds}"
        write_results(args.results / f"ablations_{name}_{scale.path.stem}", command, TABLES[name], study, args.seeds)
    if failed:
        sys.exit(f"error: {failed} of {len(runs)} runs failed; the same command tries them again")


if __name__ == "__main__":
    run_script(main)
