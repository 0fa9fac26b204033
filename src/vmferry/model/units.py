"""Sizes, durations and rates as people write them, to integers (bytes, milliseconds, bits per second) and back."""

from __future__ import annotations

import re

from vmferry.model.errors import WrongInput

_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z%/]*)\s*\Z")
_SIZES = {
    "": 1, "b": 1,
    "k": 1 << 10, "kib": 1 << 10, "kb": 10**3,
    "m": 1 << 20, "mib": 1 << 20, "mb": 10**6,
    "g": 1 << 30, "gib": 1 << 30, "gb": 10**9,
    "t": 1 << 40, "tib": 1 << 40, "tb": 10**12,
}  # fmt: skip
_DURATIONS_MS = {"ms": 1.0, "s": 1000.0, "m": 60_000.0, "min": 60_000.0, "h": 3_600_000.0}
_RATES = {
    "bit": 1, "bit/s": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9,
    "kbit/s": 10**3, "mbit/s": 10**6, "gbit/s": 10**9,
    "mib/s": 8 << 20, "mb/s": 8 * 10**6, "gib/s": 8 << 30, "gb/s": 8 * 10**9,
}  # fmt: skip


def _parse(text: str, what: str, table: dict[str, float] | dict[str, int], example: str) -> float:
    match = _NUMBER.match(text)
    factor = table.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise WrongInput(f"bad-{what}", f"“{text}” is not a {what}.", f"Write it like {example}.")
    return float(match.group(1)) * factor


def parse_size(text: str) -> int:
    """Bytes of a size such as `512MiB`. Raises WrongInput `bad-size`."""
    return int(_parse(text, "size", _SIZES, "512MiB or 2GiB"))


def parse_duration_ms(text: str) -> int:
    """Milliseconds of a duration such as `300ms`, `10m`. Raises WrongInput `bad-duration`."""
    return int(_parse(text, "duration", _DURATIONS_MS, "300ms, 20s or 10m"))


def parse_rate_bps(text: str) -> int:
    """Bits per second of a rate such as `500mbit`. Raises WrongInput `bad-rate`."""
    return int(_parse(text, "rate", _RATES, "500mbit or 2gbit"))


def parse_percent(text: str) -> int:
    """Percent, 0 to 99, of a text such as `50%`. Raises WrongInput `bad-percent`."""
    value = int(_parse(text, "percent", {"": 1, "%": 1}, "50%"))
    if not 0 <= value <= 99:
        raise WrongInput("bad-percent", f"“{text}” is not between 0% and 99%.", "Write it like 50%.")
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
            return f"{bits_per_s / factor:.3g} {unit}"
    return f"{bits_per_s:.0f} bit/s"
