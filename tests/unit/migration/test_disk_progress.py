"""What is shown of the copying of disks: holes are no work, and a limit is not exceeded."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmferry.migration.disk_progress import DiskMeter, Holes, Rate, observe_holes, work_of
from vmferry.model.vm import Disk, FirmwareBoot, VmSpec
from vmferry.qemu.blocks import MirrorSample
from vmferry.storage.holes import DataMap, observe_data

MIB = 1 << 20
HOLES = Holes(256 * MIB, DataMap([(100 * MIB, 132 * MIB), (200 * MIB, 208 * MIB)]))


def sample(offset: int, length: int = 256, *, ready: bool = False) -> MirrorSample:
    return MirrorSample("mirror0", offset * MIB, length * MIB, 0, ready, None, "running", "")


@pytest.mark.parametrize(
    ("offset", "length", "ready", "done", "total"),
    [
        (0, 0, False, 0, 40),
        (100, 256, False, 0, 40),
        (110, 256, False, 10, 40),
        (180, 256, False, 32, 40),
        (204, 256, False, 36, 40),
        (256, 256, True, 40, 40),
        (256, 260, False, 40, 44),  # the guest has written 4 MiB of it again
        (258, 260, True, 42, 44),
    ],
)
def test_holes_are_no_work(offset: int, length: int, ready: bool, done: int, total: int) -> None:
    assert work_of(sample(offset, length, ready=ready), HOLES) == (done * MIB, total * MIB)


def test_where_qemu_does_not_count_holes_nothing_is_left_out() -> None:
    assert work_of(sample(16, 32), None) == (16 * MIB, 32 * MIB)


@pytest.mark.parametrize("every_s", [0.1, 0.4])
def test_a_limit_is_not_exceeded_by_what_is_shown(every_s: float) -> None:
    """8 MiB/s, which QEMU 10.0 sends as 16 MiB every two seconds, the first of them at once."""
    meter, shown = DiskMeter({}), []
    for look in range(int(20 / every_s)):
        now = look * every_s
        shown.append(meter.read([sample(16 * (1 + int(now / 2)), 1000)], now).rate)
    assert max(shown) <= 8.5 * MIB
    assert min(shown[int(5 / every_s) :]) >= 5 * MIB


def test_passing_holes_is_no_speed() -> None:
    meter, shown = DiskMeter({"mirror0": HOLES}), []
    for offset in (0, 100, 101, 102, 103, 199, 199, 199):
        shown.append(meter.read([sample(offset)], len(shown) * 0.25).rate)
    assert max(shown) <= 30 * MIB * 4 and shown[1] == 0


def test_a_rate_comes_soon_and_goes_when_nothing_does() -> None:
    rate = Rate()
    assert [rate.update(n * 100, n / 8) for n in range(5)] == [0, 0, 0, 800, 800]
    assert 0 < rate.update(500, 5) < 100
    assert rate.update(500, 11) == 0


async def test_holes_of_raw_images_are_found(tmp_path: Path) -> None:
    raw = tmp_path / "a.raw"
    with raw.open("wb") as file:
        file.truncate(8 * MIB)
        file.seek(2 * MIB)
        file.write(b"x" * MIB)
    data = observe_data(raw)
    assert data.total_bytes == MIB and data.below(2 * MIB) == 0 and data.below(3 * MIB) == data.below(8 * MIB) == MIB
    (tmp_path / "empty.raw").write_bytes(b"")
    assert observe_data(tmp_path / "empty.raw").total_bytes == 0
    disks = tuple(Disk(name, "local", 8 * MIB, name, str(raw)) for name in ("raw", "qcow2"))
    spec = VmSpec("v", "v", 1, 1 << 28, "q35", "max", FirmwareBoot("bios"), disks)
    assert list(await observe_holes(spec, ["mirror0", "mirror1"])) == ["mirror0"]
