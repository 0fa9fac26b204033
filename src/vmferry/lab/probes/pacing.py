"""Real cadence in a Python process: priority, exact waits, a stop flag, and the live progress file.

For the probes only.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PR_SET_TIMERSLACK = 29
_PROGRESS_NS = 200_000_000
NS = 1_000_000_000


def raise_priority() -> bool:
    """Real-time priority, or the best nice value; no timer slack, no garbage collection. False if none was allowed."""
    gc.disable()
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(5))
        return True
    except OSError:
        with contextlib.suppress(OSError):
            os.nice(-20)
            return True
    return False


class StopFlag:
    """Raised by SIGTERM and SIGINT, or when the duration is over."""

    def __init__(self, duration_s: float | None) -> None:
        self._end = None if duration_s is None else time.monotonic() + duration_s
        self._raised = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._raise)

    def _raise(self, *_: object) -> None:
        self._raised = True

    def is_raised(self) -> bool:
        return self._raised or (self._end is not None and time.monotonic() >= self._end)


class Pacer:
    """Says when the next of `rate` events a second is due, and how late the process was at worst.

    After a delay the missed events are due at once, so that their number stays right.
    """

    def __init__(self, rate: float) -> None:
        self._period_ns = int(NS / rate)
        self._next_ns = time.monotonic_ns() + self._period_ns
        self.latest_ns = 0

    def take_due(self) -> bool:
        """Whether an event is due now; it is then counted as done."""
        late = time.monotonic_ns() - self._next_ns
        if late < 0:
            return False
        self.latest_ns = max(self.latest_ns, late)
        self._next_ns += self._period_ns
        return True

    def wait(self, readable: socket.socket, writable: bool = False) -> None:
        """Waits until the next event is due or there is something to read (or room to write)."""
        left_s = max(0.0, (self._next_ns - time.monotonic_ns()) / NS)
        # select takes microseconds; poll would round to milliseconds
        select.select([readable], [readable] if writable else [], [], left_s)


class Progress:
    """Keeps one JSON line in a file up to date, five times a second; nothing without a path."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._next_ns = 0

    def show(self, describe: Callable[[], dict[str, Any]], now: bool = False) -> None:
        if self._path is None or (time.monotonic_ns() < self._next_ns and not now):
            return
        self._next_ns = time.monotonic_ns() + _PROGRESS_NS
        fresh = self._path.with_name(self._path.name + ".new")
        fresh.write_text(json.dumps(describe()) + "\n", encoding="utf-8")
        fresh.replace(self._path)


def wall_time(ns: int) -> str:
    """RFC 3339 with microseconds, UTC."""
    seconds, rest = divmod(ns, NS)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest // 1000:06d}Z"
