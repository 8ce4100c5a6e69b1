"""Progress bars for a terminal, and log lines beside them."""

import sys

from tqdm import tqdm


def progress_bar(
    phase: str, total: int | None, unit: str, is_shown: bool = True, initial: int = 0, stays: bool = True
) -> tqdm:
    """Make a progress bar that a terminal shows and a log file does not.

    Args:
        phase: what takes the time, such as `training`.
        total: number of units in all; None if unknown.
        unit: what is counted, in the plural; `B` for bytes.
        is_shown: whether this process is the one to show it.
        initial: number of units that were done before.
        stays: whether the bar stays on the screen at its end.
    """
    return tqdm(
        desc=phase,
        total=total,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
        initial=initial,
        leave=stays,
        disable=None if is_shown else True,  # None: tqdm shows it on terminals only
        dynamic_ncols=True,
    )


def print_line(text: str) -> None:
    """Print above the bars, if there are any, so that a log file has the line at once."""
    tqdm.write(text)
    sys.stdout.flush()
