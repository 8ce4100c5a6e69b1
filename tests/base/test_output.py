"""What is printed can fail, and nothing else does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from testing.helpers import PYTHONPATH, ROOT, write_jsonl
from tests.test_pretrain import start

PRINTS = """
import sys
from recipe.base.errors import UserError, report_user_errors
from recipe.base.progress import print_line, progress_bar

with report_user_errors():
    pass
with report_user_errors():
    with progress_bar("phase", 9, "steps") as bar:
        for number in range(2000):
            print_line(f"{number} → \\udcff 漢")
            print("warning", file=sys.stderr, flush=True)
    file = open(sys.argv[1], "w")
    assert file.fileno() > 2
    file.write("reached")
    file.close()
    if len(sys.argv) > 2:
        raise UserError("wrong")
"""


def prints(out: Path, *words: str, shell: str, **variables: str) -> int:
    command = ["bash", "-c", f"set -o pipefail; {shell}", "bash", sys.executable, "-c", PRINTS, out, *words]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, stdin=subprocess.DEVNULL, check=False
    ).returncode


@pytest.mark.parametrize(
    "shell",
    [
        '"$@" > /dev/full 2> /dev/null',
        '"$@" > /dev/full 2> /dev/full',
        '"$@" 2> /dev/null | head -1 > /dev/null',
        '"$@" 2>&1 | head -1 > /dev/null',
        '"$@" >&- 2> /dev/null',
        '"$@" <&- >&- 2>&-',
    ],
)
def test_output_that_cannot_be_written_changes_neither_work_nor_exit_status(tmp_path: Path, shell: str):
    out = tmp_path / "out"
    assert prints(out, shell=shell) == 0
    assert out.read_text() == "reached"
    assert prints(out, "wrong", shell=shell) == 2


def test_characters_that_a_locale_lacks_are_escaped(tmp_path: Path):
    for encoding, expected in (("ascii", b"7 \\u2192 \\udcff \\u6f22\n"), ("utf-8", "7 → \\udcff 漢\n".encode())):
        log = tmp_path / "log"
        assert prints(tmp_path / "out", shell=f'"$@" > {log} 2> /dev/null', PYTHONIOENCODING=encoding) == 0
        assert log.read_bytes().splitlines(keepends=True)[7] == expected


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_line_is_one_write_though_python_does_not_buffer(stream: str):
    """Several processes have one log, in which pieces of their lines would mix."""
    code = "import os, sys\nfrom recipe.base.errors import run_script\n"
    code += f"run_script(lambda: print('a', 7, file=sys.{stream}))\nos._exit(0)"
    reader, writer = os.pipe2(os.O_DIRECT)  # of which each read gives one write
    subprocess.run([sys.executable, "-u", "-c", code], cwd=ROOT, check=True, **{stream: writer})
    os.close(writer)
    assert os.read(reader, 100) == b"a 7\n"


def test_run_whose_output_goes_to_a_full_disk_is_complete(flags, tmp_path: Path):
    with open("/dev/full", "w") as full:
        assert start(flags, stdout=full, stderr=full).wait() == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "complete"


@pytest.mark.parametrize("kind", ["byte_level_bpe", "wordpiece", "unigram"])
def test_vocabulary_is_not_lost_to_a_full_disk_behind_stdout(tmp_path: Path, kind: str):
    """The trainers print from Rust, where a failure to do so ends the process."""
    options = {
        "output_dir": tmp_path / "tokenizer",
        "tokenizer_type": kind,
        "vocab_size": 800,
        "max_train_bytes": 200_000,
    }
    flags = ["--config=recipe/configs/tokenizer/tiny.yaml", *(f"--{name}={value}" for name, value in options.items())]
    command = [sys.executable, "train_tokenizer.py", *flags]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, cwd=ROOT, stdout=full, stdin=subprocess.DEVNULL).returncode == 0
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()


LOCALES = {"posix": {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "utf-8": {"LC_ALL": "C.UTF-8"}}


@pytest.mark.parametrize("locale", LOCALES)
def test_scripts_read_write_and_print_utf_8_whatever_the_locale(tmp_path: Path, locale: str):
    """Names of files too, which the libraries would otherwise not find."""
    (tmp_path / "mémoires").mkdir()
    write_jsonl(tmp_path / "mémoires" / "тексты.jsonl", ["Слово за слово. 語料。"] * 9)
    config = tmp_path / "конфиг.yaml"
    config.write_text("corpora: [{name: книги, path: mémoires/тексты.jsonl}]\noutput_dir: 出力\n", "utf-8")
    options = ["--config", "конфиг.yaml", "--vocab_size", "300", "--min_frequency", "1"]
    result = subprocess.run(
        [sys.executable, ROOT / "train_tokenizer.py", *options],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": PYTHONPATH} | LOCALES[locale],
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    assert "MB of книги" in result.stdout.decode()
    assert "語" not in result.stderr.decode()
    assert json.loads((tmp_path / "出力" / "tokenizer.json").read_text("utf-8"))
