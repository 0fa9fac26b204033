"""The command line and the names inside QEMU."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.model.errors import WrongInput
from vmferry.model.vm import DirectBoot, Disk, FirmwareBoot, Nic, VmSpec
from vmferry.qemu.command import MAX_DISKS, build_command
from vmferry.qemu.layout import (
    DiskAccess,
    FirmwareFiles,
    GuestLayout,
    Layer,
    ListenFds,
    device_node,
    file_node,
    format_node,
    guest_uuid,
    layer_node,
    limits_id,
)

LISTEN = ListenFds(10, 11, 12)
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)


def spec(**changes: Any) -> VmSpec:
    disks = (Disk("root", "local", 1 << 30, "qcow2", "/pool/a,b.qcow2", "/pool/base.qcow2"),)
    values: dict[str, Any] = {
        "id": "vm-1",
        "name": "web1",
        "cpus": 2,
        "memory_bytes": 512 << 20,
        "machine": "pc-q35-10.0",
        "cpu": "Westmere-v1,enforce",
        "boot": FirmwareBoot("bios"),
        "disks": disks,
        "nics": (Nic("lan", "52:54:00:00:00:01", 1400),),
    }
    return VmSpec(**{**values, **changes})


def layout(vm: VmSpec, **options: Any) -> GuestLayout:
    return GuestLayout(vm, Path("/run/a,b"), Path("/store/vm"), "tcg", **{"tap_fds": (7,), **options})


def given_as(command: list[str], option: str) -> list[str]:
    return [command[i + 1] for i, word in enumerate(command) if word == option]


def parsed(command: list[str], option: str) -> list[dict[str, Any]]:
    return [json.loads(value) for value in given_as(command, option)]


def test_the_graph_of_a_disk() -> None:
    nodes = {node["node-name"]: node for node in parsed(build_command(layout(spec()), LISTEN), "-blockdev")}
    assert list(nodes) == ["root.base0", "root.file", "root.format", "root"]
    assert nodes["root"]["file"] == "root.format" and nodes["root"]["detect-zeroes"] == "unmap"
    assert nodes["root.format"]["backing"] == "root.base0" and nodes["root.format"]["discard"] == "unmap"
    assert nodes["root.file"]["filename"] == "/pool/a,b.qcow2" and nodes["root.file"]["discard"] == "unmap"
    assert nodes["root.base0"]["read-only"] and nodes["root.base0"]["backing"] is None


def test_layers_direct_access_devices_and_other_protocols() -> None:
    access = DiskAccess(direct=True, aio="io_uring", layers=(Layer("/a", "qcow2"), Layer("/b", "raw")))
    nodes = {
        n["node-name"]: n for n in parsed(build_command(layout(spec(), disks={"root": access}), LISTEN), "-blockdev")
    }
    assert nodes["root.base0"]["backing"] == "root.base1" and "backing" not in nodes["root.base1"]
    assert nodes["root.file"]["cache"] == {"direct": True} and nodes["root.file"]["aio"] == "io_uring"
    other = DiskAccess(protocol={"driver": "nfs", "path": "/x"})
    vm = spec(disks=(Disk("root", "nas", 1 << 30, "raw", "ignored"), Disk("lv", "vg", 1 << 20, "raw", "/dev/vg/lv")))
    nodes = {n["node-name"]: n for n in parsed(build_command(layout(vm, disks={"root": other}), LISTEN), "-blockdev")}
    assert nodes["root.file"]["driver"] == "nfs" and nodes["lv.file"]["driver"] == "host_device"
    assert nodes["lv.format"]["size"] == 1 << 20


def test_devices_have_fixed_addresses_and_explicit_properties() -> None:
    vm = spec(disks=tuple(Disk(f"d{i}", "p", 1 << 20, "raw", f"/p/{i}") for i in range(3)))
    devices = {d.get("id"): d for d in parsed(build_command(layout(vm), LISTEN), "-device")}
    assert [devices[f"disk{i}"]["addr"] for i in range(3)] == ["0x3", "0x4", "0x5"]
    assert [devices[f"disk{i}"]["bootindex"] for i in range(3)] == [0, 1, 2]
    assert devices["nic0"] == {
        "driver": "virtio-net-pci",
        "id": "nic0",
        "mac": "52:54:00:00:00:01",
        "host_mtu": 1400,
        "romfile": "",
        "bus": "pcie.0",
        "addr": "0x10",
        "netdev": "net0",
    }


def test_a_twin_has_the_same_devices_and_nothing_behind_them() -> None:
    real = build_command(layout(spec()), LISTEN)
    twin = build_command(layout(spec(), twin=True, incoming=True, tap_fds=()), LISTEN)
    without_peer = [{k: v for k, v in d.items() if k != "netdev"} for d in parsed(real, "-device")]
    assert parsed(twin, "-device") == without_peer
    assert not given_as(twin, "-netdev") and "-S" in twin and "defer" in twin
    assert {node["driver"] for node in parsed(twin, "-blockdev")} == {"null-co", "throttle"}
    assert "/pool" not in " ".join(twin)
    assert "-S" not in real and "-incoming" not in real


def test_boot_by_kernel_and_by_uefi() -> None:
    command = build_command(layout(spec(boot=DirectBoot("k,1", "i", "a=b,c"))), LISTEN)
    assert given_as(command, "-kernel") == ["/store/vm/k,1"] and given_as(command, "-append") == ["a=b,c"]
    assert all("bootindex" not in device for device in parsed(command, "-device"))
    firmware = FirmwareFiles(Path("/usr/share/code.fd"), 4096, Path("/store/vars,1.fd"), 8192)
    uefi = layout(spec(boot=FirmwareBoot("uefi")), firmware=firmware)
    assert "pflash0=firmware.code,pflash1=firmware.vars" in given_as(build_command(uefi, LISTEN), "-machine")[0]
    nodes = {n["node-name"]: n for n in parsed(build_command(replace(uefi, twin=True), LISTEN), "-blockdev")}
    assert nodes["firmware.vars"]["file"] == {"driver": "null-co", "size": 8192, "read-zeroes": True}
    with pytest.raises(WrongInput):
        build_command(layout(spec(boot=FirmwareBoot("uefi"))), LISTEN)


def test_what_qemu_parses_itself_cannot_smuggle_options_in() -> None:
    for bad in ({"machine": "pc-q35-10.0,kernel=/etc/shadow"}, {"machine": "q 35"}, {"cpu": "max -S"}, {"machine": ""}):
        with pytest.raises(WrongInput):
            build_command(layout(spec(**bad)), LISTEN)
    log = next(c for c in given_as(build_command(layout(spec()), LISTEN), "-chardev") if "console" in c)
    assert "logfile=/run/a,,b/console.log," in log


def test_too_many_devices_and_missing_taps_are_refused() -> None:
    disks = tuple(Disk(f"d{i}", "p", 1 << 20, "raw", f"/p/{i}") for i in range(MAX_DISKS + 1))
    nics = tuple(Nic("lan", f"52:54:00:00:00:{i:02x}") for i in range(11))
    for vm, taps in ((spec(disks=disks), (7,)), (spec(nics=nics), tuple(range(11))), (spec(), ())):
        with pytest.raises(WrongInput):
            build_command(layout(vm, tap_fds=taps), LISTEN)


def test_the_sandbox_can_be_left_out() -> None:
    assert given_as(build_command(layout(spec()), LISTEN), "-sandbox")
    assert not given_as(build_command(layout(spec(), sandbox=False), LISTEN), "-sandbox")


@given(NAMES)
def test_every_name_gives_nodes_that_qemu_takes(name: str) -> None:
    for node in (device_node(name), format_node(name), file_node(name), layer_node(name, 99), limits_id(name)):
        assert len(node) <= 31
        assert re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", node)


@given(st.sets(NAMES, min_size=2, max_size=6))
def test_no_two_disks_share_a_node(names: set[str]) -> None:
    nodes = [make(name) for name in names for make in (device_node, format_node, file_node)]
    assert len(nodes) == len(set(nodes))


def test_the_uuid_is_the_id_or_made_of_it() -> None:
    known = "5b0e2f0e-8d3e-4a53-9b64-0f1d8b0c2c11"
    assert guest_uuid(known) == known
    assert guest_uuid("web1") == guest_uuid("web1") != guest_uuid("web2")
