"""What other hosts ask of this one: checks, rehearsals, incoming migrations, questions about the journal.

One `PeerSession` a connection; the migrations outlive it: when a connection is lost before the take, the reservation is
given up, or, if the guest is complete here, the source is asked what it wrote.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from vmferry.api.codec import decode
from vmferry.api.signing import check_document
from vmferry.host import log
from vmferry.host.heap import give_memory_back
from vmferry.host.journal import Journal
from vmferry.host.migration_views import MigrationViews, now_text
from vmferry.host.peers import Peers
from vmferry.host.vms import Vms, observe_free_memory
from vmferry.migration import messages as m
from vmferry.migration.gates import open_ports
from vmferry.migration.guest import RunningGuest
from vmferry.migration.handoff import Act, GuestSeen, PeerSays, decide_target
from vmferry.migration.host_parts import HostParts
from vmferry.migration.preflight import HostUse, TargetChecks
from vmferry.migration.records import MigrationRecord, RecordState
from vmferry.migration.rehearsal import TargetTwin
from vmferry.migration.target import TargetHooks, TargetMigration, clear_reserved
from vmferry.model.errors import Conflict, NotFound, Refused, VmferryError, WrongInput
from vmferry.model.migration import MigrationView, Mode, Outcome, Phase, PhaseTime, Progress, Reason, Role
from vmferry.model.receipt import Receipt
from vmferry.model.vm import RunState
from vmferry.qemu.cpu import CpuFeatures
from vmferry.qemu.liveness import wait_vcpus_advance

_ASK_PAUSE_S = (0.2, 0.5, 1, 2, 5)
_SOURCE_RETURNS_S = 60.0
_CLOSE_LIMIT_S = 1800.0  # a source that keeps a reservation for ever does not keep the daemon alive
_MOST_TWINS = 8


class Incoming:
    """The registry of migrations that come to this host."""

    def __init__(
        self, parts: HostParts, journal: Journal, vms: Vms, peers: Peers, views: MigrationViews, tls_dir: Path
    ) -> None:
        self.parts = parts
        self._journal = journal
        self._vms = vms
        self._peers = peers
        self._views = views
        self._tls_dir = tls_dir
        self._migrations: dict[str, TargetMigration] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._reserved_bytes: dict[str, int] = {}
        self._left = asyncio.Event()
        self._closing = False
        self.cpus: dict[tuple[str, str], CpuFeatures] = {}

    def session(self, peer: str) -> PeerSession:
        """For a connection of that host."""
        return PeerSession(self, peer)

    async def use(self) -> HostUse:
        """What is in use here, incoming migrations counted."""
        vms = self._vms.all()
        free = observe_free_memory() - self.parts.limits.memory_reserve_bytes - sum(self._reserved_bytes.values())
        return HostUse(
            free_memory_bytes=free,
            vm_names={vm.spec.name: vm.spec.id for vm in vms},
            macs={nic.mac: vm.spec.name for vm in vms for nic in vm.spec.nics},
            incoming=len(self._migrations),
        )

    def get(self, migration_id: str, peer: str) -> TargetMigration:
        """Raises NotFound `no-such-migration` unless it is one of that source."""
        migration = self._migrations.get(migration_id)
        if migration is None or migration.record.peer != peer:
            raise NotFound("no-such-migration", f"Migration {migration_id[:40]} is not under way here.", "")
        return migration

    async def prepare(self, request: m.Prepare, peer: str) -> m.Prepared:
        """Reserves. Raises Refused `incoming-limit`, `memory-room` and what the reservation raises."""
        if self._closing:
            raise Refused("stopping", f"vmferryd on {self.parts.name} is being stopped.", "Start it again first.")
        if request.migration_id in self._reserved_bytes or request.migration_id in self._migrations:
            raise Conflict("migration-exists", f"Migration {request.migration_id[:40]} is known here already.", "")
        # Counted and reserved before anything is waited for: many may ask at once.
        if len(self._reserved_bytes) >= self.parts.limits.incoming:
            raise Refused("incoming-limit", f"{self.parts.name} takes no more incoming migrations now.", "Wait.")
        self._reserved_bytes[request.migration_id] = request.spec.memory_bytes
        try:
            if (await self.use()).free_memory_bytes < 0:
                raise Refused("memory-room", f"{self.parts.name} has no room for its memory any more.", "Check again.")
            hooks = TargetHooks(on_taken=self._on_taken)
            migration = await TargetMigration.reserve(self.parts, hooks, request, peer)
        except BaseException:
            self._reserved_bytes.pop(request.migration_id, None)
            raise
        self._migrations[request.migration_id] = migration
        self._views.put(_view_of(request, peer, self.parts.name))
        await self._views.save(request.migration_id)
        log.event("incoming-reserved", id=request.migration_id, vm=request.spec.name, source=peer)
        return m.Prepared(migration.record.spec, 0, 0, migration.missing_boot_files(), 0)

    async def _on_taken(self, record: MigrationRecord, guest: RunningGuest, run: bool) -> None:
        state = RunState.RUNNING if run else RunState.PAUSED
        self._reserved_bytes.pop(record.id, None)
        self._vms.receive(guest.spec, guest, state, "")
        self._views.enter(record.id, Phase.FINISH)
        log.event("vm-taken", id=record.id, vm=record.vm_name, generation=record.generation)

    async def take(self, request: m.Take, peer: str) -> m.Taken:
        """Takes, answers, and settles in afterwards: the answer must not wait for that."""
        migration = self.get(request.migration_id, peer)
        # In one piece: a source that hangs up meanwhile must not leave a VM that is ours and that nobody manages.
        return await asyncio.shield(asyncio.ensure_future(self._take(migration, request)))

    async def _take(self, migration: TargetMigration, request: m.Take) -> m.Taken:
        try:
            taken = await migration.take(request)
        except VmferryError as error:
            if migration.record.state is RecordState.TAKEN:
                # It is this host's for good, though its QEMU has failed before it ran: managed from now on.
                log.alarm(
                    "taken-and-failed", id=migration.record.id, vm=migration.record.vm_name, problem=error.message
                )
                self._background(self._settle_in(migration, request.run))
            raise
        self._background(self._settle_in(migration, request.run))
        return taken

    async def _settle_in(self, migration: TargetMigration, run: bool) -> None:
        try:
            await migration.settle_in(run)
        except VmferryError as error:
            log.alarm("settle-in-failed", id=migration.record.id, problem=error.message)

    async def refuse(self, migration_id: str, why: str) -> None:
        """Refuses for good and removes everything. Nothing happens if it has ended. Raises Conflict `taken`."""
        migration = self._migrations.get(migration_id)
        if migration is None:
            return
        await asyncio.shield(asyncio.ensure_future(migration.refuse()))
        self._forget(migration_id)
        self._reserved_bytes.pop(migration_id, None)
        with contextlib.suppress(NotFound):
            await self._views.end(migration_id, Outcome.FAILED, Reason("refused", why, ""))
        log.event("incoming-refused", id=migration_id, why=why)

    async def finish(self, request: m.Finish, peer: str) -> None:
        """The source has finished."""
        migration = self._migrations.get(request.migration_id)
        if migration is None or migration.record.peer != peer:
            # Taken in an earlier life of this daemon: only the receipt is new.
            await self._require_record(request.migration_id, peer)
            await self._require_receipt(request.receipt, peer)
            await self._journal.save_document(request.migration_id, "receipt", request.receipt)
            return
        if migration.record.state is not RecordState.TAKEN:
            raise Conflict("not-taken", "This host has not taken the VM: there is nothing to finish.", "Abort it.")
        receipt = await self._require_receipt(request.receipt, peer)
        await migration.finish(request.receipt)
        self._forget(request.migration_id)
        blackout, total = (receipt.blackout_ms, receipt.total_ms) if receipt else (None, None)
        await self._views.end(request.migration_id, Outcome.COMPLETED, None, blackout_ms=blackout, total_ms=total)
        await asyncio.to_thread(give_memory_back)

    async def _require_receipt(self, document: dict[str, object], signer: str) -> Receipt | None:
        """The receipt, if there is one. Raises WrongInput unless it is one and that host's."""
        if not document:
            return None
        receipt = decode(Receipt, document)
        await asyncio.to_thread(_signed_by, self._tls_dir, document, signer)
        return receipt

    async def ask_running(self, request: m.AskRunning, peer: str) -> m.RunningSeen:
        """Whether the guest was seen to run here; also after a restart of this daemon."""
        migration = self._migrations.get(request.migration_id)
        if migration is not None and migration.record.peer == peer:
            return await migration.ask_running()
        record = await self._require_record(request.migration_id, peer)
        vm = self._vms.by_id(record.vm_id)
        if vm is None or vm.guest is None:
            return m.RunningSeen(False, 0, 0, None)
        running = vm.wanted == "paused" or await wait_vcpus_advance(vm.guest.process, vm.guest.monitor)
        return m.RunningSeen(running, 0, 0, None)

    async def _require_record(self, migration_id: str, peer: str) -> MigrationRecord:
        for record in await self._journal.list_migrations():
            if record.id == migration_id and record.peer == peer and record.was_taken:
                return record
        raise NotFound("no-such-migration", f"Migration {migration_id[:40]} is not known here.", "")

    # -- after a lost connection or a restart ------------------------------------------------------------------------

    async def connection_lost(self, peer: str, migration_ids: Iterable[str]) -> None:
        """Gives up what the source cannot finish any more; asks it where it may have handed over.

        Only the migrations of that connection: the same host may have others under way, and asks and checks besides.
        """
        for migration in [self._migrations[each] for each in migration_ids if each in self._migrations]:
            if migration.record.peer != peer:
                continue
            if migration.record.state is RecordState.ACTIVE:
                self._background(self._settle(migration))
            elif migration.record.state is RecordState.TAKEN:
                self._background(self._finish_alone(migration))
            else:  # its preparation was cut short, and has undone itself
                self._background(self.refuse(migration.record.id, "the connection was lost"))

    async def _settle(self, migration: TargetMigration) -> None:
        record, attempt = migration.record, 0
        while migration.record.state is RecordState.ACTIVE:
            seen = migration.seen()
            says = PeerSays.UNREACHABLE if seen is not GuestSeen.LOADED else await self.ask(record)
            decision = decide_target(migration.record.state, says, seen)
            log.event("incoming-asked", id=record.id, act=decision.act, why=decision.why)
            if decision.act is Act.REFUSE:
                with contextlib.suppress(Conflict):  # taken in this very moment
                    await self.refuse(record.id, decision.why)
                return
            if decision.act is Act.TAKE:
                await migration.take(m.Take(record.id, record.generation, run=migration.wanted_running))
                await self._settle_in(migration, run=migration.wanted_running)
                break
            await asyncio.sleep(_ASK_PAUSE_S[min(attempt, len(_ASK_PAUSE_S) - 1)])
            attempt += 1
        if migration.record.state is RecordState.TAKEN:  # by us, or by a request that was still under way
            await self._finish_alone(migration)

    async def _finish_alone(self, migration: TargetMigration) -> None:
        """The source has fallen silent after the take: what only it needed is given up after a while."""
        await asyncio.sleep(self.parts.limits.forward_s + _SOURCE_RETURNS_S)
        if migration.record.state is RecordState.TAKEN:
            await self.finish(m.Finish(migration.record.id), migration.record.peer)

    async def ask(self, record: MigrationRecord) -> PeerSays:
        """What the source's journal says."""
        try:
            link = await self._peers.connect(record.peer)
        except VmferryError:
            return PeerSays.UNREACHABLE
        try:
            question = m.Inquire(record.id, record.vm_id, record.generation, refuse=False)
            return (await link.call(question, m.Answer, 10.0)).says
        except VmferryError:
            return PeerSays.UNREACHABLE
        finally:
            await link.close()

    async def resume_after_restart(self, record: MigrationRecord) -> None:
        """Goes on with an incoming migration that an earlier life of the daemon left unfinished."""
        if record.state is RecordState.TAKEN:
            await self._resume_taken(record)
            return
        # Not taken: what is here was never run, and this daemon cannot know whether its state is complete. The
        # source still has the guest, or has handed over and takes it back once it hears that we refused.
        if record.state is RecordState.ACTIVE:
            record = await self._journal.move(record, RecordState.REFUSED)
        await self.kill_reserved_guest(record)
        await clear_reserved(self.parts, record)
        await self._journal.move(record, RecordState.ENDED)
        with contextlib.suppress(NotFound):
            reason = Reason("daemon-restarted", "vmferryd ended during the migration; it was refused.", "")
            await self._views.end(record.id, Outcome.FAILED, reason)

    async def _resume_taken(self, record: MigrationRecord) -> None:
        vm = self._vms.by_id(record.vm_id)
        if vm is not None and vm.guest is not None and vm.wanted == "running":
            await vm.guest.monitor.execute("cont")
            await self._vms.refresh(vm)
        if vm is not None and vm.guest is not None:
            self._background(open_ports(self.parts, vm.guest.ports))
        await self._journal.move(record, RecordState.ENDED)
        with contextlib.suppress(NotFound):
            await self._views.end(record.id, Outcome.COMPLETED, None)

    async def kill_reserved_guest(self, record: MigrationRecord) -> None:
        """Ends the incoming QEMU of a migration that was not taken; found by its run directory."""
        from vmferry.host.strays import end_processes_of

        await end_processes_of(record.reserved.run_dir)

    async def close(self) -> None:
        """The daemon ends: migrations that come in are waited for, their guests are not to be harmed."""
        self._closing = True
        if self._migrations:
            log.event("waiting-for-incoming", count=len(self._migrations))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_LIMIT_S):
                while self._migrations:
                    self._left.clear()
                    await self._left.wait()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _refused(self, record: MigrationRecord) -> PeerSays:
        """After a refusal: what the journal says now, refused from the record alone if nothing else did it."""
        for fresh in await self._journal.list_migrations():
            if fresh.id == record.id and fresh.role is Role.TARGET:
                if fresh.state is RecordState.ACTIVE:
                    await self.resume_after_restart(fresh)
                    return PeerSays.REFUSED
                return _says(fresh, False)
        return PeerSays.ABSENT

    def _forget(self, migration_id: str) -> None:
        self._migrations.pop(migration_id, None)
        self._left.set()

    @property
    def busy(self) -> bool:
        """Whether a migration comes in right now."""
        return bool(self._migrations)

    def _background(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            try:
                await work
            except VmferryError as error:
                log.alarm("incoming-problem", problem=error.message)
            except Exception as error:  # noqa: BLE001 - the end of a task: a bug must be seen
                log.defect("incoming-defect", error)

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def answer_inquiry(self, request: m.Inquire, peer: str) -> m.Answer:
        """What this host's journal says about a migration, after refusing for good if asked to."""
        record = next((r for r in await self._journal.list_migrations() if r.id == request.migration_id), None)
        if record is None or record.peer != peer:
            return m.Answer(PeerSays.ABSENT)
        if record.role is Role.TARGET and record.state is RecordState.ACTIVE and request.refuse:
            try:
                await self.refuse(record.id, "the source asked for it")
            except Conflict:
                return m.Answer(PeerSays.TAKEN)
            return m.Answer(await self._refused(record))
        return m.Answer(_says(record, self._vms.by_id(record.vm_id) is not None))


def _signed_by(tls_dir: Path, document: dict[str, object], signer: str) -> None:
    reason = check_document(tls_dir, document, signer)
    if reason:
        raise WrongInput("bad-receipt", f"The receipt is not {signer}'s: {reason}.", "It was not kept.")


def _says(record: MigrationRecord, here: bool) -> PeerSays:
    match record.state:
        case RecordState.ACTIVE:
            return PeerSays.ACTIVE
        case RecordState.HANDED_OVER:
            return PeerSays.HANDED_OVER
        case RecordState.TAKEN:
            return PeerSays.TAKEN if record.role is Role.TARGET else PeerSays.HANDED_OVER
        case RecordState.REFUSED:
            return PeerSays.REFUSED
        case RecordState.ENDED:
            owned = record.was_taken if record.role is Role.TARGET else here
            return PeerSays.ENDED_HERE if owned else PeerSays.ENDED_AWAY


def _view_of(request: m.Prepare, peer: str, own: str) -> MigrationView:
    at = now_text()
    return MigrationView(
        id=request.migration_id,
        vm=request.spec.name,
        vm_id=request.spec.id,
        role=Role.TARGET,
        source=peer,
        target=own,
        mode=Mode.LIVE,
        phase=Phase.PREPARE,
        outcome=Outcome.RUNNING,
        generation=request.generation,
        started_at=at,
        ended_at="",
        phases=(PhaseTime(Phase.PREPARE, at),),
        progress=Progress(),
        options=request.options,
    )


class PeerSession:
    """One connection of another host: dispatches its requests."""

    def __init__(self, incoming: Incoming, peer: str) -> None:
        self._incoming = incoming
        self._peer = peer
        self._checks = TargetChecks(incoming.parts, incoming.use, incoming.cpus)
        self._twins: dict[str, TargetTwin] = {}
        self._prepared: set[str] = set()
        self._handlers: dict[type, Callable[..., Awaitable[object]]] = {
            m.CheckTarget: self._checks.check,
            m.ListenForProbe: self._checks.listen,
            m.CollectProbe: self._checks.collect,
            m.Rehearse: self._rehearse,
            m.EndRehearsal: self._end_rehearsal,
            m.Prepare: self._prepare,
            m.StartGuest: lambda r: self._migration(r).start(),
            m.RedigestDisk: lambda r: self._migration(r).disks().redigest(r),
            m.StandBy: self._stand_by,
            m.PlugPorts: self._plug,
            m.DisksComplete: self._disks_complete,
            m.AwaitLoaded: lambda r: self._migration(r).await_loaded(r),
            m.Take: lambda r: incoming.take(r, peer),
            m.Abort: self._abort,
            m.ReturnFrames: lambda r: self._migration(r).return_frames(),
            m.Inquire: lambda r: incoming.answer_inquiry(r, peer),
            m.AnnounceAgain: self._announce,
            m.AskRunning: lambda r: incoming.ask_running(r, peer),
            m.Finish: self._finish,
        }

    async def handle(self, request: m.Request, data: bytes = b"") -> object:
        """The answer to one request and what was sent beside it."""
        if isinstance(request, m.PutBootFile):
            await self._migration(request).put_boot_file(request, data)
            return m.Done()
        return await self._handlers[type(request)](request)

    def _migration(self, request: m.Request) -> TargetMigration:
        return self._incoming.get(getattr(request, "migration_id", ""), self._peer)

    async def _rehearse(self, request: m.Rehearse) -> m.RehearsalReady:
        if not request.nonce.isalnum() or len(request.nonce) > 32 or request.nonce in self._twins:
            raise Refused("bad-nonce", "This is no name for a rehearsal.", "")
        if len(self._twins) >= _MOST_TWINS:
            raise Refused("too-many-rehearsals", f"{self._peer} has {len(self._twins)} rehearsals here.", "End one.")
        twin, ready = await TargetTwin.start(
            self._incoming.parts, request.spec, self._peer, request.streams_from, request.nonce
        )
        self._twins[request.nonce] = twin
        return ready

    async def _end_rehearsal(self, request: m.EndRehearsal) -> m.RehearsalEnded:
        twin = self._twins.pop(request.nonce, None)
        if twin is None:
            raise NotFound("no-rehearsal", "There is no such rehearsal here.", "")
        return await twin.end()

    async def _prepare(self, request: m.Prepare) -> m.Prepared:
        self._prepared.add(request.migration_id)  # before: whatever it has made must be found when the peer hangs up
        return await self._incoming.prepare(request, self._peer)

    async def _stand_by(self, request: m.StandBy) -> m.Done:
        await self._migration(request).stand_by()
        return m.Done()

    async def _disks_complete(self, request: m.DisksComplete) -> m.Done:
        await self._migration(request).end_exports()
        return m.Done()

    async def _plug(self, request: m.PlugPorts) -> m.Done:
        self._migration(request).plug()
        return m.Done()

    async def _announce(self, request: m.AnnounceAgain) -> m.Done:
        self._migration(request).announce_again()
        return m.Done()

    async def _abort(self, request: m.Abort) -> m.Done:
        with contextlib.suppress(NotFound):
            self._migration(request)
            await self._incoming.refuse(request.migration_id, request.why)
        return m.Done()

    async def _finish(self, request: m.Finish) -> m.Done:
        await self._incoming.finish(request, self._peer)
        return m.Done()

    async def close(self) -> None:
        """The connection has ended."""
        try:
            await self._incoming.connection_lost(self._peer, self._prepared)
        finally:
            twins, self._twins = self._twins, {}
            await asyncio.gather(self._checks.close(), *(twin.remove() for twin in twins.values()))
