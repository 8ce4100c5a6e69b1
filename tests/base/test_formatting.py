import pytest

from recipe.base.formatting import count_of, format_bytes, format_count, format_duration, number


@pytest.mark.parametrize(
    ("formatted", "expected"),
    [
        (format_duration(59.6), "0:01:00"),
        (format_duration(90_061), "1d 1:01:01"),
        (format_count(12), "12"),
        (format_count(1234), "1.23K"),
        (format_count(999_600), "1M"),
        (format_count(5e18), "5e+18"),
        (format_bytes(999), "999 bytes"),
        (format_bytes(1_234_567), "1.23 MB"),
        (format_bytes(2.5e15), "2.5e+03 TB"),
        (number(1.5, "6.3f"), " 1.500"),
        (number(None, "6.3f"), "  none"),
    ],
)
def test_numbers_are_short_and_have_a_unit(formatted: str, expected: str):
    assert formatted == expected


def test_one_is_no_plural():
    assert [count_of(n, "file") for n in (0, 1, 2000)] == ["0 files", "1 file", "2,000 files"]
    assert [count_of(n, "process", "processes") for n in (1, 2)] == ["1 process", "2 processes"]
