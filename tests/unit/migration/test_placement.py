"""The VM as the target will run it."""

from __future__ import annotations

import pytest

from vmferry.migration.placement import map_pools, map_switches, place
from vmferry.model.errors import WrongInput
from vmferry.model.migration import MigrateOptions
from vmferry.model.vm import Disk, FirmwareBoot, Nic, VmSpec

SPEC = VmSpec(
    id="id-1",
    name="web1",
    cpus=2,
    memory_bytes=1 << 28,
    machine="pc-q35-10.0",
    cpu="max",
    boot=FirmwareBoot("bios"),
    disks=(
        Disk("root", "local", 1 << 30, "qcow2", "/a/root.qcow2", "/a/base.qcow2"),
        Disk("data", "big", 1 << 31, "raw", "/b/data.raw"),
    ),
    nics=(Nic("lan", "52:54:00:00:00:01"), Nic("dmz", "52:54:00:00:00:02", 9000), Nic("lan", "52:54:00:00:00:03")),
)


@pytest.mark.parametrize(
    ("storage", "root", "data"),
    [
        ({}, "local", "big"),
        ({"": "fast"}, "fast", "fast"),
        ({"data": "fast"}, "local", "fast"),
        ({"": "fast", "root": "slow"}, "slow", "fast"),
    ],
)
def test_pools(storage: dict[str, str], root: str, data: str) -> None:
    assert map_pools(SPEC, MigrateOptions(storage=storage)) == {"root": root, "data": data}


def test_switches() -> None:
    assert map_switches(SPEC, MigrateOptions()) == {"lan": "lan", "dmz": "dmz"}
    assert map_switches(SPEC, MigrateOptions(network={"lan": "lan2"})) == {"lan": "lan2", "dmz": "dmz"}


def test_the_placed_vm_is_the_same_but_for_its_place() -> None:
    placed = place(SPEC, MigrateOptions(storage={"": "fast"}, network={"dmz": "dmz2"}), generation=7)
    assert placed.generation == 7
    assert [(disk.pool, disk.path, disk.backing) for disk in placed.disks] == [("fast", "", None)] * 2
    assert [(disk.name, disk.size_bytes, disk.format) for disk in placed.disks] == [
        ("root", 1 << 30, "qcow2"),
        ("data", 1 << 31, "raw"),
    ]
    assert [nic.switch for nic in placed.nics] == ["lan", "dmz2", "lan"]
    assert [(nic.mac, nic.mtu) for nic in placed.nics] == [(nic.mac, nic.mtu) for nic in SPEC.nics]
    assert (placed.id, placed.name, placed.machine, placed.cpu) == (SPEC.id, SPEC.name, SPEC.machine, SPEC.cpu)


def test_what_the_vm_has_not_is_named_with_what_it_has() -> None:
    with pytest.raises(WrongInput) as caught:
        place(SPEC, MigrateOptions(storage={"swap": "fast"}), 2)
    assert caught.value.code == "unknown-disk"
    assert "'swap'" in caught.value.message and "data, root" in caught.value.fix
    with pytest.raises(WrongInput) as caught:
        place(SPEC, MigrateOptions(network={"wan\x1b" * 100: "lan"}), 2)
    assert caught.value.code == "unknown-switch"
    assert "dmz, lan" in caught.value.fix
    assert "\x1b" not in caught.value.message and len(caught.value.message) < 400
