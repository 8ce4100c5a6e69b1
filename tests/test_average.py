"""The mean of checkpoints: by hand, evaluated, exported, and refused where there is none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

import recipe.average
from recipe.average import average_run, parse_options
from recipe.base.errors import UserError
from recipe.base.hashing import file_checksum
from recipe.publish.card import build_card
from testing.glue_data import write_rte
from testing.helpers import read_lines, reset_accelerate


@pytest.fixture
def average(monkeypatch) -> Callable[..., Path]:
    """The command, which returns the folder that it makes."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run_average(run: Path, *options: str) -> Path:
        reset_accelerate()
        before = set(run.glob("averages/*"))
        average_run(*parse_options([str(run), *options]))
        reset_accelerate()
        [folder] = set(run.glob("averages/*")) - before
        return folder

    yield run_average
    reset_accelerate()


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def rewrite(path: Path, weights: dict[str, torch.Tensor] | None = None, **identity: object) -> None:
    """Change a checkpoint, and its manifest with it."""
    if weights:
        save_file(load_file(path / "model.safetensors") | weights, path / "model.safetensors", {"format": "pt"})
    state = json.loads((path / "state.json").read_text())
    state["identity"] |= identity
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest:
        manifest[name] = {"bytes": (path / name).stat().st_size, "sha256": file_checksum(path / name)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def check_mean(run: Path, folder: Path, steps: list[int]) -> dict:
    """Check what an average has to be; return its average.json."""
    checkpoints = [load_file(checkpoint(run, step) / "model.safetensors") for step in steps]
    mean = load_file(folder / "model.safetensors")
    assert mean.keys() == checkpoints[-1].keys()
    for name, tensor in mean.items():
        assert torch.equal(tensor, torch.stack([one[name].double() for one in checkpoints]).mean(0).float()), name
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    record = json.loads((folder / "average.json").read_text())
    evaluation = [line for line in read_lines(run / "metrics.jsonl") if line.get("eval_loss") is not None][-1]
    assert record["steps"] == steps
    assert record["last_evaluation"]["eval_loss"] == pytest.approx(evaluation["eval_loss"], abs=1e-6)
    assert record["last_evaluation"]["unigram_loss"] == evaluation["unigram_loss"]
    assert record["evaluation"]["eval_loss"] != record["last_evaluation"]["eval_loss"]
    return record


def test_mean_is_evaluated_and_exported_with_its_card(finished_run, average, capsys):
    folder = average(finished_run, "--last", "2")
    record = check_mean(finished_run, folder, [3, 6])
    assert folder.name == "step-00000006-mean-of-2"
    assert {path.name for path in folder.iterdir()} == {
        "average.json",
        *(path.name for path in (finished_run / "model").iterdir()),
    }
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_text() == (finished_run / "model" / name).read_text()
    mean, last = (record[name]["eval_loss"] for name in ("evaluation", "last_evaluation"))
    assert f"held-out loss {mean:.4f} of the mean, {last:.4f} of step-00000006 alone" in capsys.readouterr().out
    card = (folder / "README.md").read_text()
    assert "# run step-00000006-mean-of-2" in card
    assert "Its weights are the mean of those after 3 and 6 updates." in card
    assert f"Held-out loss {mean:.3f} nats a masked token, perplexity " in card
    assert f"after 6 updates ({last:.3f} without averaging, " in card
    assert 'model="run/averages/step-00000006-mean-of-2"' in card
    assert "python -m recipe.average run --steps 3,6" in card
    assert "mean of" not in build_card(finished_run, finished_run / "model")


PAIRS = {"packing": "segment_pair", "objective": "next_sentence"}
KINDS = [
    ("bert", PAIRS),
    ("roberta", PAIRS),  # the pair head lies beside the model
    ("albert", {"packing": "sentence_order", "objective": "sentence_order"}),
    ("roberta", {"streaming": True, "num_lanes": 4, "eval_mlm_probability": 0.3}),
]


@pytest.mark.parametrize(("model_type", "changes"), KINDS)
def test_every_model_mode_and_objective_is_averaged(model_type, changes, flags, run_pretrain, average, tokenizer_dirs):
    of_type = {"model_type": model_type, "tokenizer_name": tokenizer_dirs[model_type], "save_steps": 2}
    run_pretrain(flags | of_type | changes)
    check_mean(flags["output_dir"], average(flags["output_dir"], "--steps", "6,2"), [2, 6])


def test_run_under_way_is_averaged_as_its_checkpoints_are(flags, run_pretrain, average):
    """The card tells of the updates that were averaged, and nothing of the run's folder is locked or changed."""
    run_pretrain(flags | {"save_steps": 2})
    run = flags["output_dir"]
    (run / "status.json").write_text('{"state": "running", "step": 6, "saved_step": 6}')
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    card = (average(run, "--steps", "2,4") / "README.md").read_text()
    assert "Its weights are the mean of those after 2 and 4 updates." in card
    assert "| updates | 4 of 6 |" in card
    assert {path: path.stat().st_mtime_ns for path in run.iterdir() if path.name != "averages"} == before


def test_without_text_there_is_a_mean_if_it_is_asked_for_without_evaluation(finished_run, average, tmp_path):
    gone = json.dumps([{"name": "sample", "path": str(tmp_path / "gone.jsonl")}])
    config = (finished_run / "config.yaml").read_text()
    path = next(line for line in config.splitlines() if line.strip().startswith("path: "))
    (finished_run / "config.yaml").write_text(config.replace(path, f"  path: {tmp_path}/gone.jsonl"))
    with pytest.raises(UserError, match=r"(?s)corpus 'sample'.*gone\.jsonl.*or give --eval_blocks 0"):
        average(finished_run, "--last", "2")
    folder = average(finished_run, "--last", "2", "--eval_blocks", "0", "--corpora", gone)
    assert json.loads((folder / "average.json").read_text())["evaluation"] is None
    assert "Held-out loss" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--last", "1"], "`--last` is 1; a mean takes two or more"),
        (["--last", "3"], r"`--last` is 3; .* of the updates 3, 6; .*`save_total_limit` \(default: 3\): raise it"),
        (["--steps", "6"], "`--steps` is 6; a mean takes two or more"),
        (["--steps", "3,5"], "`--steps` is 3,5; .* has checkpoints of the updates 3, 6"),
        (["--steps", "3,6,6"], "give each update once"),
        (["--steps", "3,six"], "write the updates with commas"),
        (["--last", "2", "--sed", "1"], "no field `sed`"),
    ],
)
def test_wrong_options_are_refused(finished_run_of_session, options, message):
    with pytest.raises(UserError, match=message):
        parse_options([str(finished_run_of_session), *options])


def test_folder_without_a_run_or_two_checkpoints_is_refused(finished_run, tmp_path):
    with pytest.raises(UserError, match=r"RUN .* is no run: it has no config.yaml; name the `output_dir`"):
        parse_options([str(tmp_path / "elsewhere"), "--last", "2"])
    with pytest.raises(UserError, match=r"no config.yaml, in the run .*, which is complete and has .*step-00000003"):
        parse_options([str(finished_run / "model"), "--last", "2"])
    shutil.rmtree(checkpoint(finished_run, 3))
    with pytest.raises(UserError, match=r"of the updates 6, and a mean takes two .*`save_total_limit`"):
        parse_options([str(finished_run), "--last", "2"])
    shutil.rmtree(finished_run / "checkpoints")
    with pytest.raises(UserError, match="of the updates none"):
        parse_options([str(finished_run), "--last", "2"])


def damage(path: Path) -> None:
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage, r"step-00000003 is damaged or gone \(model.safetensors has .* bytes"),
        (
            lambda path: rewrite(path, {"lm_head.bias": torch.zeros(7)}),
            r"lm_head.bias is F32 \[7\] in .*different models",
        ),
        (lambda path: rewrite(path, {"new": torch.zeros(7)}), r"new is F32 \[7\] in .*00003 and missing in .*00006"),
        (lambda path: rewrite(path, {"lm_head.bias": torch.full((400,), torch.nan)}), "lm_head.bias is not finite"),
        (lambda path: rewrite(path, seed=7), "(?s)step-00000003 is of another experiment.*`seed`: 7 before, 42 now"),
        (
            lambda path: rewrite(path, model_config={"num_attention_heads": 4}),
            "`num_attention_heads` of `model_config`",
        ),
        (lambda path: (path.parents[1] / "averages/step-00000006-mean-of-2").mkdir(parents=True), "is there already"),
    ],
)
def test_what_cannot_be_averaged_is_refused(finished_run, average, change, message):
    change(checkpoint(finished_run, 3))
    with pytest.raises(UserError, match=message):
        average(finished_run, "--last", "2")
    assert not list(finished_run.glob("averages/*/*"))


def test_another_run_than_the_checkpoints_is_refused(finished_run, average):
    with pytest.raises(UserError, match=r"(?s)step-00000006 is of another experiment.*`eval_blocks`: 10 before, 5 now"):
        average(finished_run, "--last", "2", "--eval_blocks", "5")


@pytest.mark.parametrize("moment", ["find_fault", "build_config"])
def test_checkpoint_that_is_removed_meanwhile_is_a_clear_error(finished_run, average, monkeypatch, moment):
    function = getattr(recipe.average, moment)

    def remove(*arguments: object) -> object:
        shutil.rmtree(checkpoint(finished_run, 3), ignore_errors=True)
        return function(*arguments)

    monkeypatch.setattr(recipe.average, moment, remove)
    with pytest.raises(UserError, match=r"is damaged or (gone|missing) .*step-00000003.*removes those beyond"):
        average(finished_run, "--last", "2")


def test_glue_results_reach_the_card_of_an_average_and_no_other(finished_run, average, run_glue, tmp_path):
    write_rte(tmp_path / "glue")
    config = finished_run / "config.yaml"
    pushed = {"push_to_hub": True, "hub_model_id": "ann/small", "license": "mit"}
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | pushed))
    folder, before = average(finished_run, "--last", "2"), (finished_run / "model" / "README.md").read_text()
    flags = {"output_dir": tmp_path / "out", "model_name_or_path": folder, "glue_dir": tmp_path / "glue"}
    flags |= {"tasks": "[rte]", "seeds": "[1]", "num_train_epochs": 1, "max_seq_length": 32}
    run_glue(flags | {"save_models": "true", "update_model_card": "true"})
    card, classifier = (folder / "README.md").read_text(), (tmp_path / "out/models/rte/README.md").read_text()
    assert "### GLUE" in card
    assert "Its weights are the mean of those after 3 and 6 updates." in card
    assert "ann/small" not in card.split("<details>")[0] + classifier
    assert "run/averages/step-00000006-mean-of-2" in classifier
    assert (finished_run / "model" / "README.md").read_text() == before
    assert not (finished_run / "hub").exists()


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left")


def test_full_disk_leaves_nothing(finished_run, average, monkeypatch):
    monkeypatch.setattr("recipe.base.files.free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match=r"a model of .* in .*averages.*, 1 KB free; free some"):
        average(finished_run, "--last", "2")
    monkeypatch.setattr("recipe.base.files.free_bytes", lambda _: 1e9)
    monkeypatch.setattr("recipe.average.write_card", full_disk)
    with pytest.raises(UserError, match=r"mean-of-2 cannot be written .*No space left"):
        average(finished_run, "--last", "2")
    assert not list(finished_run.glob("averages/*")) + list(finished_run.glob("averages/.*"))
