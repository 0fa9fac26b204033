"""What a migration's options promise: proof, post-copy, bandwidth, other pools, kept sources, honest giving up."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import time
from dataclasses import replace

import pytest
from sysrig import MOST_BLACKOUT_MS, QUICK, Guest, Rig, copying_memory, in_phase, wait_for

from vmferry.api.codec import encode
from vmferry.lab import faults
from vmferry.model.errors import NotFound, WrongInput
from vmferry.model.migration import MigrateOptions, Outcome, Phase, PostCopy, Role, Verify

pytestmark = pytest.mark.system


def test_verify_all(rig: Rig, guest: Guest) -> None:
    """Digests of memory and disks are equal, the receipt is signed, and a changed one is found."""
    source, target = rig.place(guest.name)
    with rig.watch(guest) as watched:
        ended = rig.migrate(guest.name, MigrateOptions(verify=Verify.ALL, max_blackout_ms=2000))
    receipt = rig.on(source).receipt(ended.id)
    assert receipt.verified.memory is not None and receipt.verified.memory.equal
    assert [disk.name for disk in receipt.verified.disks] == ["root"] and receipt.verified.disks[0].equal
    assert receipt.frames.lost == 0
    # Some of those held came to the target directly: it is announced when its port is plugged.
    assert receipt.frames.held > 0 and receipt.frames.forwarded > 0
    assert receipt.network.reachable_before and receipt.network.reachable_after
    assert (receipt.source, receipt.target) == (source, target)
    assert watched.gap_ms <= MOST_BLACKOUT_MS
    assert receipt.blackout_ms <= watched.gap_ms + 20
    for host in (source, target):
        assert rig.on(host).check_receipt(ended.id) == (True, "")
        assert encode(rig.on(host).receipt(ended.id)) == encode(receipt)
    rig.require_alive(guest, target)
    rig.require_clean()
    rig.require_unharmed(guest)


def test_changed_receipt_is_found(rig: Rig, guest: Guest) -> None:
    source, _ = rig.place(guest.name)
    ended = rig.migrate(guest.name)
    rig.require_clean()
    rig.kill_daemon(source)
    with sqlite3.connect(rig.host(source).state_dir / "journal.sqlite") as db:
        (text,) = db.execute("SELECT receipt FROM migration WHERE id=?", (ended.id,)).fetchone()
        changed = json.loads(text) | {"blackout_ms": 0.01}
        db.execute("UPDATE migration SET receipt=? WHERE id=?", (json.dumps(changed), ended.id))
    db.close()
    rig.start_daemon(source)
    valid, reason = rig.on(source).check_receipt(ended.id)
    assert not valid and reason


def test_post_copy(rig: Rig) -> None:
    """A guest that dirties faster than the slowed link carries still moves, unharmed."""
    busy = rig.ensure_guest("busy", "10.77.0.66", load={"wss": 48, "dirty": 60, "fill": 8, "disk": 1})
    source, target = rig.place(busy.name)
    options = MigrateOptions(post_copy=PostCopy.ALLOW, max_blackout_ms=300, max_slowdown_percent=0, verify=Verify.DISKS)
    for name in (source, target):
        faults.slow_link(rig.host(name), 150_000_000)
    try:
        begun = rig.on(source).migrate(busy.name, target, options)
        ended = rig.wait_end(source, begun.id, 120.0)
        assert ended.outcome is Outcome.COMPLETED, ended.reason
        rig.require_alive(busy, target)
        rig.require_clean(30.0)
        busy.client.set_load(dirty_mb=2)
        rig.require_unharmed(busy)
    finally:
        for name in (source, target):
            faults.slow_link(rig.host(name), rig.layout.link_bps)


def test_does_not_converge(rig: Rig) -> None:
    """Without post-copy the same guest is refused, or given up, with the numbers; it runs on at full speed."""
    busy = rig.ensure_guest("busy", "10.77.0.66", load={"wss": 48, "dirty": 60, "fill": 8, "disk": 1})
    busy.client.set_load(dirty_mb=0)
    source, target = rig.place(busy.name)
    options = MigrateOptions(max_blackout_ms=100, max_slowdown_percent=0, verify=Verify.NONE)
    for name in (source, target):
        faults.slow_link(rig.host(name), 150_000_000)
    try:
        begun = rig.on(source).migrate(busy.name, target, options)
        rig.wait_until(source, begun.id, copying_memory)
        busy.client.set_load(dirty_mb=60)  # after the check, which would have refused it
        ended = rig.wait_end(source, begun.id, 120.0)
        assert ended.outcome is Outcome.FAILED and ended.reason is not None, ended
        assert ended.reason.code == "not-converging" and ended.reason.fix, ended.reason
        assert any(character.isdigit() for character in ended.reason.message), ended.reason
        rig.require_alive(busy, source)
        rig.require_clean()
        # and the check says so beforehand
        wait_for("it dirties", lambda: busy.client.status().memory.rate_bytes > 30e6, 20.0)
        checked = rig.on(source).check(busy.name, target, options)
        assert not checked.ok, checked
        assert "goal-not-feasible" in {finding.code for finding in checked.findings}
        # which is known last: what was prepared meanwhile goes again
        refused = rig.wait_end(source, rig.on(source).migrate(busy.name, target, options).id)
        assert refused.outcome is Outcome.FAILED and refused.reason is not None and refused.reason.code == "refused"
        rig.require_alive(busy, source)
        rig.require_clean()
    finally:
        for name in (source, target):
            faults.slow_link(rig.host(name), rig.layout.link_bps)
        rig.forget_guest(busy.name)


def test_keep_source(rig: Rig, guest: Guest) -> None:
    """The old images stay, set aside, and are said to be there; they are no part of any VM."""
    source, target = rig.place(guest.name)
    rig.migrate(guest.name, replace(QUICK, keep_source=True))
    rig.require_alive(guest, target)
    kept = [path for path in rig.host(source).pools["local"].rglob("*") if path.is_file() and "root" in path.name]
    assert kept, list(rig.host(source).pools["local"].rglob("*"))
    shutil.rmtree(rig.host(source).state_dir / "vms" / rig.on(target).vm(guest.name).spec.id)  # kept with them
    for path in kept:
        path.unlink()
    for path in sorted(rig.host(source).pools["local"].iterdir()):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def test_storage(rig: Rig, guest: Guest) -> None:
    source, target = rig.place(guest.name)
    rig.migrate(guest.name, replace(QUICK, storage={"": "fast"}, verify=Verify.DISKS))
    disk = rig.on(target).vm(guest.name).spec.disks[0]
    assert disk.pool == "fast" and disk.path.startswith(str(rig.host(target).pools["fast"]))
    rig.require_alive(guest, target)
    rig.require_clean()
    rig.migrate(guest.name, replace(QUICK, storage={"root": "local"}))
    assert rig.on(source).vm(guest.name).spec.disks[0].pool == "local"
    rig.require_clean()
    rig.require_unharmed(guest)


@pytest.mark.parametrize("limit_bps", [80_000_000, 240_000_000])
def test_bandwidth_is_kept(rig: Rig, guest: Guest, limit_bps: int) -> None:
    """Measured at the link: disks and memory together stay below the limit (and what TLS and TCP add)."""
    source, target = rig.place(guest.name)
    options = replace(QUICK, bandwidth_bps=limit_bps, max_blackout_ms=2000)
    begun = rig.on(source).migrate(guest.name, target, options)
    rig.wait_until(source, begun.id, lambda view: view.progress.disk_done_bytes > 0)
    began, before = time.monotonic(), bytes_from(rig, source)
    rig.wait_until(source, begun.id, in_phase(Phase.SWITCHOVER))
    rate_bps = (bytes_from(rig, source) - before) * 8 / (time.monotonic() - began)
    ended = rig.wait_end(source, begun.id)
    assert ended.outcome is Outcome.COMPLETED, ended.reason
    assert limit_bps * 0.3 <= rate_bps <= limit_bps * 1.15
    rig.require_alive(guest, target)


def bytes_from(rig: Rig, host: str) -> int:
    """What has left the host on its migration link, as the switch counts it."""
    counter = f"/sys/class/net/{rig.host(host).migration_port}/statistics/rx_bytes"
    argv = ["ip", "netns", "exec", rig.layout.switch_namespace, "cat", counter]
    return int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)


def test_what_is_not_there(rig: Rig, guest: Guest) -> None:
    source, target = rig.place(guest.name)
    host = rig.on(source)
    with pytest.raises(NotFound) as unknown:
        host.migrate(guest.name, "host9", QUICK)
    assert unknown.value.code == "unknown-host" and unknown.value.fix
    with pytest.raises(NotFound) as nobody:
        host.migrate("nobody", target, QUICK)
    assert nobody.value.code == "no-such-vm" and nobody.value.fix
    with pytest.raises(WrongInput):
        host.migrate(guest.name, "../host2", QUICK)
    for options, code in (
        (replace(QUICK, storage={"": "nowhere"}), "pool-missing"),
        (replace(QUICK, network={"lan": "wan"}), "switch-missing"),
    ):
        checked = host.check(guest.name, target, options)
        assert code in {finding.code for finding in checked.findings if finding.fix} and not checked.ok
        view = host.migrate(guest.name, target, options)
        ended = rig.wait_end(source, view.id)
        assert ended.outcome is Outcome.FAILED and ended.reason is not None and ended.reason.code == "refused"
    rig.require_alive(guest, source)
    rig.require_clean()
    assert rig.journal_state(target, view.id, Role.TARGET) == ""
