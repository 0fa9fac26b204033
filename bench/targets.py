"""What must be true (issue "What must be true"), judged on the medians. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.plan import BARE, BARE_TUNED, OURS, VIRSH, VIRSH_TUNED, Measured

Rows = Sequence[Measured]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target under one load. `passed` is None when what it needs was not measured."""

    load: str
    target: str
    passed: bool | None
    told: str


def median_of(rows: Rows, value: Callable[[Measured], float | None]) -> float | None:
    """Of the runs that have it."""
    found = [one for row in rows if (one := value(row)) is not None]
    return statistics.median(found) if found else None


def rows_of(rows: Rows, load: str, *tools: str) -> list[Measured]:
    return [row for row in rows if row.load == load and row.tool in tools]


def judge(rows: Rows, load: str) -> list[Verdict]:
    """All targets of one load."""
    ours = rows_of(rows, load, OURS)
    if not ours:
        return []
    virsh, tuned = rows_of(rows, load, VIRSH), rows_of(rows, load, VIRSH_TUNED)
    bare = rows_of(rows, load, BARE, BARE_TUNED)

    def blackout(row: Measured) -> float | None:
        return row.blackout_ms

    return [
        _every_run(load, ours),
        _compare(load, "blackout at most 1/5 of virsh's", ours, virsh, blackout, 5),
        _compare(load, "blackout at most 1/2 of tuned virsh's", ours, tuned, blackout, 2),
        _compare(load, "gap beyond blackout as with the bare script", ours, bare, lambda row: row.beyond_ms, 1),
        _none_lost(load, ours),
        _compare(load, "total time at most virsh's", ours, virsh, lambda row: row.total_ms, 1),
    ]


def _every_run(load: str, ours: Rows) -> Verdict:
    good = sum(not row.fault for row in ours)
    return Verdict(load, "every run succeeded", good == len(ours), f"{good} of {len(ours)}")


def _none_lost(load: str, ours: Rows) -> Verdict:
    lost = [row.lost for row in ours if row.lost is not None]
    told = "lost " + ", ".join(map(str, lost))
    return Verdict(load, "no probe lost in any run", not any(lost) if lost else None, told if lost else "not measured")


def _compare(
    load: str, target: str, ours: Rows, theirs: Rows, value: Callable[[Measured], float | None], divisor: float
) -> Verdict:
    mine, other = median_of(ours, value), median_of(theirs, value)
    if mine is None or other is None:
        return Verdict(load, target, None, "not measured")
    return Verdict(load, target, mine <= other / divisor, f"{mine:.0f} ms against {other:.0f} ms")
