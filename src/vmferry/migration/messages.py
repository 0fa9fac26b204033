"""What two hosts say to each other about a migration: requests of the source, answers of the target.

One dataclass a message; `vmferry.host.peering` carries them over mutual TLS. Every request that changes something names
its migration, so that a late one is recognised and dropped. `REPLIES` is the protocol's table of contents.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmferry.migration.handoff import PeerSays
from vmferry.model.findings import Finding
from vmferry.model.migration import MigrateOptions
from vmferry.model.vm import VmSpec
from vmferry.qemu.cpu import CpuFeatures

PROTOCOL_VERSION = 1


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What the target must know of the source to check the migration from its side."""

    host: str
    protocol: int
    qemu_version: str
    accel: str
    cpu: CpuFeatures
    machine: str
    clock_unix_ms: float
    switch_mtu: dict[str, int]
    disk_bytes: dict[str, int]  # allocated, what has to fit


@dataclass(frozen=True, slots=True)
class CheckTarget:
    """Is this VM welcome? Nothing changes."""

    spec: VmSpec
    options: MigrateOptions
    facts: SourceFacts


@dataclass(frozen=True, slots=True)
class TargetChecked:
    """All that the target found, and what the source needs for its half of the comparison."""

    findings: tuple[Finding, ...]
    clock_unix_ms: float
    qemu_version: str
    accel: str
    capabilities: tuple[str, ...]
    migration_address: str


@dataclass(frozen=True, slots=True)
class ListenForProbe:
    """Put a spare port on `switch` and wait there for frames of these sizes with this nonce."""

    switch: str
    nonce: str
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProbeListening:
    """The spare port's MAC, to which the source now sends."""

    mac: str


@dataclass(frozen=True, slots=True)
class CollectProbe:
    """Which of the probe's frames came? Removes the spare port."""

    nonce: str


@dataclass(frozen=True, slots=True)
class ProbeSeen:
    """Sizes (bytes of the whole frame) that arrived."""

    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rehearse:
    """Start an un-booted twin that takes an incoming migration."""

    spec: VmSpec
    nonce: str
    streams_from: str  # as in `Prepare`


@dataclass(frozen=True, slots=True)
class RehearsalReady:
    """Where the twin listens."""

    port: int


@dataclass(frozen=True, slots=True)
class EndRehearsal:
    """How did it go? Removes the twin."""

    nonce: str


@dataclass(frozen=True, slots=True)
class RehearsalEnded:
    """`problem` is empty when the twin took everything."""

    ok: bool
    problem: str


@dataclass(frozen=True, slots=True)
class Prepare:
    """Reserve everything. `spec` is the source's; pools and switches are mapped by the options."""

    migration_id: str
    spec: VmSpec
    options: MigrateOptions
    source: str
    source_address: str
    streams_from: str  # memory and disks come from this address: the target's QEMU accepts no other one
    generation: int
    running: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """Where to send. `spec` is the VM as the target will run it."""

    spec: VmSpec
    memory_port: int
    disk_port: int
    boot_files: tuple[str, ...]  # those that the target lacks and now awaits
    vni: int


@dataclass(frozen=True, slots=True)
class PutBootFile:
    """A part of a kernel or initramfs, sent beside this message, at that offset in bytes.

    The last one completes the file, and its digest is checked.
    """

    migration_id: str
    name: str
    offset: int
    last: bool


@dataclass(frozen=True, slots=True)
class Done:
    """It was done."""


@dataclass(frozen=True, slots=True)
class StartGuest:
    """All boot files are there: start the waiting QEMU."""

    migration_id: str


@dataclass(frozen=True, slots=True)
class RedigestDisk:
    """Read these extents again (offset, length, ...), as pairs in one flat tuple; their chunks are digested anew."""

    migration_id: str
    disk: str
    extents: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DiskDigested:
    """The digests of the chunks that were read, as `vmferry.storage.digest.pack_part` packs them."""

    digests: str


@dataclass(frozen=True, slots=True)
class StandBy:
    """The switchover comes soon: write out what is in the caches, map what will be read."""

    migration_id: str


@dataclass(frozen=True, slots=True)
class DisksComplete:
    """The mirrors have ended and the disks are equal: end the exports, while the state comes."""

    migration_id: str


@dataclass(frozen=True, slots=True)
class PlugPorts:
    """Put the VM's ports into their switches, correct the tables, announce once."""

    migration_id: str


@dataclass(frozen=True, slots=True)
class AwaitLoaded:
    """Answered when the guest's state is complete here (or failed). Asked before the guest is stopped.

    `memory_digest`: digest its memory then.
    """

    migration_id: str
    memory_digest: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """`problem` is empty when all state is here. `waited_ms` counts from the end of the stream, for the receipt."""

    problem: str
    memory_digest: str = ""
    digest_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Take:
    """The source has durably handed over: take the VM and run it. Idempotent."""

    migration_id: str
    generation: int
    run: bool


@dataclass(frozen=True, slots=True)
class Taken:
    """The VM is the answering host's. `resumed_ago_ms`: since the guest's RESUME, by this host's clock."""

    resumed_ago_ms: float
    journal_ms: float
    cont_ms: float


@dataclass(frozen=True, slots=True)
class Abort:
    """The migration failed before the handoff: refuse durably and remove everything."""

    migration_id: str
    why: str


@dataclass(frozen=True, slots=True)
class ReturnFrames:
    """Rollback after the gate was closed: send the held frames back."""

    migration_id: str


@dataclass(frozen=True, slots=True)
class FramesReturned:
    """How many went back."""

    frames: int


@dataclass(frozen=True, slots=True)
class Inquire:
    """What does your journal say? With `refuse`, an active target refuses for good first.

    Without a record it only says so: a journal that was lost may have known of a guest that still runs.
    """

    migration_id: str
    vm_id: str
    generation: int
    refuse: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """The journal's word."""

    says: PeerSays


@dataclass(frozen=True, slots=True)
class AnnounceAgain:
    """The source's port is gone: say once more where the VM is, so that the source's switch can be seen to learn it."""

    migration_id: str


@dataclass(frozen=True, slots=True)
class AskRunning:
    """Has the guest been seen to run here since the take?"""

    migration_id: str


@dataclass(frozen=True, slots=True)
class RunningSeen:
    """`running`: its vCPUs advanced. Frames as counted at the new port."""

    running: bool
    held: int
    dropped: int
    mac_seen: bool | None


@dataclass(frozen=True, slots=True)
class Finish:
    """Clean up, keep the receipt (canonical JSON)."""

    migration_id: str
    receipt: dict[str, object] = field(default_factory=dict)


Request = (
    CheckTarget
    | ListenForProbe
    | CollectProbe
    | Rehearse
    | EndRehearsal
    | Prepare
    | PutBootFile
    | StartGuest
    | RedigestDisk
    | StandBy
    | PlugPorts
    | DisksComplete
    | AwaitLoaded
    | Take
    | Abort
    | ReturnFrames
    | AnnounceAgain
    | Inquire
    | AskRunning
    | Finish
)

REPLIES: dict[type, type] = {
    CheckTarget: TargetChecked,
    ListenForProbe: ProbeListening,
    CollectProbe: ProbeSeen,
    Rehearse: RehearsalReady,
    EndRehearsal: RehearsalEnded,
    Prepare: Prepared,
    PutBootFile: Done,
    StartGuest: Prepared,
    RedigestDisk: DiskDigested,
    StandBy: Done,
    PlugPorts: Done,
    DisksComplete: Done,
    AwaitLoaded: Loaded,
    Take: Taken,
    Abort: Done,
    ReturnFrames: FramesReturned,
    AnnounceAgain: Done,
    Inquire: Answer,
    AskRunning: RunningSeen,
    Finish: Done,
}
