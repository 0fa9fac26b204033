"""The results as a table and as JSON. Judges nothing: see `targets`."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from bench.plan import (
    BARE,
    BARE_TUNED,
    DISK_GIB,
    FILL_MIB,
    LOADS,
    MEMORY_MIB,
    OURS,
    TOOLS,
    VIRSH,
    VIRSH_TUNED,
    Measured,
)
from bench.quiet import QUIET_SHARE
from bench.steps import phases
from bench.targets import Verdict, judge, median_of, rows_of

_COLUMNS = ("tool", "blackout", "gap", "beyond", "lost", "total", "sent", "back", "runs")
_WIDTHS = (10, 9, 9, 9, 7, 9, 9, 9, 5)


def document(rows: Sequence[Measured], link_bps: int, began: str) -> dict[str, Any]:
    """Everything, for --json."""
    return {
        "began": began,
        "machine": {"cpus": _cpus(), "kernel": platform.release(), "versions": versions()},
        "setting": {"link_bps": link_bps, "memory_mib": MEMORY_MIB, "disk_gib": DISK_GIB, "data_mib": FILL_MIB},
        "runs": [asdict(row) | {"beyond_ms": row.beyond_ms} for row in rows],
        "medians": {load: {tool: _medians(rows_of(rows, load, tool)) for tool in TOOLS} for load in _loads(rows)},
        "targets": [asdict(verdict) for load in _loads(rows) for verdict in judge(rows, load)],
    }


def print_report(rows: Sequence[Measured]) -> bool:
    """Prints medians, ratios and targets of every load; True if no target was missed."""
    verdicts: list[Verdict] = []
    for load in _loads(rows):
        print(f"\n{LOADS[load].title}")
        _print_table(rows, load)
        _print_ratios(rows, load)
        _print_phases(rows, load)
        found = judge(rows, load)
        verdicts += found
        for verdict in found:
            word = {True: "pass", False: "FAIL", None: "-"}[verdict.passed]
            print(f"  {word:4}  {verdict.target}: {verdict.told}")
    _print_faults(rows)
    return not any(verdict.passed is False for verdict in verdicts)


def versions() -> dict[str, str]:
    """Of the programs that take part."""
    asked = {"qemu": ["qemu-system-x86_64", "--version"], "libvirt": ["virsh", "--version"]}
    return {name: _first_line(command) for name, command in asked.items()}


def _first_line(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def _cpus() -> int:
    return os.cpu_count() or 0


def _loads(rows: Sequence[Measured]) -> list[str]:
    return [load for load in LOADS if any(row.load == load for row in rows)]


_VALUES: dict[str, Callable[[Measured], float | None]] = {
    "blackout_ms": lambda row: row.blackout_ms,
    "gap_ms": lambda row: row.gap_ms,
    "beyond_ms": lambda row: row.beyond_ms,
    "lost": lambda row: row.lost,
    "lost_at_switch": lambda row: row.lost_at_switch,
    "total_ms": lambda row: row.total_ms,
    "wire_bytes": lambda row: row.wire_bytes,
    "back_bytes": lambda row: row.back_bytes,
}


def _medians(rows: Sequence[Measured]) -> dict[str, float | None]:
    return {name: median_of(rows, value) for name, value in _VALUES.items()}


def _print_table(rows: Sequence[Measured], load: str) -> None:
    print("  " + _line(_COLUMNS))
    for tool in TOOLS:
        mine = rows_of(rows, load, tool)
        if not mine:
            continue
        found = _medians(mine)
        times = [_ms(found[name]) for name in ("blackout_ms", "gap_ms", "beyond_ms")]
        sizes = [_mib(found[name]) for name in ("wire_bytes", "back_bytes")]
        lost = "-" if found["lost"] is None else f"{found['lost']:.0f}"
        runs = f"{sum(not row.fault for row in mine)}/{len(mine)}"
        print("  " + _line([tool, *times, lost, _seconds(found["total_ms"]), *sizes, runs]))


def _print_ratios(rows: Sequence[Measured], load: str) -> None:
    ours = _medians(rows_of(rows, load, OURS))
    for title, names in (("blackout", ("blackout_ms",)), ("gap", ("gap_ms",)), ("total", ("total_ms",))):
        parts = []
        for tool in (VIRSH, VIRSH_TUNED, BARE, BARE_TUNED):
            theirs = _medians(rows_of(rows, load, tool))
            mine, other = ours[names[0]], theirs[names[0]]
            if mine is not None and other:
                parts.append(f"{mine / other:.2f} of {tool}")
        if parts:
            print(f"  ours, {title}: {', '.join(parts)}")


def _print_phases(rows: Sequence[Measured], load: str) -> None:
    receipts = [row.details for row in rows_of(rows, load, OURS) if row.details.get("phases")]
    if receipts:
        print(f"  ours, by phase: {phases(receipts)}")


def _print_faults(rows: Sequence[Measured]) -> None:
    for row in rows:
        if row.fault:
            print(f"\n{row.tool}, {row.load}, run {row.run}: {row.fault}")
    busy = [row.others for row in rows if row.others is not None]
    if busy:
        disturbed = sum(share > QUIET_SHARE for share in busy)
        print(
            f"\nOther work on this machine's processors during the migrations: at most {max(busy):.0%}; "
            f"{disturbed} of {len(busy)} runs with more than {QUIET_SHARE:.0%}. "
            f"Load average before the first: {rows[0].load_average}."
        )


def _line(words: Sequence[str]) -> str:
    first, *rest = zip(words, _WIDTHS, strict=True)
    return first[0].ljust(first[1]) + "".join(word.rjust(width) for word, width in rest)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value / 1000:.1f} s"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f} MiB"
