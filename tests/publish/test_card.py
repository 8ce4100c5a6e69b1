import ast
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from recipe.arguments import GlueArguments
from recipe.base.errors import UserError
from recipe.finetune.jobs import Job
from recipe.modeling.model import build_config, build_model, count_parameters
from recipe.publish.card import build_card, count_weights, write_card
from recipe.publish.glue_card import build_classifier_card
from recipe.publish.markdown import as_text, code_block
from testing.helpers import SMALL_MODEL, read_lines

ROW = {
    "task": "cola",
    "init": "pretrained",
    "metric": "matthews_correlation",
    "n": 5,
    "failed": 0,
    "official": True,
    "majority": 0.0,
    "device_seconds": 10.0,
    "published": 63.6,
    "learning_rate": 1e-5,
    "batch_size": 16,
    "median": 0.6123,
    "best": 0.62,
    "standard_deviation": 0.01,
    "metrics": {"matthews_correlation": 0.6123},
    "difference": -2.37,
}


@pytest.fixture
def run(finished_run: Path) -> Path:
    return finished_run


def add_glue(run: Path, **changes: object) -> None:
    summary = {"compare_with": "base", "tasks": [ROW | changes], "average": None, "average_without_wnli": None}
    config = {"num_train_epochs": 10, "seeds": [1, 2, 3, 4, 5], "max_seq_length": 512}
    (run / "model" / "glue.json").write_text(json.dumps({"summary": summary, "config": config}))


def change(run: Path, **values: object) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["environment"] |= values.pop("environment", {})
    (run / "config.yaml").write_text(yaml.safe_dump(config | values))


def test_figures_are_those_of_the_files(run, tokenizer):
    text = (run / "model" / "README.md").read_text()
    records = read_lines(run / "metrics.jsonl")
    held_out = [record for record in records if "eval_loss" in record][-1]
    train = [record for record in records if "tokens_per_second" in record]
    assert f"Held-out loss {held_out['eval_loss']:.3f} nats" in text
    assert f"perplexity {held_out['eval_perplexity']:,.2f}, after 6 updates" in text
    seen = train[-1]["corpora"]["sample"]
    assert f"| sample | local: text.jsonl | its size | {seen['tokens']:,} | {seen['passes']:.2f} |" in text
    assert "| updates | 6 of 6 |" in text
    assert f"{sorted(record['tokens_per_second'] for record in train)[1]:,.0f} tokens/s, median" in text
    hours = sum(2 * record["seconds_per_update"] for record in train) / 3600
    assert f"{hours:.3g} device-hours" in text
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert f"Commit of the recipe: {config['environment']['git_commit']}" in text
    parameters = count_parameters(build_model(build_config(SMALL_MODEL, None, tokenizer, 32), None))
    assert count_weights(run / "model") == parameters
    assert f"{parameters / 1000:.3g}K parameters" in text
    assert (run / "model" / "loss.png").read_bytes() == (run / "loss.png").read_bytes()


def test_metadata_pass_the_validation_of_the_hub_library(run):
    add_glue(run)
    change(run, push_to_hub=True, hub_model_id="ann/small", license="cc-by-4.0")
    text = build_card(run, run / "model")
    data = ModelCard(text).data  # parses `model-index`, and raises where it is not one
    results = {(result.dataset_type, result.metric_type): result.metric_value for result in data.eval_results}
    held_out = [record for record in read_lines(run / "metrics.jsonl") if "eval_loss" in record][-1]
    assert results == {
        ("held-out", "loss"): round(held_out["eval_loss"], 4),
        ("held-out", "perplexity"): round(held_out["eval_perplexity"], 3),
        ("nyu-mll/glue", "matthews_correlation"): 0.6123,
    }
    assert (data.model_name, data.language, data.license) == ("small", "en", "cc-by-4.0")
    assert 'pipeline("fill-mask", model="ann/small")' in text
    assert re.search(r"\| CoLA .*\| *61\.2 \|.*\| *63\.6 \| *-2\.4 \|", text)


def test_share_of_random_or_swapped_parts_is_told(run):
    assert "Of the pairs" not in build_card(run, run / "model")
    records = read_lines(run / "metrics.jsonl")
    for record in records:
        for counts in record.get("corpora", {}).values():
            counts["negative_pairs"] = 0.482
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for packing, kind in (("segment_pair", "have parts of two documents"), ("sentence_order", "are swapped")):
        change(run, packing=packing)
        assert f"Of the pairs, 48% (sample) {kind}." in build_card(run, run / "model")


def test_what_was_not_run_is_not_there(run):
    text = (run / "model" / "README.md").read_text()
    for missing in ("GLUE", "kWh", "under way", "Documents left out", "updates skipped", "None", "nan"):
        assert missing not in text.split("<details>")[0], missing
    records = [record for record in read_lines(run / "metrics.jsonl") if "eval_loss" not in record]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = build_card(run, run / "model")
    assert "Held-out loss" not in text
    assert "model-index" not in text
    (run / "metrics.jsonl").unlink()
    (run / "loss.png").unlink()
    text = build_card(run, run / "model")
    assert "tokens/s" not in text
    assert "loss.png" not in text


def test_results_on_other_data_are_no_glue_results(run):
    add_glue(run, official=False, published=None, difference=None)
    text = build_card(run, run / "model")
    assert "nyu-mll/glue" not in text.split("---")[1]
    assert "Not the official data" in text


def test_card_of_a_checkpoint_says_how_far_it_is(run):
    (run / "status.json").write_text(json.dumps({"step": 4}))
    text = build_card(run, run / "checkpoints" / "step-00000003")
    assert "**Training is under way:** 4 of 6 updates are done." in text
    assert "after 3 updates" in text


def test_run_of_older_code_has_a_card(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("license", "push_to_hub", "masking"):
        del config[name]
    for name in ("hub_sources", "changes"):
        del config["environment"][name]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "license" not in build_card(run, run / "model").split("---")[1]


@pytest.mark.parametrize("values", [{"corpora": [{"path": 3}]}, {"learning_rate": {}}, {"model_type": "odd"}])
def test_damaged_config_is_an_error_and_the_card_stays(run, values):
    before = (run / "model" / "README.md").read_bytes()
    change(run, **values)
    with pytest.raises(UserError, match="that the model card is made from"):
        write_card(run, run / "model")
    assert (run / "model" / "README.md").read_bytes() == before


def test_corpora_of_the_hub_are_linked_and_named_in_the_metadata(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    corpus = config["corpora"][0] | {"path": "wikimedia/wikipedia", "config_name": "20231101.en", "weight": 2.0}
    change(run, corpora=[corpus], environment={"hub_sources": ["wikimedia/wikipedia"]})
    text = build_card(run, run / "model")
    assert ModelCard(text).data.datasets == ["wikimedia/wikipedia"]
    assert "[wikimedia/wikipedia](https://huggingface.co/datasets/wikimedia/wikipedia) (20231101.en) | 2 |" in text


HOSTILE = (
    "| a |\n\n<b>x</b><script>y</script> `c` ``` [l](https://evil.example) ![i](x.png) _e_ **b** ~~s~~ $m$ &lt; "
    "<https://evil.example> www.evil.example WWW.evil.example a@evil.example \\| \\ # \u2028--- #"
)


def shown(markdown: str) -> list[tuple[list[str], str]]:
    """What a reader sees of each heading, paragraph or cell: kinds of markup in it, and its text."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    blocks = [token for token in parser.parse(markdown) if token.type in ("inline", "html_block", "fence")]
    parts = [[block] if block.children is None else block.children for block in blocks]
    return [([one.type for one in own if one.type != "text"], "".join(one.content for one in own)) for own in parts]


def test_what_users_have_named_shows_as_text(run):
    plain = " ".join(HOSTILE.split())
    config = yaml.safe_load((run / "config.yaml").read_text())
    corpora = [corpus | {"name": HOSTILE} for corpus in config["corpora"]]
    path = shutil.copytree(run, run.with_name(plain.replace("/", "")[:200]))
    sources = {"hub_sources": [HOSTILE]}
    change(path, corpora=corpora, language=HOSTILE, license=HOSTILE, model_name_or_path=HOSTILE, environment=sources)
    text = build_card(path, path / "model")
    data = ModelCard(text).data
    assert (data.license, data.language, data.model_name) == (HOSTILE, HOSTILE, path.name)
    parts = shown(text.split("\n---\n", 1)[1])
    assert ([], path.name) in parts  # the title
    assert ([], plain) in parts  # the cell of the corpus
    assert sum(plain in part and kinds in ([], ["link_open", "link_close"]) for kinds, part in parts) == 4
    links = [kinds for kinds, _ in parts if "link_open" in kinds]
    assert len(links) == 1  # to the paper
    markup = {kind for kinds, _ in parts for kind in kinds}
    assert markup <= {"link_open", "link_close", "image", "fence", "html_block", "code_inline", "softbreak"}
    assert sum(kinds == ["html_block"] for kinds, _ in parts) == 2  # around the config
    code, _, yaml_text = (part for kinds, part in parts if kinds == ["fence"])
    assert yaml.safe_load(yaml_text)["language"] == HOSTILE
    assert ast.literal_eval(code.split("model=")[1].split(")\n")[0]) == f"{path.name}/model"


def test_addresses_become_no_links():
    """By the rules of GitHub's Markdown, which the hub follows: it looks for `://`, `www.` and `@`."""
    text = as_text("http://a.b https://a.b www.a.b WWW.a.b a@b.c :smile: @user #1")
    assert not re.search(r"(?<!\\)[:@#]|www\.", text, re.IGNORECASE)
    assert as_text("books-2.0 (a/b), 5 % of 'x'") == "books-2.0 (a/b), 5 % of 'x'"


def test_code_with_fences_in_it_stays_one_block():
    code = "a\n```\n````yaml\n<b>"
    assert shown(code_block(code, "yaml")) == [(["fence"], code + "\n")]


def test_card_of_a_classifier_shows_names_as_text():
    config = asdict(GlueArguments(output_dir="out", model_name_or_path="models/<b>a_*b*"))
    config["environment"] = {"versions": {}, "device": "cpu", "python": "3", "git_commit": None}
    config["environment"]["hub_sources"] = ["models/<b>a_*b*"]
    result = {"metrics": {"matthews_correlation": 0.5}, "best_epoch": 1, "seconds": 1.0, "processes": 1}
    text = build_classifier_card(config, ROW, Job("cola", "pretrained", 1e-5, 16, 1), result, None)
    parts = shown(text.split("\n---\n", 1)[1])
    assert ([], "<b>a_*b*-cola") in parts
    assert ([], "models/<b>a_*b*") in parts


def test_only_ids_of_the_hub_are_told_in_full(run):
    """Of the cards and what is pushed with them: a name in place of each path, of this machine or another."""
    private = "/home/jane/clinic"
    config = yaml.safe_load((run / "config.yaml").read_text())
    corpora = [corpus | {"path": f"{private}/notes.jsonl"} for corpus in config["corpora"]]
    paths = {
        "corpora": corpora,
        "eval_corpora": [corpora[0] | {"path": f"{private}/held/*.txt"}],
        "decontaminate_against": [f"{private}/glue/*.tsv"],
        "output_dir": f"{private}/runs/x",
        "tokenizer_name": f"{private}/tokenizer",
        "token_store_dir": f"{private}/stores",
        "resume_from_checkpoint": f"{private}/runs/x/checkpoints/step-00000003",
    }
    for base, shown_as in ((f"{private}/base", "base"), (f"{private}/runs/y/model", "y/model"), ("my/texts", "texts")):
        change(run, **paths, model_name_or_path=base)
        text = build_card(run, run / "model")
        assert ModelCard(text).data.base_model is None
        assert f"pretrained from {shown_as} by" in text
        assert "| local: notes.jsonl |" in text
        for word in ("jane", "clinic", str(run.parent), "my/texts"):
            assert word not in text, word
    change(run, model_name_or_path="FacebookAI/roberta-base", environment={"hub_sources": ["FacebookAI/roberta-base"]})
    text = build_card(run, run / "model")
    assert ModelCard(text).data.base_model == "FacebookAI/roberta-base"
    assert "model_name_or_path: FacebookAI/roberta-base" in text


def test_schedule_is_told_as_it_was_over_resumes(run, run_pretrain, flags):
    assert "changed on the way" not in (run / "model" / "README.md").read_text()
    flags |= {"resume_from_checkpoint": "latest", "max_steps": 8, "learning_rate": 5e-4, "license": "mit"}
    run_pretrain(flags)
    run_pretrain(flags | {"max_steps": 9, "warmup_steps": 3})
    text = (run / "model" / "README.md").read_text()
    told = "after 6 updates max steps from 6 to 8; after 6 updates learning rate from 0.001 to 0.0005; "
    told += "after 8 updates max steps from 8 to 9; after 8 updates warmup steps from 2 to 3"
    assert f"| changed on the way | {told} |" in text
    # From before the last change, which has not been then.
    run_pretrain(flags | {"resume_from_checkpoint": run / "checkpoints" / "step-00000006"})
    text = (run / "model" / "README.md").read_text()
    assert "after 6 updates learning rate from 0.001 to 0.0005 |" in text


def test_card_that_is_no_run_s_is_not_to_be_updated(run, run_glue, small_model, tmp_path):
    from testing.glue_data import write_rte

    write_rte(tmp_path / "glue")
    (run / "metrics.jsonl").unlink()
    for model in (small_model, run / "model"):
        flags = {"output_dir": tmp_path / "out", "model_name_or_path": model, "glue_dir": tmp_path / "glue"}
        with pytest.raises(
            UserError, match=r"`update_model_card` is true, .* is not the `model` or an average of a run"
        ):
            run_glue(flags | {"tasks": "[rte]", "max_seq_length": 32, "update_model_card": "true"})


def test_energy_is_an_estimate_from_the_boards_limit(run):
    change(run, environment={"device": "NVIDIA H200", "num_processes": 8, "power_limit_watts": 700.0})
    text = build_card(run, run / "model")
    seconds = sum(2 * r["seconds_per_update"] for r in read_lines(run / "metrics.jsonl") if "seconds_per_update" in r)
    assert f"at most {8 * seconds / 3600 * 0.7:.3g} kWh (estimate: 700 W" in text
    assert "8 × NVIDIA H200" in text


def test_glue_results_reach_the_cards(run, run_glue, tmp_path, capsys):
    from testing.glue_data import write_rte

    write_rte(tmp_path / "glue")
    flags = {"output_dir": tmp_path / "out", "model_name_or_path": run / "model", "glue_dir": tmp_path / "glue"}
    flags |= {"tasks": "[rte]", "seeds": "[1,2]", "num_train_epochs": 1, "max_seq_length": 32, "save_models": "true"}
    change(run, push_to_hub=True, hub_model_id="ann/small")
    before = (run / "model" / "README.md").read_text()
    run_glue(flags)
    assert (run / "model" / "README.md").read_text() == before
    assert f"--update_model_card true adds this table to {run / 'model' / 'README.md'}" in capsys.readouterr().out
    run_glue(flags | {"update_model_card": "true"})
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    text = (run / "model" / "README.md").read_text()
    assert f"| {100 * summary['tasks'][0]['median']:.1f} |" in re.sub(" +", " ", text)
    failing = {"output_dir": tmp_path / "again", "seeds": "[1]", "learning_rates": "[1e14]", "num_train_epochs": 3}
    with pytest.raises(UserError, match="1 of 1 jobs failed"):
        run_glue(flags | failing | {"update_model_card": "true"})
    assert (run / "model" / "README.md").read_text() == text
    waiting = run / "hub" / "step-00000006-card"
    assert (waiting / "README.md").read_text() == text
    assert f"push with: python -m recipe.publish.hub {run}" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "out" / "models" / "rte" / "README.md")
    assert card.data.base_model == "ann/small"
    assert card.data.model_name == "small-rte"
    assert card.data.eval_results is None  # not the official data
    assert "labels entailment, not_entailment" in card.text
    best = json.loads((tmp_path / "out" / "best" / "rte.json").read_text())
    assert f"| accuracy | {-100 * best['rank'][0]:.1f} |" in card.text
    assert f"| seed | {best['job']['seed']} |" in card.text
    shutil.rmtree(tmp_path / "out")
