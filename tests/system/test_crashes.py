"""vmferryd is killed: guests run on, are found again, and at no time two hosts run the same one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import replace

import pytest
from sysrig import QUICK, SLOW, Guest, Rig, copying_disks, copying_memory, in_phase, wait_for

from vmferry.model.errors import Conflict
from vmferry.model.migration import Outcome, Phase, Role, Verify
from vmferry.model.vm import RunState

pytestmark = pytest.mark.system

KILLED = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])


@KILLED
def test_idle_daemon_ends(rig: Rig, guest: Guest, number: signal.Signals) -> None:
    """The guest notices nothing and is managed as before."""
    host, _ = rig.place(guest.name)
    before = rig.on(host).vm(guest.name)
    with rig.watch(guest) as watched:
        rig.kill_daemon(host, number)
        assert rig.qemu_pids(host) == [before.pid]
        rig.start_daemon(host)
    assert rig.on(host).vm(guest.name) == before
    assert watched.gap_ms <= 1000, watched.report["gaps"]  # nobody stopped it
    rig.require_alive(guest, host)
    assert rig.on(host).pause_vm(guest.name).state is RunState.PAUSED
    assert rig.on(host).resume_vm(guest.name).state is RunState.RUNNING
    rig.require_clean()
    rig.migrate(guest.name)
    rig.require_alive(guest, rig.other(host))
    rig.require_clean()


def test_paused_guest_stays_paused(rig: Rig, guest: Guest) -> None:
    host, _ = rig.place(guest.name)
    rig.on(host).pause_vm(guest.name)
    rig.kill_daemon(host)
    rig.start_daemon(host)
    assert rig.on(host).vm(guest.name).state is RunState.PAUSED
    rig.on(host).resume_vm(guest.name)
    rig.require_alive(guest, host)


@pytest.mark.parametrize("moment", ["check", "disks", "memory", "switchover"])
def test_source_daemon_killed(rig: Rig, guest: Guest, moment: str) -> None:
    """In the middle of a migration, before the handoff: after its restart the guest runs there as before."""
    options = replace(QUICK, verify=Verify.ALL) if moment == "switchover" else SLOW
    reached = {
        "check": in_phase(Phase.CHECK),
        "disks": copying_disks,
        "memory": copying_memory,
        "switchover": in_phase(Phase.SWITCHOVER),
    }[moment]
    begun, source, target = rig.begin(guest.name, options)
    pids = set(rig.qemu_pids(source))
    rig.wait_until(source, begun.id, reached)
    rig.kill_daemon(source)
    assert set(rig.qemu_pids(source, guest.name)) == pids
    rig.start_daemon(source)
    ended = rig.wait_end(source, begun.id, 30.0)
    if moment == "switchover" and ended.outcome is Outcome.COMPLETED:  # it had been handed over already
        rig.require_alive(guest, target)
    else:
        assert ended.outcome is Outcome.FAILED, ended
        assert ended.reason is not None and ended.reason.code == "daemon-restarted" and ended.reason.fix
        rig.require_alive(guest, source)
    rig.require_clean(40.0)
    rig.require_unharmed(guest)
    rig.migrate(guest.name)  # and it can be moved
    rig.require_clean()


def test_target_daemon_killed_after_the_take(rig: Rig, guest: Guest) -> None:
    begun, source, target = rig.begin(guest.name)
    wait_for(
        "the target has taken it",
        lambda: rig.journal_state(target, begun.id, Role.TARGET) in ("taken", "ended"),
        60.0,
        0.001,
    )
    rig.kill_daemon(target)
    rig.start_daemon(target)
    ended = rig.wait_end(source, begun.id, 60.0)
    assert ended.outcome is Outcome.COMPLETED, ended.reason
    rig.require_alive(guest, target)
    rig.require_clean(40.0)
    rig.require_unharmed(guest)


def test_source_daemon_killed_after_the_take(rig: Rig, guest: Guest) -> None:
    begun, source, target = rig.begin(guest.name)
    wait_for(
        "the target has taken it",
        lambda: rig.journal_state(target, begun.id, Role.TARGET) in ("taken", "ended"),
        60.0,
        0.001,
    )
    rig.kill_daemon(source)
    rig.require_running_once(guest)
    rig.start_daemon(source)
    ended = rig.wait_end(source, begun.id, 60.0)
    assert ended.outcome is Outcome.COMPLETED, ended.reason
    rig.require_alive(guest, target)
    rig.require_clean(40.0)
    rig.require_unharmed(guest)


def hand_over(rig: Rig, guest: Guest, journal: contextlib.ExitStack) -> tuple[str, str, str]:
    """A migration that the source has handed over and that the target cannot take, because its journal stands still."""
    begun, source, target = rig.begin(guest.name)
    rig.wait_until(source, begun.id, copying_memory)
    journal.enter_context(rig.journal_held(target))
    wait_for(
        "it is handed over", lambda: rig.journal_state(source, begun.id, Role.SOURCE) == "handed-over", 30.0, 0.001
    )
    return begun.id, source, target


@pytest.mark.parametrize("killed", ["source", "target", "both"])
def test_killed_between_handoff_and_take(rig: Rig, guest: Guest, killed: str) -> None:
    """Nobody knows what the other did: the guest runs nowhere until that is settled, and then once."""
    with contextlib.ExitStack() as held:
        migration_id, source, target = hand_over(rig, guest, held)
        hosts = {"source": [source], "target": [target], "both": [source, target]}[killed]
        for host in hosts:
            os.kill(rig.daemon_pid(host), signal.SIGKILL)
        rig.require_running_at_most_once(guest)
    rig.require_running_at_most_once(guest)
    for host in hosts:
        rig.kill_daemon(host)  # waits for its end
        rig.start_daemon(host)
        rig.require_running_at_most_once(guest)
    ended = rig.wait_end(source, migration_id, 60.0)
    owner = target if ended.outcome is Outcome.COMPLETED else source
    print(f"settled: {ended.outcome} {ended.reason}")
    if killed != "source":  # it had not taken it, and an incoming guest is given up at a restart
        assert ended.outcome is Outcome.FAILED and ended.reason is not None
    rig.require_alive(guest, owner)
    rig.require_clean(40.0)
    rig.require_unharmed(guest)


def test_target_silent_after_the_handoff(rig: Rig, guest: Guest) -> None:
    """The target host stands still between handoff and take: the outcome is unknown and said to be, then settles."""
    with contextlib.ExitStack() as held:
        migration_id, source, target = hand_over(rig, guest, held)
        pids = [rig.daemon_pid(target), *rig.qemu_pids(target, guest.name)]
        held.enter_context(rig.frozen(*pids))
        view = rig.wait_until(source, migration_id, lambda v: v.outcome is Outcome.UNKNOWN, 60.0)
        assert view.reason is not None and "recover" in view.reason.fix, view.reason
        rig.require_running_at_most_once(guest)
        with pytest.raises(Conflict):
            rig.on(source).cancel(migration_id)
        with pytest.raises(Conflict):
            rig.on(source).resume_vm(guest.name)
    asked = time.monotonic()
    ended = rig.wait_end(source, migration_id, 60.0)
    print(f"settled after {time.monotonic() - asked:.1f} s: {ended.outcome} {ended.reason}")
    rig.require_alive(guest, target if ended.outcome is Outcome.COMPLETED else source)
    rig.require_clean(40.0)
    rig.require_unharmed(guest)


def test_sigterm_waits_for_the_migration(rig: Rig, guest: Guest) -> None:
    """Both daemons are asked to end while the migration runs: it is carried through first."""
    begun, source, target = rig.begin(guest.name)
    rig.wait_until(source, begun.id, copying_disks)
    for host in (source, target):
        os.kill(rig.daemon_pid(host), signal.SIGTERM)
    for host in (source, target):
        rig.kill_daemon(host, signal.SIGTERM)
    for host in (source, target):
        rig.start_daemon(host)
    assert rig.on(source).migration(begun.id).outcome is Outcome.COMPLETED
    rig.require_alive(guest, target)
    rig.require_clean()
