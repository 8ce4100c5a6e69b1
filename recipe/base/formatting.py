"""Numbers as a person reads them: durations, counts and bytes."""


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02}:{seconds:02}"


def format_count(number: float) -> str:
    """Three to four digits and a unit: 1,234 as `1.23K`."""
    for unit in ("", "K", "M", "B", "T"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number * 1e15:.3g}"


def format_bytes(number: float) -> str:
    """Three digits and a unit: 1,234,567 as `1.23 MB`."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def number(value: float | None, form: str) -> str:
    """A number in this format, or `none` in its width."""
    return "none".rjust(len(format(0.0, form))) if value is None else format(value, form)
