"""The proof that the target's disks equal the source's, made while the guest runs.

Each host digests its own copy through a read-only NBD export of its own QEMU. On the source a dirty bitmap records what
the guest writes meanwhile; those chunks are read again on both sides, again and again, so that at the stop only those
of the last moments are left.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Sequence
from pathlib import Path

from vmferry.migration.guest import RunningGuest
from vmferry.migration.host_parts import HostParts
from vmferry.migration.link import PeerLink
from vmferry.migration.messages import DiskDigested, RedigestDisk
from vmferry.model.errors import Failed
from vmferry.model.names import stream_name
from vmferry.model.receipt import DiskDigests as DiskVerdict
from vmferry.qemu.blocks import add_bitmap, remove_bitmap
from vmferry.qemu.exports import export_readonly, remove_export, start_local_nbd_server, stop_exports
from vmferry.qemu.layout import device_node
from vmferry.qemu.monitor import QmpRefused
from vmferry.storage.digest import DiskDigests, blank_digests, chunk_bytes_for, compare, pack_part, put_part, redigest
from vmferry.storage.nbd import ALLOCATION, Extent, NbdAddress, NbdClient, bitmap_context, dirty_extents

# Far from the end nothing is gained by reading often, and each time costs QEMU changes of its block graph, for which
# its main loop waits until the target has answered the mirrors' writes under way (bdrv_graph_wrlock).
_REFRESH_EVERY_S = 2.0
_FRESH_S = 0.12  # what the guest has written since the last reading is read again in the blackout
_SHORT_S = 0.05  # a reading
_STEP_BYTES = 32 << 20
_DIGEST_LIMIT_S = 24 * 3600.0
_MOST_DIFFERENCES = 1 << 20
_COARSEST_GRAIN = 64 << 10  # of a recording: what QEMU takes by itself


class DiskReader:
    """One connection for digests of one disk, used by one thread at a time."""

    def __init__(self, client: NbdClient) -> None:
        self._client = client
        self._digests = blank_digests(client.size_bytes)
        self._turn = asyncio.Lock()

    @classmethod
    async def connect(cls, address: NbdAddress) -> DiskReader:
        """Raises as `NbdClient.connect` does."""
        return cls(await asyncio.to_thread(NbdClient.connect, address))

    @property
    def digests(self) -> DiskDigests:
        """Those of what was read so far; what was never read counts as zeros."""
        return self._digests

    async def redigest(self, extents: Sequence[Extent]) -> None:
        """Reads these extents again."""
        async with self._turn:
            await asyncio.to_thread(redigest, self._client, self._digests, extents)

    async def dirty(self, bitmap: str) -> tuple[Extent, ...]:
        """What the bitmap has recorded."""
        async with self._turn:
            return await asyncio.to_thread(dirty_extents, self._client, bitmap)

    def use(self, other: DiskReader) -> None:
        """Takes over the digests of an earlier connection."""
        self._digests = other._digests

    async def close(self) -> None:
        """Ends the connection; a reading in another thread ends with an error."""
        self._client.abort()
        async with self._turn:
            await asyncio.to_thread(self._client.close)


# -- the target ------------------------------------------------------------------------------------------------------


async def open_target_readers(parts: HostParts, guest: RunningGuest, port: int) -> dict[str, DiskReader]:
    """Read-only exports beside the writable ones, and a connection to each."""
    readers: dict[str, DiskReader] = {}
    context = await asyncio.to_thread(_own_context, parts.stream_dir) if parts.stream_dir else None
    for disk in guest.spec.disks:
        export = f"{disk.name}.proof"
        await export_readonly(guest.monitor, device_node(disk.name), export)
        address = NbdAddress((parts.address, port), export, tls=context, tls_name=stream_name(parts.name))
        readers[disk.name] = await DiskReader.connect(address)
    return readers


def _own_context(stream_dir: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(stream_dir / "ca-cert.pem"))
    context.load_cert_chain(stream_dir / "client-cert.pem", stream_dir / "client-key.pem")
    return context


async def answer_redigest(reader: DiskReader, request: RedigestDisk) -> DiskDigested:
    """The target's answer to `RedigestDisk`: only the digests of the chunks that were read again."""
    extents = _extents(request.extents)
    await reader.redigest(extents)
    return DiskDigested(pack_part(reader.digests, extents))


# -- the source ------------------------------------------------------------------------------------------------------


class SourceProof:
    """The source's half for all disks of a guest, and the comparison."""

    def __init__(self, guest: RunningGuest, link: PeerLink, migration_id: str) -> None:
        self._guest = guest
        self._link = link
        self._migration_id = migration_id
        self._socket = guest.process.run_dir / "proof.sock"
        self._sizes = {disk.name: disk.size_bytes for disk in guest.spec.disks}
        self._disks = list(self._sizes)
        self._fronts = dict.fromkeys(self._disks, 0)
        self._front_moved = asyncio.Event()
        self._readers: dict[str, DiskReader] = {}
        self._theirs = {name: blank_digests(size) for name, size in self._sizes.items()}
        self._last: dict[str, asyncio.Task[None]] = {}
        self._round = 0
        self._turn = asyncio.Lock()
        self._graph = asyncio.Lock()
        self._go = asyncio.Event()
        self._go.set()
        self._due = asyncio.Event()
        self._all_read = asyncio.Event()
        self._reading = True
        self._read_at = 0.0
        self._last_took_s = 0.0
        self._shrinks = False
        self._serving = False
        self.proven = False

    async def open(self) -> None:
        """Starts to record writes and connects; before the first digest. Idempotent leftovers are removed first."""
        await clear_proof(self._guest)
        await start_local_nbd_server(self._guest.monitor, self._socket)
        self._serving = True
        for name in self._disks:
            self._readers[name] = await self._record(name, 0)

    def moved(self, name: str, front_bytes: int) -> None:
        """The mirror of a disk has got so far for the first time; at its end everything below is on the target."""
        self._fronts[name] = max(self._fronts[name], front_bytes)
        self._front_moved.set()

    async def run(self) -> None:
        """Reads everything once, close behind the mirrors; then what was written since, again and again.

        What is read before the mirror has really written it differs, and is read once more. Ends only when cancelled.
        """
        done = dict.fromkeys(self._disks, 0)
        while any(done[name] < self._sizes[name] for name in self._disks):
            await self._front_moved.wait()
            self._front_moved.clear()
            for name in self._disks:
                front = self._fronts[name]
                if front - done[name] >= _STEP_BYTES or front == self._sizes[name] > done[name]:
                    await self._read(name, (Extent(done[name], front - done[name], 0),))
                    done[name] = front
        self._all_read.set()
        while True:
            began = time.monotonic()
            async with self._turn:
                await self._refresh()
            self.proven = True
            self._reading, self._read_at = False, time.monotonic()
            took_s = self._read_at - began
            self._shrinks = took_s > _SHORT_S and (not self._last_took_s or took_s < self._last_took_s / 2)
            self._last_took_s = took_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), _REFRESH_EVERY_S)
            await self._go.wait()
            self._due.clear()
            self._reading = True

    def rest(self, wanted: bool) -> bool:
        """Whether nothing is being read and next to nothing is left to be read; to be called again and again.

        While it is wanted no new reading begins, except when the last one is too long ago, or was long and the next
        one will be shorter.
        """
        stale = self._shrinks or time.monotonic() - self._read_at > _FRESH_S
        if self.proven and wanted and stale and not self._reading:
            self._due.set()
        if self.proven and wanted and not (stale and not self._reading):
            self._go.clear()
        else:
            self._go.set()
        return self.proven and not self._reading and not self._go.is_set()

    def undisturbed(self) -> asyncio.Lock:
        """To be held while QEMU must not wait for the target: the proof keeps its hands off the block graph."""
        return self._graph

    async def _record(self, name: str, number: int) -> DiskReader:
        node, bitmap = device_node(name), _bitmap(number)
        grain = min(_COARSEST_GRAIN, chunk_bytes_for(self._sizes[name]))
        await add_bitmap(self._guest.monitor, node, bitmap, grain)
        await export_readonly(self._guest.monitor, node, _export(name, number), (bitmap,))
        contexts = (ALLOCATION, bitmap_context(bitmap))
        return await DiskReader.connect(NbdAddress(self._socket, _export(name, number), contexts))

    async def _refresh(self) -> None:
        """Begins a new recording, then reads again what the old one has: no write falls between the two."""
        self._round += 1
        for name in self._disks:
            old = self._readers[name]
            async with self._graph:
                fresh = await self._record(name, self._round)
                extents = await old.dirty(_bitmap(self._round - 1))
                fresh.use(old)
                self._readers[name] = fresh
                await old.close()
                await self._forget(name, self._round - 1)
            await self._read_again(name, extents)

    async def _read_again(self, name: str, extents: Sequence[Extent]) -> None:
        ours = self._readers[name]
        wanted = _merge(extents, compare(ours.digests, self._theirs[name], _MOST_DIFFERENCES), ours.digests.chunk_bytes)
        if wanted:
            await self._read(name, wanted)

    async def _read(self, name: str, wanted: Sequence[Extent]) -> None:
        """Both sides read these extents and tell the digests."""
        await asyncio.gather(self._read_theirs(name, wanted), self._readers[name].redigest(wanted))

    async def _read_theirs(self, name: str, wanted: Sequence[Extent]) -> None:
        flat = tuple(number for extent in wanted for number in (extent.offset, extent.length))
        part = await self._link.call(RedigestDisk(self._migration_id, name, flat), DiskDigested, _DIGEST_LIMIT_S)
        put_part(self._theirs[name], wanted, part.digests)

    async def read_last(self) -> None:
        """The guest is stopped, no write is under way: reads those of the last moments again.

        Returns when the source's are read, whose disks may then become inactive; `judge` waits for the target's.
        Waits until everything was read once: QEMU may stop a guest by itself before that, and what was never read
        would pass for equal. The caller limits the time.
        """
        self._go.clear()  # no further round begins: its new exports would be in the way
        await self._all_read.wait()
        async with self._turn:  # a guest that QEMU stopped by itself may come in the middle of a refresh
            await asyncio.gather(*(self._read_last(name) for name in self._disks))

    async def _read_last(self, name: str) -> None:
        ours = self._readers[name]
        extents = await ours.dirty(_bitmap(self._round))
        wanted = _merge(extents, compare(ours.digests, self._theirs[name], _MOST_DIFFERENCES), ours.digests.chunk_bytes)
        if wanted:
            self._last[name] = asyncio.create_task(self._read_theirs(name, wanted))
            await ours.redigest(wanted)

    async def judge(self) -> None:
        """After `read_last`, with the mirrors complete and the target's exports open: returns if the copies are equal.

        Raises Failed `disk-differs` with the disk and the first offset.
        """
        await asyncio.gather(*(self._judge(name) for name in self._disks))

    def verdicts(self) -> tuple[DiskVerdict, ...]:
        """For the receipt, after `judge`. Takes milliseconds for large disks: not while the guest waits for it."""
        found = []
        for disk in self._guest.spec.disks:
            ours, theirs = self._readers[disk.name].digests.whole, self._theirs[disk.name].whole
            found.append(DiskVerdict(disk.name, Path(disk.path).name, ours, theirs, ours == theirs))
        return tuple(found)

    async def _judge(self, name: str) -> None:
        if name in self._last:
            await self._last[name]
        ours = self._readers[name].digests
        # What the two sides read at different moments of a write: the source's is right since the guest stopped.
        early = compare(ours, self._theirs[name], _MOST_DIFFERENCES)
        if early:
            await self._read_theirs(name, _merge((), early, ours.chunk_bytes))
        differing = compare(ours, self._theirs[name])
        if differing:
            raise Failed(
                "disk-differs",
                f"Disk {name} on the target is not what left the source, first at offset {differing[0]}.",
                "The guest runs on here. Look at the target's storage; then migrate again.",
            )

    async def _forget(self, name: str, number: int) -> None:
        await remove_export(self._guest.monitor, f"nbd.{_export(name, number)}")
        await remove_bitmap(self._guest.monitor, device_node(name), _bitmap(number))

    async def close(self, *, clear: bool) -> None:
        """Closes the connections; with `clear` the guest's exports and recordings go, too."""
        for task in self._last.values():
            task.cancel()
        await asyncio.gather(*self._last.values(), return_exceptions=True)
        for reader in self._readers.values():
            await reader.close()
        self._readers = {}
        if clear:
            await clear_proof(self._guest)


async def clear_proof(guest: RunningGuest) -> None:
    """Removes server, exports and recordings from a guest, also those of an earlier attempt."""
    monitor = guest.monitor
    with contextlib.suppress(QmpRefused):  # it does not run
        await stop_exports(monitor)
    for node in await monitor.execute("query-named-block-nodes", flat=True):
        for bitmap in node.get("dirty-bitmaps", ()):
            if str(bitmap.get("name", "")).startswith(_BITMAP):
                await remove_bitmap(monitor, node["node-name"], bitmap["name"])


_BITMAP = "proof"


def _bitmap(number: int) -> str:
    return f"{_BITMAP}{number}"


def _export(name: str, number: int) -> str:
    return f"{name}.{_BITMAP}{number}"


def _extents(flat: Sequence[int]) -> tuple[Extent, ...]:
    return tuple(Extent(flat[i], flat[i + 1], 0) for i in range(0, len(flat) - 1, 2))


def _merge(extents: Sequence[Extent], chunks: Sequence[int], chunk_bytes: int) -> tuple[Extent, ...]:
    """Dirty extents and differing chunks in order of their offset. Pure."""
    whole = [(extent.offset, extent.length) for extent in extents] + [(offset, chunk_bytes) for offset in chunks]
    return tuple(Extent(offset, length, 0) for offset, length in sorted(whole))
