import dataclasses
import re
from pathlib import Path

import pytest
import sentencex
import yaml

from recipe.arguments import (
    CorpusArguments,
    GlueArguments,
    PretrainArguments,
    TokenizerArguments,
    identity_of,
    parse_config,
    recorded_values,
)
from recipe.arguments.checks import divisors
from recipe.arguments.languages import WITH_RULES, describe_rules
from recipe.base.errors import UserError
from recipe.base.files import read_yaml, to_yaml
from testing.helpers import ROOT

BASE = {
    "output_dir": "runs/x",
    "tokenizer_name": "runs/tokenizer",
    "corpora": [{"name": "a", "path": "a.jsonl"}, {"name": "b", "path": "b.jsonl"}],
    "learning_rate": 0.0006,
    "model_config": {"num_hidden_layers": 3},
}


@pytest.fixture
def config_file(tmp_path: Path):
    def write(**changes: object) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(BASE | changes))
        return path

    return write


def parse(*arguments: object) -> PretrainArguments:
    return parse_config(PretrainArguments, "test", [str(argument) for argument in arguments])


def test_flags_win_over_yaml_and_yaml_over_defaults(config_file):
    args = parse("--config", config_file(), "--learning_rate", "4e-4", "--model_config.hidden_size", 64)
    assert args.learning_rate == 4e-4
    assert args.model_config == {"num_hidden_layers": 3, "hidden_size": 64}
    assert args.train_batch_size == 8192
    assert [corpus.name for corpus in args.corpora] == ["a", "b"]


def test_list_of_a_flag_takes_nothing_from_that_of_a_file(config_file):
    corpora = [{"name": "x", "path": "x", "config_name": "20231101.en", "weight": 2.0}]
    args = parse("--config", config_file(corpora=corpora), "--corpora", '[{"name": "y", "path": "y"}]')
    assert args.corpora == [CorpusArguments(name="y", path="y")]
    args = parse("--config", config_file(corpora=corpora), '--corpora=[{"name": "y", "path": "y"}]', "--seed", 1)
    assert args.corpora == [CorpusArguments(name="y", path="y")]


RULES = f"; sentencex has rules for {', '.join(WITH_RULES)}, and finds sentences in others too"


@pytest.mark.parametrize(
    ("language", "hint"),
    [
        ("german", "; did you mean `de`?"),
        ("Japanese", "; did you mean `ja`?"),
        ("chines", "; did you mean `zh`?"),
        ("de_AT", "; did you mean `de`?"),
        ("EN", "; did you mean `en`?"),
        ("deu", "; did you mean `de`?"),
        ("xx", RULES),
        ("", RULES),
    ],
)
def test_language_is_a_code(config_file, language: str, hint: str):
    with pytest.raises(UserError) as caught:
        parse("--config", config_file(), f"--language={language}")
    assert str(caught.value) == f"`language` is {language!r}, which is no code of ISO 639-1 such as en, de or zh{hint}"


def test_language_without_rules_is_told_and_rules_are_those_of_the_library():
    assert not describe_rules("de")
    assert describe_rules("sv").startswith("sentencex has no rules of its own for `language` sv and takes those of")
    abbreviated = "Er kam ggf. Anna war da. Am 3. Mai."
    assert sentencex.segment("de", abbreviated) != sentencex.segment("en", abbreviated)
    assert sentencex.segment("sv", abbreviated) == sentencex.segment("en", abbreviated)


@pytest.fixture
def overlay(tmp_path: Path):
    """A function that writes a second YAML file, from text, and returns its path."""

    def write(text: str, name: str = "overlay.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_overlay_replaces_single_fields_single_keys_of_the_model_and_whole_lists(config_file, overlay):
    base = config_file(model_config={"num_hidden_layers": 3, "layer_norm_eps": 1e-5})
    first = overlay("model_config: {num_hidden_layers: 6, hidden_size: 64}\nseed: 1\n", "first.yaml")
    second = overlay("corpora: [{name: c, path: c.jsonl}]\nseed: 2\nlicense: '1e3'\n")
    args = parse("--config", base, "--config", first, "--config", second)
    assert args.model_config == {"num_hidden_layers": 6, "layer_norm_eps": 1e-5, "hidden_size": 64}
    assert [corpus.name for corpus in args.corpora] == ["c"]
    assert (args.seed, args.learning_rate, args.output_dir) == (2, 0.0006, "runs/x")
    assert args.license == "1e3"  # quoted in the file: a text, not a number


def test_flag_wins_over_every_file_wherever_it_stands(config_file, overlay):
    path = overlay("model_config: {num_hidden_layers: 6}\nseed: 1\n")
    flags = ["--seed=7", "--model_config.num_hidden_layers", 9]
    for line in ([*flags, "--config", config_file(), f"--config={path}"], ["--config", config_file(), *flags]):
        args = parse(*line)
        assert (args.seed, args.model_config) == (7, {"num_hidden_layers": 9})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lerning_rate: 1", "there is no field `lerning_rate` (in {overlay}); did you mean `learning_rate`?"),
        ("learning_rate: fast", "`learning_rate` (in {overlay}) is fast; it takes float, more than 0"),
        ("corpora: [{name: a, pth: b}]", "there is no field `pth` in `corpora` (in {overlay}); did you mean `path`?"),
        ("corpora+: [{name: a, path: b}]", "there is no field `corpora+` (in {overlay}); did you mean `corpora`?"),
        ("model_config.hidden_size: 3", "there is no field `model_config.hidden_size` (in {overlay})"),
        ("model_config: [3]", "`model_config` (in {overlay}) is [3]; it takes fields and values"),
        ("seed: null\nlanguage: en", "`seed` (in {overlay}) is null"),
        ("config: base.yaml", "there is no field `config` (in {overlay})"),
        ("3: 1", "there is no field `3` (in {overlay})"),
        ("", "--config {overlay} holds nothing; write fields with their values"),
        ("# seed: 1", "--config {overlay} holds nothing"),
        ("- seed: 1", "--config {overlay} holds a list"),
        ("seed", "--config {overlay} holds a single value"),
        ("seed: [", "--config {overlay} cannot be read as YAML"),
        ("seed: " + "9" * 5000, "--config {overlay} cannot be read as YAML"),
    ],
)
def test_error_names_the_file_that_holds_it(config_file, overlay, text, expected):
    base, path = config_file(), overlay(text)
    with pytest.raises(UserError) as caught:
        parse("--config", base, "--config", path)
    assert expected.format(overlay=path) in str(caught.value)
    assert str(base) not in str(caught.value)


def test_value_of_the_first_file_is_named_with_the_first_file(config_file, overlay):
    base = config_file(learning_rate="fast")
    with pytest.raises(UserError) as caught:
        parse("--config", base, "--config", overlay("seed: 1"))
    assert f"`learning_rate` (in {base}) is fast" in str(caught.value)


def test_file_without_effect_is_refused(config_file, overlay):
    base, path = config_file(), overlay("learning_rate: 1\nmodel_config: {num_hidden_layers: 1}")
    for first, second in ((base, base), (path, base)):
        with pytest.raises(UserError, match=f"--config {first} has no effect"):
            parse("--config", first, "--config", second)
    parse("--config", overlay("model_config: {hidden_size: 64}"), "--config", base)


def test_overlay_alone_is_told_to_come_after_its_base(overlay):
    with pytest.raises(UserError) as caught:
        parse("--config", overlay("seed: 1"))
    for part in ("output_dir, corpora must be given", "overlay.yaml", "an overlay comes after the file it changes"):
        assert part in str(caught.value)


def test_switch_may_stand_alone(config_file):
    assert parse("--dry_run", "--config", config_file()).dry_run
    assert not parse("--config", config_file(), "--dry_run", "false").dry_run


@pytest.mark.parametrize(
    ("changes", "arguments", "expected"),
    [
        ({"lerning_rate": 1}, [], ["lerning_rate", "config.yaml", "did you mean `learning_rate`?"]),
        ({}, ["--lerning_rate=1"], ["lerning_rate", "on the command line", "did you mean `learning_rate`?"]),
        ({"corpora": [{"name": "a", "pth": "b"}]}, [], ["pth", "`corpora`", "did you mean `path`?"]),
        ({"learning_rate": "fast"}, [], ["learning_rate", "fast", "config.yaml"]),
        ({}, ["--max_steps=1.5"], ["max_steps", "1.5", "on the command line"]),
        ({"sentence_splitter": "period"}, [], ["sentence_splitter", "period", "sentencex", "config.yaml"]),
        ({}, ["--sentence_splitter=period"], ["sentence_splitter", "period", "on the command line"]),
        ({}, ["--packing=full_sentence"], ["it takes full_sentences | doc_sent", "did you mean `full_sentences`?"]),
        ({}, ["--max_train_hours=x"], ["`max_train_hours` (on the command line) is x; it takes null or float, more t"]),
        ({}, ["--eval_corpora=[{name: a}]"], ["path must be given in `eval_corpora` (on the command line)"]),
        (
            {"corpora": [{"name": "a", "path": "b", "weight": "x"}]},
            [],
            ["`weight` in `corpora` (in ", "config.yaml) is x; it takes null or float, more than 0"],
        ),
        ({"corpora": [{"name": "a", "path": 3}]}, [], ["`path` in `corpora`", "is 3; it takes str"]),
        ({}, ["--seed"], ["--seed has no value after it"]),
        ({}, ["stray"], ["stray: an option is written --name value"]),
        ({"corpora": []}, [], ["corpora", "at least one"]),
        ({"corpora": ["a.jsonl"]}, [], ["write {name: ..., path: a.jsonl}"]),
        ({}, ["--corpora=[a.jsonl]"], ["write {name: ..., path: a.jsonl}"]),
        ({"corpora": [{"name": "a", "path": ""}]}, [], ["`path` of corpus 'a' is empty"]),
        ({"corpora": [{"name": "a", "path": "x"}] * 2}, [], ["two corpora named 'a'"]),
        ({"corpora": [{"name": "a", "path": "x", "weight": -1}]}, [], ["weight", "'a'", "-1"]),
        (
            {"corpora": [{"name": "a", "path": "x", "weight": 1}, {"name": "b", "path": "y"}]},
            [],
            ["b has no `weight`", "all or none"],
        ),
        ({"train_batch_size": 0}, [], ["train_batch_size", "0", "1 or more"]),
        ({"warmup_steps": 11, "max_steps": 10}, [], ["warmup_steps", "11", "max_steps", "10"]),
        ({"mlm_probability": 1.5}, [], ["mlm_probability", "1.5"]),
        ({"tokenizer_name": None}, [], ["tokenizer_name", "missing"]),
        ({"model_name_or_path": "m"}, [], ["tokenizer_name", "model_name_or_path", "keeps its own tokenizer"]),
        ({"max_grad_norm": None}, [], ["max_grad_norm", "null"]),
        ({"language": None}, [], ["language", "null"]),
        ({"output_dir": ""}, [], ["output_dir", "empty"]),
        ({"output_dir": "a\0b"}, [], ["`output_dir` is 'a\\x00b'", "a valid path"]),
        ({"token_store_dir": "x" * 300}, [], ["`token_store_dir` is 'xxx", "a valid path"]),
        ({"resume_from_checkpoint": "x" * 300}, [], ["`resume_from_checkpoint` is 'xxx", "a valid path"]),
        ({"decontaminate_against": ["a\0b"]}, [], ["`decontaminate_against` holds 'a\\x00b'", "a valid path"]),
        ({"corpora": [{"name": "a", "path": "x/" * 3000}]}, [], ["`path` of corpus 'a' is 'x/x/", "a valid path"]),
        ({"learning_rate": float("inf")}, [], ["`learning_rate` is inf", "below"]),
        ({"max_steps": 10**30}, [], ["`max_steps` is 1000000000000000000000000000000", "below"]),
        (
            {"streaming": True, "train_batch_size": 10**14 + 1, "num_lanes": 64},
            [],
            ["`num_lanes` (64)", "the nearest number that does is"],
        ),
    ],
)
def test_bad_input_is_named(config_file, changes, arguments, expected):
    with pytest.raises(UserError) as caught:
        parse("--config", config_file(**changes), *arguments)
    for part in expected:
        assert part in str(caught.value)


def test_missing_field_and_file_are_named(tmp_path):
    with pytest.raises(UserError, match="output_dir"):
        parse("--tokenizer_name=x")
    with pytest.raises(UserError, match="--config has no value after it"):
        parse("--config")
    with pytest.raises(UserError, match=r"no\.yaml: there is no such file"):
        parse("--config", tmp_path / "no.yaml")


def test_nearest_file_is_named_beside_it_or_of_those_shipped(tmp_path):
    (tmp_path / "experiment.yaml").write_text("seed: 1")
    for file, meant in (("experimnt.yaml", tmp_path / "experiment"), ("robert-base.yml", "pretrain/roberta-base")):
        with pytest.raises(UserError, match=rf"there is no such file; did you mean `.*{meant}\.yaml`\?"):
            parse("--config", tmp_path / file)


def test_broken_yaml_names_file_and_line(tmp_path):
    (tmp_path / "broken.yaml").write_text("output_dir: x\nmodel_config: {a: 1\n")
    with pytest.raises(UserError, match=r"(?s)broken\.yaml.*line"):
        parse("--config", tmp_path / "broken.yaml")


def test_yaml_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: caf\xe9\n")
    with pytest.raises(UserError, match=r"latin\.yaml.*UTF-8"):
        parse("--config", tmp_path / "latin.yaml")


@pytest.mark.parametrize("place", ["config", "model_config", "output_dir", "model_config.id2label"])
def test_values_that_would_crash_the_parser_are_named(config_file, tmp_path, place):
    bomb = "{a: &a [x, x], b: [*a, *a]}"
    for value, expected in {"[" * 50_000: "more than 50 lists", "{a: " * 50_000: "more than 50", bomb: "alias"}.items():
        (tmp_path / "deep.yaml").write_text(value)
        flag = ("--config", tmp_path / "deep.yaml") if place == "config" else (f"--{place}", value)
        for flags in (flag, ("=".join(map(str, flag)),)):
            with pytest.raises(UserError, match=rf"--{place}.* {expected}"):
                parse("--config", config_file(), *flags)


def test_yaml_of_a_run_is_names_and_values(tmp_path):
    path = tmp_path / "config.yaml"
    for text in ("- a", "", "3: a", "a: b: c", "!!python/object/apply:os.getpid []", "[" * 5000):
        path.write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml is damaged or missing"):
            read_yaml(path)
    path.write_text("a: 1")
    assert read_yaml(path) == {"a": 1}


@pytest.mark.parametrize("number", [1, 2, 12, 97, 100, 2**20, 10**12])
def test_divisors_are_all_there_are(number):
    found = divisors(number)
    assert found == sorted(set(found))
    assert all(number % n == 0 for n in found)
    if number < 10**6:
        assert len(found) == sum(number % n == 0 for n in range(1, number + 1))


def test_accumulation_is_derived(config_file):
    args = parse("--config", config_file(), "--per_device_train_batch_size=32")
    assert args.micro_batch_sizes(8, 0) == [32] * 32
    assert args.micro_batch_sizes(64, 0) == [32] * 4
    with pytest.raises(UserError, match=r"`train_batch_size` is 8192; which 3 processes do not divide: give 8193"):
        args.check_processes(3)


@pytest.mark.parametrize(("size", "expected"), [(20, [20, 20, 8]), (48, [48]), (64, [48]), (1, [1] * 48)])
def test_the_last_micro_batch_has_what_is_left(config_file, size, expected):
    args = parse("--config", config_file(train_batch_size=96, per_device_train_batch_size=size))
    args.check_processes(2)
    assert args.micro_batch_sizes(2, 0) == expected


PRETRAINING_IDENTITY = """
    corpora tokenizer_name language sentence_splitter deduplicate decontaminate_against packing objective masking
    eval_corpora eval_blocks max_seq_length mlm_probability eval_mlm_probability streaming
    num_lanes shuffle_buffer_size model_type model_config model_name_or_path train_batch_size seed"""


def test_identity_holds_the_experiment_and_nothing_else(config_file):
    """A run is resumed, or a GLUE grid continued, only with these values: a change here splits runs from their code."""
    args = parse("--config", config_file())
    assert sorted(identity_of(args)) == sorted(PRETRAINING_IDENTITY.split())
    assert identity_of(args)["corpora"][0] == dataclasses.asdict(args.corpora[0])
    assert identity_of(GlueArguments(output_dir="x", model_name_or_path="m")) == {
        "model_name_or_path": "m",
        "tokenizer_name": None,
        "glue_dir": None,
        "max_seq_length": 512,
        "num_train_epochs": 10,
        "warmup_ratio": 0.06,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-6,
        "classifier_dropout": None,
    }


def test_a_run_records_all_but_what_only_a_plan_has(config_file, tmp_path):
    args = parse("--config", config_file(), "--dry_run", "--gpu=h200", "--num_gpus=8", "--price_per_gpu_hour=2")
    recorded = recorded_values(args)
    assert set(dataclasses.asdict(args)) - set(recorded) == {"gpu", "num_gpus", "price_per_gpu_hour"}
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(recorded_values(parse("--config", config_file())) | {"environment": {"num_processes": 1}}))
    assert parse("--config", path) == parse("--config", config_file())


def test_config_of_a_run_can_be_given_again(config_file, tmp_path):
    args = parse("--config", config_file())
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(dataclasses.asdict(args) | {"environment": {"num_processes": 1}}))
    assert parse("--config", path) == args


CONFIGS = ROOT / "recipe" / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_config_is_complete_and_opens_with_its_command(path: Path):
    kind = path.relative_to(CONFIGS).parts[0]
    cls = {"tokenizer": TokenizerArguments, "pretrain": PretrainArguments, "glue": GlueArguments}[kind]
    given = yaml.safe_load(path.read_text())
    transient = {"resume_from_checkpoint", "dry_run", "prepare_only", "num_gpus", "gpu", "price_per_gpu_hour"}
    assert set(given) | transient == {field.name for field in dataclasses.fields(cls)} | transient
    parse_config(cls, "test", ["--config", str(path)])
    head = path.read_text().split("\n\n")[0]
    assert str(path.relative_to(ROOT)) in head
    assert "Hardware:" in head
    if cls is PretrainArguments:
        assert "Batch:" in head
        assert "Expected held-out loss:" in head


@pytest.mark.parametrize("cls", [PretrainArguments, GlueArguments, TokenizerArguments])
def test_help_has_every_option_in_a_group_and_no_names_of_python(cls, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_config(cls, "What it is for.\n\n  a command", ["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    titles = [line.removesuffix(":") for line in text.splitlines() if re.fullmatch(r"\w[\w ,]*:", line)]
    assert titles == list(cls.GROUPS.values())
    assert set(cls.GROUPS) <= {option.name for option in dataclasses.fields(cls)}
    for option in dataclasses.fields(cls):
        assert f"\n  --{option.name}  (" in text
    for word in ("Annotated", "Optional", "Literal", "None", "Union", "CorpusArguments"):
        assert word not in text
    assert max(map(len, text.splitlines())) <= 100


def test_path_given_as_corpora_is_told_how_it_is_written(config_file):
    with pytest.raises(UserError, match=r"takes a list of corpora: write '\[\{name: \.\.\., path: my_texts/\}\]'"):
        parse("--config", config_file(), "--corpora", "my_texts/")
