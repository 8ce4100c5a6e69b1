"""Runs whose layers see no padding: the same as padded ones, whatever the packing, the system and the engine."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from recipe.modeling.attention import loop_over
from testing.helpers import PYTHONPATH, ROOT, command_line, learning
from tests.test_scaling import LAUNCH, ON_CPU, assert_same_losses, exact_flags, run_fsdp  # noqa: F401  two are fixtures
from tests.test_systems import SIZES, SYSTEMS

LOOP = """
import recipe.modeling.objectives

recipe.modeling.objectives.find_kernel = lambda *_: ("loop", "")
"""


@pytest.fixture
def with_loop(monkeypatch: pytest.MonkeyPatch):
    """A function that has runs of this process attend within sequences from now on; each time grows the list."""
    calls: list[int] = []

    def counted(*arguments):
        calls.append(1)
        return loop_over(*arguments)

    def start() -> list[int]:
        monkeypatch.setattr("recipe.modeling.objectives.find_kernel", lambda *_: ("loop", ""))
        monkeypatch.setattr("recipe.modeling.attention.loop_over", counted)
        return calls

    return start


@pytest.mark.parametrize(
    "choice",
    [
        {"packing": "doc_sentences"},
        {"gradient_checkpointing": True, "per_device_train_batch_size": 16},
        {"streaming": True, "num_lanes": 2},
        {"packing": "doc_sentences", "model_type": "roberta-prelayernorm", "gradient_checkpointing": True},
        SYSTEMS["roberta-prelayernorm"],
        SYSTEMS["bert"],
        SYSTEMS["albert"],
    ],
    ids=str,
)
def test_run_learns_what_a_padded_one_does(
    exact_flags,  # noqa: F811
    run_pretrain,
    with_loop,
    tokenizer_dirs,
    tmp_path: Path,
    choice: dict[str, object],
):
    system = choice.get("model_type", "roberta")
    sizes = SIZES[system] | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes |= {"classifier_dropout_prob": 0.0} if system == "albert" else {}
    flags = exact_flags | choice | {"model_config": json.dumps(sizes), "tokenizer_name": tokenizer_dirs[system]}
    run_pretrain(flags)
    calls = with_loop()
    run_pretrain(flags | {"output_dir": tmp_path / "tokens"})
    assert calls
    assert_same_losses(tmp_path / "run", tmp_path / "tokens")


@pytest.mark.parametrize("model_type", ["roberta", "roberta-prelayernorm"])
def test_resume_is_exact_with_dropout(flags, run_pretrain, with_loop, tmp_path: Path, capsys, model_type: str):
    with_loop()
    flags |= {"model_type": model_type}
    run_pretrain(flags)
    assert "\nattention: loop, of real tokens alone\n" in capsys.readouterr().out
    resumed = flags | {"output_dir": tmp_path / "resumed", "resume_from_checkpoint": "latest"}
    shutil.copytree(tmp_path / "run/checkpoints/step-00000003", tmp_path / "resumed/checkpoints/step-00000003")
    run_pretrain(resumed)
    whole, rest = (learning(tmp_path / name / "metrics.jsonl") for name in ("run", "resumed"))
    assert whole[-len(rest) :] == rest
    assert rest[0]["step"] > 3


@pytest.mark.long
@pytest.mark.parametrize("packing", ["full_sentences", "doc_sentences"])
def test_processes_learn_what_one_padded_one_does(
    exact_flags,  # noqa: F811
    run_pretrain,
    run_fsdp,  # noqa: F811
    tmp_path: Path,
    packing: str,
):
    flags = exact_flags | {"packing": packing}
    run_pretrain(flags)
    script = tmp_path / "loop.py"
    script.write_text(LOOP + "import pretrain\nfrom recipe.base.errors import run_script\nrun_script(pretrain.main)\n")
    command = [*LAUNCH, "--main_process_port=0", script, *command_line(flags | {"output_dir": tmp_path / "ddp"})]
    subprocess.run(command, cwd=ROOT, env=os.environ | ON_CPU | {"PYTHONPATH": PYTHONPATH}, check=True)
    assert_same_losses(tmp_path / "run", tmp_path / "ddp")
    run_fsdp(flags | {"output_dir": tmp_path / "fsdp"}, before=LOOP)
    assert_same_losses(tmp_path / "run", tmp_path / "fsdp")
