"""What a guest process is made of, and the names of its parts inside QEMU. Pure, for `qemu/` and `migration/`.

Names inside QEMU must start with a letter, have no blank in them and be at most 31 characters long
(`id_wellformed`, `node_name[32]`); a disk's name is a DNS label of up to 63 characters. A dot cannot occur in a disk's
name, so that parts named with one never collide with another disk.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmferry.model.vm import VmSpec

_LONGEST_STEM = 22
_UUID_SPACE = uuid.UUID("0d6c3a5e-7f0b-5d8e-9a35-5f3f6f1f7a11")

QMP_SOCKET = "qmp.sock"
YANK_SOCKET = "yank.sock"
CONSOLE_SOCKET = "console.sock"
QEMU_LOG = "qemu.log"
CONSOLE_LOG = "console.log"
TWIN_MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Layer:
    """A frozen layer below a disk's top: absolute path and format ("qcow2" | "raw")."""

    path: str
    format: str


@dataclass(frozen=True, slots=True)
class DiskAccess:
    """How a disk's files are opened. `protocol` replaces the plain file of the top layer (a QMP BlockdevOptions)."""

    direct: bool = False  # O_DIRECT
    aio: str = "threads"  # or "io_uring" where the host has it
    layers: tuple[Layer, ...] = ()  # below the top, nearest first; empty: Disk.backing as qcow2, if there is one
    protocol: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class FirmwareFiles:
    """UEFI: the read-only code, and the VM's own variables (both raw; sizes in bytes are the guest's flash)."""

    code: Path
    code_bytes: int
    variables: Path
    variables_bytes: int


@dataclass(frozen=True, slots=True)
class GuestLayout:
    """All that a guest's command line is made of.

    `boot_dir` is what a DirectBoot's paths are relative to; `run_dir` gets sockets and logs. One tap descriptor a NIC,
    in order (a twin needs none). `incoming`: waits for a migration, stopped. `twin`: the same devices without images
    and without peers, stopped, for a rehearsal; with `incoming` it is the rehearsal's target.
    """

    spec: VmSpec
    run_dir: Path
    boot_dir: Path
    accel: str  # "kvm" | "tcg"
    binary: str = "qemu-system-x86_64"
    tap_fds: tuple[int, ...] = ()
    incoming: bool = False
    twin: bool = False
    paused: bool = False
    disks: Mapping[str, DiskAccess] = field(default_factory=dict)
    firmware: FirmwareFiles | None = None
    sandbox: bool = True

    def access(self, disk_name: str) -> DiskAccess:
        """How the disk is opened; the default where nothing was said."""
        return self.disks.get(disk_name) or DiskAccess()


@dataclass(frozen=True, slots=True)
class ListenFds:
    """Listening Unix sockets that QEMU inherits: it answers on them from its start, whatever their path is called."""

    qmp: int
    yank: int
    console: int


def guest_uuid(vm_id: str) -> str:
    """The VM's id if it is a UUID, else one derived from it (always the same): what `validate-uuid` compares."""
    try:
        return str(uuid.UUID(vm_id))
    except ValueError:
        return str(uuid.uuid5(_UUID_SPACE, vm_id))


def device_node(disk_name: str) -> str:
    """The node that the guest's device uses, that mirrors start from and that exports are put on."""
    if disk_name[0].isalpha() and len(disk_name) <= _LONGEST_STEM:
        return disk_name
    return "d_" + disk_name[:11] + "_" + hashlib.sha256(disk_name.encode()).hexdigest()[:8]


def format_node(disk_name: str) -> str:
    """The top layer's format node (qcow2 or raw), below `device_node`."""
    return device_node(disk_name) + ".format"


def file_node(disk_name: str) -> str:
    """The top layer's protocol node (the file), below `format_node`."""
    return device_node(disk_name) + ".file"


def layer_node(disk_name: str, depth: int) -> str:
    """The format node of a frozen layer; depth 0 is the one next to the top."""
    return f"{device_node(disk_name)}.base{depth}"


def limits_id(disk_name: str) -> str:
    """The throttle group of the disk (no limits unless set)."""
    return device_node(disk_name) + ".limits"


FIRMWARE_CODE_NODE = "firmware.code"
FIRMWARE_VARIABLES_NODE = "firmware.vars"
