"""Values that no option may have, whether they come from a command line or from code."""

from typing import Any

import pytest

from recipe.arguments import CorpusArguments, GlueArguments, PretrainArguments, TokenizerArguments, parse_config
from recipe.arguments.checks import PositiveInt, check_repo_id, rules
from recipe.base.errors import UserError

CORPORA = [CorpusArguments(name="a", path="a.jsonl")]
REQUIRED: dict[type, dict[str, Any]] = {
    PretrainArguments: {"output_dir": "x", "corpora": CORPORA, "tokenizer_name": "t"},
    TokenizerArguments: {"output_dir": "x", "corpora": CORPORA},
    GlueArguments: {"output_dir": "x", "model_name_or_path": "m"},
    CorpusArguments: {"name": "a", "path": "x"},
}
NAN, INFINITY = float("nan"), float("inf")
COUNTS = """
    train_batch_size per_device_train_batch_size per_device_eval_batch_size logging_steps eval_steps save_steps
    save_total_limit max_nonfinite_updates num_lanes shuffle_buffer_size preprocessing_num_workers"""
# Of each option values that are refused, and values at the edge that are not.
NUMBERS: dict[type, dict[str, tuple[list[Any], list[Any]]]] = {
    PretrainArguments: {
        **dict.fromkeys(
            COUNTS.split(),
            ([0, -1, 2**48], [1, 2**48 - 1]),
        ),
        "max_steps": ([0, 2**48], [24_000]),
        "warmup_steps": ([-1, -0.1, 1.5, NAN, INFINITY], [0, 0.06, 1, 100.0]),
        **dict.fromkeys(
            ["eval_blocks", "max_unreadable_documents", "dataloader_num_workers"],
            ([-1, 2**48], [0]),
        ),
        **dict.fromkeys(["weight_decay", "max_grad_norm"], ([-1e-9, NAN, INFINITY], [0])),
        **dict.fromkeys(["learning_rate", "adam_epsilon", "max_train_hours"], ([0, -1, NAN, INFINITY], [1e-9])),
        **dict.fromkeys(["adam_beta1", "adam_beta2"], ([-1e-9, 1, NAN], [0, 0.999])),
        **dict.fromkeys(["mlm_probability", "eval_mlm_probability"], ([0, 1, NAN], [0.01, 0.99])),
        "loss_spike_ratio": ([1, NAN, INFINITY], [1.01]),
        "max_seq_length": ([7, 2**48], [9]),
        "seed": ([-1, 2**63], [0, 2**63 - 1]),
        "expected_loss": ([NAN, INFINITY, -INFINITY], [1.5]),
    },
    TokenizerArguments: {
        "vocab_size": ([260, 2**48], [261]),
        "min_frequency": ([0], [1]),
        "max_train_bytes": ([0], [1]),
        "max_document_characters": ([999], [1000]),
        "model_max_length": ([3], [4]),
    },
    GlueArguments: {
        "learning_rates": ([[0.0], [1e-5, -1], [NAN], [INFINITY], []], [None, [1e-5]]),
        "batch_sizes": ([[0], [16, 16], []], [None, [1]]),
        "seeds": ([[-1], [2**63], []], [[0, 2**63 - 1]]),
        **dict.fromkeys(
            ["num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size"], ([0, 2**48], [1])
        ),
        "max_seq_length": ([7], [8]),
        "warmup_ratio": ([-0.1, 1.1, NAN], [0, 1]),
        "weight_decay": ([-1], [0]),
        "adam_epsilon": ([0], [1e-9]),
        **dict.fromkeys(["adam_beta1", "adam_beta2"], ([-1, 1], [0])),
    },
    CorpusArguments: {"weight": ([0, -1, NAN, INFINITY], [None, 1e-9])},
}
CASES = [(cls, name, *values) for cls, numbers in NUMBERS.items() for name, values in numbers.items()]


@pytest.mark.parametrize(("cls", "name", "refused", "allowed"), CASES)
def test_numbers_out_of_bounds_are_refused_with_field_and_way_out(cls, name, refused, allowed):
    for value in refused:
        with pytest.raises(UserError, match=rf"^`{name}` .*; (give|name|leave|5 special)"):
            cls(**REQUIRED[cls] | {name: value})
    for value in allowed:
        assert getattr(cls(**REQUIRED[cls] | {name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [("num_gpus", 0), ("price_per_gpu_hour", 0), ("price_per_gpu_hour", NAN)])
def test_a_plan_is_for_a_positive_number_of_gpus_and_price(name, value):
    with pytest.raises(UserError, match=f"`{name}` is {value}; give"):
        PretrainArguments(**REQUIRED[PretrainArguments], dry_run=True, **{name: value})
    with pytest.raises(UserError, match=f"`{name}` is 1; it is for a plan only: add --dry_run"):
        PretrainArguments(**REQUIRED[PretrainArguments], **{name: 1})


PATHS = {
    PretrainArguments: [
        "output_dir",
        "tokenizer_name",
        "model_name_or_path",
        "token_store_dir",
        "resume_from_checkpoint",
    ],
    TokenizerArguments: ["output_dir"],
    GlueArguments: ["output_dir", "model_name_or_path", "glue_dir"],
    CorpusArguments: ["path"],
}


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, names in PATHS.items() for name in names])
def test_paths_that_no_system_takes_are_refused(cls, name):
    for value in ("a\0b", "x" * 300, "x/" * 3000):
        with pytest.raises(UserError, match=rf"^`{name}`.* is '.*; give a valid path"):
            cls(**REQUIRED[cls] | {name: value})


def test_rules_are_found_beside_null_and_in_lists():
    assert [str(rule) for rule in rules(PositiveInt | None)] == ["1 or more"]
    assert list(rules(PositiveInt | None)) == list(rules(list[PositiveInt])) == list(rules(list[PositiveInt] | None))
    assert list(rules(dict[str, Any] | None)) == []


@pytest.mark.parametrize("cls", [PretrainArguments, TokenizerArguments, GlueArguments])
def test_help_shows_options_with_their_bounds(cls, capsys):
    with pytest.raises(SystemExit):
        parse_config(cls, "test", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, words in {
        "max_seq_length": "int, 8 or more",
        "max_train_bytes": "int, 1 or more",
        "weight_decay": "float, 0 or more",
        "seeds": "int, 0 or more and less than 2**63",
        "adam_beta2": "float, 0 or more and less than 1",
        "output_dir": "str, a valid path",
    }.items():
        if name in cls.__dataclass_fields__:
            assert f"--{name} ({'list of ' if name == 'seeds' else ''}{words.replace(',', ';', 1)}; " in text


def test_repository_names_are_checked():
    check_repo_id("hub_model_id", "user/name")
    with pytest.raises(UserError, match="`hub_model_id` is 'a/b/c'; write user/name"):
        check_repo_id("hub_model_id", "a/b/c")
