import os
import pickle
import signal
import subprocess
import sys

import pytest

from recipe.base.errors import (
    UserError,
    describe_error,
    did_you_mean,
    raising_damaged_file,
    report_user_errors,
    require,
)
from testing.helpers import ROOT


@pytest.mark.parametrize("error", [UserError, FloatingPointError])
def test_error_that_says_what_to_do_is_its_message_and_status_2(error, capsys):
    with pytest.raises(SystemExit) as ended, report_user_errors():
        raise error("lower --learning_rate")
    sys.stderr.flush()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: lower --learning_rate\n"


def test_what_all_ranks_refuse_is_said_by_the_first():
    """The launcher ends the others as soon as one has failed; one that fails alone says so all the same."""
    code = "import recipe.base.errors as e\ndef main(): raise e.UserError('x')\ne.run_script(main)"
    start = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"LOCAL_RANK": rank}, **start)
        for rank in ("0", "1")
    ]
    assert ranks[0].communicate()[1] == "error: x\n"
    ranks[1].terminate()
    assert ranks[1].communicate()[1] == ""
    code = code.replace("as e\n", "as e; e.FIRST_RANK_SECONDS = 0\n")
    alone = subprocess.run([sys.executable, "-c", code], env=os.environ | {"LOCAL_RANK": "1"}, **start)
    assert alone.stderr == "error: x\n"


ENDS = """
import atexit, os, sys, threading
import torch
from recipe.base.errors import UserError, run_script

def compute():
    while True:
        torch.ones(99, 99) @ torch.ones(99, 99)

def outlive_main():
    threading.main_thread().join()
    print("joined")

def throw(error):
    raise error

ENDS = {
    "return": lambda: None,
    "exit": sys.exit,
    "exit 3": lambda: sys.exit(3),
    "words": lambda: sys.exit("these words"),
    "mistake": lambda: throw(UserError("a mistake")),
    "signal": lambda: throw(KeyboardInterrupt("SIGTERM")),
    "bug": lambda: throw(KeyError("a bug")),
}
atexit.register(print, "called")
for _ in range(5):
    if os.fork() == 0:
        threading.Thread(target=outlive_main).start()
        for _ in range(4):
            threading.Thread(target=compute, daemon=True).start()
        run_script(ENDS[sys.argv[1]])
        break
    _, status = os.wait()
    print("status", os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.parametrize(
    ("end", "status", "printed"),
    [
        ("return", 0, ""),
        ("exit", 0, ""),
        ("exit 3", 3, ""),
        ("words", 1, "these words\n"),
        ("mistake", 2, "error: a mistake\n"),
        ("signal", 128 + signal.SIGTERM, "stopped by SIGTERM\n"),
        ("bug", 1, "KeyError: 'a bug'\n"),
    ],
)
def test_status_is_right_whatever_threads_are_left(end: str, status: int, printed: str):
    """Threads that Python stopped inside torch would abort the process."""
    command = [sys.executable, "-c", ENDS, end]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.stdout.count(f"{printed}joined\ncalled\nstatus {status}\n") == 5, result.stdout


def chained() -> Exception:
    try:
        try:
            raise KeyError("a")
        except KeyError as inner:
            raise OSError("the line\n   is down") from inner
    except OSError as middle:
        error = RuntimeError("outer")
        error.__cause__ = middle
        return error


def test_an_error_is_one_line_of_bounded_length():
    assert describe_error(OSError("the line\n   is down")) == "OSError: the line is down"
    assert len(describe_error(ValueError("x" * 10_000))) == len("ValueError: ") + 300
    assert "not loaded" in describe_error(pickle.UnpicklingError("set weights_only=False"))
    assert "weights_only" not in describe_error(pickle.UnpicklingError("set weights_only=False"))


def test_causes_are_followed_when_asked_for_and_no_further():
    assert describe_error(chained()) == "RuntimeError: outer"
    assert describe_error(chained(), until=OSError) == "OSError: the line is down"
    assert describe_error(chained(), until=TypeError) == "KeyError: 'a'"


def test_a_damaged_file_is_named_with_the_way_out():
    message = r"^a\.json is damaged or missing \(KeyError: 'x'\); remove it$"
    with pytest.raises(UserError, match=message), raising_damaged_file("a.json", "remove it"):
        raise KeyError("x")
    with pytest.raises(UserError, match=r"^its own words$"), raising_damaged_file("a.json", "remove it"):
        raise UserError("its own words")


def test_a_user_error_ends_the_script_without_a_traceback():
    code = (
        "from recipe.base.errors import *\nwith report_user_errors():\n    require(1 > 2, 'seed', 1, 'give 2 or more')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: `seed` is 1; give 2 or more\n"


def test_the_nearest_name_is_proposed():
    assert did_you_mean("lerning_rate", ["max_steps", "learning_rate"]) == "; did you mean `learning_rate`?"
    assert did_you_mean("xyz", ["max_steps", "learning_rate"]) == ""
    require(True, "seed", 1, "")
