"""The real command line, from corpora to an exported model."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from recipe.base.errors import UserError
from recipe.data.masking import DynamicMaskingCollator
from testing.helpers import (
    PATIENCE_SECONDS,
    PYTHONPATH,
    ROOT,
    SAMPLE,
    SMALL_MODEL,
    command_line,
    learning,
    read_lines,
    wait_for,
    wait_for_training,
    weights,
    write_jsonl,
)

PHASES = (
    "[{steps: 40, max_seq_length: 16, train_batch_size: [4, 16]}, {steps: 0.5, mlm_probability: [0.3, 0.15]},"
    " {steps: 20, max_seq_length: 24}]"
)
STREAMED = {"streaming": "true", "num_lanes": 4, "shuffle_buffer_size": 64}


def assert_same_run(one: Path, two: Path) -> None:
    assert learning(one / "metrics.jsonl") == learning(two / "metrics.jsonl")
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def launch(flags: dict[str, object], processes: int = 1, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--mixed_precision=no"]
    command += ["--dynamo_backend=no", f"--num_processes={processes}", *(["--multi_gpu"] if processes > 1 else [])]
    command += ["--main_process_port=0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "pretrain.py", *command_line(flags)], cwd=ROOT, env=environment, text=True, check=True, **kwargs
    )


def start(flags: dict[str, object], script: Path | str = "pretrain.py", **kwargs) -> subprocess.Popen:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": PYTHONPATH}
    return subprocess.Popen([sys.executable, script, *command_line(flags)], cwd=ROOT, env=environment, **kwargs)


def test_run_that_goes_on_with_a_model_says_what_that_model_had_learnt(
    flags, run_pretrain, finished_run, tmp_path: Path
):
    flags |= {"output_dir": tmp_path / "more", "model_name_or_path": finished_run / "model", "tokenizer_name": "null"}
    run_pretrain(flags | {"max_steps": 1, "warmup_steps": 0, "eval_steps": 5, "model_config": "{}"})
    before, after = [
        line["eval_loss"] for line in read_lines(tmp_path / "more" / "metrics.jsonl") if "eval_loss" in line
    ]
    assert before == pytest.approx(read_lines(finished_run / "metrics.jsonl")[-1]["eval_loss"], abs=1e-6)
    assert after != before
    assert f"({before:.3f} before the first)" in (tmp_path / "more" / "model" / "README.md").read_text()


def test_run_leaves_what_it_promises(flags, run_pretrain, tmp_path: Path, capsys):
    run_pretrain(flags)
    run = tmp_path / "run"
    assert json.loads((run / "status.json").read_text())["state"] == "complete"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["max_steps"] == 6
    assert config["environment"]["num_processes"] == 1
    assert {"torch", "transformers", "datasets"} <= set(config["environment"]["versions"])
    metrics = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in metrics if "eval_loss" in line] == [0, 3, 6]
    assert all(line["tokens_per_second"] > 0 for line in metrics if "loss" in line)
    assert ["seconds_to_first_update" in line for line in metrics if "loss" in line] == [True, False, False]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert len(re.findall(r"first update \d+\.\d s after the start of the process; it took \d+\.\d s\n", printed)) == 1
    assert "held-out loss" in printed
    assert str(run / "model") in printed


def test_mfu_is_at_most_one_even_if_the_machine_was_busy_when_its_ceiling_was_measured(
    flags, run_pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured = iter([1.0, 1.0, 1e15])  # FLOP/s at the start, and whenever training is faster
    monkeypatch.setattr("recipe.monitoring.matmul_flops", lambda device, precision: next(measured))
    run_pretrain(flags)
    first, *later = [line["mfu"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "mfu" in line]
    assert first == 1
    assert len(later) == 2
    assert max(later) <= 1


@pytest.mark.parametrize("mode", [{}, {"streaming": "true", "num_lanes": 4}])
def test_own_tokens_are_trained_on_and_unknown_ones_are_told(
    flags, run_pretrain, tmp_path: Path, texts, tokenizer_dirs, capsys, mode
):
    """In both modes, and the export reads the same ids."""
    stock = AutoTokenizer.from_pretrained(tokenizer_dirs["bert"])
    stock.add_tokens(["<url>", "糖尿病"], special_tokens=True)
    stock.save_pretrained(tmp_path / "own")
    corpus = write_jsonl(tmp_path / "own.jsonl", [f"{text} 😀{' See <url> and 糖尿病.' * 20}" for text in texts])
    flags |= {"corpora": json.dumps([{"name": "own", "path": str(corpus)}]), "tokenizer_name": tmp_path / "own"}
    flags |= {"model_type": "bert", "mlm_probability": 0.5}
    seen = Counter()
    with pytest.MonkeyPatch.context() as patch:
        collate = DynamicMaskingCollator.__call__

        def count(self, *args):
            batch = collate(self, *args)
            seen.update(batch["labels"].flatten().tolist())
            return batch

        patch.setattr(DynamicMaskingCollator, "__call__", count)
        run_pretrain(flags | mode)
    assert all(seen[stock.convert_tokens_to_ids(token)] for token in ("<url>", "糖尿病"))
    printed = capsys.readouterr().out
    assert re.search(r"warning: corpus own: \d+ of [\d,]+ tokens \(\d.\d\d%\) are \[UNK\], for characters", printed)
    if not mode:
        assert f"warning: corpus own: {len(texts)} of " in printed
    exported = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert exported("see <url> 糖尿病")["input_ids"] == stock("see <url> 糖尿病")["input_ids"]


def test_exported_model_needs_none_of_our_code(finished_run: Path, tmp_path: Path):
    model = str(finished_run / "model")
    _, loading = AutoModelForMaskedLM.from_pretrained(model, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    script = "import sys; from transformers import pipeline; print(pipeline('fill-mask', sys.argv[1])('He<mask> it.'))"
    result = subprocess.run(
        [sys.executable, "-c", script, model], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "token_str" in result.stdout
    assert len(pipeline("fill-mask", model=model)("He<mask> it.")) == 5
    # The tokenizer was trained for 64 tokens and the model for 32, which longer texts are cut to.
    assert AutoTokenizer.from_pretrained(model).model_max_length == 32
    assert len(pipeline("feature-extraction", model=model)("he " * 700, truncation=True)[0]) == 32


def test_training_learns_to_use_the_context(echo_flags, run_pretrain, tmp_path: Path):
    run_pretrain(echo_flags)
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["eval_loss"] < 0.5 * last["unigram_loss"]


def test_same_seed_gives_the_same_run_and_another_another(flags, finished_run, run_pretrain, tmp_path: Path):
    run_pretrain(flags | {"output_dir": tmp_path / "again", "dataloader_num_workers": 2})
    run_pretrain(flags | {"output_dir": tmp_path / "other", "seed": 1})
    assert_same_run(tmp_path / "run", tmp_path / "again")
    assert learning(tmp_path / "run" / "metrics.jsonl") != learning(tmp_path / "other" / "metrics.jsonl")


@pytest.mark.parametrize("stop_at", [3, 5, "edge"])
def test_resume_matches_uninterrupted_run(flags, run_pretrain, tmp_path: Path, texts, stop_at, capsys):
    if stop_at == "edge":
        # An update takes all training blocks: the run is stopped at the edge of its third epoch.
        path = write_jsonl(tmp_path / "small.jsonl", texts[:6])
        flags |= {"corpora": json.dumps([{"name": "small", "path": str(path)}]), "eval_blocks": 2}
        run_pretrain(flags | {"output_dir": tmp_path / "probe", "max_steps": 2})
        blocks = read_state(tmp_path / "probe")["identity"]["data"]["small"][2] - 2
        flags |= {"train_batch_size": blocks, "per_device_train_batch_size": blocks}
        stop_at = 3
    # Saved between two lines of the log, so that half a window of losses has to be kept.
    run_pretrain(flags | {"save_steps": stop_at})
    stopped = flags | {"output_dir": tmp_path / "stopped", "save_steps": stop_at, "resume_from_checkpoint": "latest"}
    run_pretrain(stopped)
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000006")
    run_pretrain(stopped)
    assert f"step-{stop_at:08d}: {stop_at} of 6 updates done" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", tmp_path / "stopped")


def read_state(run: Path) -> dict:
    return json.loads((sorted((run / "checkpoints").iterdir())[-1] / "state.json").read_text())


@pytest.mark.parametrize("packing", ["doc_sentences", "contiguous"])
def test_other_packings_train_and_go_on(flags, run_pretrain, tmp_path: Path, packing):
    flags |= {"packing": packing}
    run_pretrain(flags)
    records = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert all(line["loss"] > 0 for line in records)
    assert records[-1]["padding_share"] < (0.01 if packing == "contiguous" else 0.2)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    run_pretrain(flags | {"resume_from_checkpoint": "latest"})
    assert [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line][-1]["loss"] == (
        records[-1]["loss"]
    )


def test_counts_of_corpora_are_in_the_metrics_and_the_log(flags, run_pretrain, tmp_path: Path, texts, capsys):
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", texts[n * 60 : n * 60 + 60]) for n in range(2)]
    corpora = [
        {"name": name, "path": str(path), "weight": w} for name, path, w in zip("ab", paths, (3, 1), strict=True)
    ]
    run_pretrain(flags | {"corpora": json.dumps(corpora), "max_steps": 60, "save_steps": 30, "logging_steps": 20})
    last = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "corpora" in line][-1]
    a, b = last["corpora"]["a"], last["corpora"]["b"]
    assert (a["blocks"], b["blocks"]) == (360, 120)
    assert a["tokens"] + b["tokens"] == last["tokens"]
    assert 0 < b["passes"] < a["passes"]
    assert last["padding_share"] == pytest.approx(1 - last["tokens"] / (480 * 32), abs=1e-4)
    printed = capsys.readouterr().out
    assert f"b {b['tokens'] / 1000:.3g}K ({b['passes']:.2f} passes); padding" in printed


@pytest.mark.long
@pytest.mark.parametrize("mode", [{}, STREAMED, STREAMED | {"dataloader_num_workers": 2, "phases": PHASES}])
def test_killed_run_goes_on_to_the_same_end(flags, run_pretrain, tmp_path: Path, mode):
    flags |= {"max_steps": 120, "save_steps": 4, "eval_steps": 7, "logging_steps": 3} | mode
    run_pretrain(flags)
    killed = flags | {"output_dir": tmp_path / "killed", "resume_from_checkpoint": "latest"}
    process = start(killed)
    wait_for(lambda: list((tmp_path / "killed" / "checkpoints").glob("step-*")))
    process.kill()
    process.wait()
    assert json.loads((tmp_path / "killed" / "status.json").read_text())["state"] == "running"
    run_pretrain(killed)
    assert_same_run(tmp_path / "run", tmp_path / "killed")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGUSR1, signal.SIGHUP))]
)
def test_signal_saves_and_ends_the_run_as_preempted(flags, run_pretrain, tmp_path: Path, number: signal.Signals):
    flags |= {"max_steps": 100_000, "save_steps": 100_000, "resume_from_checkpoint": "latest", "logging_steps": 1}
    process = start(flags)
    run = tmp_path / "run"
    wait_for_training(run)
    pids = json.loads((run / "status.json").read_text())["pids"]
    assert pids == [process.pid]
    os.kill(pids[0], number)
    assert process.wait(timeout=PATIENCE_SECONDS) == 0
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "preempted"
    assert status["reason"] == number.name
    assert (run / "checkpoints" / f"step-{status['step']:08d}").is_dir()
    run_pretrain(flags | {"max_steps": status["step"] + 1, "warmup_steps": 1})
    assert json.loads((run / "status.json").read_text())["state"] == "complete"


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("mode", [{}, STREAMED], ids=["cached", "streaming"])
def test_signal_to_the_whole_group_of_processes_saves_too(flags, tmp_path: Path, mode, number: signal.Signals):
    flags |= {"max_steps": 100_000, "save_steps": 100_000, "logging_steps": 1, "dataloader_num_workers": 2} | mode
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # children inherit what `nohup` does to these tests
    process = start(flags, start_new_session=True)
    signal.signal(signal.SIGHUP, handler)
    wait_for_training(tmp_path / "run")
    os.killpg(process.pid, number)
    assert process.wait(timeout=PATIENCE_SECONDS) == 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "preempted"
    assert (tmp_path / "run" / "checkpoints" / f"step-{status['step']:08d}").is_dir()


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("mode", [{}, STREAMED], ids=["cached", "streaming"])
def test_worker_that_is_killed_costs_no_update(flags, tmp_path: Path, mode, processes: int):
    flags |= {"max_steps": 100_000, "save_steps": 100_000, "logging_steps": 1, "dataloader_num_workers": 2} | mode
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "pretrain.py", *command_line(flags)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    wait_for_training(run)
    worker = psutil.Process(json.loads((run / "status.json").read_text())["pids"][-1]).children()[0]
    worker.kill()
    _, printed = process.communicate(timeout=PATIENCE_SECONDS)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert (run / "checkpoints" / f"step-{status['step']:08d}").is_dir()
    assert status["step"] == read_lines(run / "metrics.jsonl")[-1]["step"]
    assert f"DataLoader worker (pid {worker.pid}) is killed by signal: Killed." in printed
    assert "lower `dataloader_num_workers`" in printed


WAITS_FOR_ITS_SOURCE = """
import pretrain
import recipe.data.corpora
import recipe.data.streaming
from recipe.base.errors import run_script

recipe.data.corpora.RETRY_SECONDS = (600,)
recipe.data.streaming.REFILL_CHARACTERS = 2000
records = recipe.data.corpora.LocalSource.records
count = 0

def failing(self, shard, first, part):
    global count
    for index, text in records(self, shard, first, part):
        count += 1
        if count > 1000:
            raise ConnectionError("the line is down")
        yield index, text

recipe.data.corpora.LocalSource.records = failing
run_script(pretrain.main)
"""


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_signal_is_heard_while_a_source_is_waited_for(flags, tmp_path: Path, workers: int):
    script = tmp_path / "waits.py"
    script.write_text(WAITS_FOR_ITS_SOURCE)
    flags |= STREAMED | {"max_steps": 100_000, "save_steps": 100_000, "logging_steps": 1}
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        process = start(flags | {"dataloader_num_workers": workers}, script=script, stdout=out)
    wait_for(lambda: "opening it again" in log.read_text())
    wait_for_training(tmp_path / "run")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE_SECONDS) == 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "preempted"
    assert (tmp_path / "run" / "checkpoints" / f"step-{status['step']:08d}").is_dir()


def test_two_processes_give_the_losses_of_one(flags, run_pretrain, tmp_path: Path, tokenizer_dir: Path):
    flags |= {
        "corpora": json.dumps([{"name": "tales", "path": str(SAMPLE / "tales.jsonl.gz")}]),
        "train_batch_size": 32,
        "per_device_train_batch_size": 8,
        "model_config": json.dumps(
            json.loads(flags["model_config"]) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        ),
        "logging_steps": 1,
    }
    run_pretrain(flags)
    two = flags | {"output_dir": tmp_path / "two"}
    launch(two, processes=2)
    one, both = (learning(tmp_path / name / "metrics.jsonl") for name in ("run", "two"))
    assert len(one) == len(both)
    for line, other in zip(one, both, strict=True):
        assert line["tokens"] == other["tokens"]
        for name in ("loss", "grad_norm", "eval_loss"):
            assert line.get(name) == (pytest.approx(other[name], rel=1e-5) if name in line else None)
    assert len(json.loads((tmp_path / "two" / "status.json").read_text())["pids"]) == 2


@pytest.mark.long
def test_stream_goes_on_from_two_processes_to_one_and_back(flags, run_pretrain, tmp_path: Path):
    sizes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    flags |= STREAMED | {
        "model_config": json.dumps(json.loads(flags["model_config"]) | sizes),
        "save_steps": 2,
        "logging_steps": 1,
    }
    run_pretrain(flags)
    parts = flags | {"output_dir": tmp_path / "parts", "resume_from_checkpoint": "latest"}
    # A schedule for all six updates, left after two of them, twice.
    launch(parts, processes=2)
    for step in (2, 4):
        for later in (tmp_path / "parts" / "checkpoints").glob("step-*"):
            if later.name > f"step-{step:08d}":
                shutil.rmtree(later)
        (run_pretrain if step == 2 else lambda again: launch(again, processes=2))(parts)
    one, two = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("run", "parts"))
    for line, other in zip(one, two, strict=True):
        assert line.get("data_digest") == other.get("data_digest")
        assert line.get("corpora") == other.get("corpora")
        assert line.get("loss") == (pytest.approx(other["loss"], rel=1e-5) if "loss" in line else None)


ONE_RANK_FAILS = """
import os
import pretrain
import recipe.data.corpora
import recipe.data.streaming
from recipe.base.errors import run_script

recipe.data.corpora.RETRY_SECONDS = ()
recipe.data.streaming.REFILL_CHARACTERS = 2000
records = recipe.data.corpora.LocalSource.records
count = 0

def failing(self, shard, first, part):
    global count
    for index, text in records(self, shard, first, part):
        count += 1
        if os.environ["RANK"] == "1" and count > 400:
            raise ConnectionError("the line is down")
        yield index, text

recipe.data.corpora.LocalSource.records = failing
run_script(pretrain.main)
"""


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_all_ranks_save_and_stop_when_one_has_no_more_data(flags, tmp_path: Path, workers: int):
    script = tmp_path / "fails.py"
    script.write_text(ONE_RANK_FAILS)
    flags |= STREAMED | {
        "max_steps": 10_000,
        "save_steps": 10_000,
        "logging_steps": 1,
        "dataloader_num_workers": workers,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *command_line(flags)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode != 0
    assert "corpus 'sample'" in result.stderr
    assert "the line is down" in result.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["step"] > 2
    assert (tmp_path / "run" / "checkpoints" / f"step-{status['step']:08d}").is_dir()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_prepare_only_makes_the_stores_and_stops(flags, run_pretrain, tmp_path: Path, processes: int):
    prepared = flags | {"prepare_only": "true", "token_store_dir": tmp_path / "stores"}
    run_pretrain(prepared) if processes == 1 else launch(prepared, processes)
    (store,) = (tmp_path / "stores").iterdir()
    assert (store / "shard-00000.arrow").exists()
    assert list(store.glob("full_sentences-32-*/shard-00000/segments.bin"))
    assert not (tmp_path / "run").exists()


def test_training_goes_on_from_a_prepared_store_without_the_text(flags, run_pretrain, tmp_path: Path, texts):
    text = write_jsonl(tmp_path / "mine.jsonl", texts)
    flags |= {"token_store_dir": tmp_path / "stores"}
    run_pretrain(flags | {"corpora": json.dumps([{"name": "mine", "path": str(text)}])})
    text.unlink()
    (store,) = (tmp_path / "stores").iterdir()
    run_pretrain(
        flags | {"corpora": json.dumps([{"name": "mine", "path": str(store)}]), "output_dir": tmp_path / "two"}
    )
    assert_same_run(tmp_path / "run", tmp_path / "two")


def test_pretrained_model_goes_on_with_its_own_tokenizer(flags, finished_run, run_pretrain, tmp_path, tokenizer):
    # A learning rate that moves nothing: what comes out is what was loaded.
    domain = flags | {"output_dir": tmp_path / "domain", "model_name_or_path": tmp_path / "run" / "model"}
    domain |= {"learning_rate": 1e-12, "seed": 7, "max_seq_length": 40}
    del domain["tokenizer_name"], domain["model_config"]
    run_pretrain(domain)
    before, after = weights(tmp_path / "run"), weights(tmp_path / "domain")
    assert all(torch.allclose(before[name], after[name], atol=1e-8) for name in before)
    exported = AutoTokenizer.from_pretrained(tmp_path / "domain" / "model")
    assert exported.get_vocab() == tokenizer.get_vocab()
    assert exported.model_max_length == 40  # more than before
    assert [line["step"] for line in read_lines(tmp_path / "domain" / "metrics.jsonl") if "loss" in line] == [2, 4, 6]


def test_existing_run_is_refused(flags, finished_run, run_pretrain):
    with pytest.raises(UserError, match="already holds a run"):
        run_pretrain(flags)


def test_resume_with_another_identity_names_the_fields(flags, finished_run, run_pretrain):
    changed = flags | {"resume_from_checkpoint": "latest", "seed": 7, "mlm_probability": 0.2, "max_steps": 8}
    with pytest.raises(UserError) as caught:
        run_pretrain(changed)
    assert "`seed`: 42 before, 7 now" in str(caught.value)
    assert "`mlm_probability`: 0.15 before, 0.2 now" in str(caught.value)
    assert "max_steps" not in str(caught.value)


def test_resume_with_changed_data_is_refused(flags, run_pretrain, tmp_path: Path, texts):
    path = write_jsonl(tmp_path / "mine.jsonl", texts)
    flags |= {"corpora": json.dumps([{"name": "mine", "path": str(path)}])}
    run_pretrain(flags)
    write_jsonl(path, [texts[1], texts[0], *texts[2:]])
    with pytest.raises(UserError, match=r"`mine` of `data`: \[120, "):
        run_pretrain(flags | {"resume_from_checkpoint": "latest"})


def test_resume_of_a_stream_whose_files_have_other_times_is_told(flags, run_pretrain, tmp_path: Path, texts, capsys):
    path = write_jsonl(tmp_path / "mine.jsonl", texts)
    flags |= {"corpora": json.dumps([{"name": "mine", "path": str(path)}]), "streaming": "true", "num_lanes": 4}
    flags |= {"resume_from_checkpoint": "latest", "shuffle_buffer_size": 8}
    run_pretrain(flags | {"max_steps": 3})
    run_pretrain(flags | {"max_steps": 4})
    assert "other times" not in capsys.readouterr().out
    os.utime(path, (0, 0))
    run_pretrain(flags | {"max_steps": 5})
    assert "warning: corpus mine has other times or another commit" in capsys.readouterr().out


def test_what_may_change_on_resume_changes(flags, finished_run, run_pretrain, tmp_path: Path, capsys):
    more = {"resume_from_checkpoint": "latest", "max_steps": 9, "per_device_train_batch_size": 2, "save_steps": 9}
    run_pretrain(flags | more)
    assert read_state(tmp_path / "run")["step"] == 9
    assert "changed since the checkpoint: `max_steps` 6 -> 9" in capsys.readouterr().out


def test_learning_rate_may_change_on_resume(flags, finished_run, run_pretrain, tmp_path: Path):
    run_pretrain(flags | {"resume_from_checkpoint": "latest", "max_steps": 9, "learning_rate": 5e-3})
    last = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line][-1]
    assert last["learning_rate"] == pytest.approx(5e-3 / 7)


def test_going_back_and_past_the_end_are_told_apart(flags, finished_run, run_pretrain, tmp_path: Path):
    with pytest.raises(UserError, match=r"`max_steps` \(4\) is less than the updates done"):
        run_pretrain(flags | {"resume_from_checkpoint": "latest", "max_steps": 4})
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    before = learning(tmp_path / "run" / "metrics.jsonl")
    run_pretrain(flags | {"resume_from_checkpoint": checkpoint})
    assert learning(tmp_path / "run" / "metrics.jsonl") == before
    other = shutil.copytree(finished_run, tmp_path / "other")
    with pytest.raises(UserError, match="already holds a run"):
        run_pretrain(flags | {"output_dir": other, "resume_from_checkpoint": checkpoint})


def test_infinite_learning_rate_ends_as_diverged(flags, run_pretrain, tmp_path: Path):
    with pytest.raises(FloatingPointError, match="3 updates in a row"):
        run_pretrain(flags | {"learning_rate": 1e14, "max_nonfinite_updates": 3, "max_steps": 30, "save_steps": 2})
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_diverged_run_stops_and_says_where_to_go_on(flags, run_pretrain, tmp_path: Path, monkeypatch):
    import recipe.training

    real = recipe.training.train_step

    def diverge(*arguments):
        return real(*arguments) * float("nan")

    monkeypatch.setattr(recipe.training, "train_step", diverge)
    with pytest.raises(FloatingPointError, match="3 updates in a row"):
        run_pretrain(flags | {"max_nonfinite_updates": 3, "save_steps": 2})
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "step-00000002" in status["reason"]


@pytest.mark.parametrize("place", ["export_model", "write_card", "Publisher.publish", "Publisher.finish"])
def test_run_whose_end_fails_says_so_and_is_finished_by_the_same_command(
    flags, run_pretrain, tmp_path: Path, monkeypatch, place
):
    def crash(*arguments, **values):
        raise OSError(28, "No space left on device")

    flags |= {"resume_from_checkpoint": "latest"}
    with monkeypatch.context() as patch:
        patch.setattr(f"recipe.session.{place}", crash)
        with pytest.raises(UserError, match=r"all 6 updates are done and saved.*No space left.*latest finishes it"):
            run_pretrain(flags)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["saved_step"]) == ("failed", 6, 6)
    assert "No space left" in status["reason"]
    run_pretrain(flags)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("complete", None)
    assert (
        status["loss"]
        == [line["loss"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line][-1]
    )
    assert (tmp_path / "run" / "model" / "README.md").exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            torch.OutOfMemoryError("no room"),
            r"`per_device_eval_batch_size` is 4, .*too small for it \(no room\); give less",
        ),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
)
@pytest.mark.parametrize(("works", "step", "saved"), [(0, 0, None), (1, 3, 3)])
def test_evaluation_that_fails_costs_no_update(
    flags, run_pretrain, tmp_path: Path, monkeypatch, error, expected, works, step, saved
):
    calls = itertools.count()

    def fail(batch, device):
        if next(calls) < works * 3:  # micro-batches of an evaluation
            return batch
        raise error

    flags |= {"save_steps": 100, "resume_from_checkpoint": "latest"}
    with monkeypatch.context() as patch:
        patch.setattr("recipe.monitoring.to_device", fail)
        with pytest.raises((UserError, OSError), match=expected):
            run_pretrain(flags)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["saved_step"]) == ("failed", step, saved)
    run_pretrain(flags)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "complete"


def test_crash_while_a_run_is_built_is_noted(flags, run_pretrain, tmp_path: Path, monkeypatch):
    def crash(*arguments):
        raise RuntimeError("the device is broken")

    monkeypatch.setattr("recipe.session.prepare", crash)
    with pytest.raises(RuntimeError, match="the device is broken"):
        run_pretrain(flags)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "RuntimeError: the device is broken")


def test_refused_resume_leaves_the_status_of_the_run(flags, finished_run, run_pretrain, texts, tmp_path: Path):
    before = (finished_run / "status.json").read_bytes()
    changed = write_jsonl(tmp_path / "changed.jsonl", texts[1:])
    corpora = json.dumps([{"name": "sample", "path": str(changed)}])
    with pytest.raises(UserError, match="is of another experiment"):
        run_pretrain(flags | {"corpora": corpora, "resume_from_checkpoint": "latest"})
    assert (finished_run / "status.json").read_bytes() == before


def losses(run: Path) -> list[float]:
    return [line.get("loss") or line["eval_loss"] for line in read_lines(run / "metrics.jsonl")]


@pytest.mark.long
def test_compiled_run_and_recomputed_activations_learn_the_same(flags, run_pretrain, tmp_path: Path, capsys):
    """Rows without padding and rows with some, in training and in evaluation: a graph each."""
    flags |= {"model_config": json.dumps(SMALL_MODEL | {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0})}
    run_pretrain(flags)
    plain = losses(tmp_path / "run")
    for name in ("torch_compile", "gradient_checkpointing"):
        run_pretrain(flags | {name: True, "output_dir": tmp_path / name})
        assert losses(tmp_path / name) == pytest.approx(plain, rel=1e-4)
        assert weights(tmp_path / name).keys() == weights(tmp_path / "run").keys()
    assert "nothing compiles here" not in capsys.readouterr().out


@pytest.mark.long
def test_run_goes_on_where_nothing_compiles(flags, tmp_path: Path):
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [sys.executable, "pretrain.py", *command_line(flags | {"torch_compile": True})]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "warning: `torch_compile` is true, and nothing compiles here" in result.stdout
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "complete"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"corpora": '[{"name": "a", "path": "no/such/file.jsonl"}]'}, "no/such/file.jsonl does not exist"),
        ({"max_seq_length": 600}, "`max_seq_length` (600) needs `max_position_embeddings` >= 602, got 514"),
        ({"phases": "[{steps: 5}]"}, "`phases` have 5 updates together, and `max_steps` is 6: change the `steps`"),
        ({"model_config": '{"vocab_size": 10}'}, "the tokenizer has 400 entries"),
        ({"tokenizer_name": "no/such/tokenizer"}, "`tokenizer_name` is no/such/tokenizer"),
        ({"resume_from_checkpoint": "no/such/checkpoint"}, "there is no such checkpoint"),
        ({"output_dir": __file__}, "is a file"),
        ({"model_config": '{"num_attention_heads": 0}'}, "`num_attention_heads` is 0"),
        ({"model_config": '{"hidden_act": "foo"}'}, "no model can be built"),
        ({"model_config": '{"attn_implementation": "eager"}'}, "has `attn_implementation: eager`; leave it out"),
        ({"mlm_probability": 0.01}, "less than one masked token"),
    ],
)
def test_bad_input_leaves_nothing_behind(flags, run_pretrain, tmp_path: Path, changes, expected):
    with pytest.raises(UserError) as caught:
        run_pretrain(flags | changes)
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_script_prints_the_error_alone(flags):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "pretrain.py", *command_line(flags | {"max_steps": 0})]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.strip() == "error: `max_steps` is 0; give 1 or more"
