"""Attacks that once lost something: a daemon that stands still as the memory begins, a source that dies in the finish,
a network that is gone while a guest waits for its memory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from sysrig import Guest, Rig, copying_memory, in_phase, wait_for

from vmferry.lab import faults
from vmferry.model.migration import MigrateOptions, Outcome, Phase, PostCopy, Verify
from vmferry.model.vm import RunState

pytestmark = pytest.mark.system

_STANDS_STILL_S = 2.0
_PROVEN = MigrateOptions(max_blackout_ms=2000, verify=Verify.DISKS)


def _sends_memory(pid: int) -> bool:
    """Whether QEMU's migration thread is there; it is named differently in each version."""
    names = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            names.append((task / "comm").read_text())
    return any(name.startswith(("mig/src/main", "live_migration")) for name in names)


@pytest.mark.parametrize("paused", [False, True])
def test_the_source_daemon_stands_still_as_the_memory_begins(rig: Rig, guest: Guest, paused: bool) -> None:
    """QEMU may send everything and stop the guest meanwhile: what was not proven by then is not taken for proven."""
    source, target = rig.place(guest.name)
    if paused:
        rig.on(source).pause_vm(guest.name)
    try:
        begun = rig.on(source).migrate(guest.name, target, _PROVEN)
        (pid,) = rig.qemu_pids(source, guest.name)
        wait_for("the memory begins", lambda: _sends_memory(pid), 40.0, 0.001)
        with rig.frozen(rig.daemon_pid(source)):
            time.sleep(_STANDS_STILL_S)
        ended = rig.wait_end(source, begun.id)
        here = target if ended.outcome is Outcome.COMPLETED else source
        if ended.outcome is Outcome.COMPLETED:
            assert [disk.equal for disk in rig.on(source).receipt(begun.id).verified.disks] == [True]
        else:
            assert ended.reason is not None and ended.reason.code == "switchover-stalled", ended.reason
        assert rig.owners(guest.name) == [(here, RunState.PAUSED if paused else RunState.RUNNING)]
    finally:
        if paused:
            rig.on(rig.place(guest.name)[0]).resume_vm(guest.name)
    rig.require_clean()
    rig.require_alive(guest, here)
    rig.require_unharmed(guest)


def test_the_source_qemu_dies_in_the_finish(rig: Rig, guest: Guest) -> None:
    """The VM is the target's by then: the end of the old process is no failure, and nothing is left of it."""
    begun, source, target = rig.begin(guest.name)
    (pid,) = rig.qemu_pids(source, guest.name)
    rig.wait_until(source, begun.id, in_phase(Phase.HANDOFF))
    with contextlib.suppress(ProcessLookupError):  # it has been ended already
        os.kill(pid, signal.SIGKILL)
    ended = rig.wait_end(source, begun.id)
    assert ended.outcome is Outcome.COMPLETED, ended.reason
    rig.require_clean()
    rig.require_alive(guest, target)


def test_the_network_is_gone_while_the_guest_waits_for_its_memory(rig: Rig) -> None:
    """Post-copy: the source's QEMU has pages that nobody else has. It is kept until they have arrived."""
    busy = rig.ensure_guest("busy", "10.77.0.66", load={"wss": 48, "dirty": 60, "fill": 8, "disk": 1})
    busy.client.set_load(dirty_mb=60)
    source, target = rig.place(busy.name)
    options = MigrateOptions(post_copy=PostCopy.ALLOW, max_blackout_ms=100, max_slowdown_percent=0, verify=Verify.NONE)
    try:
        begun = rig.on(source).migrate(busy.name, target, options)
        rig.wait_until(source, begun.id, copying_memory)
        faults.slow_link(rig.host(source), 100_000_000)  # it would converge, else
        view = rig.wait_until(source, begun.id, in_phase(Phase.HANDOFF))
        assert view.phase is Phase.HANDOFF and view.outcome is Outcome.RUNNING, view
        faults.slow_link(rig.host(source), 20_000_000)  # and its memory would be there, else
        faults.cut_link(rig.host(source))
        try:
            time.sleep(6.5)  # longer than memory_stall
            assert rig.qemu_pids(source, busy.name), "the source's QEMU has gone with the guest's pages"
        finally:
            faults.restore_link(rig.host(source))
        faults.slow_link(rig.host(source), rig.layout.link_bps)
        ended = rig.wait_until(source, begun.id, lambda view: view.outcome is Outcome.COMPLETED, 90.0)
        assert ended.outcome is Outcome.COMPLETED, ended.reason
        rig.require_alive(busy, target)
        rig.require_clean(30.0)
        busy.client.set_load(dirty_mb=2)
        rig.require_unharmed(busy)
    finally:
        faults.slow_link(rig.host(source), rig.layout.link_bps)
        rig.forget_guest(busy.name)
