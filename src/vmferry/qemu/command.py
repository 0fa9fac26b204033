"""The command line of a guest, from its layout. Pure.

Everything that can be is passed as JSON, so that no name or path is ever parsed as an option. All devices have fixed
addresses: the same layout gives the same guest-visible hardware on every host. See `layout` for the names of nodes.

The graph of a disk: device -> NAME (throttle filter) -> NAME.format -> NAME.file, and below the format node
NAME.base0, NAME.base1 ... The throttle filter stays where it is when the image below it is exchanged, so that NAME
always means "this disk"; being a filter (unlike `raw`), it lets a mirror of NAME see the backing chain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vmferry.model.errors import WrongInput
from vmferry.model.vm import DirectBoot, Disk, FirmwareBoot, Nic
from vmferry.qemu.layout import (
    CONSOLE_LOG,
    FIRMWARE_CODE_NODE,
    FIRMWARE_VARIABLES_NODE,
    TWIN_MEMORY,
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

_FIRST_DISK_SLOT = 0x03
_FIRST_NIC_SLOT = 0x10
MAX_DISKS = _FIRST_NIC_SLOT - _FIRST_DISK_SLOT
MAX_NICS = 0x1A - _FIRST_NIC_SLOT  # 0x1a and above belong to the ICH9 of q35
RAM_ID = "pc.ram"  # QEMU's own name: also accepts the stream of a guest that was started without a backend object
_WORD = re.compile(r"[A-Za-z0-9._+=,-]+\Z")  # the two that QEMU parses itself: machine and CPU
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

# `suppress-vmdesc`: QEMU would write a description of its whole state for tools that read a stream from a file, 5 ms of
# the blackout. Both ends must have it alike: the one that expects it waits for it.
# `sata`, `smbus`: controllers without devices, whose state would be moved all the same.
_MACHINE_OPTIONS = "usb=off,vmport=off,sata=off,smbus=off,dump-guest-core=off,suppress-vmdesc=on"


def build_command(layout: GuestLayout, listen: ListenFds) -> list[str]:
    """The whole command line. Raises WrongInput for more devices than there are addresses or descriptors."""
    _require_fitting(layout)
    return [
        layout.binary,
        *_machine(layout),
        *_boot(layout),
        *_channels(layout, listen),
        *_disks(layout),
        *_nics(layout),
        *(["-incoming", "defer"] if layout.incoming else []),
        *(["-S"] if layout.incoming or layout.twin or layout.paused else []),
        *(["-sandbox", _SANDBOX] if layout.sandbox else []),
    ]


def _require_fitting(layout: GuestLayout) -> None:
    spec = layout.spec
    if "," in spec.machine or not _WORD.match(spec.machine) or not _WORD.match(spec.cpu):
        raise WrongInput("bad-machine", f"{spec.machine!r} with CPU {spec.cpu!r} is no machine.", "See `host probe`.")
    if len(spec.disks) > MAX_DISKS:
        raise WrongInput("too-many-disks", f"{len(spec.disks)} disks do not fit.", f"At most {MAX_DISKS} are possible.")
    if len(spec.nics) > MAX_NICS:
        raise WrongInput("too-many-nics", f"{len(spec.nics)} NICs do not fit.", f"At most {MAX_NICS} are possible.")
    if not layout.twin and len(layout.tap_fds) != len(spec.nics):
        raise WrongInput("tap-missing", f"{len(spec.nics)} NICs need as many taps, not {len(layout.tap_fds)}.")


def _machine(layout: GuestLayout) -> list[str]:
    spec = layout.spec
    memory = _twin_memory(layout) if layout.twin else {"qom-type": "memory-backend-ram"}
    memory |= {"id": RAM_ID, "size": spec.memory_bytes}
    flash = f",pflash0={FIRMWARE_CODE_NODE},pflash1={FIRMWARE_VARIABLES_NODE}" if layout.firmware else ""
    return [
        *("-name", f"guest={spec.name},debug-threads=on"),
        *("-nodefaults", "-no-user-config"),
        *("-display", "none"),
        *("-msg", "timestamp=on"),
        *("-object", _json(memory)),
        *("-machine", f"{spec.machine},{_MACHINE_OPTIONS},memory-backend={RAM_ID}{flash}"),
        *("-accel", "tcg,thread=multi" if layout.accel == "tcg" else layout.accel),
        *("-cpu", spec.cpu),
        *("-m", f"size={spec.memory_bytes // 1024}K"),
        *("-smp", f"{spec.cpus},sockets=1,cores={spec.cpus},threads=1"),
        *("-uuid", guest_uuid(spec.id)),
        *("-rtc", "base=utc"),
    ]


def _twin_memory(layout: GuestLayout) -> dict[str, Any]:
    """A sparse file that is never written: only memory of a named file is left out by `x-ignore-shared`.

    Any other is not (migrate_ram_is_ignored in QEMU's migration/ram.c): all of it would be read.
    """
    return {"qom-type": "memory-backend-file", "share": True, "mem-path": str(layout.run_dir / TWIN_MEMORY)}


def _boot(layout: GuestLayout) -> list[str]:
    boot = layout.spec.boot
    if layout.twin and isinstance(boot, DirectBoot):
        return []  # it never boots, and the target of a rehearsal has not got the files yet
    if isinstance(boot, DirectBoot):
        arguments = ["-kernel", str(layout.boot_dir / boot.kernel)]
        if boot.initrd is not None:
            arguments += ["-initrd", str(layout.boot_dir / boot.initrd)]
        return [*arguments, "-append", boot.cmdline]
    arguments = ["-boot", "strict=on"]
    if layout.firmware is not None:
        arguments += list(_flash(layout.firmware, layout.twin))
    elif boot.firmware != "bios":
        raise WrongInput(
            "firmware-missing", f"Firmware {boot.firmware!r} needs its files.", "Install the package ovmf."
        )
    return arguments


def _flash(firmware: FirmwareFiles, twin: bool) -> Iterator[str]:
    code: dict[str, Any] = {"driver": "file", "filename": str(firmware.code)}
    variables: dict[str, Any] = {"driver": "file", "filename": str(firmware.variables)}
    if twin:
        variables = _nothing(firmware.variables_bytes)
    yield from ("-blockdev", _json({"node-name": FIRMWARE_CODE_NODE, "driver": "raw", "read-only": True, "file": code}))
    yield from ("-blockdev", _json({"node-name": FIRMWARE_VARIABLES_NODE, "driver": "raw", "file": variables}))


def _channels(layout: GuestLayout, listen: ListenFds) -> list[str]:
    log = str(layout.run_dir / CONSOLE_LOG).replace(",", ",,")  # -chardev knows no JSON
    return [
        *("-chardev", f"socket,id=qmp,fd={listen.qmp},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=yank,fd={listen.yank},server=on,wait=off"),
        *("-mon", "chardev=yank,mode=control"),
        *("-chardev", f"socket,id=console,fd={listen.console},server=on,wait=off,logfile={log},logappend=on"),
        *("-device", _json({"driver": "isa-serial", "id": "serial0", "chardev": "console", "index": 0})),
    ]


def _disks(layout: GuestLayout) -> Iterator[str]:
    bootable = isinstance(layout.spec.boot, FirmwareBoot)
    for index, disk in enumerate(layout.spec.disks):
        yield from ("-object", _json({"qom-type": "throttle-group", "id": limits_id(disk.name)}))
        for node in _disk_nodes(disk, layout.access(disk.name), layout.twin):
            yield from ("-blockdev", _json(node))
        device: dict[str, Any] = {
            "driver": "virtio-blk-pci",
            "id": f"disk{index}",
            "drive": device_node(disk.name),
            "bus": "pcie.0",
            "addr": hex(_FIRST_DISK_SLOT + index),
            "serial": disk.name[:20],
            "num-queues": layout.spec.cpus,
            "write-cache": "on",
            "werror": "enospc",
            "rerror": "report",
        }
        if bootable:
            device["bootindex"] = index
        yield from ("-device", _json(device))


def _disk_nodes(disk: Disk, access: DiskAccess, twin: bool) -> Iterator[dict[str, Any]]:
    """The nodes of a disk, lowest first, because each refers to the one before."""
    top = {
        "driver": "throttle",
        "node-name": device_node(disk.name),
        "throttle-group": limits_id(disk.name),
        "file": format_node(disk.name),
        "discard": "unmap",
        "detect-zeroes": "unmap",
    }
    if twin:
        yield {**_nothing(disk.size_bytes), "node-name": format_node(disk.name)}
        yield top
        return
    backing: str | None = None
    layers = access.layers or ((Layer(disk.backing, "qcow2"),) if disk.backing else ())
    for depth in range(len(layers) - 1, -1, -1):
        yield _layer_node(disk.name, depth, layers[depth], access, backing)
        backing = layer_node(disk.name, depth)
    yield top_file(disk, access)
    yield top_format(disk, backing)
    yield top


def top_file(disk: Disk, access: DiskAccess) -> dict[str, Any]:
    """The protocol node of a disk's top layer."""
    options = dict(access.protocol) if access.protocol is not None else _file_options(disk.path, access)
    return {"node-name": file_node(disk.name), "discard": "unmap", **options}


def top_format(disk: Disk, backing: str | None) -> dict[str, Any]:
    """The format node of a disk's top layer. `backing` is explicit: the image's header is not asked."""
    node: dict[str, Any] = {
        "driver": disk.format,
        "node-name": format_node(disk.name),
        "file": file_node(disk.name),
        "discard": "unmap",
    }
    if disk.format == "qcow2":
        node["backing"] = backing
    elif disk.format == "raw":
        node["size"] = disk.size_bytes  # a device may be larger than what the guest sees
    return node


def _layer_node(name: str, depth: int, layer: Layer, access: DiskAccess, backing: str | None) -> dict[str, Any]:
    node: dict[str, Any] = {
        "driver": layer.format,
        "node-name": layer_node(name, depth),
        "read-only": True,
        "file": _file_options(layer.path, access),
    }
    if layer.format == "qcow2":
        node["backing"] = backing
    return node


def _file_options(path: str, access: DiskAccess) -> dict[str, Any]:
    driver = "host_device" if Path(path).is_relative_to("/dev") else "file"
    return {"driver": driver, "filename": path, "aio": access.aio, "cache": {"direct": access.direct}}


def _nothing(size_bytes: int) -> dict[str, Any]:
    return {"driver": "null-co", "size": size_bytes, "read-zeroes": True}


def _nics(layout: GuestLayout) -> Iterator[str]:
    for index, nic in enumerate(layout.spec.nics):
        device = _nic_device(index, nic)
        if not layout.twin:
            fd = str(layout.tap_fds[index])
            yield from ("-netdev", _json({"type": "tap", "id": f"net{index}", "fd": fd, "vhost": False}))
            device["netdev"] = f"net{index}"
        yield from ("-device", _json(device))


def _nic_device(index: int, nic: Nic) -> dict[str, Any]:
    return {
        "driver": "virtio-net-pci",
        "id": f"nic{index}",
        "mac": nic.mac,
        "host_mtu": nic.mtu,
        "romfile": "",
        "bus": "pcie.0",
        "addr": hex(_FIRST_NIC_SLOT + index),
    }


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
