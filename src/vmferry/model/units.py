"""Sizes, durations and rates as people write them, to integers (bytes, milliseconds, bits per second) and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from vmferry.model.errors import WrongInput

_NUMBER = re.compile(r" *([0-9]{1,20}(?:\.[0-9]{1,20})?) *([A-Za-z%/]{0,6}) *\Z")
_LIMIT = 1 << 63  # QEMU and SQLite count in signed 64-bit integers
_SIZES = {
    "": 1, "b": 1,
    "k": 1 << 10, "kib": 1 << 10, "kb": 10**3,
    "m": 1 << 20, "mib": 1 << 20, "mb": 10**6,
    "g": 1 << 30, "gib": 1 << 30, "gb": 10**9,
    "t": 1 << 40, "tib": 1 << 40, "tb": 10**12,
}  # fmt: skip
_DURATIONS_MS = {"ms": 1, "s": 1000, "m": 60_000, "min": 60_000, "h": 3_600_000}
_RATES = {
    "bit": 1, "bit/s": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9,
    "kbit/s": 10**3, "mbit/s": 10**6, "gbit/s": 10**9,
    "mib/s": 8 << 20, "mb/s": 8 * 10**6, "gib/s": 8 << 30, "gb/s": 8 * 10**9,
}  # fmt: skip


def _parse(text: str, what: str, table: Mapping[str, int], example: str) -> int:
    """Exact (decimal, not binary floating point): 1.001s is 1001 ms."""
    match = _NUMBER.match(text)
    factor = table.get(match.group(2).lower()) if match else None
    value = int(Decimal(match.group(1)) * factor) if match and factor is not None else _LIMIT
    if value >= _LIMIT:
        shown = text if len(text) <= 40 else text[:40] + "…"
        raise WrongInput(f"bad-{what}", f"{shown!r} is not a {what}.", f"Write it like {example}.")
    return value


def parse_size(text: str) -> int:
    """Bytes of a size such as `512MiB`. Raises WrongInput `bad-size`."""
    return _parse(text, "size", _SIZES, "512MiB or 2GiB")


def parse_duration_ms(text: str) -> int:
    """Milliseconds of a duration such as `300ms`, `10m`. Raises WrongInput `bad-duration`."""
    return _parse(text, "duration", _DURATIONS_MS, "300ms, 20s or 10m")


def parse_rate_bps(text: str) -> int:
    """Bits per second of a rate such as `500mbit`. Raises WrongInput `bad-rate`."""
    return _parse(text, "rate", _RATES, "500mbit or 2gbit")


def parse_percent(text: str) -> int:
    """Percent, 0 to 99, of a text such as `50%`. Raises WrongInput `bad-percent`."""
    value = _parse(text, "percent", {"": 1, "%": 1}, "50%")
    if not 0 <= value <= 99:
        raise WrongInput("bad-percent", f"{text!r} is not between 0% and 99%.", "Write it like 50%.")
    return value


def format_size(size_bytes: float) -> str:
    """A size for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def format_ms(duration_ms: float) -> str:
    """A duration for people: `12.3 ms`, `4.2 s`, `3 min 5 s`."""
    if duration_ms < 1000:
        return f"{duration_ms:.1f} ms"
    seconds = duration_ms / 1000
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def format_rate(bits_per_s: float) -> str:
    """A rate for people: `940 Mbit/s`."""
    for factor, unit in ((10**9, "Gbit/s"), (10**6, "Mbit/s"), (10**3, "kbit/s")):
        if bits_per_s >= factor:
            count = bits_per_s / factor
            return f"{count:.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"
    return f"{bits_per_s:.0f} bit/s"
