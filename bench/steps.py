"""`./dev bench --steps`: only vmferry, many times, and where the time of its switchover goes.

From the receipts' `switchover` lists: when each step was done, after the source's STOP, and how long it took after the
one before it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

from bench.plan import LOADS, Measured


def print_steps(rows: Sequence[Measured]) -> None:
    """For each load: medians, least and most."""
    for load in LOADS:
        mine = [row for row in rows if row.load == load and row.details.get("switchover")]
        if mine:
            print(f"\n{LOADS[load].title}: {len(mine)} migrations")
            _print_load([row.details for row in mine])
            _print_values("blackout by QEMU's events", [row.blackout_ms for row in mine if row.blackout_ms is not None])
            _print_values("gap beyond it", [row.beyond_ms for row in mine if row.beyond_ms is not None])


def _print_load(receipts: Sequence[dict[str, Any]]) -> None:
    print(f"  {'step':28}{'at':>9}{'least':>9}{'most':>9}{'took':>9}{'most':>9}   in")
    for name in _names(receipts):
        at = [step["at_ms"] for receipt in receipts for step in receipt["switchover"] if step["name"] == name]
        took = list(_took(receipts, name))
        share = "" if len(at) == len(receipts) else f"{len(at)}"
        waits = f"{statistics.median(took):9.2f}{max(took):9.2f}" if took else " " * 18
        print(f"  {name:28}{statistics.median(at):9.2f}{min(at):9.2f}{max(at):9.2f}{waits}   {share}")
    print(f"  {phases(receipts)}")
    for title, key in (("blackout", "blackout_ms"), ("total", "total_ms"), ("rounds", "rounds")):
        _print_values(f"{title} by the receipt", [receipt[key] for receipt in receipts])


def _print_values(title: str, values: Sequence[float]) -> None:
    if values:
        print(f"  {title}: median {statistics.median(values):.1f}, {min(values):.1f} to {max(values):.1f}")


def _names(receipts: Sequence[dict[str, Any]]) -> list[str]:
    """In the order of their median times."""
    times: dict[str, list[float]] = {}
    for receipt in receipts:
        for step in receipt["switchover"]:
            times.setdefault(step["name"], []).append(step["at_ms"])
    return sorted(times, key=lambda name: statistics.median(times[name]))


def _took(receipts: Sequence[dict[str, Any]], name: str) -> Iterable[float]:
    for receipt in receipts:
        for before, step in pairwise(receipt["switchover"]):
            if step["name"] == name:
                yield step["at_ms"] - before["at_ms"]


def phases(receipts: Sequence[dict[str, Any]]) -> str:
    """Median length of each phase, to the precision of its recorded times."""
    lengths: dict[str, list[float]] = {}
    for receipt in receipts:
        for phase in receipt["phases"]:
            if phase["ended_at"]:
                began, ended = (datetime.fromisoformat(phase[key]) for key in ("started_at", "ended_at"))
                lengths.setdefault(phase["name"], []).append((ended - began).total_seconds() * 1000)
    return ", ".join(f"{name} {statistics.median(values):.0f} ms" for name, values in lengths.items())
