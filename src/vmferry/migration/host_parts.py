"""What a host lends to the engine of a migration: its name, places, limits, journal. Filled in by `vmferry.host`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vmferry.migration.records import MigrationRecord, RecordState
from vmferry.model.migration import MigrationView
from vmferry.model.names import require_name
from vmferry.network.netlink import Netlink
from vmferry.network.switches import SwitchConfig
from vmferry.qemu.features import QemuFeatures
from vmferry.qemu.process import GuestUser
from vmferry.storage.pool import DirectoryPool


class MigrationJournal(Protocol):
    """The part of the host's journal that a migration writes. Every call is durable when it returns."""

    async def begin_migration(self, record: MigrationRecord, view: MigrationView | None = None) -> None:
        """Writes the intent. Raises Conflict when the VM is in another migration, or its name is taken."""
        ...

    async def update_migration(self, record: MigrationRecord) -> None:
        """Changes what is reserved."""
        ...

    async def move(self, record: MigrationRecord, new: RecordState, *, wanted: str = "running") -> MigrationRecord:
        """Compare-and-set of the state with what it means for the VM. Raises Conflict."""
        ...

    async def set_process(self, vm_id: str, pid: int, start_ticks: int) -> None:
        """The guest's process."""
        ...

    async def save_document(self, migration_id: str, kind: str, document: object) -> None:
        """Keeps a check's result or a receipt."""
        ...


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How long before a watchdog gives up, in seconds (the configuration's [limits] explains each)."""

    request_s: float
    prepare_s: float
    start_s: float
    qemu_silence_s: float
    disk_stall_s: float
    memory_stall_s: float
    switchover_s: float
    stopped_s: float
    handoff_retry_s: float
    forward_s: float
    incoming: int
    outgoing: int
    memory_reserve_bytes: int
    clock_difference_ms: int
    bandwidth_bps: int  # for each migration of this host at the most, 0: no limit


@dataclass(frozen=True, slots=True)
class HostParts:
    """One host, as the engine sees it. `stream_dir` None: memory and disk streams are not encrypted."""

    name: str
    address: str
    binary: str
    accel: str
    features: QemuFeatures
    user: GuestUser | None
    state_dir: Path
    run_dir: Path
    pools: Mapping[str, DirectoryPool]
    switches: Mapping[str, SwitchConfig]
    netlink: Netlink
    journal: MigrationJournal
    limits: EngineLimits
    stream_dir: Path | None
    gate_port: int
    version: str

    def vm_dir(self, vm_id: str) -> Path:
        """Where a VM's boot files are kept. Raises WrongInput `bad-name` for an id that would lead elsewhere."""
        return self.state_dir / "vms" / require_name(vm_id, "VM id")

    def guest_dir(self, vm_id: str) -> Path:
        """Where a running guest's sockets and logs are."""
        return self.run_dir / "guests" / require_name(vm_id, "VM id")
