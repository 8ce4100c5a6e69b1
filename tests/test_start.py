"""What a script answers without its work: before torch and its like are imported, which takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from testing.helpers import PYTHONPATH, ROOT, command_line

HEAVY = ["accelerate", "datasets", "evaluate", "torch", "transformers"]
# One process for all questions to a script: what one of them imports is there at the end.
ASK = f"""
import contextlib, io, json, os, runpy, sys
script, *questions = map(json.loads, sys.argv[1:])
answers = []
for arguments in questions:
    sys.argv, text, status = [script, *arguments], io.StringIO(), 0
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    answers.append([status, text.getvalue()])
print(json.dumps([answers, sorted(sys.modules.keys() & set({HEAVY}))]), flush=True)
os._exit(0)  # and not with the status of the last question
"""
SCRIPTS = {
    "train_tokenizer.py": ("tokenizer/tiny.yaml", "vocab_size", "3", "5 special tokens and 256 bytes need 261"),
    "pretrain.py": ("pretrain/tiny.yaml", "max_steps", "0", "give 1 or more"),
    "finetune_glue.py": ("glue/tiny.yaml", "num_train_epochs", "0", "give 1 or more"),
}


def ask(script: str, *questions: list[str]) -> tuple[list[tuple[int, str]], list[str]]:
    """Return exit status and output of a script for each list of arguments, and the heavy libraries it has imported."""
    command = [sys.executable, "-c", ASK, *map(json.dumps, [script, *questions])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_mistakes_are_answered_without_heavy_libraries(script: str):
    config, name, value, remedy = SCRIPTS[script]
    config = f"recipe/configs/{config}"
    is_glue = script == "finetune_glue.py"
    no_text = ["--glue_dir=no/such"] if is_glue else ["--corpora=[{name: a, path: no/such.jsonl}]"]
    (help_, resolved, misspelt, missing, impossible, textless), imported = ask(
        script,
        ["--help"],
        ["--config", config, f"--{name}=300", "--print_config"],
        ["--config", config, "--output_dirr=x"],
        ["--config", "no.yaml"],
        ["--config", config, f"--{name}", value],
        ["--config", config, *no_text, "--output_dir=no-such"],
    )
    assert help_[0] == resolved[0] == 0
    assert f"--{name}" in help_[1]
    assert f"\n{name}: 300\n" in resolved[1]
    for (status, text), words in {
        tuple(misspelt): "there is no field `output_dirr` (on the command line); did you mean `output_dir`?",
        tuple(missing): "--config no.yaml: there is no such file",
        tuple(impossible): f"`{name}` is {value}; {remedy}",
    }.items():
        assert status == 2
        assert text == f"error: {words}\n"
    assert textless[0] == 2
    assert "no/such" in textless[1]
    assert imported == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [("raise RuntimeError('an old driver')", "RuntimeError: an old driver"), ("", "No module named 'triton.language'")],
    ids=["raises", "stub"],
)
def test_broken_triton_is_left_out_with_a_warning(flags, tmp_path: Path, content: str, problem: str):
    """Transformers cannot be imported beside it."""
    package = tmp_path / "path" / "triton"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(content)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{package.parent}:{PYTHONPATH}"}
    command = [sys.executable, "pretrain.py", *command_line(flags), "--dry_run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: Triton is broken, and left out: ") == 1
    assert problem in done.stderr
    assert "ok       kernels: " in done.stdout
