"""The outgoing migrations of this host: asked for, run, watched, cancelled, settled after interruptions."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vmferry.api.codec import encode
from vmferry.api.signing import check_document
from vmferry.host import log
from vmferry.host.heap import give_memory_back
from vmferry.host.journal import Journal, JournalBroken
from vmferry.host.migration_views import MigrationViews, now_text
from vmferry.host.outcome import finish_source
from vmferry.host.peers import Peers
from vmferry.host.strays import end_processes_of
from vmferry.host.vms import Vm, Vms
from vmferry.migration.finish import put_disks_aside
from vmferry.migration.gates import remove_gate_leftovers
from vmferry.migration.handoff import Act, Decision, PeerSays, decide_source
from vmferry.migration.host_parts import HostParts
from vmferry.migration.link import LostLink, PeerLink
from vmferry.migration.preflight import check
from vmferry.migration.records import MigrationRecord, RecordState
from vmferry.migration.source import SourceEvents, SourceMigration, ask_target
from vmferry.migration.undoing import to_the_end
from vmferry.model.errors import Conflict, Failed, Refused, VmferryError, WrongInput
from vmferry.model.findings import Finding, Severity
from vmferry.model.migration import (
    CheckResult,
    MigrateOptions,
    MigrationView,
    Mode,
    Outcome,
    Phase,
    PhaseTime,
    Progress,
    Reason,
    Role,
)
from vmferry.model.vm import RunState

_LONGEST_PAUSE_S = 5.0
_UNKNOWN_AFTER_S = 3.0
_CLOSE_LOOK_S = 2.0


@dataclass(slots=True)
class Outgoing:
    """One outgoing migration in memory."""

    vm: Vm
    task: asyncio.Task[None] | None = None
    engine: SourceMigration | None = None
    resumed: bool = False  # after a restart of the daemon: it is undone or settled, not cancelled
    settled: MigrationRecord | None = None  # as it was written, where there is no engine to hold it
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # ask the target now


class Migrations:
    """The registry of this host's outgoing migrations, and the views of all."""

    def __init__(
        self, parts: HostParts, journal: Journal, vms: Vms, peers: Peers, views: MigrationViews, tls_dir: Path
    ) -> None:
        self._parts = parts
        self._journal = journal
        self._vms = vms
        self._peers = peers
        self._views = views
        self._tls_dir = tls_dir
        self._outgoing: dict[str, Outgoing] = {}
        self._closing = False

    # -- looking -----------------------------------------------------------------------------------------------------

    def list_views(self) -> list[MigrationView]:
        """All, newest first."""
        return self._views.all()

    def view(self, migration_id: str) -> MigrationView:
        """Raises NotFound `no-such-migration`."""
        return self._views.get(migration_id)

    async def changed(self, migration_id: str, seen: MigrationView) -> MigrationView:
        """The view once it has changed."""
        return await self._views.changed(migration_id, seen)

    async def document(self, migration_id: str, kind: str) -> Any:
        """The `checked` result or the `receipt`. Raises NotFound."""
        self._views.get(migration_id)
        return await self._journal.load_document(migration_id, kind)

    async def check_receipt(self, migration_id: str) -> dict[str, Any]:
        """Whether the receipt is the source's, unchanged."""
        receipt = await self.document(migration_id, "receipt")
        reason = await asyncio.to_thread(check_document, self._tls_dir, receipt, str(receipt.get("source")))
        return {"valid": not reason, "reason": reason}

    # -- asking ------------------------------------------------------------------------------------------------------

    async def check(self, name: str, to: str, options: MigrateOptions) -> CheckResult:
        """The check alone; nothing changes. Raises NotFound, Conflict `vm-not-running`, Unreachable."""
        vm = self._vms.get(name)
        if vm.guest is None:
            raise Conflict("vm-not-running", f"{name} is {vm.state}.", f"Start it first: vmferry vm start {name}.")
        link = await self._peers.connect(to)
        try:
            return await check(self._parts, vm.guest, link, options)
        finally:
            await link.close()

    async def begin(self, name: str, to: str, options: MigrateOptions) -> MigrationView:
        """Starts a migration in the background. Raises when it cannot even begin; then nothing changed."""
        self._peers.address_of(to)
        options = self._within_ceiling(options)
        if self._closing:
            raise Conflict("stopping", f"vmferryd on {self._parts.name} is being stopped.", "Start it again first.")
        if len(self._outgoing) >= self._parts.limits.outgoing:
            raise Conflict(
                "outgoing-limit",
                f"{self._parts.name} has {len(self._outgoing)} outgoing migrations, as many as it may.",
                "Wait for one to end, or raise [limits] outgoing.",
            )
        migration_id = f"m-{secrets.token_hex(6)}"
        vm = await self._vms.claim(name, migration_id)
        try:
            record, view = self._intend(vm, to, options, migration_id)
            await self._journal.begin_migration(record, view)
        except BaseException:
            await asyncio.shield(self._vms.release(vm))
            raise
        self._views.put(view)
        outgoing = Outgoing(vm)
        self._outgoing[migration_id] = outgoing
        outgoing.task = asyncio.create_task(self._run(outgoing, record, options))
        return view

    def _within_ceiling(self, options: MigrateOptions) -> MigrateOptions:
        ceiling = self._parts.limits.bandwidth_bps
        if not ceiling:
            return options
        return replace(options, bandwidth_bps=min(options.bandwidth_bps or ceiling, ceiling))

    def _intend(
        self, vm: Vm, to: str, options: MigrateOptions, migration_id: str
    ) -> tuple[MigrationRecord, MigrationView]:
        at, generation = now_text(), vm.spec.generation + 1
        record = MigrationRecord(
            id=migration_id,
            role=Role.SOURCE,
            vm_id=vm.spec.id,
            vm_name=vm.spec.name,
            peer=to,
            generation=generation,
            state=RecordState.ACTIVE,
            spec=vm.spec,
            keep_source=options.keep_source,
        )
        view = MigrationView(
            id=migration_id,
            vm=vm.spec.name,
            vm_id=vm.spec.id,
            role=Role.SOURCE,
            source=self._parts.name,
            target=to,
            mode=Mode.LIVE,
            phase=Phase.CHECK,
            outcome=Outcome.RUNNING,
            generation=generation,
            started_at=at,
            ended_at="",
            phases=(PhaseTime(Phase.CHECK, at),),
            progress=Progress(),
            options=options,
        )
        return record, view

    # -- running -----------------------------------------------------------------------------------------------------

    async def _run(self, outgoing: Outgoing, record: MigrationRecord, options: MigrateOptions) -> None:
        began = time.monotonic()
        log.event("migration-begun", id=record.id, vm=record.vm_name, to=record.peer)
        try:
            await self._move(outgoing, record, options, began)
        except asyncio.CancelledError:
            if outgoing.engine is not None and outgoing.engine.committed:
                return  # the daemon ends while the outcome is unknown: the record says all that the next one needs
            reason = Reason("cancelled", "It was cancelled; the guest runs on here.", "")
            await asyncio.shield(self._fail(outgoing, record, Outcome.CANCELLED, reason))
        except VmferryError as error:
            reason = Reason(error.code, error.message, error.fix)
            await self._fail(outgoing, record, Outcome.FAILED, reason)
        except Exception as error:  # noqa: BLE001 - the end of a task: a bug must show in the migration, not vanish
            log.defect("migration-defect", error, id=record.id)
            reason = Reason("internal", f"vmferryd failed at this ({type(error).__name__}: {error}).", "See its log.")
            await self._fail(outgoing, record, Outcome.FAILED, reason)
        finally:
            self._outgoing.pop(record.id, None)
            await asyncio.to_thread(give_memory_back)

    async def _move(self, outgoing: Outgoing, record: MigrationRecord, options: MigrateOptions, began: float) -> None:
        vm = outgoing.vm
        link = await self._peers.connect(record.peer)
        try:
            guest = vm.guest
            if guest is None:
                raise Failed("guest-ended", "The guest ended by itself.", "Start it, then migrate again.")
            engine = SourceMigration(
                parts=self._parts,
                guest=guest,
                link=link,
                record=record,
                options=options,
                events=SourceEvents(
                    phase=lambda phase: self._views.enter(record.id, phase),
                    progress=lambda progress: self._show(record.id, progress),
                ),
                connect=lambda: self._connect(record.peer),
                was_running=vm.state is not RunState.PAUSED,
            )
            outgoing.engine = engine
            await self._require_checked(engine, link, vm)
            try:
                await engine.move()
            except Exception as error:
                if not engine.committed:
                    raise
                known = error if isinstance(error, VmferryError) else _as_failed(error)
                log.alarm("handoff-unanswered", id=record.id, problem=known.message)
                await self._settle(outgoing, engine, known)
            await self._finish(engine, vm, began)
        finally:
            await (outgoing.engine.link if outgoing.engine else link).close()

    async def _finish(self, engine: SourceMigration, vm: Vm, began: float) -> None:
        """Forward only: whatever goes wrong here, the VM is the target's and the migration has succeeded."""
        try:
            await self._write_taken(engine)
            await finish_source(self, engine, vm, began)
        except Exception as error:  # noqa: BLE001 - a bug in the clean-up must not be told as a failed migration
            log.defect("finish-defect", error, id=engine.record.id)
            reason = Reason(
                "finish-incomplete",
                f"The VM runs on {engine.record.peer}; tidying up here failed ({type(error).__name__}: {error}).",
                "Restart vmferryd here: it goes on with it.",
            )
            with contextlib.suppress(JournalBroken):  # shown all the same
                await self._views.end(engine.record.id, Outcome.COMPLETED, reason)

    async def _write_taken(self, engine: SourceMigration) -> None:
        """The target has it: written down, however long the journal takes to be writable again."""
        while engine.record.state is RecordState.HANDED_OVER:
            try:
                engine.record = await self._journal.move(engine.record, RecordState.TAKEN)
            except JournalBroken as broken:
                log.alarm("journal-broken", id=engine.record.id, problem=broken.message)
                await asyncio.sleep(_LONGEST_PAUSE_S)

    async def _connect(self, peer: str) -> PeerLink:
        return await self._peers.connect(peer)

    async def _require_checked(self, engine: SourceMigration, link: PeerLink, vm: Vm) -> None:
        """The check, while the engine already prepares. Raises Refused with the first obstacle."""
        assert vm.guest is not None
        record = engine.record
        try:
            result = await check(self._parts, vm.guest, link, engine.options, engine.prepare_ahead)
            await self._journal.save_document(record.id, "checked", encode(result))
            self._views.change(record.id, prediction=result.prediction)
            if not result.ok:
                obstacles = [f for f in result.findings if f.severity is Severity.ERROR]
                raise Refused(
                    "refused",
                    _sentence(obstacles),
                    f"All findings: vmferry vm check {record.vm_name} --to {link.peer}.",
                )
        except BaseException as error:
            await to_the_end(engine.call_off(error))
            raise
        engine.expected_dirty_rate = result.prediction.dirty_bytes_per_s if result.prediction else 0

    def _show(self, migration_id: str, progress: Progress) -> None:
        self._views.change(migration_id, progress=progress)

    async def _fail(self, outgoing: Outgoing, record: MigrationRecord, outcome: Outcome, reason: Reason) -> None:
        """The guest is here; the record is closed and the VM let go."""
        engine = outgoing.engine
        record = engine.record if engine else outgoing.settled or record
        if record.state in (RecordState.HANDED_OVER, RecordState.TAKEN):
            # Never let go of here: it may run on the target. The record says so, also to the next life of the daemon.
            log.alarm("handed-over-and-failed", id=record.id, reason=reason.code, message=reason.message)
            self._views.change(record.id, outcome=Outcome.UNKNOWN, reason=_unknown(record, reason.message))
            return
        if engine is not None and engine.problems:
            log.alarm("not-all-undone", id=record.id, problems=engine.problems)
            left = f"{reason.message} Not everything could be tidied up: {'; '.join(engine.problems)}"
            reason = Reason(reason.code, left, reason.fix)
        try:
            if record.state is RecordState.ACTIVE:
                await self._journal.move(record, RecordState.ENDED)
        finally:
            # Also when the journal cannot be written: the guest is here, and its user must be able to work with it.
            await self._vms.release(outgoing.vm)
            if outgoing.vm.guest is not None:  # said with the end: whoever watches looks no further
                runs = f"{record.vm_name} is on {self._parts.name} as before ({outgoing.vm.state})."
                reason = Reason(reason.code, f"{reason.message} {runs}", reason.fix)
            await self._views.end(record.id, outcome, reason)
        log.event("migration-ended", id=record.id, outcome=outcome, reason=reason.code, message=reason.message)

    # -- settling ----------------------------------------------------------------------------------------------------

    async def _settle(self, outgoing: Outgoing, engine: SourceMigration, error: VmferryError) -> None:
        """After a handoff that was not answered: asks until it is known. Returns when the target has the VM.

        Raises Failed `taken-back` when it is certain that the target has not and never will.
        """
        migration_id, attempt, since = engine.record.id, 0, time.monotonic()
        while True:
            try:
                decision = await engine.settle()
            except JournalBroken as broken:
                # What it decided could not be written, so it did not happen: asked again.
                log.alarm("journal-broken", id=migration_id, problem=broken.message)
                decision = Decision(Act.WAIT, f"the journal here cannot be written ({broken.message})")
            log.event("handoff-asked", id=migration_id, act=decision.act, why=decision.why)
            if decision.act is Act.FINISH:
                self._views.change(migration_id, outcome=Outcome.RUNNING, reason=None)
                await self._renew_link(engine)
                return
            if decision.act is Act.TAKE_BACK:
                raise Failed(
                    "taken-back",
                    f"The target has refused the VM; it runs here again. Before that: {error.message}",
                    error.fix,
                )
            if time.monotonic() - since > _UNKNOWN_AFTER_S:
                self._views.change(migration_id, outcome=Outcome.UNKNOWN, reason=_unknown(engine.record, decision.why))
                await self._views.save(migration_id)
            await self._pause(outgoing, attempt)
            attempt += 1

    async def _pause(self, outgoing: Outgoing, attempt: int) -> None:
        outgoing.wake.clear()
        with contextlib.suppress(TimeoutError):
            pause_s = min(self._parts.limits.handoff_retry_s * 2 ** min(attempt, 10), _LONGEST_PAUSE_S)
            await asyncio.wait_for(outgoing.wake.wait(), pause_s)

    async def _settle_without_guest(self, outgoing: Outgoing, record: MigrationRecord) -> None:
        """The handoff was written and the guest's process is gone here (the host went down): the target decides.

        Returns when it has taken the VM; raises Failed `taken-back` when it never will: the VM is here, stopped.
        """
        attempt = 0
        while True:
            decision = decide_source(record.state, await self._ask(record, refuse=False), can_run=False)
            if decision.act is Act.ASK_REFUSAL:
                decision = decide_source(record.state, await self._ask(record, refuse=True), can_run=False)
            log.event("handoff-asked", id=record.id, act=decision.act, why=decision.why)
            if decision.act is Act.FINISH:
                await self._finish_without_guest(outgoing.vm, record)
                return
            if decision.act is Act.TAKE_BACK:
                outgoing.settled = await self._journal.move(record, RecordState.ENDED)
                message = f"{record.peer} has refused the VM. Its guest ended here with its host; the disks are here."
                raise Failed("taken-back", message, f"Start it: vmferry vm start {record.vm_name}.")
            self._views.change(record.id, outcome=Outcome.UNKNOWN, reason=_unknown(record, decision.why))
            await self._pause(outgoing, attempt)
            attempt += 1

    async def _ask(self, record: MigrationRecord, refuse: bool) -> PeerSays:
        return await ask_target(lambda: self._connect(record.peer), record, refuse, self._parts.limits.request_s)

    async def _finish_without_guest(self, vm: Vm | None, record: MigrationRecord) -> None:
        if record.state is RecordState.HANDED_OVER:
            record = await self._journal.move(record, RecordState.TAKEN)
        if vm is not None:
            self._vms.give_away(vm)
        aside = await put_disks_aside(self._parts, record)
        await self._journal.move(record, RecordState.ENDED)
        kept = f"Its disks are set aside: {', '.join(aside)}." if aside else ""
        reason = Reason(
            "finished-after-restart", f"{record.peer} has taken the VM. {kept}", "Delete them when it runs."
        )
        await self._views.end(record.id, Outcome.COMPLETED, reason)

    async def _renew_link(self, engine: SourceMigration) -> None:
        """What follows needs a link that works: whether the guest is seen to run there decides about the disks here."""
        lost, known = engine.link, engine.measured.switchover
        if known is not None and not engine.measured.blackout_ms and known.timeline.stop_ns:
            # The target's own measure is lost with its answer: no longer than this.
            engine.measured.blackout_ms = (time.monotonic_ns() - known.timeline.stop_ns) / 1e6
        try:
            engine.link = await self._connect(engine.record.peer)
        except VmferryError as error:
            log.alarm("link-not-renewed", id=engine.record.id, problem=error.message)
            return
        await lost.close()

    # -- ending from outside -----------------------------------------------------------------------------------------

    async def cancel(self, migration_id: str) -> MigrationView:
        """Ends it with the guest running here. Raises Conflict after the handoff, or when it has ended."""
        view = self._views.get(migration_id)
        outgoing = self._outgoing.get(migration_id)
        if view.role is Role.TARGET:
            raise Conflict("not-the-source", f"It is cancelled on its source, {view.source}.", f"--host {view.source}")
        if outgoing is None or outgoing.task is None:
            raise Conflict("migration-ended", f"Migration {migration_id} has ended ({view.outcome}).", "")
        if outgoing.resumed or (outgoing.engine is not None and outgoing.engine.committed):
            raise Conflict(
                "handed-over",
                "The VM has been handed over to the target, or the migration is being undone already.",
                f"Watch it: vmferry migration watch {migration_id}.",
            )
        outgoing.task.cancel()
        await asyncio.wait([outgoing.task])
        return self._views.get(migration_id)

    async def recover(self, migration_id: str, dead: str | None) -> MigrationView:
        """Shows, or asks anew, what an unknown outcome is. Raises Conflict when there is nothing to recover."""
        view = self._views.get(migration_id)
        if view.outcome is not Outcome.UNKNOWN:
            raise Conflict("nothing-unknown", f"The outcome of {migration_id} is known: {view.outcome}.", "")
        if dead is not None:
            raise WrongInput(
                "not-yet",
                "Declaring a host dead is not possible in this version.",
                "Bring the host back: the migration then settles by itself.",
            )
        outgoing = self._outgoing.get(migration_id)
        if outgoing is not None:
            outgoing.wake.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._views.changed(migration_id, view), self._parts.limits.request_s)
        return self._views.get(migration_id)

    # -- the daemon's start and end ----------------------------------------------------------------------------------

    async def resume_after_restart(self, record: MigrationRecord) -> None:
        """Goes on with an outgoing migration that an earlier life of the daemon left unfinished."""
        vm = self._vms.by_id(record.vm_id)
        if vm is None:
            await self._forget(record)
            return
        outgoing = Outgoing(vm, resumed=True)
        self._outgoing[record.id] = outgoing
        outgoing.task = asyncio.create_task(self._resume(outgoing, record))

    async def _forget(self, record: MigrationRecord) -> None:
        """The target has the VM, and an earlier life of the daemon ended before it had tidied up here."""
        if record.state is not RecordState.TAKEN:
            log.alarm("migration-without-vm", id=record.id, state=record.state)
            return
        run_dir = self._parts.guest_dir(record.vm_id)
        await end_processes_of(str(run_dir))
        await asyncio.to_thread(shutil.rmtree, run_dir, ignore_errors=True)
        await self._finish_without_guest(None, record)

    async def _resume(self, outgoing: Outgoing, record: MigrationRecord) -> None:
        try:
            await self._resume_known(outgoing, record)
        except VmferryError as error:
            await self._fail_resumed(outgoing, record, Reason(error.code, error.message, error.fix))
        except Exception as error:  # noqa: BLE001 - the end of a task: a bug must show in the migration, not vanish
            log.defect("recovery-defect", error, id=record.id)
            reason = Reason("internal", f"vmferryd failed at this ({type(error).__name__}: {error}).", "See its log.")
            await self._fail_resumed(outgoing, record, reason)
        finally:
            self._outgoing.pop(record.id, None)
        try:
            await self.sweep_gates()
            await self._vms.plug_ports(outgoing.vm)
        except VmferryError as error:
            log.alarm("gates-not-swept", id=record.id, problem=error.message)

    async def _fail_resumed(self, outgoing: Outgoing, record: MigrationRecord, reason: Reason) -> None:
        """Its ports and gates are seen to even if the journal cannot be written: the next start closes the record."""
        try:
            await self._fail(outgoing, record, Outcome.FAILED, reason)
        except JournalBroken as broken:
            log.alarm("journal-broken", id=record.id, problem=broken.message)

    async def sweep_gates(self) -> None:
        """Removes the gates that migrations of an earlier life of the daemon have left, now that they have ended."""
        unfinished = [r.id for r in await self._journal.list_migrations() if r.state is not RecordState.ENDED]
        await remove_gate_leftovers(self._parts, unfinished)

    async def _connect_if_there(self, peer: str) -> PeerLink:
        try:
            return await self._connect(peer)
        except VmferryError:
            return LostLink(peer)

    async def _resume_known(self, outgoing: Outgoing, record: MigrationRecord) -> None:
        vm, guest = outgoing.vm, outgoing.vm.guest
        link = await self._connect_if_there(record.peer)
        restarted = Failed("daemon-restarted", "vmferryd ended during the migration.", "Migrate again.")
        if guest is None:
            if record.state is RecordState.ACTIVE:
                raise restarted
            await self._settle_without_guest(outgoing, record)
            return
        engine = SourceMigration(
            parts=self._parts,
            guest=guest,
            link=link,
            record=record,
            options=self._views.get(record.id).options,
            events=SourceEvents(phase=lambda _: None, progress=lambda _: None),
            connect=lambda: self._connect(record.peer),
            was_running=vm.wanted == "running",
        )
        outgoing.engine = engine
        try:
            if record.state is RecordState.ACTIVE:
                await engine.undo_after_restart()
                raise restarted
            engine.commit_after_restart()
            await self._settle(outgoing, engine, restarted)
            await self._finish(engine, vm, time.monotonic())
        finally:
            await engine.link.close()

    async def close(self) -> None:
        """The daemon ends: no new migrations; those under way are waited for."""
        self._closing = True
        while tasks := [outgoing.task for id_, outgoing in self._outgoing.items() if outgoing.task and self._runs(id_)]:
            log.event("waiting-for-migrations", count=len(tasks))
            await asyncio.wait(tasks, timeout=_CLOSE_LOOK_S)
        # What is unknown may stay so for days; it is in the journal.
        rest = [outgoing.task for outgoing in self._outgoing.values() if outgoing.task]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def _runs(self, migration_id: str) -> bool:
        return self._views.get(migration_id).outcome is Outcome.RUNNING

    # -- for outcome.py ----------------------------------------------------------------------------------------------

    @property
    def parts(self) -> HostParts:
        """This host."""
        return self._parts

    @property
    def journal(self) -> Journal:
        """This host's journal."""
        return self._journal

    @property
    def views(self) -> MigrationViews:
        """What is shown."""
        return self._views

    @property
    def vms(self) -> Vms:
        """The VMs."""
        return self._vms

    @property
    def tls_dir(self) -> Path:
        """Where the host's identity is."""
        return self._tls_dir


def _as_failed(error: Exception) -> Failed:
    return Failed("internal", f"vmferryd failed at this ({type(error).__name__}: {error}).", "See its log.")


def _sentence(obstacles: list[Finding]) -> str:
    first = obstacles[0]
    more = f" ({len(obstacles) - 1} more)" if len(obstacles) > 1 else ""
    return f"The check found: {first.message} {first.fix}".strip() + more


def _unknown(record: MigrationRecord, why: str) -> Reason:
    return Reason(
        "outcome-unknown",
        f"The VM was handed over to {record.peer}, and {why}. The guest stays paused here.",
        f"It settles by itself when {record.peer} answers; ask at once with: vmferry migration recover {record.id}.",
    )
