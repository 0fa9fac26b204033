"""The target's side of one migration: reserve, receive, take or refuse. It obeys the source's requests.

Everything that it makes is in the journal first (`Reserved`), so that `clear_reserved` finds it after a crash. The VM
is this host's only after `take` has written so.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vmferry.migration.disks import TargetDisks, create_images, remove_images, sync_images
from vmferry.migration.gates import TargetGates, gate_vni
from vmferry.migration.guest import (
    RunningGuest,
    boot_files,
    build_guest,
    create_ports,
    dismantle,
    open_memory,
    remove_ports,
)
from vmferry.migration.handoff import GuestSeen
from vmferry.migration.host_parts import HostParts
from vmferry.migration.messages import (
    AwaitLoaded,
    FramesReturned,
    Loaded,
    Prepare,
    Prepared,
    PutBootFile,
    RunningSeen,
    Take,
    Taken,
)
from vmferry.migration.placement import place
from vmferry.migration.records import MigrationRecord, RecordState, Reserved
from vmferry.migration.streams import TARGET_TLS, add_target_tls
from vmferry.migration.undoing import to_the_end
from vmferry.model.errors import Conflict, Failed, VmferryError, WrongInput
from vmferry.model.migration import PostCopy, Role, Verify
from vmferry.model.names import require_name
from vmferry.network.ports import Port
from vmferry.qemu.connections import prepare_listeners
from vmferry.qemu.liveness import wait_vcpus_advance
from vmferry.qemu.memory_image import MemoryReader
from vmferry.qemu.memory_stream import StreamSettings, expect_status, observe_migration, prepare_incoming
from vmferry.storage.boot_files import LARGEST_BOOT_FILE, accept_boot_file

_ALIVE_WITHIN_S = 10.0
_RECEIVING_NICE = -10
_WRITE_OUT_EVERY_S = 0.5
_LOADED = ("completed", "postcopy-active")
_WANTED = {True: "running", False: "paused"}


@dataclass(frozen=True, slots=True)
class TargetHooks:
    """What the host does when the VM has become its own."""

    on_taken: Callable[[MigrationRecord, RunningGuest, bool], Awaitable[None]]


class TargetMigration:
    """One incoming migration in memory; its record is the durable part."""

    def __init__(self, parts: HostParts, hooks: TargetHooks, request: Prepare, record: MigrationRecord) -> None:
        self._parts = parts
        self._hooks = hooks
        self._request = request
        self.record = record
        self.guest: RunningGuest | None = None
        self._ports: list[Port] = []
        self._gates: TargetGates | None = None
        self._disks: TargetDisks | None = None
        self._memory: MemoryReader | None = None
        self._loaded = False
        self._unserving = asyncio.Lock()
        self._writer: asyncio.Task[None] | None = None
        self._writing_out: asyncio.Task[None] | None = None
        self._taken: Taken | None = None
        self._taken_at = 0.0
        self._settled_in = False
        self._ending = asyncio.Lock()
        self._starting: asyncio.Task[Prepared] | None = None
        self._given_up = False
        self._progress_at = time.monotonic()

    @property
    def wanted_running(self) -> bool:
        """Whether the guest ran on the source: else it stays paused here, too."""
        return self._request.running

    # -- prepare -----------------------------------------------------------------------------------------------------

    @classmethod
    async def reserve(cls, parts: HostParts, hooks: TargetHooks, request: Prepare, source: str) -> TargetMigration:
        """Journals the intent and makes images and ports. On failure everything is removed again, and refused."""
        spec = place(request.spec, request.options, request.generation)
        for boot_file in boot_files(spec):
            _require_file_name(boot_file)
        require_name(spec.name, "VM")
        require_name(spec.id, "VM id")
        require_name(request.migration_id, "migration")
        record = MigrationRecord(
            id=request.migration_id,
            role=Role.TARGET,
            vm_id=spec.id,
            vm_name=spec.name,
            peer=source,
            generation=request.generation,
            state=RecordState.ACTIVE,
            spec=spec,
            reserved=Reserved(
                run_dir=str(parts.guest_dir(spec.id)), vm_dir=str(parts.vm_dir(spec.id)), gate_id=request.migration_id
            ),
        )
        migration = cls(parts, hooks, request, record)
        # The write is carried through by the journal even if we are cancelled: then it has to be taken back.
        begun = asyncio.ensure_future(parts.journal.begin_migration(record))
        try:
            await asyncio.shield(begun)
            await migration._make()
        except BaseException:
            await asyncio.wait([begun])
            if begun.exception() is None:
                await to_the_end(migration.refuse())
            raise
        return migration

    async def _make(self) -> None:
        spec = self.record.spec

        async def announce(paths: tuple[str, ...]) -> None:
            reserved = replace(self.record.reserved, images=paths)
            self.record = replace(self.record, reserved=reserved)
            await self._parts.journal.update_migration(self.record)

        spec = await create_images(self._parts, spec, announce)
        self.record = replace(self.record, spec=spec)
        await self._parts.journal.update_migration(self.record)
        self._ports = await create_ports(self._parts, spec, plugged=False)

    def missing_boot_files(self) -> tuple[str, ...]:
        """Names of the boot files that this host has not got; the source sends them."""
        directory = self._parts.vm_dir(self.record.vm_id)
        return tuple(name for name in boot_files(self.record.spec) if not (directory / name).exists())

    async def put_boot_file(self, request: PutBootFile, data: bytes) -> None:
        """Writes a part of a boot file. Raises WrongInput when it is none of this VM's, Refused for a wrong digest."""
        if request.name not in boot_files(self.record.spec):
            raise WrongInput("unknown-boot-file", f"{request.name[:80]!r} is no boot file of this VM.", "")
        if not 0 <= request.offset <= LARGEST_BOOT_FILE - len(data):
            raise WrongInput("bad-offset", "A boot file has at most 2 GiB.", "Is the other host's version known?")
        directory = self._parts.vm_dir(self.record.vm_id)
        part = directory / f".{request.name}.{self.record.id}.part"
        await asyncio.to_thread(_append, part, request.offset, data)
        if request.last:
            await accept_boot_file(part, directory / request.name)

    async def start(self) -> Prepared:
        """Starts the waiting QEMU with its streams open and its gates ready. On failure everything is removed again.

        Raises Conflict `refused` when it is refused meanwhile, `already-started` the second time.
        """
        if self._starting is not None:
            raise Conflict("already-started", f"{self._parts.name} has started this guest already.", "")
        if self._given_up:
            raise self._refused()
        # A task of its own, so that `refuse` can end it wherever it is: what it holds must not outlive the refusal.
        self._starting = asyncio.create_task(self._start())
        try:
            return await self._starting
        except BaseException:
            refused = self._given_up
            await to_the_end(self.refuse())
            if refused and self._starting.cancelled():
                raise self._refused() from None
            raise

    def _refused(self) -> Conflict:
        return Conflict("refused", f"{self._parts.name} has refused the VM.", "The source has called it off.")

    async def _start(self) -> Prepared:
        spec, options = self.record.spec, self._request.options
        ports, self._ports = self._ports, []
        try:
            self.guest = await build_guest(self._parts, spec, ports, incoming=True)
        except BaseException:
            self._ports = ports
            raise
        identity = self.guest.process.identity
        reserved = replace(self.record.reserved, pid=identity.pid, start_ticks=identity.start_time_ticks)
        self.record = replace(self.record, reserved=reserved)
        await self._parts.journal.update_migration(self.record)
        # It only receives: its threads must not wait for others' vCPUs when the state comes.
        self.guest.process.set_priority(_RECEIVING_NICE)
        monitor = self.guest.monitor
        await add_target_tls(self._parts, monitor, self.record.peer)
        self._disks = TargetDisks(self._parts, self.guest)
        disk_port = await self._disks.serve(provable=options.verify is not Verify.NONE)
        settings = StreamSettings(
            postcopy=options.post_copy is PostCopy.ALLOW,
            max_bandwidth=options.bandwidth_bps // 8,
            tls_creds=TARGET_TLS.creds(self._parts),
            tls_authz=TARGET_TLS.authz(self._parts),
            validate_uuid=True,
        )
        memory_port = await prepare_incoming(monitor, self._parts.address, settings)
        allowed = (self._request.streams_from, self._parts.address)  # our own: the proof of the disks
        await asyncio.to_thread(prepare_listeners, self.guest.process, allowed)
        mtus = [nic.mtu for nic in spec.nics]
        self._gates = TargetGates(self._parts, self.record.id, self.guest.ports, mtus, self._request.source_address)
        await self._gates.prepare()
        if options.verify is Verify.ALL:
            self._memory = await open_memory(self.guest)
        self._writer = asyncio.create_task(self._write_out_early())
        return Prepared(spec, memory_port, disk_port, (), gate_vni(self.record.id))

    async def _write_out_early(self) -> None:
        """Writes out what has come, again and again, so that little is left to be written at the end."""
        while not self._loaded:
            await asyncio.sleep(_WRITE_OUT_EVERY_S)
            await sync_images(self.record.spec)

    # -- copy and switchover -----------------------------------------------------------------------------------------

    def disks(self) -> TargetDisks:
        """The disks being received. Raises Failed `target-guest-gone`, Conflict `not-prepared`."""
        return self._require_disks()

    async def stand_by(self) -> None:
        """Before the switchover, while the guest runs on the source: the little that is left then is quick."""
        await self._stop_writer()
        await sync_images(self.record.spec)

    async def end_exports(self) -> None:
        """Ends all exports; strictly before the guest runs. Idempotent."""
        if self._gates is not None:
            with contextlib.suppress(VmferryError):  # only the repair of broadcasts would need it
                self._gates.listen()
        async with self._unserving:
            await self._require_disks().stop_serving()

    def plug(self) -> None:
        """The ports are in their switches and the tables point to them; frames wait in the new ports."""
        if self._gates is not None:
            self._gates.plug()

    async def await_loaded(self, request: AwaitLoaded) -> Loaded:
        """Waits until QEMU has all of the guest's state; then closes the disk exports and digests memory if asked."""
        guest = self._require_guest()
        # In post-copy the guest may run as soon as its devices are here: its memory follows on demand.
        done = expect_status(guest.monitor, *_LOADED, "failed")
        try:
            sample = await observe_migration(guest.monitor)
            ended = sample.status in (*_LOADED, "failed")
            status = sample.status if ended else str((await done).data["status"])
        finally:
            done.cancel()
        if status not in _LOADED:
            sample = await observe_migration(guest.monitor)
            return Loaded(problem=sample.error_desc or " / ".join(guest.process.log_tail(3)) or "QEMU does not say why")
        self._loaded = True
        self._writing_out = asyncio.create_task(sync_images(self.record.spec))
        # In post-copy most of it is not here yet, and cannot even be read.
        if not request.memory_digest or self._memory is None or status != "completed":
            return Loaded("")
        started = time.monotonic()
        digest = await self._memory.digest()
        return Loaded("", digest.hex, (time.monotonic() - started) * 1000)

    async def take(self, request: Take) -> Taken:
        """Writes "mine", then runs the guest. Idempotent: a second call answers as the first did.

        Not to be cancelled in the middle: the caller shields it. Raises Conflict `not-loaded`, `state-changed`.
        """
        async with self._ending:
            if self._taken is not None:
                return replace(self._taken, resumed_ago_ms=(time.monotonic() - self._taken_at) * 1000)
            guest = self._require_guest()
            if not self._loaded or request.generation != self.record.generation:
                raise Conflict("not-loaded", "The guest's state is not complete on the target.", "Nothing was taken.")
            started = time.monotonic()
            await self.end_exports()
            if self._writing_out is not None:
                await self._writing_out  # the guest's own flushes on the source must hold here, too
            self.record = await self._parts.journal.move(self.record, RecordState.TAKEN, wanted=_WANTED[request.run])
            written = time.monotonic()
            resumed_at = await self._run(guest) if request.run else written
            self._taken_at = resumed_at
            self._taken = Taken(
                resumed_ago_ms=(time.monotonic() - resumed_at) * 1000,
                journal_ms=(written - started) * 1000,
                cont_ms=(resumed_at - written) * 1000,
            )
            return self._taken

    async def _run(self, guest: RunningGuest) -> float:
        resumed = guest.monitor.expect("RESUME")
        try:
            await guest.monitor.execute("cont")
            return (await resumed).at_ns / 1e9
        finally:
            resumed.cancel()

    async def settle_in(self, run: bool) -> None:
        """After the take, out of the blackout: announce, hand the guest to the host's registry. Happens once."""
        if self._settled_in:
            return
        self._settled_in = True
        guest = self.guest
        if guest is None:
            return
        # First of all the host knows it: whatever fails after this, the VM is managed.
        await self._hooks.on_taken(self.record, guest, run)
        if self._gates is not None and guest.process.running:
            self._gates.announce()
            guest.process.set_priority(0)

    def announce_again(self) -> None:
        """Tells the network once more where the VM is."""
        if self._gates is not None:
            self._gates.announce_again()

    async def ask_running(self) -> RunningSeen:
        """Whether the guest's vCPUs were seen to advance since the take, and what the new ports counted.

        One that was paused on the source is alive when it is here, paused.
        """
        guest = self._require_guest()
        running = not self.wanted_running or await wait_vcpus_advance(guest.process, guest.monitor, _ALIVE_WITHIN_S)
        held, dropped = (await self._gates.counters()) if self._gates else (0, 0)
        return RunningSeen(running, held, dropped, None)

    async def return_frames(self) -> FramesReturned:
        """Rollback: what waits in the new ports goes back to the source."""
        return FramesReturned(await self._gates.return_frames() if self._gates else 0)

    # -- the end -----------------------------------------------------------------------------------------------------

    async def refuse(self) -> None:
        """Writes that this host will not take the VM, then removes everything. Idempotent.

        Raises Conflict `taken` when it has taken it.
        """
        async with self._ending:
            if self.record.state is RecordState.TAKEN or self._taken is not None:
                raise Conflict("taken", f"{self._parts.name} has taken the VM.", "It runs there now.")
            await self._end_start()
            if self.record.state is RecordState.ACTIVE:
                self.record = await self._parts.journal.move(self.record, RecordState.REFUSED)
            if self.record.state is RecordState.REFUSED:
                await self._clear()
                self.record = await self._parts.journal.move(self.record, RecordState.ENDED)

    async def _end_start(self) -> None:
        self._given_up = True
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])

    async def _stop_writer(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _clear(self) -> None:
        await self._stop_writer()
        if self._memory is not None:
            await asyncio.to_thread(self._memory.close)
            self._memory = None
        if self._gates is not None:
            await self._gates.release()
        if self.guest is not None:
            await dismantle(self._parts, self.guest)
            self.guest = None
        await remove_ports(self._parts, self._ports)
        await clear_reserved(self._parts, self.record)

    async def finish(self, receipt: dict[str, object]) -> None:
        """The source has finished: release what only the migration needed, keep the receipt. Idempotent."""
        async with self._ending:
            if self.record.state is not RecordState.TAKEN:
                return
            if self._memory is not None:
                await asyncio.to_thread(self._memory.close)
                self._memory = None
            if self._gates is not None:
                await self._gates.release()
            if receipt:
                await self._parts.journal.save_document(self.record.id, "receipt", receipt)
            self.record = await self._parts.journal.move(self.record, RecordState.ENDED)

    def seen(self) -> GuestSeen:
        """What this host sees of the guest, for the decision after an interruption."""
        if self.guest is None or not self.guest.process.running:
            return GuestSeen.GONE
        if self._taken is not None:
            return GuestSeen.RUNNING
        return GuestSeen.LOADED if self._loaded else GuestSeen.INCOMING

    def _require_guest(self) -> RunningGuest:
        if self.guest is None or not self.guest.process.running:
            raise Failed("target-guest-gone", f"The guest's QEMU on {self._parts.name} is gone.", "See its log there.")
        return self.guest

    def _require_disks(self) -> TargetDisks:
        self._require_guest()
        if self._disks is None:
            raise Conflict("not-prepared", "The target is not prepared.", "")
        return self._disks


async def clear_reserved(parts: HostParts, record: MigrationRecord) -> None:
    """Removes what a migration made on its target, from its record alone. Accepts that it is gone or half there."""
    await remove_images(parts, record.reserved.images)
    # (tunnels and redirects are found by what is not alive: the host's sweep removes them)
    # Derived anew, not taken from the record: what is removed here is removed by root.
    for directory in (parts.guest_dir(record.vm_id), parts.vm_dir(record.vm_id)):
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


def problem_of(error: BaseException) -> str:
    """The sentence of an error for the other side."""
    return error.message if isinstance(error, VmferryError) else type(error).__name__


def _require_file_name(name: str) -> None:
    if "/" in name or name.startswith(".") or not name:
        raise WrongInput("bad-boot-file", f"{name[:80]!r} is no name of a boot file.", "")


def _append(path: Path, offset: int, data: bytes) -> None:
    try:
        path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        with path.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(data)
    except OSError as error:
        raise Failed("boot-file", f"{path.name} cannot be written: {error}.", "Is there room in state_dir?") from error
