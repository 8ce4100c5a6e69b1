import os
import pickle
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
