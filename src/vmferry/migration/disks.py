"""The disks of a migration: images on the target, mirrors from the source, both ends of their proof.

A disk travels as a mirror: QEMU's NBD export on the target, `blockdev-mirror` on the source, first in the background,
then with every guest write going to both, so that nothing is left to copy when the guest stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vmferry.migration.disk_progress import DiskMeter, DiskProgress, observe_holes
from vmferry.migration.disk_proof import (
    DiskReader,
    SourceProof,
    answer_redigest,
    clear_proof,
    open_target_readers,
)
from vmferry.migration.guest import RunningGuest
from vmferry.migration.host_parts import HostParts
from vmferry.migration.link import PeerLink
from vmferry.migration.messages import DiskDigested, RedigestDisk
from vmferry.migration.streams import SOURCE_TLS, TARGET_TLS
from vmferry.model.errors import Failed, NotFound, Refused
from vmferry.model.names import stream_name
from vmferry.model.receipt import DiskDigests as DiskVerdict
from vmferry.model.vm import VmSpec
from vmferry.qemu.blocks import (
    Mirror,
    MirrorSample,
    NbdTarget,
    add_nbd_target,
    all_in_step,
    cancel_mirrors,
    finish_mirrors,
    make_write_blocking,
    observe_mirrors,
    remove_node,
    set_mirror_speed,
    start_mirror,
)
from vmferry.qemu.connections import sum_sent
from vmferry.qemu.exports import export_disk, start_nbd_server, stop_exports
from vmferry.qemu.layout import device_node
from vmferry.qemu.monitor import QmpRefused, yank_node
from vmferry.storage.pool import DirectoryPool, ImageRequest

_LOOK_EVERY_S = 0.1
_CLEAR_LIMIT_S = 10.0
_BEHIND_BYTES = 32 << 20  # the proof reads so far behind a mirror that what it reads has mostly arrived
_NODE = "migrate.target"  # a dot cannot be in the name of a disk, so no disk has such a node


def pool_of(parts: HostParts, name: str) -> DirectoryPool:
    """Raises Refused `pool-missing`."""
    pool = parts.pools.get(name)
    if pool is None:
        known = ", ".join(sorted(parts.pools)) or "none"
        raise Refused(
            "pool-missing", f"{parts.name} has no pool {name!r} (it has: {known}).", "Choose one: --storage POOL."
        )
    return pool


# -- the target's images -------------------------------------------------------------------------------------------


async def create_images(
    parts: HostParts, spec: VmSpec, announce: Callable[[tuple[str, ...]], Awaitable[None]]
) -> VmSpec:
    """Empty images for every disk, of exactly its size; the spec with their paths.

    `announce` journals the paths before the first one is made.
    """
    paths = [pool_of(parts, disk.pool).plan_path(spec.id, disk.name, disk.format) for disk in spec.disks]
    await announce(tuple(str(path) for path in paths))
    for disk, path in zip(spec.disks, paths, strict=True):
        request = ImageRequest(spec.id, disk.name, disk.size_bytes, disk.format)
        await pool_of(parts, disk.pool).create_image(request, path)
    disks = tuple(replace(disk, path=str(path)) for disk, path in zip(spec.disks, paths, strict=True))
    return replace(spec, disks=disks)


async def sync_images(spec: VmSpec) -> None:
    """Writes the images' dirty pages out (fdatasync), so that the flush inside the blackout finds little to do."""
    for disk in spec.disks:
        await asyncio.to_thread(_sync, disk.path)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


async def remove_images(parts: HostParts, paths: Sequence[str]) -> None:
    """Removes images by path; those that were never made are fine."""
    for path in paths:
        for pool in parts.pools.values():
            if Path(path).is_relative_to(pool.path):
                with contextlib.suppress(NotFound):  # never made: its place is not there, or something else is
                    await pool.remove_image(Path(path))


class TargetDisks:
    """The target's exports, and its half of the proof."""

    def __init__(self, parts: HostParts, guest: RunningGuest) -> None:
        self._parts = parts
        self._guest = guest
        self._port = 0
        self._readers: dict[str, DiskReader] = {}
        self._serving = False

    async def serve(self, *, provable: bool) -> int:
        """Starts the NBD server with a writable export for each disk (and a read-only one if `provable`); its port."""
        monitor = self._guest.monitor
        self._port = await start_nbd_server(monitor, self._parts.address, TARGET_TLS.nbd(self._parts))
        self._serving = True
        for disk in self._guest.spec.disks:
            await export_disk(monitor, device_node(disk.name), disk.name, writable=True)
        if provable:
            self._readers = await open_target_readers(self._parts, self._guest, self._port)
        return self._port

    async def redigest(self, request: RedigestDisk) -> DiskDigested:
        """Reads the extents again."""
        return await answer_redigest(self._reader(request.disk), request)

    def _reader(self, disk: str) -> DiskReader:
        reader = self._readers.get(disk)
        if reader is None:
            raise NotFound("no-such-disk", f"Disk {disk[:80]!r} is not being received, or not to be proven.", "")
        return reader

    async def stop_serving(self) -> None:
        """Ends all exports; strictly before `cont`. Idempotent."""
        if self._serving:
            self._serving = False
            await self.close_readers()
            await stop_exports(self._guest.monitor)

    async def close_readers(self) -> None:
        """Ends the proof's connections."""
        readers, self._readers = self._readers, {}
        for reader in readers.values():
            await reader.close()


# -- the source's mirrors ------------------------------------------------------------------------------------------


class SourceDisks:
    """The mirrors of one migration, and the source's half of the proof."""

    def __init__(self, parts: HostParts, guest: RunningGuest, target_name: str, target_address: str, port: int) -> None:
        self._parts = parts
        self._guest = guest
        self._target_name = target_name
        self._target_address = target_address
        self._port = port
        self._mirrors: list[Mirror] = []
        self._nodes: list[str] = []
        self._proof: SourceProof | None = None

    @property
    def failures(self) -> list[asyncio.Future[object]]:
        """Futures that end with MirrorFailed when a copy breaks off."""
        return [mirror.ended for mirror in self._mirrors]  # type: ignore[misc]

    async def start(self, bytes_per_s: int) -> None:
        """Connects to the target's exports and starts all mirrors. Raises QmpRefused, and what a broken TLS says."""
        monitor = self._guest.monitor
        share = bytes_per_s // max(1, len(self._guest.spec.disks))
        for index, disk in enumerate(self._guest.spec.disks):
            node = f"{_NODE}{index}"
            target = NbdTarget(
                node=node,
                host=self._target_address,
                port=self._port,
                export=disk.name,
                tls_creds=SOURCE_TLS.creds(self._parts),
                tls_hostname=stream_name(self._target_name),
            )
            await add_nbd_target(monitor, target)
            self._nodes.append(node)
            self._mirrors.append(await start_mirror(monitor, device_node(disk.name), node, f"mirror{index}", share))

    async def copy(self, report: Callable[[DiskProgress], None], stall_s: float) -> None:
        """Until all targets have caught up and guest writes go to both. Raises MirrorFailed, Failed `disk-stalled`."""
        monitor = self._guest.monitor
        moved_at, last = time.monotonic(), -1
        meter = DiskMeter(await observe_holes(self._guest.spec, [mirror.job_id for mirror in self._mirrors]))
        ready = asyncio.gather(*(mirror.ready for mirror in self._mirrors))
        try:
            while not ready.done():
                samples = await observe_mirrors(monitor)
                report(meter.read(samples, time.monotonic()))
                self._tell_fronts(samples)
                gone = sum(sample.offset for sample in samples)
                if gone != last:
                    moved_at, last = time.monotonic(), gone
                elif time.monotonic() - moved_at > stall_s:
                    raise Failed(
                        "disk-stalled",
                        f"No byte of the disks got to {self._target_name} for {stall_s:g} s.",
                        "Look at the migration network and at the target's pool.",
                    )
                await asyncio.wait([ready], timeout=_LOOK_EVERY_S)
            await ready
        finally:
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)  # or asyncio complains that nobody looked at it
        await make_write_blocking(monitor, self._mirrors, stall_s)
        report(meter.read(await observe_mirrors(monitor), time.monotonic()))
        if self._proof is not None:
            for disk in self._guest.spec.disks:
                self._proof.moved(disk.name, disk.size_bytes)

    def _tell_fronts(self, samples: Sequence[MirrorSample]) -> None:
        """How far each mirror has got in its first pass: what it has done, whatever the guest writes meanwhile."""
        done = {sample.job_id: sample.offset for sample in samples}
        for mirror, disk in zip(self._mirrors, self._guest.spec.disks, strict=True):
            front = min(done.get(mirror.job_id, 0), disk.size_bytes) - _BEHIND_BYTES
            if self._proof is not None and front > 0:
                self._proof.moved(disk.name, front - front % _BEHIND_BYTES)

    async def in_step(self) -> bool:
        """Whether every write is on both sides now."""
        return await all_in_step(self._guest.monitor, self._mirrors)

    async def set_speed(self, bytes_per_s: int) -> None:
        """Shares a limit among the mirrors; 0: none."""
        for mirror in self._mirrors:
            await set_mirror_speed(self._guest.monitor, mirror, bytes_per_s // len(self._mirrors))

    async def prove(self, link: PeerLink, migration_id: str) -> None:
        """Compares both copies, and what is written again and again, until it is cancelled."""
        proof = SourceProof(self._guest, link, migration_id)
        self._proof = proof
        await proof.open()
        await proof.run()

    def undisturbed(self) -> contextlib.AbstractAsyncContextManager[None]:
        """While the block runs the proof changes nothing in QEMU's block graph (see `SourceProof.undisturbed`)."""
        return contextlib.nullcontext() if self._proof is None else self._proof.undisturbed()

    def rest_proof(self, wanted: bool) -> bool:
        """Whether everything is proven but the writes of the last moments, and nothing is being read."""
        return self._proof is not None and self._proof.rest(wanted)

    async def read_last(self) -> None:
        """The guest is stopped, the mirrors are complete: the writes of the last moments are read again."""
        if self._proof is not None:
            await self._proof.read_last()

    async def compare(self) -> None:
        """The last comparison, when the mirrors are complete. Raises Failed `disk-differs`."""
        if self._proof is not None:
            await self._proof.judge()

    def verdicts(self) -> tuple[DiskVerdict, ...]:
        """What the receipt says of the disks, after `compare`. Not while the guest waits for it."""
        return self._proof.verdicts() if self._proof is not None else ()

    async def complete(self) -> None:
        """The guest is stopped: every target is an exact copy when this returns. Raises MirrorFailed.

        A mirror that is in step has nothing left to write. It is left as it is: QEMU gives the disks up with an idle
        one (`blk_set_force_allow_inactivate` in block/mirror.c), and ending it would take 5 to 12 ms of the blackout.
        """
        if not await self.in_step():
            await finish_mirrors(self._guest.monitor, self._mirrors)

    async def let_go(self) -> None:
        """After the handoff: our connections are closed (QEMU itself goes)."""
        for mirror in self._mirrors:
            mirror.forget()
        if self._proof is not None:
            await self._proof.close(clear=False)

    async def cut(self) -> None:
        """Rollback, first of all: cuts the connections to the target. One that hangs would hang the guest's writes."""
        for node in self._nodes:
            with contextlib.suppress(QmpRefused):  # that node is gone already
                await self._guest.process.yank.yank([yank_node(node)])

    def sent_bytes(self) -> int:
        """Bytes that went over the mirrors' connections so far, encryption included. Blocks for a moment."""
        return sum_sent(self._guest.process, self._port)

    async def cancel(self) -> None:
        """Rollback: mirrors, target nodes, recordings and the proof's exports are gone, the guest is not touched."""
        await self.cut()
        if self._proof is not None:
            await self._proof.close(clear=True)
            self._proof = None
        mirrors, self._mirrors = self._mirrors, []
        await cancel_mirrors(self._guest.monitor, mirrors)
        for node in self._nodes[len(mirrors) :]:
            await remove_node(self._guest.monitor, node)
        self._nodes = []


async def clear_source_disks(guest: RunningGuest) -> None:
    """Removes mirrors, target nodes, exports and recordings that an earlier life of the daemon left in a guest."""
    monitor = guest.monitor
    for sample in await observe_mirrors(monitor):
        with contextlib.suppress(QmpRefused):  # it ends by itself
            await monitor.execute("block-job-cancel", device=sample.job_id, force=True)
    until = time.monotonic() + _CLEAR_LIMIT_S
    while samples := await observe_mirrors(monitor):
        if time.monotonic() > until:
            raise Failed("mirror-stuck", f"Mirror {samples[0].job_id} does not end.", "Look at the guest's qemu.log.")
        for sample in samples:
            if sample.status == "concluded":
                await monitor.execute("job-dismiss", id=sample.job_id)
        await asyncio.sleep(_LOOK_EVERY_S)
    for node in await monitor.execute("query-named-block-nodes", flat=True):
        if str(node["node-name"]).startswith(_NODE):
            await remove_node(monitor, node["node-name"])
    await clear_proof(guest)
