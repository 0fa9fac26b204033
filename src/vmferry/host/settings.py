"""Checking one table of a settings file: which keys it may have, and what each value may be.

For `host.config` only. A parser takes what TOML gave and returns the value, or raises ValueError whose text is a plain
phrase of what is allowed ("a size such as 512MiB"). Pure.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmferry.model.errors import WrongInput
from vmferry.model.names import require_name
from vmferry.model.units import parse_duration_ms, parse_rate_bps, parse_size

Parser = Callable[[object], Any]
MISSING: Final = object()
_SHOWN = 80
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\Z")
_DEVICE = re.compile(r"[^\s/:\x00-\x1f]{1,15}\Z")


@dataclass(frozen=True, slots=True)
class Key:
    """A setting: how its value is read, its default as it would stand in the file (MISSING: must be given).

    `unit` is what the name of the value gets at its end, for values that have one.
    """

    parse: Parser
    default: object
    unit: str = ""


Table = Mapping[str, Key]


def read_table(found: object, table: Table, where: str, faults: list[str]) -> dict[str, Any]:
    """The values of a table, defaults filled in. What is wrong is appended to `faults`, and left out of the answer."""
    if not isinstance(found, dict):
        faults.append(f"{where} must be a table, found {_shown(found)}.")
        return {}
    faults += [_unknown(key, table, where) for key in found if key not in table]
    values: dict[str, Any] = {}
    for name, key in table.items():
        if name not in found and key.default is MISSING:
            faults.append(f"{where} {name} is missing; give {_allowed(key.parse)}.")
            continue
        value = found.get(name, key.default)
        if name not in found and value in ("", None):
            values[name + key.unit] = value
            continue
        try:
            values[name + key.unit] = key.parse(value)
        except ValueError as error:
            faults.append(f"{where} {name} = {_shown(value)} is found; allowed is {error}.")
    return values


def _unknown(key: str, table: Table, where: str) -> str:
    close = difflib.get_close_matches(key, table, n=1, cutoff=0.5)
    advice = f"did you mean {close[0]}?" if close else f"known are {', '.join(table)}."
    return f"{where} {key[:_SHOWN]} is not a known key; {advice}"


def _allowed(parse: Parser) -> str:
    try:
        parse(None)
    except ValueError as error:
        return str(error)
    raise AssertionError("a parser of settings accepted nothing at all")


def _shown(value: object) -> str:
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    if isinstance(value, bool):
        text = str(value).lower()
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def line(value: object) -> str:
    """Any text on one line."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("a text on one line")
    return value


def flag(value: object) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def absolute_path(value: object) -> Path:
    """A path that begins with a slash and has no `..` in it."""
    if not isinstance(value, str) or not value.startswith("/") or "\x00" in value or ".." in Path(value).parts:
        raise ValueError("an absolute path without '..'")
    return Path(value)


def ip_address(value: object) -> str:
    """An IPv4 or IPv6 address, not a name: nothing between hosts may wait for DNS."""
    try:
        return str(ipaddress.ip_address(line(value)))
    except ValueError:
        raise ValueError("an IPv4 or IPv6 address of this host, such as 192.0.2.1") from None


def device_name(value: object) -> str:
    """A network interface's name (IFNAMSIZ - 1, no slash, colon or white space; kernel dev_valid_name)."""
    if not isinstance(value, str) or not _DEVICE.match(value) or value in (".", ".."):
        raise ValueError("the name of a network interface, at most 15 characters")
    return value


def choice(*allowed: str) -> Parser:
    """One of the words."""
    listed = ", ".join(f'"{word}"' for word in allowed)

    def parse(value: object) -> str:
        if value not in allowed:
            raise ValueError(f"one of {listed}" if len(allowed) > 1 else listed)
        return str(value)

    return parse


def whole_number(low: int, high: int) -> Parser:
    """A whole number within bounds."""

    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return parse


def name_of(what: str) -> Parser:
    """A name as model.names has it."""

    def parse(value: object) -> str:
        try:
            return require_name(value if isinstance(value, str) else "", what)
        except WrongInput as error:
            raise ValueError("a name of 1 to 63 lower-case letters, digits and hyphens") from error

    return parse


def names(parse_one: Parser) -> Parser:
    """A list of what `parse_one` reads."""

    def parse(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError('a list such as ["eth0"]')
        return tuple(parse_one(item) for item in value)

    return parse


def _with_units(read: Callable[[str], int], allowed: str, value: object) -> int:
    try:
        return read(line(value))
    except (ValueError, WrongInput) as error:
        raise ValueError(allowed) from error


def size(value: object) -> int:
    """Bytes."""
    return _with_units(parse_size, 'a size such as "512MiB"', value)


def duration(value: object) -> int:
    """Milliseconds, more than none."""
    allowed = 'a duration such as "500ms" or "10s"'
    result = _with_units(parse_duration_ms, allowed, value)
    if result <= 0:
        raise ValueError(allowed + ", more than 0")
    return result


def rate(value: object) -> int:
    """Bits per second; "0" is no limit."""
    if value == "0":
        return 0
    return _with_units(parse_rate_bps, 'a rate such as "500mbit", or "0" for no limit', value)


def endpoint(default_port: int) -> Parser:
    """`address`, `address:port` or `[IPv6]:port` as (address, port)."""
    allowed = f'an address with a port, such as "192.0.2.2:{default_port}" or "[2001:db8::2]:{default_port}"'

    def parse(value: object) -> tuple[str, int]:
        match = re.match(r"(?:\[(?P<six>[^\]]+)\]|(?P<four>[^:\[\]]+))(?::(?P<port>\d{1,5}))?\Z", str(value))
        port = int(match["port"] or default_port) if match else 0
        if not isinstance(value, str) or match is None or not 1 <= port <= 65535:
            raise ValueError(allowed)
        if match["four"]:
            if not _HOST_NAME.match(match["four"]):
                raise ValueError(allowed)
            return match["four"], port
        try:
            return str(ipaddress.IPv6Address(match["six"])), port
        except ValueError:
            raise ValueError(allowed) from None

    return parse
