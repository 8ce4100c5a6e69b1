"""Progress bars for a terminal, and log lines beside them."""

import sys

from tqdm import tqdm

from recipe.base.formatting import format_bytes, format_duration


def progress_bar(
    phase: str, total: int | None, unit: str, is_shown: bool = True, initial: int = 0, stays: bool = True
) -> tqdm:
    """Make a progress bar that a terminal shows, in a process where `is_shown`, and a log file does not.

    `unit` is what is counted, in the plural, or `B` for bytes; `initial` of the `total` were done before. A bar that
    `stays` is left on the screen at its end.
    """
    counting = {"unit": "B", "unit_scale": True} if unit == "B" else {"unit": f" {unit}"}
    disable = None if is_shown else True  # None: tqdm shows it on terminals only
    return tqdm(desc=phase, total=total, initial=initial, leave=stays, disable=disable, dynamic_ncols=True, **counting)


def describe_progress(phase: str, done: int, total: int | None, initial: int, seconds: float) -> str:
    """Describe bytes that are done for a log file: how many of how many, how fast, and the time left."""
    rate = max(1.0, (done - initial) / seconds)
    if total is None or total < done:
        return f"{phase}: {format_bytes(done)}, {format_bytes(rate)} a second"
    left = format_duration((total - done) / rate)
    return f"{phase}: {format_bytes(done)} of about {format_bytes(total)}, {format_bytes(rate)} a second, {left} left"


def print_line(text: str) -> None:
    """Print above the bars, if there are any, so that a log file has the line at once."""
    tqdm.write(text)
    sys.stdout.flush()
