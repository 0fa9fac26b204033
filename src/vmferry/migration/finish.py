"""After the handoff, on the source: see the target's guest run, forward late frames, give up what is left, the receipt.

Only forward from here; every step may be done again after a crash.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from vmferry.migration.gates import SourceGates
from vmferry.migration.guest import RunningGuest, dismantle
from vmferry.migration.host_parts import HostParts
from vmferry.migration.link import PeerLink
from vmferry.migration.messages import AnnounceAgain, AskRunning, Done, RunningSeen
from vmferry.migration.records import MigrationRecord
from vmferry.model.errors import VmferryError
from vmferry.network.gate import GateCounters
from vmferry.network.probes import observe_mac_elsewhere
from vmferry.storage.aside import AsideNote

_ASK_LIMIT_S = 30.0
_ASK_AGAIN_S = 20.0
_ASK_PAUSE_S = 0.5
_AWAY_WITHIN_S = 1.5
_LOOK_EVERY_S = 0.02


async def see_it_run(
    link: PeerLink, connect: Callable[[], Awaitable[PeerLink]], migration_id: str
) -> tuple[RunningSeen, PeerLink]:
    """Whether the guest was seen to run on the target, and the link on which it was said.

    A target that falls silent (its daemon is restarted) is asked again for a while; one that does not answer has not
    shown it.
    """
    until = time.monotonic() + _ASK_AGAIN_S
    while True:
        try:
            return await link.call(AskRunning(migration_id), RunningSeen, _ASK_LIMIT_S), link
        except VmferryError:
            if time.monotonic() > until:
                return RunningSeen(False, 0, 0, None), link
        await asyncio.sleep(_ASK_PAUSE_S)
        try:
            fresh = await connect()
        except VmferryError:
            continue
        await link.close()
        link = fresh


async def see_macs_away(parts: HostParts, link: PeerLink, record: MigrationRecord) -> bool | None:
    """Whether this host's switches learn all of the VM's MACs behind an uplink; None without a NIC.

    After its ports have gone from here. The target announces once more; what comes back is a real frame from there.
    """
    if not record.spec.nics:
        return None
    try:
        await link.call(AnnounceAgain(record.id), Done)
    except VmferryError:
        return None
    until = time.monotonic() + _AWAY_WITHIN_S
    while not await _are_away(parts, record):
        if time.monotonic() > until:
            return False
        await asyncio.sleep(_LOOK_EVERY_S)
    return True


async def _are_away(parts: HostParts, record: MigrationRecord) -> bool:
    for nic in record.spec.nics:
        switch = parts.switches[nic.switch]
        seen = await observe_mac_elsewhere(parts.netlink, switch.device, nic.mac, switch.uplinks)
        if seen.uplink is None:
            return False
    return True


async def forward_late_frames(
    parts: HostParts, gates: SourceGates | None, quiet: GateCounters | None = None
) -> GateCounters | None:
    """Forwards until no frame for the VM comes here any more; the counters at which it was quiet.

    `quiet` is what an earlier call gave back: nothing is waited for if no frame has come since.
    """
    return await gates.forward_until_quiet(parts.limits.forward_s, quiet) if gates is not None else None


async def give_up_guest(parts: HostParts, guest: RunningGuest, gates: SourceGates | None) -> GateCounters:
    """Ends tunnel, process and ports. All that the gates have counted, to the last moment."""
    counters = GateCounters()
    if gates is not None:
        try:
            counters = await gates.traffic()
        finally:
            await gates.release()
    await dismantle(parts, guest)
    return counters


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
    await asyncio.to_thread(shutil.rmtree, parts.vm_dir(vm_id), ignore_errors=True)
