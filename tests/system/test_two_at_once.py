"""Several migrations at a time: opposite ways, the same way, and the same VM twice."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
from sysrig import QUICK, SLOW, Guest, Rig, copying_disks, copying_memory

from vmferry.model.errors import Conflict, Refused
from vmferry.model.migration import MigrateOptions, Outcome
from vmferry.model.vm import RunState

pytestmark = pytest.mark.system

LIGHT = {"load": {"wss": 8, "dirty": 1, "fill": 16, "beat": 200}}


@pytest.fixture
def second(rig: Rig, guest: Guest) -> Guest:
    return rig.ensure_guest("db", "10.77.0.62", **LIGHT)


def bring(rig: Rig, guest: Guest, host: str) -> None:
    if rig.place(guest.name)[0] != host:
        rig.migrate(guest.name)


def test_opposite_ways(rig: Rig, guest: Guest, second: Guest) -> None:
    bring(rig, guest, "host1")
    bring(rig, second, "host2")
    begun = [rig.begin(each.name) for each in (guest, second)]
    ended = [rig.wait_end(source, view.id, 90.0) for view, source, _ in begun]
    assert [view.outcome for view in ended] == [Outcome.COMPLETED] * 2, [view.reason for view in ended]
    assert [rig.on(source).receipt(view.id).frames.lost for view, source, _ in begun] == [0, 0]
    rig.require_alive(guest, "host2")
    rig.require_alive(second, "host1")
    rig.require_clean()


def test_same_way_and_one_is_cancelled(rig: Rig, guest: Guest, second: Guest) -> None:
    """Two share source and target; neither one's end nor a check harms the other."""
    bring(rig, guest, "host1")
    bring(rig, second, "host1")
    slow, source, target = rig.begin(guest.name, SLOW)
    other, _, _ = rig.begin(second.name, SLOW)
    rig.wait_until(source, slow.id, copying_disks)
    rig.wait_until(source, other.id, copying_disks)
    with pytest.raises(Conflict):
        rig.on(source).migrate(guest.name, target, QUICK)  # the same VM again
    assert rig.on(source).cancel(other.id).outcome is Outcome.CANCELLED
    rig.on(source).check(second.name, target, MigrateOptions())  # over a connection of its own
    ended = rig.wait_end(source, slow.id, 90.0)
    assert ended.outcome is Outcome.COMPLETED, ended.reason
    rig.require_alive(guest, target)
    rig.require_alive(second, source)
    rig.require_clean()


def test_more_than_allowed(rig: Rig, guest: Guest) -> None:
    """A host says no to a second VM of a name that it has; the guest is not touched."""
    source, target = rig.place(guest.name)
    rig.on(target).create_vm(rig.spec("double", "10.77.0.63"))
    rig.on(source).create_vm(rig.spec("double", "10.77.0.63"))
    try:
        rig.on(source).start_vm("double")
        view = rig.on(source).migrate("double", target, QUICK)
        ended = rig.wait_end(source, view.id)
        assert ended.outcome is Outcome.FAILED and ended.reason is not None and ended.reason.code == "refused"
        codes = {finding.code for finding in rig.on(source).migration_check(view.id).findings}
        assert "name-in-use" in codes
    finally:
        rig.forget_guest("double")
    rig.require_alive(guest, source)
    rig.require_clean()


def test_acts_during_a_migration(rig: Rig, guest: Guest) -> None:
    """Stop, kill, pause, delete are refused with the way out; the migration goes on."""
    begun, source, target = rig.begin(guest.name, SLOW)
    rig.wait_until(source, begun.id, copying_disks)
    host = rig.on(source)
    for act in (host.stop_vm, host.kill_vm, host.pause_vm, host.resume_vm, host.delete_vm, host.start_vm):
        with pytest.raises(Conflict) as refused:
            act(guest.name)
        assert refused.value.code == "vm-migrating" and begun.id in refused.value.fix
    with pytest.raises(Refused):
        host.migrate(guest.name, source, QUICK)  # where it is
    ended = rig.wait_end(source, begun.id, 90.0)
    assert ended.outcome is Outcome.COMPLETED, ended.reason
    rig.require_alive(guest, target)
    rig.require_clean()


def test_stopping_vm_is_not_migrated(rig: Rig) -> None:
    """A VM that is being stopped, is stopped, or is deleted."""
    mute = rig.ensure_guest("mute", "10.77.0.64", **LIGHT)
    try:
        source, target = rig.place(mute.name)
        host = rig.on(source)

        def stop() -> None:
            while True:  # a migration that was asked for first has its way until it is cancelled
                with contextlib.suppress(Conflict):
                    host.stop_vm(mute.name, 30_000)
                    return
                time.sleep(0.002)

        stopping = threading.Thread(target=stop)
        stopping.start()
        refused: list[Conflict] = []
        while stopping.is_alive() and not refused:
            try:
                view = host.migrate(mute.name, target, SLOW)
            except Conflict as conflict:
                refused.append(conflict)
            else:  # it was asked before the stop had begun
                host.cancel(view.id)
            time.sleep(0.01)
        stopping.join(60)
        assert host.vm(mute.name).state is RunState.STOPPED
        assert not refused or refused[0].code in ("vm-busy", "vm-not-running"), refused
        with pytest.raises(Conflict) as stopped:
            host.migrate(mute.name, target, QUICK)
        assert stopped.value.code == "vm-not-running" and "vm start" in stopped.value.fix
    finally:
        rig.forget_guest(mute.name)
    rig.require_clean()


@pytest.mark.parametrize("moment", ["disks", "memory"])
def test_guest_powers_itself_off(rig: Rig, moment: str) -> None:
    """The migration ends with the reason; the VM is stopped on the source, which still owns it."""
    off = rig.ensure_guest("off", "10.77.0.65", **LIGHT)
    try:
        begun, source, _ = rig.begin(off.name, SLOW)
        rig.wait_until(source, begun.id, copying_disks if moment == "disks" else copying_memory)
        off.client.power_off()
        ended = rig.wait_end(source, begun.id)
        assert ended.outcome is Outcome.FAILED and ended.reason is not None, ended
        assert ended.reason.code == "guest-ended" and ended.reason.fix, ended.reason
        assert [(host, state.value) for host, state in rig.owners(off.name)] == [(source, "stopped")]
        rig.require_clean()
        rig.on(source).start_vm(off.name)
        off.client.status(60.0)
    finally:
        rig.forget_guest(off.name)


def test_paused_guest_moves_and_stays_paused(rig: Rig, guest: Guest) -> None:
    source, target = rig.place(guest.name)
    rig.on(source).pause_vm(guest.name)
    rig.migrate(guest.name)
    assert [(host, state.value) for host, state in rig.owners(guest.name)] == [(target, "paused")]
    rig.require_clean()
    rig.kill_daemon(target)
    rig.start_daemon(target)
    assert rig.on(target).vm(guest.name).state.value == "paused"
    rig.on(target).resume_vm(guest.name)
    rig.require_alive(guest, target)
    rig.require_unharmed(guest)
