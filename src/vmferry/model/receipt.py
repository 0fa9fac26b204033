"""The record of a finished migration (interface.md, "The receipt"). Times are RFC 3339, sizes bytes."""

from __future__ import annotations

from dataclasses import dataclass

from vmferry.model.migration import MigrateOptions, Mode, Outcome, PhaseTime, Range


@dataclass(frozen=True, slots=True)
class PredictedTimes:
    """What the check predicted, to be held against what was measured."""

    total_ms: Range
    blackout_ms: Range


@dataclass(frozen=True, slots=True)
class Bytes:
    """What went over the wire for memory and disks, and what the target already had."""

    memory: int
    disks: int
    layers_reused: int = 0


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames for the VM around the blackout.

    `held` waited in the target's port for the guest, however they got there. `forwarded` were sent on by the source
    since its gate closed, broadcasts and what the old guest had not got included. `lost` could not be kept.
    """

    held: int
    forwarded: int
    lost: int


@dataclass(frozen=True, slots=True)
class MemoryDigests:
    """Digest of guest memory on each side while no vCPU ran."""

    source: str
    target: str
    equal: bool


@dataclass(frozen=True, slots=True)
class DiskDigests:
    """Digest of a disk's guest-visible content on each side at the switchover."""

    name: str
    layer: str
    source: str
    target: str
    equal: bool


@dataclass(frozen=True, slots=True)
class Verified:
    """What was compared before the handoff; None or empty where the user asked for less."""

    memory: MemoryDigests | None
    disks: tuple[DiskDigests, ...]


@dataclass(frozen=True, slots=True)
class NetworkProof:
    """Whether a probe frame passed between the hosts' switches before, and the VM's MAC was seen in place after."""

    reachable_before: bool | None
    reachable_after: bool | None


@dataclass(frozen=True, slots=True)
class Step:
    """One timed step of the switchover path, milliseconds since the source's STOP."""

    name: str
    at_ms: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """See interface.md. `signature` is the source host's over the canonical JSON of everything else."""

    id: str
    vm: str
    kind: Mode
    source: str
    target: str
    outcome: Outcome
    started_at: str
    phases: tuple[PhaseTime, ...]
    total_ms: float
    blackout_ms: float | None  # None: not measured (the answer was lost, or the daemon restarted meanwhile)
    predicted: PredictedTimes | None
    rounds: int
    bytes: Bytes
    frames: Frames
    verified: Verified
    network: NetworkProof
    options: MigrateOptions
    versions: dict[str, str]
    generation: int
    switchover: tuple[Step, ...] = ()
    signature: str = ""
