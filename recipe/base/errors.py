"""Errors that the user can correct, and how errors of libraries are worded."""

import atexit
import difflib
import importlib.util
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

from recipe.base.output import keep_output_from_failing, restart_in_utf8

# What most processes of a launch have in common, the first one says: its launcher then ends the others, which wait.
FIRST_RANK_SECONDS = 30


class UserError(ValueError):
    """An error that the user can correct; its message names the field or file, the value and the way out."""


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Turn errors that say what to do into their message on stderr and exit status 2, without a traceback.

    They are `UserError`s, and the `FloatingPointError` of a training whose numbers are no longer finite. An interrupt
    is named, with the status that a shell gives it. All scripts and commands run in this context, by `run_script`, so
    from here on nothing that is printed can fail.
    """
    keep_output_from_failing()
    try:
        yield
    except (UserError, FloatingPointError) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(FIRST_RANK_SECONDS)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        name = str(interrupt) or "SIGINT"
        print(f"stopped by {name}", file=sys.stderr)
        sys.exit(128 + signal.Signals[name])


def run_script(main: Callable[[], object]) -> None:
    """Run the main function of a script or command in `report_user_errors`, and in UTF-8 whatever the locale.

    The process ends with the status of this run, whatever threads are left then, by `end_process`. What libraries have
    for their developers to change is not shown, unless Python's option `-W` asks for it.
    """
    restart_in_utf8()
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)
    leave_out_broken_triton()
    status = 1  # of an error that Python shows
    try:
        with report_user_errors():
            main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        atexit.register(end_process, status)


def leave_out_broken_triton() -> None:
    """Have a Triton that cannot be imported count as missing, with a warning from one process of a machine.

    Torch and transformers do without a missing one, and cannot be imported beside one that raises anything else.
    """
    if not importlib.util.find_spec("triton"):
        return
    try:
        importlib.import_module("triton.language")
        _ = sys.modules["triton"].jit
    except Exception as error:  # of whatever kind
        for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
            del sys.modules[name]
        sys.modules["triton"] = None  # type: ignore[assignment]  # which is how Python marks a module as missing
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"warning: Triton is broken, and left out: {describe_error(error)}", file=sys.stderr)


def end_process(status: int) -> None:
    """End the process with a status, after all that Python does at an end but taking the interpreter apart.

    Python would stop each thread that is left where it next asks for the interpreter, which inside of C++, such as
    torch's, aborts the process. `atexit` calls this function first, and it calls the others.
    """
    try:
        atexit.unregister(end_process)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def describe_error(error: BaseException, until: type[BaseException] | None = None) -> str:
    """Describe an error of a library in one line: with `until`, its first cause of this type, or else its innermost."""
    while until and error.__cause__ and not isinstance(error, until):
        error = error.__cause__
    if isinstance(error, UnpicklingError):  # its own message recommends loading the file without the check
        return "it holds something else than tensors and plain values, or is damaged, and is not loaded"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def raising_damaged_file(file: object, remedy: str) -> Iterator[None]:
    """Turn any error of the code that reads a file into a `UserError` that names the file and the remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library raises its own
        raise UserError(f"{file} is damaged or missing ({describe_error(error)}); {remedy}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean `x`?` for the nearest known name, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def require(condition: bool, name: str, value: Any, remedy: str, owner: str = "") -> None:
    """Raise a `UserError` about the field `name` unless the condition holds; `owner` is as in `check_values`."""
    if not condition:
        raise UserError(f"`{name}`{owner} is {value}; {remedy}")
