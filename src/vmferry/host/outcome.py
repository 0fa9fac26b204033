"""The last phase of an outgoing migration: forward only. The source is given up for good, the receipt is written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from vmferry.api.codec import encode
from vmferry.api.signing import sign_document
from vmferry.host import log
from vmferry.host.migration_views import close_phase, now_text
from vmferry.host.vms import Vm
from vmferry.migration.finish import (
    delete_boot_files,
    delete_disks,
    forward_late_frames,
    give_up_guest,
    put_disks_aside,
    see_it_run,
    see_macs_away,
)
from vmferry.migration.host_parts import HostParts
from vmferry.migration.messages import Done, Finish, RunningSeen
from vmferry.migration.records import MigrationRecord, RecordState
from vmferry.migration.source import SourceMigration
from vmferry.model.errors import VmferryError
from vmferry.model.migration import MigrationView, Outcome, Phase, Reason
from vmferry.model.receipt import Bytes, Frames, NetworkProof, PredictedTimes, Receipt, Verified
from vmferry.network.gate import GateCounters

A = TypeVar("A")
B = TypeVar("B")

if TYPE_CHECKING:
    from vmferry.host.migrations import Migrations


async def finish_source(host: Migrations, engine: SourceMigration, vm: Vm, began: float) -> None:
    """Everything after the target has taken the VM. Every step may be repeated."""
    parts, record, journal = host.parts, engine.record, host.journal
    host.views.enter(record.id, Phase.FINISH)
    if record.state is RecordState.HANDED_OVER:
        record = engine.record = await journal.move(record, RecordState.TAKEN)
    host.vms.give_away(vm)
    seen = await _see_and_forward(engine)
    (counters, away), aside = await _both(_leave_network(engine), _give_up_disks(parts, record, delete=seen.running))
    reason = None
    if not seen.running:
        reason = Reason(
            "guest-not-seen",
            f"{record.peer} has taken the VM, but its vCPUs were not seen to run. The disks were kept here.",
            f"Look at it there. The disks are set aside: {', '.join(aside)}.",
        )
        log.alarm("guest-not-seen", id=record.id, vm=record.vm_name, target=record.peer)
    total_ms = (time.monotonic() - began) * 1000
    receipt = _receipt(host, engine, host.views.get(record.id), seen, counters, away, total_ms)
    document: dict[str, Any] = encode(receipt)
    document["signature"] = sign_document(host.tls_dir, document)
    await journal.save_document(record.id, "receipt", document)
    try:
        await engine.link.call(Finish(record.id, document), Done)
    except VmferryError as error:
        log.alarm("finish-not-told", id=record.id, problem=error.message)
    await journal.move(record, RecordState.ENDED)
    await host.views.end(
        record.id, Outcome.COMPLETED, reason, blackout_ms=receipt.blackout_ms, total_ms=receipt.total_ms
    )
    log.event("migration-ended", id=record.id, outcome="completed", blackout_ms=receipt.blackout_ms)


async def _both(first: Awaitable[A], second: Awaitable[B]) -> tuple[A, B]:
    """Both to their ends, and only then raises what went wrong: neither goes on with nobody waiting for it."""
    one, other = await asyncio.gather(first, second, return_exceptions=True)
    if isinstance(one, BaseException):
        raise one
    if isinstance(other, BaseException):
        raise other
    return one, other


async def _see_and_forward(engine: SourceMigration) -> RunningSeen:
    """At the same time. Seeing may take far longer than frames come: what came meanwhile is watched again."""
    seen, quiet = await _both(_see_it_through(engine), forward_late_frames(engine.parts, engine.gates))
    await forward_late_frames(engine.parts, engine.gates, quiet)
    return seen


async def _see_it_through(engine: SourceMigration) -> RunningSeen:
    """What was seen of the guest on the target; our QEMU, which nobody needs any more, has ended."""
    seen, engine.link = await see_it_run(engine.link, engine.connect, engine.record.id)
    if not await engine.memory_is_there():
        seen = replace(seen, running=False)
    await engine.let_go()
    engine.guest.process.kill()
    await engine.guest.process.exited()
    return seen


async def _leave_network(engine: SourceMigration) -> tuple[GateCounters, bool | None]:
    """Ports, gates and the run directory go. What was forwarded, and whether the VM's MACs were seen elsewhere then."""
    counters = await give_up_guest(engine.parts, engine.guest, engine.gates)
    return counters, await see_macs_away(engine.parts, engine.link, engine.record)


async def _give_up_disks(parts: HostParts, record: MigrationRecord, *, delete: bool) -> tuple[str, ...]:
    """Sets them aside; deletes them unless they are to be kept. Where they are, or were."""
    aside = await put_disks_aside(parts, record)
    if delete and not record.keep_source:
        await delete_disks(parts, aside)
        await delete_boot_files(parts, record.vm_id)
    return aside


def _receipt(
    host: Migrations,
    engine: SourceMigration,
    view: MigrationView,
    seen: RunningSeen,
    counters: GateCounters,
    away: bool | None,
    total_ms: float,
) -> Receipt:
    measured, switchover = engine.measured, engine.measured.switchover
    prediction = view.prediction
    return Receipt(
        id=view.id,
        vm=view.vm,
        kind=view.mode,
        source=view.source,
        target=view.target,
        outcome=Outcome.COMPLETED,
        started_at=view.started_at,
        phases=close_phase(view.phases, now_text()),
        total_ms=round(total_ms, 1),
        blackout_ms=round(measured.blackout_ms, 2) if measured.taken and seen.running else None,
        predicted=PredictedTimes(prediction.total_ms, prediction.blackout_ms) if prediction else None,
        rounds=measured.rounds,
        bytes=Bytes(memory=measured.memory_bytes, disks=measured.disk_bytes),
        frames=Frames(
            held=seen.held,
            forwarded=counters.frames + counters.others,
            lost=counters.dropped + seen.dropped,
        ),
        verified=Verified(memory=switchover.memory if switchover else None, disks=measured.disks),
        network=NetworkProof(reachable_before=True if engine.guest.spec.nics else None, reachable_after=away),
        options=view.options,
        versions={"vmferry": host.parts.version, "qemu": ".".join(map(str, host.parts.features.version))},
        generation=view.generation,
        switchover=switchover.timeline.steps() if switchover else (),
    )
