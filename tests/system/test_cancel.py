"""Cancelling in each phase: answered within two seconds with the guest running where it was, nothing left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from sysrig import CANCEL_WITHIN_S, MOST_BLACKOUT_MS, QUICK, SLOW, Guest, Rig, copying_disks, copying_memory, in_phase

from vmferry.model.errors import Conflict, NotFound
from vmferry.model.migration import MigrateOptions, MigrationView, Outcome, Phase, Verify

pytestmark = pytest.mark.system

MOMENTS: dict[str, tuple[MigrateOptions, Callable[[MigrationView], bool]]] = {
    "at once": (SLOW, lambda _: True),
    "check": (SLOW, in_phase(Phase.CHECK)),
    "prepare": (SLOW, in_phase(Phase.PREPARE)),
    "copy of disks": (SLOW, copying_disks),
    "copy of memory": (SLOW, copying_memory),
    "copy of memory while disks are proven": (replace(SLOW, verify=Verify.DISKS), copying_memory),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_cancel(rig: Rig, guest: Guest, moment: str) -> None:
    options, reached = MOMENTS[moment]
    with rig.watch(guest) as watched:
        begun, source, target = rig.begin(guest.name, options)
        if moment == "check":
            time.sleep(0.5)  # in the middle of it; any moment is as good
        view = rig.wait_until(source, begun.id, reached)
        assert view.outcome is Outcome.RUNNING, view.reason
        asked = time.monotonic()
        ended = rig.on(source).cancel(begun.id)
        took_s = time.monotonic() - asked
    assert ended.outcome is Outcome.CANCELLED and ended.reason is not None
    assert took_s <= CANCEL_WITHIN_S
    assert watched.gap_ms <= MOST_BLACKOUT_MS, watched.report["gaps"]
    rig.require_alive(guest, source)
    rig.require_clean()
    with pytest.raises(Conflict):
        rig.on(source).cancel(begun.id)
    assert all(v.outcome is not Outcome.RUNNING for v in rig.on(target).migrations())


def test_cancel_at_the_switchover(rig: Rig, guest: Guest) -> None:
    """Either it comes in time and the guest runs here, or it is refused and the guest runs there."""
    begun, source, target = rig.begin(guest.name, replace(QUICK, verify=Verify.ALL))
    with rig.watch(guest) as watched:
        rig.wait_until(source, begun.id, in_phase(Phase.SWITCHOVER))
        asked = time.monotonic()
        try:
            outcome = rig.on(source).cancel(begun.id).outcome
        except Conflict as refused:
            assert (
                refused.code in ("handed-over", "migration-ended") and refused.fix
            ) or refused.code == "migration-ended"
            outcome = Outcome.COMPLETED
        took_s = time.monotonic() - asked
        ended = rig.wait_end(source, begun.id)
    assert ended.outcome is outcome
    assert took_s <= CANCEL_WITHIN_S
    assert watched.gap_ms <= MOST_BLACKOUT_MS, watched.report["gaps"]
    rig.require_alive(guest, source if outcome is Outcome.CANCELLED else target)
    rig.require_clean()
    rig.require_unharmed(guest)


def test_what_cannot_be_cancelled(rig: Rig, guest: Guest) -> None:
    source, target = rig.place(guest.name)
    with pytest.raises(NotFound):
        rig.on(source).cancel("m-000000000000")
    begun = rig.on(source).migrate(guest.name, target, SLOW)
    rig.wait_until(source, begun.id, copying_disks)
    with pytest.raises(Conflict, match=source):  # it is cancelled on its source
        rig.on(target).cancel(begun.id)
    assert rig.on(source).cancel(begun.id).outcome is Outcome.CANCELLED
    rig.require_alive(guest, source)
