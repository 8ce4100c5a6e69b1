import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from recipe.base.errors import UserError
from recipe.run.tiles import (
    MAX_DRAWN_LINES,
    MAX_TILE_COLUMNS,
    Style,
    Tile,
    count_columns,
    draw_page,
    has_colours,
    lay_out,
    to_text,
    visible,
)

ORANGE = Style("000", "542")  # 255, 215, 135


@pytest.mark.parametrize(
    ("text", "columns"), [("the", 3), ("你好", 4), ("ｶﾅ", 2), ("カナ", 4), ("é", 1), ("e\u0301", 1), ("हि", 2), ("", 0)]
)
def test_columns_are_those_of_a_terminal(text: str, columns: int):
    assert count_columns(text) == columns


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (" the", "␣the"),
        ("a\n", "a⏎"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\u202eabc", "\\u202eabc"),
        ("\u00a0\t\u200b", "\\xa0\\t\\u200b"),
        ("你好 é", "你好␣é"),
        ("[a]{b}$c$", "[a]{b}$c$"),
    ],
)
def test_what_a_terminal_would_hide_or_obey_is_written_out(text: str, written: str):
    assert visible(text) == written


@pytest.mark.parametrize("text", ["-" * 100, "你" * 100, "e\u0301" * 100])
def test_long_text_is_cut_to_a_tile(text: str):
    assert MAX_TILE_COLUMNS - 1 <= count_columns(visible(text)) <= MAX_TILE_COLUMNS
    assert visible(text).endswith("…")


@pytest.mark.parametrize("width", [20, 33, 80])
def test_lines_fit_the_width_and_hold_every_tile(width: int):
    words = ["the", "一", "␣kings", "ofhearts", "你好吗"] * 20
    lines = lay_out({" ": [Tile(word) for word in words]}, width)
    assert [tile.text.strip() for line in lines for tile in line[1:]] == words
    widths = [count_columns(line) for line in to_text(lines, False).splitlines()]
    assert max(widths) <= width
    assert min(widths[:-1]) > width - max(map(count_columns, words)) - 1  # no line is broken too soon


def test_rows_of_a_stack_keep_their_tiles_below_each_other():
    stack = {"": [Tile("你"), Tile("b"), Tile("c")], "masks": [Tile(""), Tile("{bbb}"), Tile("")]}
    assert to_text(lay_out(stack, 40), False).splitlines() == ["      你 b     c", "masks    {bbb}"]
    assert to_text(lay_out(stack, 10), False).splitlines() == [
        "      你",
        "masks",
        "      b",
        "masks {bbb}",
        "      c",
        "masks",
    ]


def test_colours_are_codes_around_the_same_text():
    page = [[Tile("plain"), Tile("␣tile", ORANGE)], [Tile("end")]]
    assert to_text(page, False) == "plain ␣tile\nend"
    coloured = to_text(page, True)
    # 16 + 36 red + 6 green + blue, of 0 to 5 each
    assert "\x1b[38;5;16;48;5;222m␣tile\x1b[0m" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == to_text(page, False)


@pytest.mark.parametrize(
    ("is_terminal", "environment", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, environment: dict[str, str], expected: bool
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    assert has_colours() is expected


def test_picture_has_the_tiles_in_their_places(tmp_path: Path):
    """A third line of two tiles, the second one wide: its ground is twice as wide as that of the first."""
    page = [[Tile("$title$ _^")], [Tile("")], [Tile("aa", ORANGE), Tile("    ", Style("000", "005"))]]
    draw_page(page, tmp_path / "page.png")
    pixels = np.round(matplotlib.image.imread(tmp_path / "page.png")[:, :, :3] * 255)
    found = {colour: (pixels == colour).all(axis=2) for colour in ((255, 215, 135), (0, 0, 255))}
    orange, blue = (mask.any(axis=0).sum() for mask in found.values())
    assert blue / orange == pytest.approx(4.4 / 2.4, rel=0.1)
    for mask in found.values():
        rows = np.flatnonzero(mask.any(axis=1)) / len(pixels)
        assert 0.6 < rows.min() < rows.max() < 0.9


def test_picture_says_which_characters_it_lacks(tmp_path: Path, capsys):
    draw_page([[Tile("a\U0001f600b"), Tile("\u13a0")]], tmp_path / "page.png")
    drawn = capsys.readouterr().out
    assert not drawn or re.fullmatch(r"warning: [12] characters have no shape in the fonts .*\n", drawn)


def test_picture_of_too_many_lines_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="lower --rows"):
        draw_page([[Tile("a")]] * (MAX_DRAWN_LINES + 1), tmp_path / "page.png")
