"""An outgoing migration that an earlier life of the daemon left, or whose journal breaks: real journal, told answers.

What must hold: a VM that was handed over is let go of only when it is certain that it is here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rig import SPEC, Host, Link, Process, eventually, guest_of, host_at, outgoing_record, refusing_writes, silent
from test_journal import moved, overwrite, record_of, view_of

from vmferry.host import daemon as daemon_module
from vmferry.host import migrations as module
from vmferry.host.config import parse_config
from vmferry.host.daemon import Daemon
from vmferry.host.journal import Journal
from vmferry.migration import finish
from vmferry.migration import messages as m
from vmferry.migration.handoff import PeerSays
from vmferry.migration.records import MigrationRecord, RecordState
from vmferry.migration.source import SourceMigration
from vmferry.model.errors import Conflict, Unreachable
from vmferry.model.migration import MigrateOptions, Outcome, Phase, Role


async def left_behind(place: Path, *states: RecordState) -> MigrationRecord:
    """What an earlier life of the daemon has written."""
    journal = Journal(place / "journal.sqlite")
    await journal.open()
    await journal.add_vm(SPEC)
    await journal.set_wanted(SPEC.id, "running")
    view = replace(view_of(), phase=Phase.CHECK, reason=None, options=MigrateOptions())
    await journal.begin_migration(outgoing_record(), view)
    record = await moved(journal, outgoing_record(), *states)
    await journal.close()
    return record


def answering(says: PeerSays, asked: list[m.Request] | None = None) -> Callable[[m.Request], object]:
    """The other host's journal says so, and it takes everything else as done."""

    def answer(request: m.Request) -> object:
        if asked is not None:
            asked.append(request)
        match request:
            case m.Inquire():
                return m.Answer(says)
            case m.AskRunning():
                return m.RunningSeen(True, 0, 0, None)
            case m.ReturnFrames():
                return m.FramesReturned(0)
            case _:
                return m.Done()

    return answer


async def outcome(host: Host, *wanted: Outcome) -> None:
    async with asyncio.timeout(10):
        await host.views.wait_for("m-1", lambda view: view.outcome in wanted)


async def idle(host: Host) -> None:
    """Nothing is done about the migration any more, by this life of the daemon."""

    async def forgotten() -> bool:
        return "m-1" not in host.migrations._outgoing

    await eventually(forgotten)


async def require_held(host: Host) -> None:
    """The VM is not this host's to start, now or in its next life."""
    assert await host.state() is RecordState.HANDED_OVER and await host.owned() == {"web1": False}
    assert host.vms.get("web1").claimed_by == "m-1"
    with pytest.raises(Conflict):
        await host.vms.start("web1")
    assert host.views.get("m-1").outcome is Outcome.UNKNOWN


# -- a journal that breaks after the handoff -------------------------------------------------------------------------


@pytest.mark.parametrize("says", [PeerSays.TAKEN, PeerSays.REFUSED])
async def test_what_was_handed_over_is_not_let_go_of_when_the_journal_breaks(tmp_path: Path, says: PeerSays) -> None:
    """The target may run it: started here too, it would run twice."""
    record = await left_behind(tmp_path, RecordState.HANDED_OVER)
    async with host_at(tmp_path) as host:
        host.others.says = answering(says)
        with refusing_writes(tmp_path):
            await host.migrations.resume_after_restart(record)
            await idle(host)
        await require_held(host)
    async with host_at(tmp_path) as host:  # the next life settles it
        host.others.says = answering(says)
        await host.migrations.resume_after_restart(await the_record(host))
        await outcome(host, Outcome.COMPLETED, Outcome.FAILED)
        assert await host.owned() == ({} if says is PeerSays.TAKEN else {"web1": True})


async def the_record(host: Host) -> MigrationRecord:
    (record,) = await host.journal.list_migrations()
    return record


async def test_a_defect_after_the_handoff_lets_go_of_nothing(tmp_path: Path) -> None:
    record = await left_behind(tmp_path, RecordState.HANDED_OVER)
    async with host_at(tmp_path) as host:
        host.others.says = answering(PeerSays.TAKEN)
        host.migrations._finish_without_guest = None  # type: ignore[method-assign, assignment]
        await host.migrations.resume_after_restart(record)
        await idle(host)
        await require_held(host)


async def test_a_refusal_is_asked_for_again_until_it_can_be_written(tmp_path: Path) -> None:
    """With the guest still there, paused: it runs on only when the record says that the VM is here."""
    record = await left_behind(tmp_path, RecordState.HANDED_OVER)
    asked: list[m.Request] = []
    async with host_at(tmp_path) as host:
        host.others.says = answering(PeerSays.REFUSED, asked)
        vm = host.vms.get("web1")
        vm.guest = guest_of(Process(tmp_path / "guest", running=False))
        with refusing_writes(tmp_path):
            await host.migrations.resume_after_restart(record)

            async def asked_again() -> bool:
                return len(asked) > 3

            await eventually(asked_again)
            assert await host.state() is RecordState.HANDED_OVER and vm.claimed_by == "m-1"
        await outcome(host, Outcome.FAILED)
        await idle(host)
        assert host.views.get("m-1").reason.code == "taken-back"  # type: ignore[union-attr]
        assert await host.state() is RecordState.ENDED and await host.owned() == {"web1": True}
        assert vm.claimed_by == "" and vm.owned


async def test_a_take_is_written_however_long_the_journal_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of the VM is given up here before."""
    monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 0.001)
    record = await left_behind(tmp_path, RecordState.HANDED_OVER)
    async with host_at(tmp_path) as host:
        host.others.says = answering(PeerSays.TAKEN)
        host.vms.get("web1").guest = guest_of(Process(tmp_path / "guest", running=False))
        with refusing_writes(tmp_path):
            await host.migrations.resume_after_restart(record)

            async def tried_again() -> bool:
                return caplog.text.count("journal-broken") > 2

            await eventually(tried_again)
            assert await host.owned() == {"web1": False} and host.vms.get("web1").claimed_by == "m-1"
        await outcome(host, Outcome.COMPLETED)
        await idle(host)
        assert await host.owned() == {} and host.vms.all() == []


async def test_a_bug_after_the_handoff_is_settled_and_not_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the engine fails with, what it has written counts."""
    record = await left_behind(tmp_path)

    class Unchecked(module.Migrations):
        async def _require_checked(self, *_: object) -> int:
            return 0

    async def move(engine: SourceMigration) -> None:
        engine.record = await host.journal.move(engine.record, RecordState.HANDED_OVER)
        engine.commit_after_restart()
        raise KeyError("a bug")

    monkeypatch.setattr(SourceMigration, "move", move)
    async with host_at(tmp_path) as host:
        host.others.says = answering(PeerSays.TAKEN)
        vm = host.vms.get("web1")
        vm.guest = guest_of(Process(tmp_path / "guest", running=False))
        migrations = Unchecked(host.parts, host.journal, host.vms, host.others, host.views, tmp_path)  # type: ignore[arg-type]
        outgoing = module.Outgoing(vm)
        await migrations._run(outgoing, record, MigrateOptions())
        assert host.views.get("m-1").outcome is Outcome.COMPLETED and await host.owned() == {}


# -- before the handoff ----------------------------------------------------------------------------------------------


async def test_a_broken_journal_does_not_keep_a_vm_that_is_here(tmp_path: Path) -> None:
    """It was never handed over: its user must be able to work with it."""
    record = await left_behind(tmp_path)
    async with host_at(tmp_path) as host:
        with refusing_writes(tmp_path):
            await host.migrations.resume_after_restart(record)
            await idle(host)
        assert host.vms.get("web1").claimed_by == "" and await host.owned() == {"web1": True}


async def test_a_damaged_view_keeps_no_guest_from_running_on(tmp_path: Path) -> None:
    """Undone like any other: the guest was stopped for the switchover when the daemon died."""
    record = await left_behind(tmp_path)
    overwrite(tmp_path, "view", b"{")
    process = Process(tmp_path / "guest", running=False)
    asked: list[m.Request] = []
    async with host_at(tmp_path) as host:
        host.others.says = answering(PeerSays.ACTIVE, asked)
        host.vms.get("web1").guest = guest_of(process)
        await host.migrations.resume_after_restart(record)
        await outcome(host, Outcome.FAILED)
        await idle(host)
        assert host.views.get("m-1").reason.code == "daemon-restarted"  # type: ignore[union-attr]
        assert await host.state() is RecordState.ENDED and host.vms.get("web1").claimed_by == ""
        assert any(isinstance(request, m.Abort) for request in asked)


# -- what is being settled is not cancelled --------------------------------------------------------------------------


async def test_what_an_earlier_life_left_is_not_cancelled(tmp_path: Path) -> None:
    record = await left_behind(tmp_path, RecordState.HANDED_OVER)
    async with host_at(tmp_path) as host:
        await host.migrations.resume_after_restart(record)
        await outcome(host, Outcome.UNKNOWN)
        with pytest.raises(Conflict) as caught:
            await host.migrations.cancel("m-1")
        assert caught.value.code == "handed-over" and "m-1" in caught.value.fix
        assert "m-1" in host.migrations._outgoing  # it goes on asking
        host.others.says = answering(PeerSays.TAKEN)
        await host.migrations.recover("m-1", None)
        await outcome(host, Outcome.COMPLETED)
        assert await host.owned() == {}


async def test_a_vm_that_was_taken_back_is_managed_at_once(tmp_path: Path) -> None:
    record = await left_behind(tmp_path, RecordState.HANDED_OVER)
    async with host_at(tmp_path) as host:
        assert not host.vms.get("web1").owned
        host.others.says = answering(PeerSays.REFUSED)
        await host.migrations.resume_after_restart(record)
        await outcome(host, Outcome.FAILED)
        await idle(host)
        await host.vms.kill("web1")  # any act: it is not refused
        assert host.vms.get("web1").owned


# -- whether the guest was seen to run -------------------------------------------------------------------------------


async def test_a_target_that_restarts_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its guest runs on meanwhile: the disks here need not be kept for that."""
    monkeypatch.setattr(finish, "_ASK_PAUSE_S", 0.0)
    first, second = Link(silent), Link(answering(PeerSays.TAKEN))
    tries: list[int] = []

    async def connect() -> Link:
        tries.append(1)
        if len(tries) < 3:
            raise Unreachable("host-unreachable", "It is not there yet.")
        return second

    seen, link = await finish.see_it_run(first, connect, "m-1")
    assert seen.running and link is second and first.closed and not second.closed


async def test_a_target_that_stays_silent_has_shown_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "_ASK_PAUSE_S", 0.0)
    monkeypatch.setattr(finish, "_ASK_AGAIN_S", 0.01)

    async def connect() -> Link:
        raise Unreachable("host-unreachable", "It is gone.")

    link = Link(silent)
    seen, kept = await finish.see_it_run(link, connect, "m-1")
    assert not seen.running and kept is link and not link.closed


# -- the daemon's start ----------------------------------------------------------------------------------------------


async def test_one_that_cannot_be_resumed_keeps_no_other_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon starts, settles the others, and leaves that record open for its next life."""
    bad = replace(record_of(Role.TARGET, "m-bad", SPEC), vm_id="../odd")  # an older version's, say
    good = record_of(Role.TARGET, "m-good", replace(SPEC, id="id-2", name="db1"))
    monkeypatch.setattr(daemon_module, "remove_gate_leftovers", _none_left)
    monkeypatch.setattr(module, "remove_gate_leftovers", _none_left)
    async with host_at(tmp_path) as host:
        for record in (good, bad, replace(good, id="m-2", vm_id="id-3", vm_name="mail1")):
            await host.journal.begin_migration(record)
        daemon = Daemon(parse_config(f'[host]\nname = "host1"\nstate_dir = "{tmp_path}"\nrun_dir = "{tmp_path}/run"\n'))
        daemon.parts, daemon.journal, daemon.vms = host.parts, host.journal, host.vms
        daemon.migrations, daemon.incoming = host.migrations, host.incoming
        await daemon._recover()
        assert [await host.state(each) for each in ("m-good", "m-2")] == [RecordState.ENDED] * 2
        assert await host.state("m-bad") is not RecordState.ENDED
        assert "migration-not-resumed" in caplog.text


async def _none_left(*_: object) -> None:
    """There is no network to sweep."""
