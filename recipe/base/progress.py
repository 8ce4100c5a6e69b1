"""What a terminal shows of a phase that takes long."""

import sys

from tqdm import tqdm


def progress_bar(
    phase: str, total: int | None, unit: str, is_shown: bool = True, initial: int = 0, stays: bool = True
) -> tqdm:
    """A bar on a terminal, and nothing in a log file.

    Args:
        phase: what is going on.
        total: units in all; None if not known.
        is_shown: whether this process is the one to show it.
        initial: units that were done before.
        stays: whether it is left standing at its end.
    """
    disable = None if is_shown else True  # None: of what is no terminal
    scaled = unit == "B"
    return tqdm(
        desc=phase,
        total=total,
        unit=unit if scaled else f" {unit}",
        unit_scale=scaled,
        initial=initial,
        leave=stays,
        disable=disable,
        dynamic_ncols=True,
    )


def print_line(text: str) -> None:
    """Print above the bars, if there are any, and have it reach a log file at once."""
    tqdm.write(text)
    sys.stdout.flush()
