"""What a process prints: printing that fails, on a full disk or into a closed pipe, never ends anything else."""

import contextlib
import io
import os
import sys


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


def keep_output_from_failing() -> None:
    """Replace stdout and stderr by streams whose writing never fails, also where they are closed.

    They stay replaced, since the interpreter flushes them at its very end and would turn a failure into an exit status.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed one would be the next file's, which then received what libraries print
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)  # None where it is closed
        buffer, encoding, by_line = open(os.devnull, "wb"), "utf-8", False  # noqa: SIM115  open until the end
        if stream is not None:
            buffer, encoding, by_line = stream.buffer, stream.encoding, stream.line_buffering
        setattr(sys, name, PatientOutput(buffer, encoding, "backslashreplace", line_buffering=by_line))
