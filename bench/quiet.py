"""Is anybody else using this machine's processors? Figures of a busy machine say little.

`CpuAccount` puts this process, and with it everything that it starts, into a control group of its own, so that the
others' share can be told even while we keep the machine busy ourselves.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

QUIET_LOAD = 1.5
QUIET_SHARE = 0.15
_STEP_S = 1.0
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class CpuMark:
    """Microseconds of processor time, all processors together: passed, used by anybody, used by us."""

    passed: float
    used: float
    own: float


class CpuAccount:
    """Use it in `with`, before anything is started. Without control groups (v2) the others' share stays unknown.

    With `first` the kernel prefers this group to everybody else: others hardly run while the bench wants to.
    """

    def __init__(self, name: str, first: bool = False) -> None:
        self._name = name
        self._first = first
        self._group: Path | None = None
        self._entered: list[tuple[Path, Path]] = []

    def __enter__(self) -> CpuAccount:
        self._group = self._enter("cgroup2", "", {"cpu.weight": "10000"} if self._first else {})
        if self._first:
            self._enter("cgroup", "cpu", {"cpu.shares": "262144"})
        return self

    def __exit__(self, *_: object) -> None:
        for former, group in self._entered:
            with contextlib.suppress(OSError):  # a leftover group is empty and does nothing
                (former / "cgroup.procs").write_text(str(os.getpid()))
                group.rmdir()

    def _enter(self, kind: str, controller: str, settings: dict[str, str]) -> Path | None:
        root, former = _mount_of(kind, controller), _own_group(controller)
        if root is None or former is None:
            return None
        group = root / self._name
        try:
            group.mkdir(exist_ok=True)
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            return None
        self._entered.append((root / former, group))
        for name, value in settings.items():
            if (group / name).exists():
                (group / name).write_text(value)
        return group

    def mark(self) -> CpuMark:
        """The account as it stands now."""
        ticks = _ticks()
        us = 1e6 / os.sysconf("SC_CLK_TCK")
        return CpuMark(sum(ticks) * us, (sum(ticks) - ticks[3] - ticks[4]) * us, self._own_us())

    def others_share(self, since: CpuMark) -> float | None:
        """Which part of all processors' time others used since the mark, 0 to 1; None if it cannot be told."""
        if self._group is None:
            return None
        now = self.mark()
        others = (now.used - since.used) - (now.own - since.own)
        return max(0.0, others / max(1.0, now.passed - since.passed))

    def _own_us(self) -> float:
        if self._group is None:
            return 0.0
        words = (self._group / "cpu.stat").read_text().split()
        return float(words[words.index("usage_usec") + 1])


def _mount_of(kind: str, controller: str) -> Path | None:
    """Where the second version of control groups is mounted (`cgroup2`), or a controller of the first (`cgroup`)."""
    for line in _MOUNTS.read_text().splitlines():
        place, _, mount = line.partition(" - ")
        found, _, options = mount.split(" ", 2)
        if found == kind and (not controller or controller in options.split(",")):
            return Path(place.split()[4])
    return None


def _own_group(controller: str) -> str | None:
    """Which group this process is in, relative to the mount."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):  # the second version's line names none
            return path.lstrip("/")
    return None


def _ticks() -> list[int]:
    """user nice system idle iowait irq softirq steal, proc_stat(5)."""
    return [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]


class Patience:
    """How much time the whole bench may lose to others: waiting for them, and repeating what they disturbed."""

    def __init__(self, limit_s: float) -> None:
        self._left_s = limit_s

    @property
    def left(self) -> bool:
        return self._left_s > 0

    @contextlib.contextmanager
    def spend(self) -> Iterator[None]:
        """What is done in this block is at its expense."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._left_s -= time.monotonic() - began

    def wait_for_low_load(self) -> float:
        """Waits until the load average of the last minute is below QUIET_LOAD; gives it."""
        while os.getloadavg()[0] >= QUIET_LOAD and self.left:
            with self.spend():
                time.sleep(_STEP_S)
        return os.getloadavg()[0]

    def wait_until_quiet(self, account: CpuAccount) -> None:
        """Waits while others use more than QUIET_SHARE."""
        while self.left:
            mark = account.mark()
            time.sleep(_STEP_S)
            share = account.others_share(mark)
            if share is None or share <= QUIET_SHARE:
                return
            with self.spend():
                time.sleep(_STEP_S)
