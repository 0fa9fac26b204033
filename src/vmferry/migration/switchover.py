"""From the closed gate to the target's word that the guest runs there: the only path where milliseconds count.

Everything that it needs is made before it begins: connections, netlink batches, mapped memory, the target's waiting
answer. Nothing here logs, sleeps or polls. Every step is timed into the receipt. What is undone after a failure is
the caller's (`source`), because until the handoff is written it is the same as for a failure at any earlier time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from vmferry.migration.disks import SourceDisks
from vmferry.migration.gates import SourceGates
from vmferry.migration.guest import RunningGuest
from vmferry.migration.link import PeerLink
from vmferry.migration.messages import AwaitLoaded, DisksComplete, Done, Loaded, PlugPorts
from vmferry.model.errors import Failed
from vmferry.model.receipt import MemoryDigests, Step
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

    def mark_once(self, name: str) -> None:
        """Notes a step the first time only."""
        if all(known != name for known, _ in self.marks):
            self.mark(name)

    def steps(self) -> tuple[Step, ...]:
        """All steps in order."""
        return tuple(
            Step(name, round((at - self.stop_ns) / 1e6, 3)) for name, at in sorted(self.marks, key=lambda m: m[1])
        )


@dataclass(slots=True)
class Switchover:
    """The objects that take part, ready to be used. `verify_memory` reads the guest's memory if it is hashed."""

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
    _exports_ended: asyncio.Task[Done] | None = None
    _until: float | None = None  # by the loop's clock, once the gate is closed
    _memory_here: asyncio.Task[MemoryDigest] | None = None

    def arm(self) -> None:
        """Listens for everything that will be waited for. Before the memory stream starts."""
        monitor = self.guest.monitor
        self.stopped = monitor.expect("STOP")
        self.waiting = expect_status(monitor, "pre-switchover", "failed", "cancelled")
        self.completed = expect_status(monitor, "completed", "failed", "cancelled")
        request = AwaitLoaded(self.migration_id, memory_digest=self.verify_memory is not None)
        self.loaded = asyncio.create_task(self.link.call(request, Loaded, timeout_s=_ANY_TIME_S))
        self.loaded.add_done_callback(_look_at)

    def disarm(self) -> None:
        """Stops listening. Idempotent."""
        for future in (self.stopped, self.waiting, self.completed):
            future.cancel()
        self.loaded.cancel()
        for task in (self._memory_here, self._exports_ended):
            if task is not None:
                task.cancel()

    @property
    def begun(self) -> bool:
        """Whether QEMU has stopped the guest, or has got so far with one that was paused: no pass follows."""
        return self.stopped.done() or self.waiting.done()

    async def plug(self) -> None:
        """The target's ports are in their switches: the last thing before the gate closes."""
        async with self.limited():
            await self.link.call(PlugPorts(self.migration_id), Done, timeout_s=_ANY_TIME_S)
        self.timeline.mark("target plugged")

    def close_gate(self) -> None:
        """From now on the guest's frames go to the target, for at most `limit_s` until it runs there. No await."""
        self._until = asyncio.get_running_loop().time() + self.limit_s
        self.gates.close()
        self.timeline.mark("gate closed")

    async def settle(self) -> None:
        """With the gate closed: a few milliseconds in which the running guest takes what is in its rings."""
        if await self.gates.settle():
            self.timeline.mark("rings empty")

    async def transfer(self) -> None:
        """From the guest's stop until all of it is on the target and proven equal. Raises Failed with the reason."""
        async with self.limited():
            await self._wait_for_stop()
        async with self.limited():
            loaded = await self._transfer()
            if self._memory_here is not None:
                self._compare_memory(await self._memory_here, loaded)

    async def transfer_disks(self) -> None:
        """Post-copy: the same up to the disks; memory and state follow after the handoff is written."""
        async with self.limited():
            await self._wait_for_stop()
        async with self.limited():
            await self._complete_disks()
            await self._compare_disks()

    async def start_post_copy(self) -> None:
        """Post-copy, with the handoff written: the target gets the state and may run; memory follows on demand."""
        self._until = None  # there is no way back: what this has to take it may take
        async with self.limited():
            active = expect_status(self.guest.monitor, "postcopy-active", "completed", "failed")
            try:
                await continue_switchover(self.guest.monitor)
                if (await active).data["status"] == "failed":
                    raise await self._stream_failed()
            finally:
                active.cancel()
            self.timeline.mark("state sent")
            self._require_loaded(await self.loaded)

    async def finish_post_copy(self, stall_s: float) -> None:
        """Waits until the rest of the memory has arrived. Raises Failed `post-copy-stalled`."""
        last, since = -1, time.monotonic()
        while not self.completed.done():
            await asyncio.wait([self.completed], timeout=0.2)
            sample = await observe_migration(self.guest.monitor)
            if sample.transferred_bytes != last:
                last, since = sample.transferred_bytes, time.monotonic()
            elif time.monotonic() - since > stall_s:
                raise Failed(
                    "post-copy-stalled",
                    f"The rest of the memory has not arrived for {stall_s:g} s; the guest waits for it on the target.",
                    "Look at the migration network: the guest goes on when it is back.",
                )

    @contextlib.asynccontextmanager
    async def limited(self) -> AsyncIterator[None]:
        """Raises Failed `switchover-stalled` when the block takes longer than is left since the gate was closed."""
        until = self._until or asyncio.get_running_loop().time() + self.limit_s
        try:
            async with asyncio.timeout_at(until):
                yield
        except TimeoutError as error:
            raise Failed(
                "switchover-stalled",
                f"The switchover stood still for {self.limit_s:g} s.",
                "Look at the migration network; [limits] switchover_limit says how long it may take.",
            ) from error

    async def _wait_for_stop(self) -> None:
        # A guest that was paused before does not stop again: for it the wait at pre-switchover is the moment.
        await asyncio.wait([self.stopped, self.waiting], return_when=asyncio.FIRST_COMPLETED)
        stop = self.stopped.result() if self.stopped.done() else self.waiting.result()
        self.timeline.stop_ns = stop.at_ns
        self.timeline.mark("guest stopped", stop.at_ns)

    async def _transfer(self) -> Loaded:
        await self._complete_disks()
        await continue_switchover(self.guest.monitor)
        comparing = asyncio.create_task(self._compare_disks())
        comparing.add_done_callback(_look_at)
        try:
            loaded = await self._wait_for_load()
            await comparing
        finally:
            comparing.cancel()
        return loaded

    async def _wait_for_load(self) -> Loaded:
        # The target's word is enough, and a millisecond earlier than that of our own QEMU.
        either: list[asyncio.Future[Any]] = [self.loaded, self.completed]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self.loaded.done() and self.completed.result().data["status"] != "completed":
            raise await self._stream_failed()
        return self._require_loaded(await self.loaded)

    def _end_exports(self) -> None:
        # Only ahead of its time: the take does it, too, and says what goes wrong.
        self._exports_ended = asyncio.create_task(self.link.call(DisksComplete(self.migration_id), Done))
        self._exports_ended.add_done_callback(_look_at)

    def _require_loaded(self, loaded: Loaded) -> Loaded:
        if loaded.problem:
            raise Failed("target-load", f"The target could not load the guest's state: {loaded.problem}", _LOAD)
        self.timeline.mark("state loaded")
        return loaded

    async def _complete_disks(self) -> None:
        """The memory's last pages are sent meanwhile; QEMU then waits for us at pre-switchover."""
        mark = self.timeline.mark
        # QEMU answers neither before it has stopped the guest for good and flushed its disks (vm_stop).
        parts = [asyncio.create_task(self._drain()), asyncio.create_task(self._end_mirrors())]
        for part in parts:
            part.add_done_callback(_look_at)
        try:
            waiting = await self.waiting
            if waiting.data["status"] != "pre-switchover":
                raise await self._stream_failed()
            mark("memory sent", waiting.at_ns)
            if self.verify_memory is not None:
                self._memory_here = asyncio.create_task(self.verify_memory.digest())
            await asyncio.gather(*parts)
        finally:
            for part in parts:
                part.cancel()

    async def _end_mirrors(self) -> None:
        await self.disks.complete()
        self.timeline.mark("disks complete")
        if self.verify_disks:  # not before: a last write that was under way at the stop may come until then
            await self.disks.read_last()
            self.timeline.mark("disks read")

    async def _compare_disks(self) -> None:
        """While the target loads the state; its exports are ended ahead of their time when they are not needed more."""
        if self.verify_disks:
            await self.disks.compare()
            self.timeline.mark("disks compared")
        self._end_exports()

    async def _drain(self) -> None:
        """Every frame that the guest did not get here goes to the target."""
        self.gates.mark()
        for _ in range(_LOOKS):
            await self.guest.monitor.execute("query-status")
        self.leftover_frames = self.gates.drain()

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


_ANY_TIME_S = 30 * 24 * 3600.0


def _look_at(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # what nobody waits for any more gets no warning from asyncio


# Answers by which QEMU has surely looked at its taps: one may come out of the turn of its main loop that was under way.
_LOOKS = 2
_LOAD = "The check's rehearsal should have found it; see the target's qemu.log."
_STREAM = "Look at the migration network and at the target's QEMU, then migrate again."
