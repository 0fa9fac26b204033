"""From the closed gate to the target's word that the guest runs there: the only path where milliseconds count.

Everything that it needs is made before it begins: connections, netlink batches, mapped memory, the target's waiting
answer. Nothing here logs, sleeps or polls. Every step is timed into the receipt. What is undone after a failure is
the caller's (`source`), because until the handoff is written it is the same as for a failure at any earlier time.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from vmferry.migration.disks import SourceDisks
from vmferry.migration.gates import SourceGates
from vmferry.migration.guest import RunningGuest
from vmferry.migration.link import PeerLink
from vmferry.migration.messages import AwaitLoaded, Done, Loaded, PlugPorts
from vmferry.model.errors import Failed
from vmferry.model.receipt import DiskDigests, MemoryDigests, Step
from vmferry.qemu.memory_image import MemoryDigest, MemoryReader
from vmferry.qemu.memory_stream import continue_switchover, expect_status, observe_migration
from vmferry.qemu.monitor import QmpEvent


@dataclass(slots=True)
class Timeline:
    """When each step was, in milliseconds since the guest stopped (negative: before)."""

    stop_ns: int = 0
    marks: list[tuple[str, int]] = field(default_factory=list)

    def mark(self, name: str, at_ns: int | None = None) -> None:
        """Notes that a step is done."""
        self.marks.append((name, time.monotonic_ns() if at_ns is None else at_ns))

    def steps(self) -> tuple[Step, ...]:
        """All steps in order."""
        return tuple(
            Step(name, round((at - self.stop_ns) / 1e6, 3)) for name, at in sorted(self.marks, key=lambda m: m[1])
        )


@dataclass(slots=True)
class Switchover:
    """The objects that take part, ready to be used. `verify_memory` maps the guest's memory when it is to be hashed."""

    guest: RunningGuest
    link: PeerLink
    migration_id: str
    gates: SourceGates
    disks: SourceDisks
    verify_memory: MemoryReader | None
    verify_disks: bool
    limit_s: float
    timeline: Timeline = field(default_factory=Timeline)
    leftover_frames: int = 0
    stopped: asyncio.Future[QmpEvent] = field(init=False)
    waiting: asyncio.Future[QmpEvent] = field(init=False)
    completed: asyncio.Future[QmpEvent] = field(init=False)
    loaded: asyncio.Task[Loaded] = field(init=False)
    memory: MemoryDigests | None = None
    disk_digests: tuple[DiskDigests, ...] = ()

    def arm(self) -> None:
        """Listens for everything that will be waited for. Before the memory stream starts."""
        monitor = self.guest.monitor
        self.stopped = monitor.expect("STOP")
        self.waiting = expect_status(monitor, "pre-switchover", "failed", "cancelled")
        self.completed = expect_status(monitor, "completed", "failed", "cancelled")
        request = AwaitLoaded(self.migration_id, memory_digest=self.verify_memory is not None)
        self.loaded = asyncio.create_task(self.link.call(request, Loaded, timeout_s=7 * 24 * 3600))

    def disarm(self) -> None:
        """Stops listening."""
        for future in (self.stopped, self.waiting, self.completed):
            future.cancel()
        self.loaded.cancel()

    async def plug(self) -> None:
        """The target's ports are in their switches: the last thing before the gate closes."""
        await self.link.call(PlugPorts(self.migration_id), Done, timeout_s=5)
        self.timeline.mark("target plugged")

    def close_gate(self) -> None:
        """From now on the guest's frames go to the target. No await."""
        late = self.stopped.done()
        self.gates.close()
        self.timeline.mark("gate closed late" if late else "gate closed")

    async def transfer(self) -> None:
        """From the guest's stop until all of it is on the target and proven equal. Raises Failed with the reason."""
        try:
            async with asyncio.timeout(self.limit_s):
                await self._transfer()
        except TimeoutError as error:
            raise Failed(
                "switchover-stalled",
                f"The switchover was not through after {self.limit_s:g} s.",
                "Look at the migration network; [limits] switchover_limit says how long it may take.",
            ) from error

    async def _transfer(self) -> None:
        stop = await self.stopped
        self.timeline.stop_ns = stop.received_ns
        self.timeline.mark("guest stopped", stop.received_ns)
        digest = asyncio.create_task(self.verify_memory.digest()) if self.verify_memory else None
        last_writes = asyncio.create_task(self.disks.read_last()) if self.verify_disks else None
        try:
            await self._complete_disks(last_writes)
            loaded = await self._send_state()
            if digest is not None:
                self._compare_memory(await digest, loaded)
        finally:
            for task in (digest, last_writes):
                if task is not None:
                    task.cancel()

    async def _complete_disks(self, last_writes: asyncio.Task[None] | None) -> None:
        """The memory's last pages are sent meanwhile; QEMU then waits for us at pre-switchover."""
        mark = self.timeline.mark
        self.leftover_frames = self.gates.drain()
        waiting = await self.waiting
        if waiting.data["status"] != "pre-switchover":
            raise await self._stream_failed()
        mark("memory sent", waiting.received_ns)
        await self.disks.finish()
        mark("disks complete")
        if last_writes is not None:
            await last_writes
            self.disk_digests = await self.disks.compare()
            mark("disks compared")

    async def _send_state(self) -> Loaded:
        await continue_switchover(self.guest.monitor)
        completed = await self.completed
        if completed.data["status"] != "completed":
            raise await self._stream_failed()
        self.timeline.mark("state sent", completed.received_ns)
        loaded = await self.loaded
        if loaded.problem:
            raise Failed("target-load", f"The target could not load the guest's state: {loaded.problem}", _LOAD)
        self.timeline.mark("state loaded")
        return loaded

    def _compare_memory(self, digest: MemoryDigest, loaded: Loaded) -> None:
        self.memory = MemoryDigests(digest.hex, loaded.memory_digest, digest.hex == loaded.memory_digest)
        self.timeline.mark("memory compared")
        if not self.memory.equal:
            raise Failed(
                "memory-differs",
                "The guest's memory on the target is not what left the source.",
                "The guest runs on here. Report this with the QEMU versions of both hosts; it should never happen.",
            )

    async def _stream_failed(self) -> Failed:
        sample = await observe_migration(self.guest.monitor)
        return Failed(
            "memory-stream", f"The memory stream broke off: {sample.error_desc or 'QEMU does not say why'}.", _STREAM
        )


_LOAD = "The check's rehearsal should have found it; see the target's qemu.log."
_STREAM = "Look at the migration network and at the target's QEMU, then migrate again."
