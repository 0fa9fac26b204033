"""Sizes, durations and rates: read exactly, written for people, and nothing else gets in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.model.errors import WrongInput
from vmferry.model.units import (
    format_ms,
    format_rate,
    format_size,
    parse_duration_ms,
    parse_percent,
    parse_rate_bps,
    parse_size,
)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_size, "512MiB", 512 << 20),
        (parse_size, "512 mib", 512 << 20),
        (parse_size, "2G", 2 << 30),
        (parse_size, "2GB", 2 * 10**9),
        (parse_size, "1.5KiB", 1536),
        (parse_size, " 7 ", 7),
        (parse_size, "9007199254740993", 9007199254740993),  # more than a float holds
        (parse_size, "4.35MB", 4_350_000),
        (parse_duration_ms, "300ms", 300),
        (parse_duration_ms, "1.001s", 1001),
        (parse_duration_ms, "10m", 600_000),
        (parse_duration_ms, "2min", 120_000),
        (parse_duration_ms, "1.5h", 5_400_000),
        (parse_rate_bps, "500mbit", 500_000_000),
        (parse_rate_bps, "2.5Gbit/s", 2_500_000_000),
        (parse_rate_bps, "1MiB/s", 8 << 20),
        (parse_rate_bps, "100MB/s", 800_000_000),
        (parse_percent, "50%", 50),
        (parse_percent, "0", 0),
        (parse_percent, "99 %", 99),
    ],
)
def test_reading(parse: Callable[[str], int], text: str, value: int) -> None:
    assert parse(text) == value


RUBBISH = ["", " ", "x", "-1", "+1", "1e3", "1 2", "1.", ".5", "0x10", "nan", "inf", "٣MiB", "5\n", "1MiBs", "1µs"]
RUBBISH += ["9" * 400, "9" * 10_000 + "MiB", "\x1b[2J", "9" * 20, "1TiB\0"]


@pytest.mark.parametrize(
    ("parse", "code"),
    [(parse_size, "size"), (parse_duration_ms, "duration"), (parse_rate_bps, "rate"), (parse_percent, "percent")],
)
def test_rubbish_is_refused_with_an_example(parse: Callable[[str], int], code: str) -> None:
    for text in RUBBISH:
        with pytest.raises(WrongInput) as caught:
            parse(text)
        assert caught.value.code == f"bad-{code}"
        assert caught.value.fix.startswith("Write it like ")
        assert len(caught.value.message) < 200 and caught.value.message.isprintable()


@pytest.mark.parametrize("text", ["5", "5KiB", "5mbit"])
def test_a_duration_needs_its_unit(text: str) -> None:
    with pytest.raises(WrongInput):
        parse_duration_ms(text)


@pytest.mark.parametrize("text", ["100%", "100"])
def test_a_percent_is_less_than_all(text: str) -> None:
    with pytest.raises(WrongInput):
        parse_percent(text)


@given(st.integers(0, (1 << 62) - 1))
def test_a_size_for_people_is_read_again(size: int) -> None:
    assert parse_size(str(size)) == size
    assert parse_size(f"{size}B") == size
    text = format_size(size)
    assert abs(parse_size(text) - size) <= max(1, size * 0.06)
    assert len(text) <= 13


@given(st.floats(0, 119_999))
def test_a_short_duration_for_people_is_read_again(duration: float) -> None:
    assert abs(parse_duration_ms(format_ms(duration)) - duration) <= max(1.1, duration * 0.06)


@given(st.integers(0, 10**13))
def test_a_rate_for_people_is_read_again(rate: int) -> None:
    text = format_rate(rate)
    assert "e" not in text
    assert abs(parse_rate_bps(text.replace(" ", "")) - rate) <= max(1, rate * 0.006)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (format_size(0), "0 B"),
        (format_size(1023), "1023 B"),
        (format_size(1536), "1.5 KiB"),
        (format_size(5 << 40), "5.0 TiB"),
        (format_ms(12.34), "12.3 ms"),
        (format_ms(4200), "4.2 s"),
        (format_ms(185_000), "3 min 5 s"),
        (format_rate(940_000_000), "940 Mbit/s"),
        (format_rate(999_900_000), "1000 Mbit/s"),
        (format_rate(2_500_000_000), "2.5 Gbit/s"),
        (format_rate(12), "12 bit/s"),
    ],
)
def test_writing(shown: str, text: str) -> None:
    assert shown == text
