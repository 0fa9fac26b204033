"""The daemon's log: events with keys, one line each, to standard error (the journal of systemd takes it from there)."""

from __future__ import annotations

import logging
import sys
from typing import Any

_LOGGER = logging.getLogger("vmferryd")


def configure(verbose: bool) -> None:
    """Once, at the daemon's start."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    _LOGGER.setLevel(logging.DEBUG if verbose else logging.INFO)


def event(name: str, **keys: Any) -> None:
    """Something that happened."""
    _LOGGER.info(_line(name, keys))


def alarm(name: str, **keys: Any) -> None:
    """Something that somebody should look at."""
    _LOGGER.warning(_line(name, keys))


def defect(name: str, error: BaseException, **keys: Any) -> None:
    """An error that nobody expected: a bug. With its traceback."""
    _LOGGER.error(_line(name, keys), exc_info=error)


def _line(name: str, keys: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value!r}" for key, value in keys.items())])
