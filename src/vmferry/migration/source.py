"""The source's side of one migration: it drives (design.md, section 3). The target obeys, a manager only watches.

Until the handoff is written, every failure, cancel or lost link ends in `_undo`: the guest runs here as before. After
it, there is only forward, or back once the target has proven that it refused (`settle`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from vmferry.migration.boot_transfer import send_boot_files
from vmferry.migration.convergence import Goal
from vmferry.migration.disk_progress import DiskProgress
from vmferry.migration.disks import SourceDisks, clear_source_disks, sync_images
from vmferry.migration.gates import SourceGates
from vmferry.migration.guest import RunningGuest, open_memory
from vmferry.migration.handoff import Act, Decision, PeerSays, decide_source
from vmferry.migration.host_parts import HostParts
from vmferry.migration.link import PeerLink
from vmferry.migration.memory import MemoryCopy
from vmferry.migration.messages import (
    Abort,
    Answer,
    Done,
    FramesReturned,
    Inquire,
    Prepare,
    Prepared,
    ReturnFrames,
    StandBy,
    StartGuest,
    Take,
    Taken,
)
from vmferry.migration.records import MigrationRecord, RecordState
from vmferry.migration.streams import SOURCE_TLS, add_source_tls, remove_tls
from vmferry.migration.switchover import Switchover
from vmferry.migration.undoing import to_the_end
from vmferry.model.errors import Conflict, Failed, OutcomeUnknown, VmferryError
from vmferry.model.migration import MigrateOptions, Phase, PostCopy, Progress, Range, Verify
from vmferry.model.names import stream_name
from vmferry.model.receipt import DiskDigests
from vmferry.qemu.memory_image import MemoryReader
from vmferry.qemu.memory_stream import StreamSettings, cancel, observe_migration, prepare_source, set_throttle
from vmferry.qemu.monitor import YANK_MIGRATION, QmpInterrupted, QmpLost, QmpRefused

_QMP_PATIENCE_S = 0.25
_CALM_PATIENCE_S = 0.15
_FRAMES_PATIENCE_S = 0.3
_POST_COPY_LOOK_S = 0.2
_PULSE_EVERY_S = 0.5
_SECOND_LOOK_S = 0.5
_CARRYING_NICE = -10
_SLOW_DIGEST_RATE = 1 << 30  # bytes of guest memory a second that even a busy host can hash
T = TypeVar("T")


@dataclass(slots=True)
class Measured:
    """What the receipt needs of what was measured on the way."""

    switchover: Switchover | None = None
    taken: Taken | None = None
    blackout_ms: float = 0.0
    memory_bytes: int = 0
    disk_bytes: int = 0
    disks: tuple[DiskDigests, ...] = ()
    rounds: int = 0
    handoff_at: float = 0.0


@dataclass(frozen=True, slots=True)
class SourceEvents:
    """Whom the engine tells."""

    phase: Callable[[Phase], None]
    progress: Callable[[Progress], None]


@dataclass(slots=True)
class SourceMigration:
    """One outgoing migration of a guest that `host.migrations` has claimed and journalled as active."""

    parts: HostParts
    guest: RunningGuest
    link: PeerLink
    record: MigrationRecord
    options: MigrateOptions
    events: SourceEvents
    connect: Callable[[], Awaitable[PeerLink]]
    was_running: bool = True
    expected_dirty_rate: int = 0  # bytes a second, from the check
    measured: Measured = field(default_factory=Measured)
    progress: Progress = field(default_factory=Progress)
    problems: list[str] = field(default_factory=list)  # what could not be undone
    _gates: SourceGates | None = None
    _disks: SourceDisks | None = None
    _memory: MemoryCopy | None = None
    _reader: MemoryReader | None = None
    _proof: asyncio.Task[None] | None = None
    _standing_by: asyncio.Task[None] | None = None
    _preparing: asyncio.Task[Prepared] | None = None
    _called_off: bool = False
    _committed: bool = False
    _switching: bool = False

    @property
    def committed(self) -> bool:
        """Whether the handoff was (or is being) written: nothing can be cancelled any more."""
        return self._committed

    @property
    def gates(self) -> SourceGates | None:
        """The gates, once prepared."""
        return self._gates

    def commit_after_restart(self) -> None:
        """The record says that the VM was handed over: only `settle` may change that."""
        self._committed = True

    async def undo_after_restart(self) -> None:
        """An earlier life of the daemon left this migration before the handoff: the guest runs on, nothing is left."""
        await self._undo()

    async def let_go(self) -> None:
        """After the handoff, before QEMU goes: takes the last measures and closes what is ours."""
        if self._memory is not None:
            with contextlib.suppress(VmferryError):  # its process has ended: what was seen last will do
                await self._memory.measure()
            self.measured.memory_bytes, self.measured.rounds = self._memory.sent_bytes, self._memory.rounds
        if self._disks is not None:
            self.measured.disks = await asyncio.to_thread(self._disks.verdicts)
            await self._disks.let_go()
        if self._reader is not None:
            await asyncio.to_thread(self._reader.close)
            self._reader = None

    async def memory_is_there(self) -> bool:
        """Waits as long as our QEMU has pages of a post-copy that the target lacks: nobody else has them.

        However long the network is gone. False if they did not get there.
        """
        post_copy = self._memory is not None and self._memory.post_copy
        while self.guest.process.running:
            try:
                status = (await observe_migration(self.guest.monitor)).status
            except VmferryError:
                if self.options.post_copy is not PostCopy.ALLOW:
                    return True  # all of it was there before the handoff
                status = ""  # it does not answer now, or has just ended
            if status and not status.startswith("postcopy"):
                return status == "completed" or not post_copy
            await asyncio.sleep(_POST_COPY_LOOK_S)
        return not post_copy

    def prepare_ahead(self) -> None:
        """Reserves on the target and has its QEMU started while the check ends; `move` or `call_off` follows."""
        if not self._called_off:
            self._preparing = asyncio.create_task(self._prepare())

    async def call_off(self, error: BaseException) -> None:
        """The check speaks against it, or broke off: what `prepare_ahead` has made goes, here and on the target.

        Raises Failed `guest-ended` if that is what is behind the error.
        """
        self._called_off = True
        if self._preparing is not None:
            await _end(self._preparing)
            await self._undo()
        if isinstance(error, VmferryError) and await self._has_guest_ended(error):
            raise await self._guest_ended() from error

    async def move(self) -> None:
        """Prepare, copy, switch over, hand off. Returns once the target has taken the VM.

        Raises what went wrong, after everything was undone and the guest runs here; raises OutcomeUnknown when the
        handoff was written and the target does not say what it did: then `settle` goes on.
        """
        try:
            self.events.phase(Phase.PREPARE)
            prepared = await (self._preparing or self._prepare())
            await self._copy_and_switch(prepared)
        except BaseException as error:
            if not self._committed:
                await to_the_end(self._undo())
                if isinstance(error, VmferryError) and await self._has_guest_ended(error):
                    raise await self._guest_ended() from error
            raise
        await self._hand_off()

    async def _has_guest_ended(self, error: VmferryError) -> bool:
        """Whether its end is what went wrong: mirrors, stream and QMP break off first, in any order."""
        silent = isinstance(error, QmpLost | QmpInterrupted)
        if self.guest.process.running and not self.problems and not silent:
            return False
        try:
            async with asyncio.timeout(_QMP_PATIENCE_S):
                await self.guest.process.exited()
        except TimeoutError:
            return False
        self.problems.clear()  # what could not be undone in it has gone with it
        return True

    # -- prepare and copy --------------------------------------------------------------------------------------------

    async def _prepare(self) -> Prepared:
        record, limits = self.record, self.parts.limits
        request = Prepare(
            migration_id=record.id,
            spec=self.guest.spec,
            options=self.options,
            source=self.parts.name,
            source_address=self.parts.address,
            streams_from=self.link.local_address,
            generation=record.generation,
            running=self.was_running,
        )
        reserved = await self.link.call(request, Prepared, limits.prepare_s)
        await send_boot_files(self.parts, self.link, record, reserved.boot_files)
        prepared, _ = await asyncio.gather(
            self.link.call(StartGuest(record.id), Prepared, limits.prepare_s),
            add_source_tls(self.parts, self.guest.monitor),
        )
        return prepared

    async def _copy_and_switch(self, prepared: Prepared) -> None:
        peer_address = self.link.peer_address
        self._disks = SourceDisks(self.parts, self.guest, self.link.peer, peer_address, prepared.disk_port)
        mtus = [nic.mtu for nic in self.guest.spec.nics]
        self._gates = SourceGates(self.parts, self.record.id, self.guest.ports, mtus, self.parts.address, peer_address)
        await self._gates.prepare()
        settings = self._stream_settings()
        self._memory = MemoryCopy(self.guest, self._goal(), settings.limit, self._report)
        if self.options.verify is Verify.ALL:
            self._reader = await open_memory(self.guest)
        self.events.phase(Phase.COPY)
        async with self._watched():
            if self._proves_disks:
                self._proof = asyncio.create_task(self._disks.prove(self.link, self.record.id))
            try:
                await self._copy_disks()
                await self._copy_memory(prepared, settings)
            finally:
                await _end(self._proof)

    def _goal(self) -> Goal:
        return Goal(
            max_blackout_ms=self.options.max_blackout_ms,
            max_slowdown_percent=self.options.max_slowdown_percent,
            allow_post_copy=self.options.post_copy is PostCopy.ALLOW,
            deadline_ms=self.options.deadline_ms,
            dirty_rate=self.expected_dirty_rate,
        )

    async def _copy_disks(self) -> None:
        disks = _require(self._disks)
        if not self.guest.spec.disks:
            return
        await disks.start(self.options.bandwidth_bps // 8)
        await disks.copy(self._report_disks, self.parts.limits.disk_stall_s)

    def _stream_settings(self) -> StreamSettings:
        return StreamSettings(
            postcopy=self.options.post_copy is PostCopy.ALLOW,
            auto_converge=self.options.max_slowdown_percent > 0,
            tls_creds=SOURCE_TLS.creds(self.parts),
            tls_hostname=stream_name(self.link.peer) if self.parts.stream_dir else "",
            max_bandwidth=self.options.bandwidth_bps // 8,
        )

    async def _copy_memory(self, prepared: Prepared, settings: StreamSettings) -> None:
        monitor, memory = self.guest.monitor, _require(self._memory)
        switchover = self._arm_switchover()
        writing_out: asyncio.Task[None] | None = None
        try:
            await prepare_source(monitor, settings)
            await set_throttle(monitor, 1, 1, 1)  # none to speak of, until `convergence` asks for more
            switchover.timeline.mark("memory started")
            # The target's QEMU does nothing else while it waits for our first bytes on a new connection (a blocking TLS
            # handshake), and ours sends none while it waits for the target to answer a disk's write: together for ever.
            async with _require(self._disks).undisturbed():
                await memory.start(self.link.peer_address, prepared.memory_port, self.parts.limits.memory_stall_s)
            await memory.converge(self._rest_is_ready, self.parts.limits.memory_stall_s)
            self.events.phase(Phase.SWITCHOVER)
            # Now: the target ends these connections before anybody has time to look at them.
            self.measured.disk_bytes = await asyncio.to_thread(_require(self._disks).sent_bytes)
            # QEMU flushes its images when the guest has stopped: what is written out by then is quick.
            writing_out = asyncio.create_task(sync_images(self.guest.spec))
            self._switching = True
            await memory.switch(switchover, self.parts.limits.memory_stall_s)
        except BaseException:
            switchover.disarm()
            raise
        finally:
            memory.close()
            await _end(self._standing_by)
            await _end(writing_out)

    async def _rest_is_ready(self, near: bool) -> bool:
        """Whether the disks are proven up to now, and resting. Raises what broke the proof."""
        if self._proof is not None and self._proof.done():
            self._proof.result()
        proven = self._proof is None or _require(self._disks).rest_proof(near)
        if near:
            await _require(self._gates).arm()
        elif self._standing_by is not None:  # what was written out by then is written anew before the end
            standing_by, self._standing_by = self._standing_by, None
            await _end(standing_by)
        if proven:
            _require(self.measured.switchover).timeline.mark_once("disks proven")
        if not (near and proven):
            return False
        if self._standing_by is None:
            self._standing_by = asyncio.create_task(self._stand_by())
        if self._standing_by.done():
            self._standing_by.result()
        return self._standing_by.done()

    async def _stand_by(self) -> None:
        """Both sides get ready for the switchover, while the guest runs."""
        there = self.link.call(StandBy(self.record.id), Done, self.parts.limits.prepare_s)
        await asyncio.gather(there, sync_images(self.guest.spec))
        # What carries the guest over must not wait for others' work; `_undo` takes it back.
        self.guest.process.set_priority(_CARRYING_NICE, vcpus=False)
        _require(self.measured.switchover).timeline.mark("standing by")

    @property
    def _proves_disks(self) -> bool:
        return self.options.verify is not Verify.NONE and bool(self.guest.spec.disks)

    def _longest_stop_s(self) -> float:
        """How long the guest may stand still before it is let run again here."""
        limit_s = max(self.parts.limits.stopped_s, self.options.max_blackout_ms * 1.5 / 1000)
        if self.options.verify is Verify.ALL:
            limit_s += self.guest.spec.memory_bytes / _SLOW_DIGEST_RATE
        return limit_s

    def _arm_switchover(self) -> Switchover:
        switchover = Switchover(
            guest=self.guest,
            link=self.link,
            migration_id=self.record.id,
            gates=_require(self._gates),
            disks=_require(self._disks),
            verify_memory=self._reader,
            verify_disks=self._proves_disks,
            limit_s=self._longest_stop_s(),
        )
        switchover.arm()
        self.measured.switchover = switchover
        return switchover

    # -- handoff -----------------------------------------------------------------------------------------------------

    async def _hand_off(self) -> None:
        """Writes the handoff, then tells the target. From here on nothing is undone by an exception."""
        switchover = _require(self.measured.switchover)
        self._committed = True
        # Shielded: a daemon that is asked to stop in this moment must not leave the record half-told.
        await to_the_end(self._write_and_tell(switchover))

    async def _write_and_tell(self, switchover: Switchover) -> None:
        timeline = switchover.timeline
        try:
            self.record = await self.parts.journal.move(self.record, RecordState.HANDED_OVER)
        except BaseException:
            self._committed = False
            await self._undo()
            raise
        timeline.mark("handoff written")
        post_copy = _require(self._memory).post_copy
        if post_copy:
            await switchover.start_post_copy()
        taken = await self.link.call(
            Take(self.record.id, self.record.generation, self.was_running), Taken, self.parts.limits.switchover_s
        )
        now = time.monotonic_ns()
        resumed = now - int((taken.resumed_ago_ms + self.link.rtt_ms / 2) * 1e6)
        timeline.mark("target asked to take it", resumed - int((taken.cont_ms + taken.journal_ms) * 1e6))
        timeline.mark("target took it", resumed - int(taken.cont_ms * 1e6))
        timeline.mark("target runs", resumed)
        self.measured.taken = taken
        self.measured.blackout_ms = (resumed - timeline.stop_ns) / 1e6
        self.measured.handoff_at = time.time()
        self.events.phase(Phase.HANDOFF)
        if post_copy:
            await switchover.finish_post_copy(self.parts.limits.memory_stall_s)
        switchover.disarm()

    async def settle(self) -> Decision:
        """Once: asks the target what it did, and does what follows. The decision says whether it is settled.

        FINISH: the target has it. TAKE_BACK: it refused for good, and the guest runs here again. WAIT: ask later.
        """
        says = await self._ask(refuse=False)
        decision = decide_source(self.record.state, says, self.guest.process.running)
        if decision.act is Act.ASK_REFUSAL:
            says = await self._ask(refuse=True)
            decision = decide_source(self.record.state, says, self.guest.process.running)
        if decision.act is Act.TAKE_BACK:
            self.record = await self.parts.journal.move(self.record, RecordState.ENDED)
            await self._undo()
        return decision

    async def _ask(self, refuse: bool) -> PeerSays:
        return await ask_target(self.connect, self.record, refuse, self.parts.limits.request_s)

    # -- undoing -----------------------------------------------------------------------------------------------------

    async def _undo(self) -> None:
        """The guest runs here as before the migration, and nothing of it is left here. Accepts any half-done state.

        The guest comes first, then its frames; what the target has to remove it removes when it is told, or notices by
        itself. A step that fails does not keep the others from being done: what could not be undone is in `problems`.
        """
        if self.measured.switchover is not None:
            self.measured.switchover.disarm()
        here = self.guest.process.running
        steps = (self._run_again, self._reopen_gates, self._clear_disks) if here else (self._reopen_gates,)
        for step in (*steps, self._tell_target, self._release_gates, self._release_rest):
            try:
                await step()
            except VmferryError as error:
                self.problems.append(error.message)

    async def _run_again(self) -> None:
        if self._disks is not None:
            await self._disks.cut()
        await self._stop_stream()
        if self.was_running and (await self.guest.monitor.execute("query-status"))["status"] != "running":
            await self.guest.monitor.execute("cont")

    async def _reopen_gates(self) -> None:
        """The guest's frames come to it again, first those that the target held."""
        gates = self._gates
        if gates is None or not gates.closed:
            return
        returned: int | None = None
        try:
            gates.reclaim()
            returned = (await self.link.call(ReturnFrames(self.record.id), FramesReturned, _FRAMES_PATIENCE_S)).frames
        except VmferryError:
            returned = None  # a target that is gone has taken them with it
        await gates.reopen(returned)

    async def _clear_disks(self) -> None:
        if self._disks is not None:
            await self._disks.cancel()
        else:
            await clear_source_disks(self.guest)

    async def _tell_target(self) -> None:
        with contextlib.suppress(VmferryError):  # a target that does not hear it asks us, and finds out
            await self.link.call(Abort(self.record.id, "the migration failed"), Done, self.parts.limits.request_s)

    async def _release_gates(self) -> None:
        if self._gates is not None:
            await self._gates.release(guest_stays=self.guest.process.running)

    async def _release_rest(self) -> None:
        if self._reader is not None:
            await asyncio.to_thread(self._reader.close)
            self._reader = None
        if self.guest.process.running:
            self.guest.process.set_priority(0)
            await remove_tls(self.guest.monitor, SOURCE_TLS)

    async def _stop_stream(self) -> None:
        monitor = self.guest.monitor
        try:
            if self._memory is not None:
                async with asyncio.timeout(_CALM_PATIENCE_S):
                    await self._memory.calm_down()
            async with asyncio.timeout(_QMP_PATIENCE_S):
                await cancel(monitor)
                await self._stream_ended()
        except (TimeoutError, OutcomeUnknown):
            # QEMU hangs on a peer that does not read: only cutting the connection frees it (qemu-notes, 0.10).
            with contextlib.suppress(QmpRefused):  # it is over already
                await self.guest.process.yank.yank([YANK_MIGRATION])
            try:
                async with asyncio.timeout(self.parts.limits.request_s):
                    await self._stream_ended()
            except TimeoutError as error:
                message = "QEMU does not let go of the memory stream"
                raise Failed("stream-stuck", f"{message}.", "Look at the guest's qemu.log.") from error

    async def _stream_ended(self) -> None:
        while True:
            status = (await self.guest.monitor.execute("query-migrate")).get("status", "none")
            if status in ("none", "cancelled", "failed", "completed"):
                return
            await asyncio.sleep(0.01)  # QEMU ends it in the background; it has no event for "none"

    # -- watching ----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _watched(self) -> AsyncIterator[None]:
        """While the block runs: the guest's end, a broken copy or a lost link ends it with that error."""
        body = asyncio.current_task()
        assert body is not None
        cause: list[VmferryError] = []

        async def watch(waiting: Awaitable[VmferryError]) -> None:
            cause.append(await waiting)
            body.cancel()

        watchers = [asyncio.create_task(watch(self._guest_ended())), asyncio.create_task(watch(self._link_lost()))]
        watchers.append(asyncio.create_task(watch(self._mirror_broken())))
        watchers.append(asyncio.create_task(watch(self._qemu_silent())))
        try:
            yield
        except asyncio.CancelledError:
            if cause:
                body.uncancel()
                raise cause[0] from None
            raise
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)

    async def _guest_ended(self) -> VmferryError:
        await self.guest.process.exited()
        return Failed("guest-ended", "The guest ended by itself on the source.", "Start it, then migrate again.")

    async def _link_lost(self) -> VmferryError:
        return await self.link.wait_lost()

    async def _qemu_silent(self) -> VmferryError:
        """Up to the switchover, which has a limit of its own. A guest whose QEMU hangs does not get far either."""
        limit_s = self.parts.limits.qemu_silence_s
        while True:
            await asyncio.sleep(_PULSE_EVERY_S)
            if self._switching or await self._answers(limit_s):
                continue
            # Once more: if it was us who stood still, the answer has been here for long.
            if not self._switching and not await self._answers(_SECOND_LOOK_S):
                return Failed(
                    "qemu-silent",
                    f"The guest's QEMU did not answer for {limit_s:g} s.",
                    "It waits for the target or for its own disk: look at the migration network and at both pools.",
                )

    async def _answers(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await self.guest.monitor.execute("query-status")
        except TimeoutError:
            return False
        return True

    async def _mirror_broken(self) -> VmferryError:
        while True:
            await asyncio.sleep(0.2)
            for future in self._disks.failures if self._disks else ():
                if future.done() and not future.cancelled() and isinstance(error := future.exception(), VmferryError):
                    return error

    def _report_disks(self, progress: DiskProgress) -> None:
        left_ms = (progress.total_bytes - progress.done_bytes) / max(1, progress.rate) * 1000
        self._report(
            disk_total_bytes=progress.total_bytes,
            disk_done_bytes=progress.done_bytes,
            disk_rate=progress.rate,
            eta_ms=Range(round(left_ms * 0.5), round(left_ms * 2 + 1000)) if progress.rate else None,
        )

    def _report(self, **changes: object) -> None:
        self.progress = replace(self.progress, **changes)  # type: ignore[arg-type]
        self.events.progress(self.progress)


async def ask_target(
    connect: Callable[[], Awaitable[PeerLink]], record: MigrationRecord, refuse: bool, limit_s: float
) -> PeerSays:
    """What the target's journal says, after it has refused for good if asked to. No answer is `unreachable`."""
    try:
        link = await connect()
    except VmferryError:
        return PeerSays.UNREACHABLE
    try:
        question = Inquire(record.id, record.vm_id, record.generation, refuse)
        return (await link.call(question, Answer, limit_s)).says
    except VmferryError:
        return PeerSays.UNREACHABLE
    finally:
        await link.close()


async def _end(task: asyncio.Task[Any] | None) -> None:
    """Cancels a task of ours and waits for its end, whatever that is."""
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _require(part: T | None) -> T:
    if part is None:
        raise Conflict("not-prepared", "The migration is not prepared.", "")
    return part
