"""One run: a fresh guest on host1, a probe from the client, the migration, and what was seen from outside."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from bench.plan import ADDRESS, LOADS, UDP_PORT, Contender, Load, Measured
from bench.quiet import QUIET_SHARE, CpuAccount, Patience
from bench.stage import Stage
from bench.watch import Pause, PauseWatch
from vmferry.lab.guest_client import GuestStatus
from vmferry.lab.probes.launch import start_probe
from vmferry.model.errors import Failed, VmferryError

PROBE_RATE = 1000
_SETTLE_S = 2.0  # before: boot is over and its writes are on the disk; after: late replies and announcements
_READY_S = 120.0
_REPEATS = 2
_OVERLAP_MS = 20.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What was noted during a run."""

    pauses: list[Pause]
    probe: dict[str, Any]
    total_ms: float
    others: float | None
    sent_bytes: int
    back_bytes: int


@dataclass(frozen=True, slots=True)
class Conditions:
    """What is known of the others on this machine, and how long to put up with them."""

    account: CpuAccount
    patience: Patience


def measure(stage: Stage, conditions: Conditions, contender: Contender, blank: Measured) -> Measured:
    """Fills in the blank. Of several tries the one that others disturbed least; a failed migration is not repeated."""
    best = _measure_once(stage, conditions, contender, blank)
    for _ in range(_REPEATS):
        if best.fault or (best.others or 0.0) <= QUIET_SHARE or not conditions.patience.left:
            break
        with conditions.patience.spend():
            again = _measure_once(stage, conditions, contender, blank)
        best = min(best, again, key=lambda one: one.others or 0.0)
    return best


def _measure_once(stage: Stage, conditions: Conditions, contender: Contender, blank: Measured) -> Measured:
    """Never raises for a failed migration: that is a result (`fault`). Whatever was started is cleared away."""
    conditions.patience.wait_until_quiet(conditions.account)
    load = LOADS[blank.load]
    result = replace(blank, load_average=round(os.getloadavg()[0], 2))
    try:
        try:
            contender.start(stage.plan(load))
            seen = _migrate(stage, conditions.account, contender, load)
            result = _judge(result, seen)
            result = replace(result, details=contender.details())
        finally:
            contender.clear()
            stage.forget_monitors()
    except VmferryError as error:
        result = replace(result, fault=result.fault or str(error))
    return result


def _migrate(stage: Stage, account: CpuAccount, contender: Contender, load: Load) -> Seen:
    with stage.guest_client() as guest:
        before = _wait_until_ready(guest.status, load)
        watch = PauseWatch(stage.monitors)
        try:
            options = ("--target", ADDRESS, "--port", str(UDP_PORT), "--rate", str(PROBE_RATE))
            with start_probe(stage.layout.client_namespace, "udp", *options) as probe:
                probe.wait_until_received()
                time.sleep(_SETTLE_S)
                sent, back = stage.wire_bytes(stage.source), stage.wire_bytes(stage.target)
                mark, began = account.mark(), time.monotonic()
                contender.migrate()
                total_ms = (time.monotonic() - began) * 1000
                others = account.others_share(mark)
                sent, back = stage.wire_bytes(stage.source) - sent, stage.wire_bytes(stage.target) - back
                time.sleep(_SETTLE_S)
                report = probe.stop()
        finally:
            pauses = watch.stop()
        _require_unharmed(before, guest.status(5))
    return Seen(pauses, report, total_ms, others, sent, back)


def _wait_until_ready(status: Any, load: Load) -> GuestStatus:
    deadline = time.monotonic() + _READY_S
    while True:
        now: GuestStatus = status(60)
        if ("dirty" not in load.options or now.memory.wss_bytes) and (
            "disk" not in load.options or now.disk.state == "writing"
        ):
            return now
        if time.monotonic() > deadline:
            raise Failed("bench-guest", f"The guest's load {load.name} does not start.", "")
        time.sleep(0.2)


def _require_unharmed(before: GuestStatus, after: GuestStatus) -> None:
    """The same guest, and its workloads have found nothing wrong."""
    if after.boot_id != before.boot_id:
        raise Failed("bench-guest", "Another guest answers than before: it has booted again.", "")
    wrong = after.dead + after.memory.errors + after.disk.errors + after.disk.io_errors
    if wrong:
        first = after.memory.first_error or after.disk.first_error
        raise Failed("bench-guest", f"The guest found {wrong} errors after the migration: {first}", "")


def _judge(result: Measured, seen: Seen) -> Measured:
    if not seen.pauses:
        return replace(result, fault="no STOP and RESUME were seen")
    pause = max(seen.pauses, key=lambda pause: pause.ms)
    return replace(
        result,
        blackout_ms=pause.ms,
        pauses_ms=tuple(one.ms for one in seen.pauses),
        gap_ms=seen.probe["longest_gap_ms"],
        switch_gap_ms=_gap_at(pause, seen.probe["gaps"]),
        lost=seen.probe["lost"],
        lost_runs=tuple(seen.probe["lost_runs"]),
        lost_requests=seen.probe["lost_requests"],
        lost_at_switch=_lost_at(pause, seen.probe["lost_runs"]),
        others=None if seen.others is None else round(seen.others, 3),
        total_ms=seen.total_ms,
        wire_bytes=seen.sent_bytes,
        back_bytes=seen.back_bytes,
    )


def _lost_at(pause: Pause, runs: list[dict[str, Any]]) -> int:
    """How many of the lost probes belong to runs of losses that began around the pause."""
    begin, end = pause.begin_us / 1e6 - _OVERLAP_MS / 1000, pause.end_us / 1e6 + _OVERLAP_MS / 1000
    return sum(run["count"] for run in runs if begin <= datetime.fromisoformat(run["at"]).timestamp() <= end)


def _gap_at(pause: Pause, gaps: list[dict[str, Any]]) -> float | None:
    """The longest of the probe's gaps around the pause. None if its longest gaps are all elsewhere."""
    margin_ns = int(_OVERLAP_MS * 1e6)
    begin_ns, end_ns = pause.begin_us * 1000 - margin_ns, pause.end_us * 1000 + margin_ns
    near = [gap["ms"] for gap in gaps if gap["begin_ns"] < end_ns and gap["end_ns"] > begin_ns]
    return max(near, default=None)
