"""What a host shows of itself and of its VMs to CLI, API and pages."""

from __future__ import annotations

from dataclasses import dataclass

from vmferry.model.vm import RunState, VmSpec


@dataclass(frozen=True, slots=True)
class PoolView:
    """A pool with its room in bytes; `problem` says why it cannot be used, if so."""

    name: str
    kind: str
    path: str
    total_bytes: int
    free_bytes: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class SwitchView:
    """A virtual switch; `problem` says why it cannot be used, if so."""

    name: str
    kind: str
    device: str
    mtu: int
    uplinks: tuple[str, ...]
    ports: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class HostView:
    """A host. `reachable` is False for a peer that did not answer; then only name and address are known."""

    name: str
    address: str
    reachable: bool
    version: str = ""
    accel: str = ""
    accel_reason: str = ""
    qemu_version: str = ""
    kernel: str = ""
    cpus: int = 0
    memory_total_bytes: int = 0
    memory_free_bytes: int = 0
    vms: int = 0
    pools: tuple[PoolView, ...] = ()
    switches: tuple[SwitchView, ...] = ()
    certificate_expires_at: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class VmView:
    """A VM on the host that owns it. `console` is the path of its serial console's Unix socket while it runs."""

    spec: VmSpec
    host: str
    state: RunState
    pid: int = 0
    console: str = ""
    migration: str = ""
    problem: str = ""
