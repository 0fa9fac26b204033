"""Whatever breaks before the handoff: the guest runs on where it was, nothing is left, and it is said what happened."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from sysrig import (
    MOST_BLACKOUT_MS,
    QUICK,
    SLOW,
    Guest,
    Rig,
    copying_disks,
    copying_memory,
    in_phase,
    tiny_pool,
    wait_for,
)

from vmferry.lab import faults
from vmferry.lab.faults import Direction
from vmferry.model.migration import MigrateOptions, MigrationView, Outcome, Phase, Verify
from vmferry.storage.pool_files import IDENTITY_FILE

pytestmark = pytest.mark.system

Fault = Callable[[Rig, Guest, str], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def daemon_killed(rig: Rig, guest: Guest, target: str) -> Iterator[None]:
    os.kill(rig.daemon_pid(target), signal.SIGKILL)
    yield
    rig.kill_daemon(target)  # is gone: only waits for that
    rig.start_daemon(target)


@contextlib.contextmanager
def qemu_killed(rig: Rig, guest: Guest, target: str) -> Iterator[None]:
    for pid in rig.qemu_pids(target):
        os.kill(pid, signal.SIGKILL)
    yield


@contextlib.contextmanager
def qemu_frozen(rig: Rig, guest: Guest, target: str) -> Iterator[None]:
    with rig.frozen(*rig.qemu_pids(target)):
        yield


@contextlib.contextmanager
def host_frozen(rig: Rig, guest: Guest, target: str) -> Iterator[None]:
    with rig.frozen(rig.daemon_pid(target), *rig.qemu_pids(target)):
        yield


def link_cut(direction: Direction) -> Fault:
    @contextlib.contextmanager
    def fault(rig: Rig, guest: Guest, target: str) -> Iterator[None]:
        faults.cut_link(rig.host(target), direction=direction)
        try:
            yield
        finally:
            faults.restore_link(rig.host(target))

    return fault


FAULTS: dict[str, Fault] = {
    "target's daemon killed": daemon_killed,
    "target's QEMU killed": qemu_killed,
    "target's QEMU frozen": qemu_frozen,
    "target host frozen": host_frozen,
    "link cut": link_cut(Direction.BOTH),
    "link cut towards the target": link_cut(Direction.IN),
    "link cut from the target": link_cut(Direction.OUT),
}
IN_DISKS = ("target's QEMU killed", "target host frozen", "link cut towards the target")


@pytest.mark.parametrize("kind", IN_DISKS)
def test_copy_of_disks_breaks(rig: Rig, guest: Guest, kind: str) -> None:
    break_it(rig, guest, FAULTS[kind], SLOW, copying_disks)


@pytest.mark.parametrize("kind", FAULTS)
def test_copy_of_memory_breaks(rig: Rig, guest: Guest, kind: str) -> None:
    break_it(rig, guest, FAULTS[kind], SLOW, copying_memory)


@pytest.mark.parametrize("kind", FAULTS)
def test_switchover_breaks(rig: Rig, guest: Guest, kind: str) -> None:
    """In the moments in which the guest is about to be stopped, or is."""
    break_it(
        rig, guest, FAULTS[kind], replace(QUICK, verify=Verify.ALL, max_blackout_ms=300), in_phase(Phase.SWITCHOVER)
    )


def test_pool_gets_full(rig: Rig, guest: Guest) -> None:
    """The check found room enough, then somebody else used it."""
    bring_to_host1(rig, guest)
    filler = tiny_pool(rig.layout) / "filler"

    @contextlib.contextmanager
    def filled(rig: Rig, guest: Guest, target: str) -> Iterator[None]:
        try:
            with contextlib.suppress(OSError), filler.open("wb") as file:
                while True:
                    file.write(bytes(1 << 20))
                    file.flush()
            yield
        finally:
            filler.unlink()

    ended = break_it(rig, guest, filled, replace(SLOW, storage={"": "tiny"}), copying_disks)
    assert ended.reason is not None and "space" in ended.reason.message.lower(), ended.reason
    assert_tiny_is_empty(rig)


def test_pool_is_full(rig: Rig, guest: Guest) -> None:
    """Found by the check."""
    bring_to_host1(rig, guest)
    filler = tiny_pool(rig.layout) / "filler"
    filler.write_bytes(bytes(90 << 20))
    try:
        begun, source, _ = rig.begin(guest.name, replace(QUICK, storage={"": "tiny"}))
        ended = rig.wait_end(source, begun.id)
        require_failed(ended)
        findings = rig.on(source).migration_check(begun.id).findings
        assert any(f.code == "pool-room" and "tiny" in f.message and f.fix for f in findings), findings
    finally:
        filler.unlink()
    rig.require_alive(guest, source)
    assert_tiny_is_empty(rig)


def test_image_on_the_target_is_changed(rig: Rig, guest: Guest) -> None:
    """Somebody writes into the new image: the digests differ, and the guest stays where its data is right."""

    @contextlib.contextmanager
    def changed(rig: Rig, guest: Guest, target: str) -> Iterator[None]:
        source = rig.other(target)
        (begun,) = [each for each in rig.on(source).migrations() if each.outcome is Outcome.RUNNING]

        def copied() -> bool:
            progress = rig.on(source).migration(begun.id).progress
            return progress.disk_done_bytes == progress.disk_total_bytes

        with rig.frozen(rig.daemon_pid(target)):  # the proof has to wait, the mirror goes on
            wait_for("everything was copied once", copied, 10.0, 0.005)
            (image,) = (rig.host(target).pools["local"] / rig.on(source).vm(guest.name).spec.id).glob("root-*.qcow2")
            with image.open("r+b") as file:
                file.seek(20 << 20)  # what the guest itself writes again is in the first 8 MiB
                file.write(os.urandom(64 << 10))
        yield

    ended = break_it(rig, guest, changed, replace(QUICK, verify=Verify.DISKS), copying_disks)
    assert ended.reason is not None and ended.reason.code == "disk-differs", ended.reason


def test_image_on_the_target_cannot_be_made(rig: Rig, guest: Guest) -> None:
    source, target = rig.place(guest.name)
    obstacle = rig.host(target).pools["local"] / rig.on(source).vm(guest.name).spec.id
    obstacle.write_text("in the way")
    try:
        begun, _, _ = rig.begin(guest.name)
        ended = rig.wait_end(source, begun.id)
        require_failed(ended)
        rig.require_alive(guest, source)
    finally:
        obstacle.unlink()
    rig.require_clean()


def bring_to_host1(rig: Rig, guest: Guest) -> None:
    if rig.place(guest.name)[0] != "host1":
        rig.migrate(guest.name)


def assert_tiny_is_empty(rig: Rig) -> None:
    left = [path for path in tiny_pool(rig.layout).rglob("*") if path.name != IDENTITY_FILE]
    assert not left, left


def break_it(
    rig: Rig, guest: Guest, fault: Fault, options: MigrateOptions, reached: Callable[[MigrationView], bool]
) -> MigrationView:
    """The fault at that moment: the migration fails, with the guest where it was."""
    begun, source, target = rig.begin(guest.name, options)
    with rig.watch(guest) as watched:
        view = rig.wait_until(source, begun.id, reached)
        assert view.outcome is Outcome.RUNNING, view.reason
        with fault(rig, guest, target):
            ended = rig.wait_end(source, begun.id, 40.0)
    require_failed(ended)
    rig.require_alive(guest, source)
    rig.require_clean(30.0)
    assert watched.gap_ms <= MOST_BLACKOUT_MS, (watched.gap_ms, watched.report["gaps"])
    rig.require_unharmed(guest)
    return ended


def require_failed(ended: MigrationView) -> None:
    """It says what happened and what to do."""
    assert ended.outcome is Outcome.FAILED, ended
    assert ended.reason is not None and ended.reason.message and ended.reason.fix, ended.reason
    assert ended.reason.code != "internal", ended.reason
    print(f"[{ended.reason.code}] {ended.reason.message} {ended.reason.fix}")
