"""The small guest under real QEMU: it boots, answers, works, and finds damage done to its memory and its disk."""

from __future__ import annotations

import multiprocessing
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmferry.lab.guest import GuestImages, build_guest, guest_cmdline
from vmferry.lab.guest_client import GuestClient, GuestStatus
from vmferry.lab.layout import LabLayout

from .rig import ADDRESS, RunningGuest, end_guest, press_power_button, start_guest

PAGE_MAGIC = struct.pack("<Q", 0x5646504147453031)
RECORD_MAGIC = struct.pack("<Q", 0x5646524543303031)
FILL_OFFSET = (1 << 20) + (2 << 20)  # header, then diskarea


def wait_for(client: GuestClient, condition: Callable[[GuestStatus], bool], within_s: float = 30.0) -> GuestStatus:
    deadline = time.monotonic() + within_s
    while not condition(status := client.status()):
        assert time.monotonic() < deadline, f"not reached: {status}"
        time.sleep(0.05)
    return status


def test_second_build_comes_from_the_cache() -> None:
    first = build_guest()
    began = time.monotonic()
    assert build_guest() == first
    assert time.monotonic() - began < 0.5


def test_output_gets_copies(tmp_path: Path) -> None:
    images = build_guest(tmp_path / "out")
    assert images.kernel.parent == tmp_path / "out"
    assert images.initrd.read_bytes() == build_guest().initrd.read_bytes()


def build_into(queue: multiprocessing.Queue[GuestImages]) -> None:
    queue.put(build_guest())


def test_builds_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = next(parent for parent in [build_guest().kernel.parent.parent] if parent.is_dir())
    cache = tmp_path / "vmferry-lab"
    cache.mkdir()
    for tree in kernel.glob("linux-image-*"):
        (cache / tree.name).symlink_to(tree)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[GuestImages] = context.Queue()
    builders = [context.Process(target=build_into, args=(queue,)) for _ in range(3)]
    for builder in builders:
        builder.start()
    results = [queue.get(timeout=60) for _ in builders]
    for builder in builders:
        builder.join()
    assert len(set(results)) == 1
    assert results[0].initrd.stat().st_size > 1 << 20
    assert not list(cache.glob("making-*"))


def test_answers_and_works(client: GuestClient) -> None:
    first = client.status()
    later = wait_for(
        client,
        lambda now: (
            now.beats > first.beats
            and now.memory.pages_written > first.memory.pages_written
            and now.disk.written > first.disk.written + 5
        ),
    )
    assert later.boot_id == first.boot_id
    assert later.dead == 0
    assert (later.memory.errors, later.disk.errors, later.disk.io_errors) == (0, 0, 0)


def test_load_can_be_changed(client: GuestClient) -> None:
    assert client.set_load(dirty_mb=0, disk_rate=0).memory.rate_bytes == 0
    assert client.set_load(dirty_mb=4, disk_rate=50).disk.rate == 50


def test_finds_a_flipped_byte_in_memory(guest: RunningGuest, client: GuestClient) -> None:
    client.set_load(dirty_mb=0)
    before = client.check_memory()
    assert (before.checked, before.errors) == (2048, 0)
    place = guest.memory.read_bytes().rfind(PAGE_MAGIC)
    index = struct.unpack_from("<Q", read_at(guest.memory, place + 8, 8))[0]
    flip(guest.memory, place + 1000)
    damaged = client.check_memory()
    flip(guest.memory, place + 1000)
    assert damaged.errors == 1
    assert f"page {index}:" in damaged.first_error
    assert client.check_memory().errors == 0
    client.set_load(dirty_mb=4)


def test_finds_a_flipped_byte_in_a_record(guest: RunningGuest, client: GuestClient) -> None:
    wait_for(client, lambda now: now.disk.written > 20)
    client.set_load(disk_rate=0)
    assert client.verify_disk().errors == 0
    place = guest.disk.read_bytes().find(RECORD_MAGIC, 1 << 20)
    flip(guest.disk, place + 2000)
    damaged = client.verify_disk()
    flip(guest.disk, place + 2000)
    assert damaged.errors == 1
    assert "slot" in damaged.first_error
    assert client.verify_disk().errors == 0
    client.set_load(disk_rate=50)


def test_finds_a_stale_record(guest: RunningGuest, client: GuestClient) -> None:
    """A record that is sound in itself but older than what was last written there: a lost write."""
    slots = 512
    wait_for(client, lambda now: now.disk.written > 10)
    client.set_load(disk_rate=0)
    number = client.status().disk.written
    place = (1 << 20) + (number * 0x9E3779B1 % slots) * 4096
    old = read_at(guest.disk, place, 4096)
    client.set_load(disk_rate=400)
    wait_for(client, lambda now: now.disk.written > number + slots)
    client.set_load(disk_rate=0)
    new = read_at(guest.disk, place, 4096)
    assert old != new
    write_at(guest.disk, place, old)
    assert client.verify_disk().errors == 1
    write_at(guest.disk, place, new)
    assert client.verify_disk().errors == 0
    client.set_load(disk_rate=50)


def test_finds_damage_in_the_fill(guest: RunningGuest, client: GuestClient) -> None:
    flip(guest.disk, FILL_OFFSET + (5 << 20) + 77)
    damaged = client.verify_disk()
    flip(guest.disk, FILL_OFFSET + (5 << 20) + 77)
    assert damaged.errors == 1
    assert "fill MiB 5" in damaged.first_error


def test_goes_on_after_a_crash_and_powers_off(lab: LabLayout, guest: RunningGuest, tmp_path: Path) -> None:
    """Killed while writing, the next boot finds all records; then only verifies; then powers off when told."""
    with GuestClient(ADDRESS, lab.client_namespace) as client:
        wait_for(client, lambda now: now.disk.written > 10)
    end_guest(lab, guest)
    (tmp_path / "disk.raw").write_bytes(guest.disk.read_bytes())
    again = start_guest(lab, tmp_path, guest_cmdline(ip=f"{ADDRESS}/24", disk="verify"))
    try:
        assert again.wait_for_line("vf: disk verified").endswith("errors 0")
        with GuestClient(ADDRESS, lab.client_namespace) as client:
            status = wait_for(client, lambda now: now.disk.state == "verifying")
            assert status.disk.found > 10
            assert client.verify_disk().errors == 0
            client.power_off()
        assert again.process.wait(timeout=30) == 0
    finally:
        end_guest(lab, again)


def test_power_button_powers_off(lab: LabLayout, guest: RunningGuest, tmp_path: Path) -> None:
    end_guest(lab, guest)
    again = start_guest(lab, tmp_path, guest_cmdline(ip=f"{ADDRESS}/24"))
    try:
        again.wait_for_line("vf: ready")
        press_power_button(again)
        assert again.process.wait(timeout=30) == 0
    finally:
        end_guest(lab, again)


def flip(path: Path, offset: int) -> None:
    write_at(path, offset, bytes([read_at(path, offset, 1)[0] ^ 0x10]))


def read_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as opened:
        opened.seek(offset)
        return opened.read(size)


def write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as opened:
        opened.seek(offset)
        opened.write(data)
