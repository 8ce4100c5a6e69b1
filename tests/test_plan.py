"""What --dry_run prints, and when it ends in an error."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import datasets
import pytest

import recipe.plan
from recipe.arguments import PretrainArguments, parse_config
from recipe.base.errors import UserError
from recipe.modeling.model import build_config, model_flops_per_token
from recipe.plan import ASSUMED_FROM, GPUS, Hardware, describe_time, find_hardware, find_mfu
from testing.helpers import ROOT, SAMPLE, write_jsonl

LONG = "But soft what light through yonder window breaks it is the east and Juliet is the sun."
PLAN = {"dry_run": "true"}
H200 = {"num_gpus": 2, "gpu": "h200"}
LARGE = sorted((ROOT / "recipe" / "configs" / "pretrain").rglob("*.yaml"))
LARGE = [path for path in LARGE if path.stem != "tiny"]


@pytest.fixture
def plan(run_pretrain, flags, capsys):
    """Plan a small run; what was printed, and the error at the end, if there was one."""

    def run(**changes) -> tuple[dict[str, str], str | None]:
        error = None
        try:
            run_pretrain(flags | PLAN | changes)
        except UserError as caught:
            error = str(caught)
        lines = capsys.readouterr().out.splitlines()
        return dict(line.split(": ", 1) for line in lines if ": " in line), error

    return run


def test_plan_of_this_machine_has_all_and_leaves_nothing(plan, tmp_path: Path):
    lines, error = plan()
    assert error is None
    for name in ("output_dir", "tokenizer", "model", "batch", "corpus sample", "data", "disk", "memory", "kernels"):
        assert f"ok       {name}" in lines, name
    assert "8 blocks of 32 = 1 process x 4 a micro-batch x 2 accumulated" in lines["update"]
    assert "CPU" in lines["time"]
    assert "the same command without --dry_run" in lines["next"]
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob("**/*.arrow"))


def test_plan_for_gpus_counts_hours_and_price(plan):
    lines, error = plan(**H200, price_per_gpu_hour=3, max_steps=10**14)
    assert error is None
    found = re.search(r"at 42% \(measured on NVIDIA H200 .*; ([\d,]+) GPU-hours, at 3 each ([\d,]+)", lines["time"])
    hours, price = (float(number.replace(",", "")) for number in found.groups())
    flops = float(re.search(r"([\d.e+]+) FLOPs", lines["run"])[1])
    assert hours == pytest.approx(flops / 736e12 / 0.416 / 3600, rel=0.01)
    assert price == pytest.approx(3 * hours, rel=0.01)
    assert "of 141 GB" in lines["ok       memory"]
    assert "2 processes x 4" in lines["update"]
    assert "unknown  kernels" in lines


def test_plan_by_hours_says_how_many_updates_fit(plan):
    hours = {"schedule_by": "hours", "max_train_hours": 2, "warmup_steps": 0.06, "price_per_gpu_hour": 3}
    lines, error = plan(**H200, **hours, max_steps=10**12)
    assert error is None
    assert lines["run"].startswith("at most 1,000,000,000,000 updates")
    assert "0.001 after 6% of the run as warmup, then linearly to zero, by the share of 2 hours" in lines["run"]
    assert lines["time"].startswith("2:00:00 on 2 x H200")
    assert "4 GPU-hours, at 3 each 12" in lines["time"]
    assert "passes, at most" in lines
    seconds, updates = re.search(
        r"([\d.e-]+) s an update.* 2 hours are about ([\d,]+) updates;", lines["time"]
    ).groups()
    assert float(seconds) * int(updates.replace(",", "")) == pytest.approx(7200, rel=0.01)
    assert "`max_steps` (100) would end the run before its schedule" in plan(**H200, **hours, max_steps=100)[0]["time"]


def test_every_problem_is_named_with_how_to_mend_it(plan, texts, tmp_path: Path):
    good = write_jsonl(tmp_path / "good.jsonl", texts)
    corpora = [{"name": "bad", "path": "no/such.jsonl"}, {"name": "good", "path": str(good)}]
    lines, error = plan(
        corpora=json.dumps(corpora), tokenizer_name="no/such", train_batch_size=9, num_gpus=2, gpu="h200"
    )
    assert "no/such.jsonl does not exist" in lines["problem  corpus bad"]
    assert "make one by train_tokenizer.py" in lines["problem  tokenizer"]
    assert "`train_batch_size` is 9; which 2 processes do not divide: give 10" in lines["problem  batch"]
    assert "tokens" in lines["ok       corpus good"]
    assert error == "3 of the above are problems"


def test_plan_is_made_before_there_is_a_tokenizer(plan):
    lines, _ = plan(tokenizer_name="no/such", **H200)
    assert "50,265 entries" in lines["model"]
    assert "times" in lines["passes"]
    assert "GPU-hours" in lines["time"]


def test_memory_that_does_not_suffice_is_a_problem(plan):
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 8, "intermediate_size": 4096}
    long = {"model_config": json.dumps(sizes), "max_seq_length": 512, "train_batch_size": 1024}
    lines, error = plan(**long, per_device_train_batch_size=512, gpu="a100-40gb")
    remedy = re.search(r"give --per_device_train_batch_size (\d+) or less", lines["problem  memory"])
    assert error == "1 of the above is a problem"
    lines, error = plan(**long, per_device_train_batch_size=2 ** (int(remedy[1]).bit_length() - 1), gpu="a100-40gb")
    assert error is None


def test_a_full_disk_is_a_problem(plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=10_000))
    lines, error = plan(token_store_dir=tmp_path / "stores")
    assert "`save_total_limit` is 3" in lines["problem  disk"]
    assert "set `token_store_dir`" in lines["problem  data"]
    assert error == "2 of the above are problems"


def test_passes_are_those_of_the_run(plan, run_pretrain, flags, capsys, tmp_path: Path):
    corpora = [
        {"name": name, "path": str(SAMPLE / f"{name}.jsonl.gz"), "weight": weight}
        for name, weight in (("novels", 1), ("tales", 3))
    ]
    flags |= {"corpora": json.dumps(corpora), "max_steps": 4000, "token_store_dir": tmp_path / "stores"}
    flags |= {"preprocessing_num_workers": 1}

    def passes(lines: dict[str, str]) -> list[float]:
        return [float(number) for number in re.findall(r"([\d.]+) times", lines["passes"])]

    estimated = passes(plan(**flags)[0])
    run_pretrain(flags | {"prepare_only": "true"})
    blocks = re.findall(r"corpus \w+: .* ([\d,]+) blocks", capsys.readouterr().out)
    lines, _ = plan(**flags)
    assert "in a token store" in lines["ok       corpus tales"]
    assert lines["ok       data"] == "all token stores are there"
    counted = passes(lines)
    assert estimated == pytest.approx(counted, rel=0.2)
    sizes = [int(number.replace(",", "")) for number in blocks]
    assert counted == pytest.approx([0.25 * 4000 * 8 / sizes[0], 0.75 * 4000 * 8 / sizes[1]], rel=0.01)


def test_right_to_push_is_tried(plan):
    lines, error = plan(push_to_hub="true", hub_model_id="ann/run", license="mit")
    assert "HF_HUB_OFFLINE is set" in lines["problem  hub"]
    assert error == "1 of the above is a problem"


def test_stream_is_opened(plan):
    lines, error = plan(streaming="true", num_lanes=4, shuffle_buffer_size=64)
    assert error is None
    assert "4 lanes, 64 blocks held back for shuffling" in lines["ok       data"]
    lines, error = plan(streaming="true", num_lanes=4, shuffle_buffer_size=64, eval_blocks=100_000)
    assert "`eval_blocks` (100000) takes all of corpus" in lines["problem  data"]


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_text_that_is_all_left_out_is_named(run_pretrain, flags, texts, tmp_path: Path, streaming: str):
    """340 lines are one document, of which one line is of a test set."""
    (tmp_path / "lines.txt").write_text("\r\n".join([*texts, LONG]))
    (tmp_path / "dev.tsv").write_text(LONG)
    flags |= {"decontaminate_against": json.dumps([str(tmp_path / "dev.tsv")]), "num_lanes": 2, "streaming": streaming}
    flags |= {"shuffle_buffer_size": 16, "token_store_dir": tmp_path / "stores"}
    with pytest.raises(UserError, match=r"contaminated.* A document with words of .* `sample_by: line` or `parag"):
        run_pretrain(flags | {"corpora": json.dumps([{"name": "c", "path": str(tmp_path / "lines.txt")}])})
    run_pretrain(
        flags | {"corpora": json.dumps([{"name": "c", "path": str(tmp_path / "lines.txt"), "sample_by": "line"}])}
    )
    assert (tmp_path / "run" / "model").is_dir()


def test_every_kind_of_file_is_opened(plan, texts, tmp_path: Path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts)
    write_jsonl(folder / "b.jsonl", texts)
    (folder / "c.txt").write_text(texts[0])
    (folder / "d.csv").write_text("text\n")
    corpora = {"corpora": json.dumps([{"name": "c", "path": str(folder)}])}
    lines, error = plan(**corpora)
    assert error is None
    assert "3 files (2 .jsonl, 1 .txt)" in lines["ok       corpus c"]
    assert "left out: 1 of unknown kind (d.csv)" in lines["ok       corpus c"]
    datasets.Dataset.from_dict({"text": texts[:3]}).to_parquet(folder / "e.parquet")
    datasets.Dataset.from_dict({"body": texts[:3]}).to_parquet(folder / "f.parquet")
    assert "f.parquet has no column 'text' among ['body']" in plan(**corpora)[0]["problem  corpus c"]
    (folder / "f.parquet").unlink()
    (folder / "g.json").write_text('[{"text": "one"}]')
    assert "g.json, line 1 is a list, not a JSON object" in plan(**corpora)[0]["problem  corpus c"]


def test_blocks_that_a_corpus_does_not_have_are_a_problem(plan, run_pretrain, flags):
    problem = plan(eval_blocks=100_000)[0]["problem  data"]
    assert re.search(r"`eval_blocks` \(100000\) takes 100,000 blocks of .* which has [\d,]+; lower it", problem)
    assert "too few for a single block" in plan(max_seq_length=400_000, eval_blocks=0)[0]["problem  data"]
    run_pretrain(flags | {"prepare_only": "true"})
    assert "takes 100,000 blocks" in plan(eval_blocks=100_000)[0]["problem  data"], "the same once they are counted"


def test_view_that_is_damaged_is_a_problem(plan, run_pretrain, flags, tmp_path: Path):
    stores = {"token_store_dir": tmp_path / "stores"}
    run_pretrain(flags | stores | {"prepare_only": "true"})
    assert plan(**stores)[1] is None
    (table,) = (tmp_path / "stores").glob("*/full_sentences-32-*/shard-00000/segments.bin")
    table.write_bytes(table.read_bytes()[:-8])
    assert "segments.bin" in plan(**stores)[0]["problem  corpus sample"]


def test_stores_that_cannot_be_written_are_a_problem(plan, run_pretrain, flags, tmp_path: Path):
    (tmp_path / "file").touch()
    stores = {"token_store_dir": tmp_path / "file" / "stores"}
    problem = plan(**stores)[0]["problem  data"]
    assert re.search(r"`token_store_dir` \S+file.* is a file; name another folder", problem)
    with pytest.raises(UserError, match=r"`token_store_dir`"):
        run_pretrain(flags | stores)


def test_plan_has_hours_of_preparation_and_seconds_of_an_update(plan, run_pretrain, flags, tmp_path: Path):
    stores = {"token_store_dir": tmp_path / "stores"}
    lines, _ = plan(**stores)
    assert re.search(r"^0:\d\d:\d\d by one process here, at .*B of text a second .* take", lines["preparation"])
    assert re.search(r"[\d.e-]+ s an update", lines["time"])
    run_pretrain(flags | stores | {"prepare_only": "true"})
    assert "preparation" not in plan(**stores)[0]
    assert "preparation" not in plan(streaming="true", num_lanes=4)[0]


def test_passes_without_sense_are_warned_of(plan):
    lines, _ = plan(max_steps=10**7)
    times = re.search(r"([\d.]+)K passes over corpus sample, .*: `max_steps` ([\d,]+) makes", lines["warning"])
    steps = int(times[2].replace(",", ""))
    assert pytest.approx(float(times[1]) * 1000 * steps / 10**7, rel=0.01) == 40
    assert "passes over" not in plan(max_steps=steps)[0]["warning"]


def test_micro_batch_that_leaves_the_device_empty_is_remarked(plan):
    lines, _ = plan(**H200, train_batch_size=96, per_device_train_batch_size=4)
    assert "--per_device_train_batch_size 48 fits too" in lines["ok       memory"]
    assert "fits too" not in plan(**H200, train_batch_size=96, per_device_train_batch_size=48)[0]["ok       memory"]
    assert "fits too" not in plan(train_batch_size=96)[0]["ok       memory"], "what is best on a CPU is not known"


@pytest.mark.parametrize(
    ("changes", "remedies"),
    [
        ({"num_gpus": 8, "dataloader_num_workers": 3}, "--dataloader_num_workers 2, or --num_lanes 24,"),
        ({"num_gpus": 32, "dataloader_num_workers": 1}, "--num_lanes 32,"),
        ({"num_gpus": 64, "dataloader_num_workers": 2}, "`streaming: false`"),
    ],
)
def test_lanes_that_do_not_fit_get_their_remedy(plan, changes, remedies: str):
    stream = {"streaming": "true", "num_lanes": 16, "train_batch_size": 96, "per_device_train_batch_size": 1}
    lines, _ = plan(**stream, gpu="h200", **changes)
    assert f"give {remedies}" in lines["problem  batch"]
    flag = re.search(r"give --(\w+) (\d+)", lines["problem  batch"])
    if flag:
        changed = {**stream, **changes, flag[1]: flag[2]}
        assert "`num_lanes`" not in plan(**changed, gpu="h200")[0].get("problem  batch", "")


def test_run_that_is_there_is_seen(plan, finished_run):
    assert "already holds a run" in plan()[0]["problem  output_dir"]
    lines, error = plan(resume_from_checkpoint="latest", max_steps=9)
    assert "6 of 9 updates done" in lines["ok       checkpoint"]
    assert error is None
    assert "another experiment" in plan(resume_from_checkpoint="latest", seed=1)[0]["problem  checkpoint"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gpu": "h20"}, "did you mean `h200`?"),
        ({"num_gpus": 8}, "this machine has no GPU; name a kind, --gpu h200 say"),
        ({"price_per_gpu_hour": 2}, "this machine has no GPU"),
        ({"num_gpus": 0}, "`num_gpus` is 0; give 1 or more"),
        ({"dry_run": "false", "gpu": "h200"}, "`gpu` is h200; it is for a plan only: add --dry_run"),
    ],
)
def test_plan_for_what_is_not_there_is_refused(plan, changes, expected):
    lines, error = plan(**changes)
    assert expected in error
    assert "time" not in lines


def report(device: str, precision: str, mflops: float, mfu: float) -> dict:
    return {"device": device, "precision": precision, "mflops_per_token": mflops, "mfu": mfu}


def test_measured_mfus_are_the_best_of_the_benchmarks():
    reports = json.loads((ROOT / "benchmarks/results/throughput.json").read_text()).values()
    best: dict[tuple[str, str, float], float] = {}
    for each in reports:
        if each["arguments"].get("dropout", 0.1) == 0.1:
            kind = each["device"], each["arguments"]["precision"], each["model_mflops_per_token"]
            best[kind] = max(best.get(kind, 0), each["sides"]["ours"]["mfu"])
    assert json.loads(recipe.plan.MEASURED.read_text()) == [report(*kind, mfu) for kind, mfu in best.items()]


def test_mfu_is_that_measured_on_such_a_device_at_the_nearest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reports = [
        report("NVIDIA H200", "bf16", 567, 0.5),
        report("NVIDIA H200", "bf16", 1951, 0.6),
        report("NVIDIA H200", "no", 567, 0.7),
        report("NVIDIA A100-SXM4-80GB", "bf16", 567, 0.3),
        report("CPU, 2 cores, AVX512", "bf16", 567, 0.2),
    ]
    path = tmp_path / "measured_mfu.json"
    path.write_text(json.dumps(reports))
    monkeypatch.setattr(recipe.plan, "MEASURED", path)

    def mfu(name: str, precision: str = "bf16", mflops: float = 600.0) -> tuple[float, str]:
        return find_mfu(Hardware(name, 1, 0, 0, precision, True), mflops * 1e6)

    assert mfu("H200")[0] == 0.5
    assert mfu("H200", mflops=1500)[0] == 0.6
    assert mfu("NVIDIA H200", precision="no")[0] == 0.7
    assert mfu("A100-80GB") == (0.3, "measured on NVIDIA A100-SXM4-80GB at 567 MFLOPs a token")
    assert mfu("CPU, 2 cores, AVX512")[0] == 0.2
    assert mfu("H100")[1] == mfu("A100-40GB")[1] == ASSUMED_FROM


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_shipped_config_says_what_the_plan_says(path: Path, accelerator):
    assert "h200" in GPUS
    head = path.read_text().split("\n\n")[0]
    files = re.findall(r"--config (\S+)", head)  # an overlay's command has its base too
    assert files[-1] == str(path.relative_to(ROOT))
    args = parse_config(PretrainArguments, "test", [f"--config={ROOT / file}" for file in files])
    args = dataclasses.replace(args, dry_run=True, gpu="h200")
    config = build_config(args.model_config, None, None, args.max_seq_length, args.model_type)
    flops = model_flops_per_token(config, args.max_seq_length, args.mlm_probability, args.predicts_pairs)
    assert f"x {flops / 1e6:.1f} MFLOPs" in head
    line = describe_time(args, config, find_hardware(args, accelerator))
    assert re.search(r"([\d,.]+) GPU-hours", line)[1] == re.search(r"([\d,.]+) H200-hours", head)[1]
