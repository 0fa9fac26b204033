"""After the handoff, on the source: see the target's guest run, forward late frames, give up what is left, the receipt.

Only forward from here; every step may be done again after a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from vmferry.migration.gates import SourceGates
from vmferry.migration.guest import RunningGuest, dismantle
from vmferry.migration.host_parts import HostParts
from vmferry.migration.link import PeerLink
from vmferry.migration.messages import AskRunning, RunningSeen
from vmferry.migration.records import MigrationRecord
from vmferry.model.errors import VmferryError
from vmferry.network.gate import GateCounters
from vmferry.network.probes import observe_mac_elsewhere
from vmferry.storage.aside import AsideNote

_ASK_LIMIT_S = 30.0


async def see_it_run(link: PeerLink, migration_id: str) -> RunningSeen:
    """Whether the guest was seen to run on the target. A target that does not answer has not shown it."""
    try:
        return await link.call(AskRunning(migration_id), RunningSeen, _ASK_LIMIT_S)
    except VmferryError:
        return RunningSeen(False, 0, 0, None)


async def see_mac_away(parts: HostParts, guest: RunningGuest) -> bool | None:
    """Whether this host's switches have learnt all of the VM's MACs behind an uplink; None without a NIC."""
    if not guest.ports:
        return None
    for port in guest.ports:
        uplinks = next((s.uplinks for s in parts.switches.values() if s.device == port.switch), ())
        with contextlib.suppress(VmferryError):
            seen = await observe_mac_elsewhere(parts.netlink, port.switch, port.mac, uplinks)
            if seen.uplink is not None:
                continue
        return False
    return True


async def forward_late_frames(parts: HostParts, gates: SourceGates | None) -> GateCounters:
    """Forwards until no frame for the VM comes here any more. What the gate counted."""
    return await gates.forward_until_quiet(parts.limits.forward_s) if gates is not None else GateCounters()


async def give_up_guest(parts: HostParts, guest: RunningGuest, gates: SourceGates | None) -> None:
    """Ends tunnel, process and ports."""
    if gates is not None:
        await gates.release()
    await dismantle(parts, guest)


async def put_disks_aside(parts: HostParts, record: MigrationRecord) -> tuple[str, ...]:
    """Renames the source's images so that nothing here uses them any more; the new paths. Idempotent."""
    at = datetime.now(UTC).isoformat()
    note = AsideNote(record.vm_id, record.vm_name, record.id, record.generation, at)
    paths = []
    for disk in record.spec.disks:
        pool = parts.pools.get(disk.pool)
        if pool is not None and Path(disk.path).is_relative_to(pool.path):
            paths.append(str(await pool.set_aside(Path(disk.path), note)))
    return tuple(paths)


async def delete_disks(parts: HostParts, paths: Sequence[str]) -> None:
    """Deletes images that were set aside, once the target's guest was seen to run. Idempotent."""
    for path in paths:
        for pool in parts.pools.values():
            if Path(path).is_relative_to(pool.path):
                await pool.remove_image(Path(path))


async def delete_boot_files(parts: HostParts, vm_id: str) -> None:
    """Deletes the VM's boot files here. Idempotent."""
    import shutil

    await asyncio.to_thread(shutil.rmtree, parts.vm_dir(vm_id), ignore_errors=True)
