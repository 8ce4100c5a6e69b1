"""Durations, counts and bytes in a form for people."""


def format_duration(seconds: float) -> str:
    """Format a duration as days, hours, minutes and seconds: 90061 as `1d 1:01:01`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02}:{seconds:02}"


def format_count(number: float) -> str:
    """Format a number with three to four digits and a unit: 1,234 as `1.23K`."""
    for unit in ("", "K", "M", "B", "T"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number * 1e15:.3g}"


def format_bytes(number: float) -> str:
    """Format a size with three digits and a unit: 1,234,567 as `1.23 MB`."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def count_of(number: int, noun: str, plural: str = "") -> str:
    """Write a number before its noun, as in `1 file` and `2 files`; `plural` is that of a noun that takes no bare s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def number(value: float | None, form: str) -> str:
    """Format a number by a format specification, or None as `none` in the same width."""
    return "none".rjust(len(format(0.0, form))) if value is None else format(value, form)
