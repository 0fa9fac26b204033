"""Is anybody else using this machine's processors? Figures of a busy machine say little."""

from __future__ import annotations

import os
import time
from pathlib import Path

QUIET_LOAD = 1.5
QUIET_SHARE = 0.15
_STEP_S = 1.0


def busy_share(over_s: float = _STEP_S) -> float:
    """Which part of all processors' time was used, 0 to 1."""
    before = _ticks()
    time.sleep(over_s)
    after = _ticks()
    total = sum(after) - sum(before)
    idle = after[3] + after[4] - before[3] - before[4]  # idle, iowait: proc_stat(5)
    return 1 - idle / total if total else 0.0


def _ticks() -> list[int]:
    return [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]


def wait_until_quiet(limit_s: float) -> float:
    """Waits while more than QUIET_SHARE is used, at most `limit_s`; gives the last share."""
    deadline = time.monotonic() + limit_s
    while (share := busy_share()) > QUIET_SHARE and time.monotonic() < deadline:
        pass
    return share


def wait_for_low_load(limit_s: float) -> float:
    """Waits until the load average of the last minute is below QUIET_LOAD, at most `limit_s`; gives it."""
    deadline = time.monotonic() + limit_s
    while os.getloadavg()[0] >= QUIET_LOAD and time.monotonic() < deadline:
        time.sleep(_STEP_S)
    return os.getloadavg()[0]
