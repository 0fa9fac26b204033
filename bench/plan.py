"""What is measured: the guest, its loads, the tools. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vmferry.lab.guest import guest_cmdline

MEMORY_MIB = 512
DISK_GIB = 2
FILL_MIB = 400
LINK_BPS = 10**9
MAC = "52:54:00:be:5c:01"
ADDRESS = "10.77.0.60"
UDP_PORT = 7
CPU_MODEL = "qemu64"


@dataclass(frozen=True, slots=True)
class Load:
    """What the guest does while it is moved; `options` go on its kernel command line (vmferry.lab.guest)."""

    name: str
    title: str
    options: dict[str, int]

    @property
    def cmdline(self) -> str:
        return guest_cmdline(ip=f"{ADDRESS}/24", udp=UDP_PORT, beat=0, **self.options)


LOADS = {
    load.name: load
    for load in (
        Load("idle", "idle", {}),
        Load("dirty", "30 MB/s of memory dirtied", {"dirty": 30, "wss": 64}),
        Load("disk", "disk workload (100 records a second, each synced)", {"disk": 1, "diskrate": 100}),
    )
}


@dataclass(frozen=True, slots=True)
class Tool:
    """One of the ways to migrate. `limit_ms` is QEMU's downtime limit where the tool's own default is not used."""

    name: str
    title: str
    limit_ms: int = 0


OURS, VIRSH, VIRSH_TUNED, BARE, BARE_TUNED = "vmferry", "virsh", "virsh-50", "bare-300", "bare-50"
TOOLS = {
    tool.name: tool
    for tool in (
        Tool(OURS, "vmferry vm migrate (defaults, disks verified)"),
        Tool(VIRSH, "virsh migrate --live --copy-storage-all"),
        Tool(VIRSH_TUNED, "the same after migrate-setmaxdowntime 50", 50),
        Tool(BARE, "bare QMP script, limit 300 ms", 300),
        Tool(BARE_TUNED, "bare QMP script, limit 50 ms", 50),
    )
}


@dataclass(frozen=True, slots=True)
class GuestPlan:
    """One guest of one run. `template` is the disk to copy; the copy is the tool's affair and is not timed."""

    kernel: Path
    initrd: Path
    template: Path
    load: Load


class Contender(Protocol):
    """A tool under measurement. One guest at a time: `start`, `migrate`, `clear`, and again."""

    def start(self, plan: GuestPlan) -> None:
        """The guest boots on host1."""
        ...

    def migrate(self) -> dict[str, Any]:
        """Moves it to host2; what the tool itself says of it. This call is what is timed."""
        ...

    def details(self) -> dict[str, Any]:
        """More that the tool says of the last migration; not timed."""
        ...

    def clear(self) -> None:
        """The guest and its images are gone from both hosts, whatever happened before."""
        ...


@dataclass(frozen=True, slots=True)
class Measured:
    """One run. Times in milliseconds; None where it was not seen (then `fault` says why).

    `blackout_ms`: the source's STOP to the target's RESUME, from the events' own timestamps. `gap_ms`: the client's
    longest gap. `switch_gap_ms`: its longest gap that overlaps the blackout. `lost_at_switch`: probes lost that were
    sent in or close to the blackout, `lost_requests` those that never got to the guest. `others`: which part of the
    processors' time others used during the migration.
    """

    tool: str
    load: str
    run: int
    fault: str = ""
    blackout_ms: float | None = None
    gap_ms: float | None = None
    switch_gap_ms: float | None = None
    lost: int | None = None
    lost_at_switch: int | None = None
    total_ms: float | None = None
    wire_bytes: int | None = None
    back_bytes: int | None = None
    pauses_ms: tuple[float, ...] = ()
    load_average: float = 0.0
    others: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    lost_runs: tuple[dict[str, Any], ...] = ()
    lost_requests: int = 0

    @property
    def beyond_ms(self) -> float | None:
        """How much longer than the blackout the client waited."""
        if self.switch_gap_ms is None or self.blackout_ms is None:
            return None
        return self.switch_gap_ms - self.blackout_ms
