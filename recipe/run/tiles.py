"""Pages of coloured tiles of text, for the terminal or as a PNG: lines of fixed-width characters."""

import os
import sys
import textwrap
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

from recipe.base.errors import UserError
from recipe.base.progress import print_line
from recipe.run.plots import new_figure

CUBE_LEVELS = (0, 95, 135, 175, 215, 255)  # of red, green and blue in the 256 colours of a terminal
MAX_TILE_COLUMNS = 30
FONT_POINTS, LINE_INCHES = 8, 0.17
COLUMN_INCHES = 0.602 * FONT_POINTS / 72  # of DejaVu Sans Mono
MAX_DRAWN_LINES = 2_000
VISIBLE = str.maketrans({" ": "␣", "\n": "⏎"})


class Style(NamedTuple):
    """Colours, each as three digits: places among `CUBE_LEVELS`, of red, green and blue; empty for none of its own."""

    foreground: str = ""
    background: str = ""


class Tile(NamedTuple):
    """A piece of text on a ground."""

    text: str
    style: Style = Style()


Line = list[Tile]  # with a space between each two


def visible(text: str) -> str:
    """Write a text so that all of it can be seen, cut where it is too long for a tile.

    Spaces become `␣` and line breaks `⏎`; what a terminal would obey, or not show, is escaped.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.translate(VISIBLE))
    if count_columns(text) > MAX_TILE_COLUMNS:
        while count_columns(text) >= MAX_TILE_COLUMNS:
            text = text[:-1]
        text += "…"
    return text


def count_columns(text: str) -> int:
    """Count the columns of a terminal that a text takes: two for a wide character, none for a combining one."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text
    )


def lay_out_text(text: str, width: int) -> list[Line]:
    """Break a text into lines of a width in columns."""
    return [[Tile(line)] for line in textwrap.wrap(text, width)]


def lay_out(rows: dict[str, list[Tile]], width: int) -> list[Line]:
    """Break rows of tiles, by their names and all of one length, into lines of a width in columns.

    Several rows stay together, a line of each in turn, and their tiles below each other.
    """
    columns = [max(count_columns(tile.text) for tile in tiles) for tiles in zip(*rows.values(), strict=True)]
    margin = max(map(count_columns, rows))
    lines: list[Line] = []
    first = 0
    while first < len(columns):
        used, last = margin, first
        while last < len(columns) and (last == first or used + 1 + columns[last] <= width):
            used += 1 + columns[last]
            last += 1
        for name, tiles in rows.items():
            padded = zip(tiles[first:last], columns[first:last], strict=True)
            line = [tile._replace(text=tile.text + " " * (size - count_columns(tile.text))) for tile, size in padded]
            lines.append([Tile(name.ljust(margin)), *line] if margin else line)
        first = last
    return lines


def has_colours() -> bool:
    """Say whether stdout is a terminal that shows colours, and is wanted to (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def to_text(page: list[Line], is_coloured: bool) -> str:
    """Write a page for a terminal, with its 256 colours or as plain text."""
    if is_coloured:
        return "\n".join(" ".join(map(colour, line)) for line in page)
    return "\n".join(" ".join(tile.text for tile in line).rstrip() for line in page)


def colour(tile: Tile) -> str:
    """Put the codes of its colours around the text of a tile."""
    grounds = zip((38, 48), tile.style, strict=True)
    codes = [f"{ground};5;{16 + int(digits, 6)}" for ground, digits in grounds if digits]
    return f"\x1b[{';'.join(codes)}m{tile.text}\x1b[0m" if codes else tile.text


def draw_page(page: list[Line], path: Path) -> None:
    """Draw a page to a PNG file; raise a `UserError` if it has too many lines."""
    if len(page) > MAX_DRAWN_LINES:
        raise UserError(f"{path} would have {len(page):,} lines, and {MAX_DRAWN_LINES:,} can be drawn; lower --rows")
    columns = max(sum(1 + count_columns(tile.text) for tile in line) for line in page)
    figure = new_figure((columns + 1) * COLUMN_INCHES, (len(page) + 1) * LINE_INCHES)
    from matplotlib.font_manager import get_font_names
    from matplotlib.patches import Rectangle

    fonts = ["DejaVu Sans Mono", *(name for name in get_font_names() if "CJK" in name)]
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-1, columns), ylim=(len(page), -1))
    axes.axis("off")
    for y, line in enumerate(page):
        x = 0
        for text, style in line:
            size = count_columns(text)
            foreground, background = ([CUBE_LEVELS[int(digit)] / 255 for digit in digits] for digits in style)
            if background:
                axes.add_patch(Rectangle((x - 0.2, y - 0.42), size + 0.4, 0.84, color=background, linewidth=0))
            axes.text(
                x,
                y,
                text,
                color=foreground or "black",
                family=fonts,
                fontsize=FONT_POINTS,
                va="center_baseline",
                parse_math=False,
            )
            x += size + 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(path, dpi=100, format="png")
    if missing := sum("missing from font" in str(warning.message) for warning in caught):
        print_line(f"warning: {missing} characters have no shape in the fonts of this machine; install Noto Sans CJK")
