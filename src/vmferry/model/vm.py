"""What a VM is: a spec with an identity that outlives any process.

Plain frozen dataclasses; the wire and the journal encode them with `vmferry.api.codec`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RunState(StrEnum):
    """What a host says of a VM it owns. `unknown` is said only when the guest cannot be asked."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class DirectBoot:
    """Kernel and initramfs in the host's store; paths are relative to the VM's directory there."""

    kernel: str
    initrd: str | None
    cmdline: str


@dataclass(frozen=True, slots=True)
class FirmwareBoot:
    """Boot from the first disk through `bios` (SeaBIOS) or `uefi` (OVMF)."""

    firmware: str


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk: `size_bytes` is what the guest sees; `path` is the top layer's absolute path on the owning host."""

    name: str
    pool: str
    size_bytes: int
    format: str  # "qcow2" | "raw"
    path: str
    backing: str | None = None  # absolute path of a shared base layer on the owning host


@dataclass(frozen=True, slots=True)
class Nic:
    """A network card on a virtual switch. `mtu` is what the guest is told (virtio host_mtu)."""

    switch: str
    mac: str
    mtu: int = 1500


@dataclass(frozen=True, slots=True)
class VmSpec:
    """A VM as its owner holds it.

    `machine` is a concrete QEMU machine type (never an alias) and `cpu` a complete -cpu argument, both resolved when
    the VM is created, so that the same guest-visible hardware can be built on another host.
    """

    id: str
    name: str
    cpus: int
    memory_bytes: int
    machine: str
    cpu: str
    boot: DirectBoot | FirmwareBoot
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    generation: int = 1
