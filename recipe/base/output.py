"""What a process prints: printing that fails, on a full disk or into a closed pipe, never ends anything else."""

import contextlib
import io
import os
import sys

UTF8_MODE = "PYTHONUTF8"  # the variable that switches it on, for the processes that this one starts too


class PatientOutput(io.TextIOWrapper):
    """A text stream that leaves out what cannot be written, and escapes what its encoding lacks."""

    def write(self, text: str) -> int:
        """Write the text if that is possible, and return its length."""
        with contextlib.suppress(OSError, ValueError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Write what waits, if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            super().flush()

    def close(self) -> None:
        """Write what waits; the file stays open for the stream that this one has replaced."""
        self.flush()


def restart_in_utf8() -> None:
    """Start this process again in Python's UTF-8 mode, if its locale has another encoding for names of files.

    As Python does by itself from 3.15 on. Otherwise a file could not be opened by a name that the locale cannot write,
    and libraries would read and write their files in the locale's encoding. Process id, signals and files stay.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get(UTF8_MODE) != "1":
        os.environ[UTF8_MODE] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_output_from_failing() -> None:
    """Replace stdout and stderr by streams whose writing never fails, also where they are closed.

    They stay replaced, since the interpreter flushes them at its very end and would turn a failure into an exit status.
    A stream that is no file, such as a notebook's, is left as it is.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed one would be the next file's, which then received what libraries print
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it is closed
            setattr(sys, name, PatientOutput(open(os.devnull, "wb"), "utf-8", "backslashreplace"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            by_line = stream.line_buffering or stream.write_through  # other processes' pieces would mix with its own
            output = PatientOutput(stream.buffer, stream.encoding, "backslashreplace", line_buffering=by_line)
            setattr(sys, name, output)
