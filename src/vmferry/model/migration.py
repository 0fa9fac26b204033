"""What a migration is: options, phases, states, progress, prediction. The same words in code, API and database."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from vmferry.model.errors import WrongInput
from vmferry.model.findings import Finding


class Mode(StrEnum):
    """How the VM moves. Only `live` is there yet; `quick` saves, moves and restores, `cold` moves a stopped VM."""

    LIVE = "live"


class PostCopy(StrEnum):
    """Whether memory may be fetched after the switchover (then a failure of either host loses the guest)."""

    NEVER = "never"
    ALLOW = "allow"


class Verify(StrEnum):
    """Which digests are compared before the handoff. `all` adds the guest's memory, hashed while it is stopped."""

    NONE = "none"
    DISKS = "disks"
    ALL = "all"


class Phase(StrEnum):
    """The phases of a migration, in order (design.md, section 3)."""

    CHECK = "check"
    PREPARE = "prepare"
    COPY = "copy"
    SWITCHOVER = "switchover"
    HANDOFF = "handoff"
    FINISH = "finish"


class Outcome(StrEnum):
    """How a migration ended, or that it has not. `unknown` waits for the peer or for `migration recover`."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


class Role(StrEnum):
    """Which side of a migration this host's record describes."""

    SOURCE = "source"
    TARGET = "target"


@dataclass(frozen=True, slots=True)
class MigrateOptions:
    """What the user asked for.

    `bandwidth_bps` is one budget for memory and disks together, 0 for no limit. `storage` maps disk names to pools on
    the target ("" maps every disk that is not named), `network` maps switches of the source to switches of the target.
    """

    max_blackout_ms: int = 300
    deadline_ms: int = 0
    bandwidth_bps: int = 0
    max_slowdown_percent: int = 50
    post_copy: PostCopy = PostCopy.NEVER
    verify: Verify = Verify.DISKS
    keep_source: bool = False
    mode: Mode = Mode.LIVE
    storage: dict[str, str] = field(default_factory=dict)
    network: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.max_blackout_ms <= 60_000:
            raise WrongInput(
                "bad-max-blackout", "The longest blackout must be 1ms to 60s.", "Try --max-blackout 300ms."
            )
        if self.deadline_ms < 0 or self.bandwidth_bps < 0 or 0 < self.bandwidth_bps < 1_000_000:
            raise WrongInput(
                "bad-limit", "A deadline or bandwidth is too small.", "Give at least 1mbit, or leave it out."
            )
        if not 0 <= self.max_slowdown_percent <= 99:
            raise WrongInput("bad-max-slowdown", "The slowdown must be 0% to 99%.", "Try --max-slowdown 50%.")
        if self.verify is Verify.ALL and self.post_copy is PostCopy.ALLOW:
            raise WrongInput(
                "no-proof-of-post-copy",
                "Memory that follows a guest which runs already cannot be compared.",
                "Leave out --post-copy allow, or verify the disks only (--verify disks).",
            )


@dataclass(frozen=True, slots=True)
class Range:
    """A predicted value with its honest bounds."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is expected before anything moves. `feasible` is false with the reason when the goal cannot be met."""

    memory_bytes: int
    disk_bytes: int
    total_ms: Range
    blackout_ms: Range
    rounds: int
    dirty_bytes_per_s: int
    link_bytes_per_s: int
    feasible: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """All findings of both hosts, and the prediction when the check got that far."""

    vm: str
    source: str
    target: str
    ok: bool
    findings: tuple[Finding, ...]
    prediction: Prediction | None = None


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """When a phase began and ended (RFC 3339, UTC); `ended_at` is empty while it runs."""

    name: Phase
    started_at: str
    ended_at: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a running migration stands. Rates are bytes per second; `eta_ms` is what is left, as a range.

    Of the disks what has to be sent counts: not their holes.
    """

    disk_total_bytes: int = 0
    disk_done_bytes: int = 0
    disk_rate: int = 0
    memory_total_bytes: int = 0
    memory_remaining_bytes: int = 0
    memory_sent_bytes: int = 0
    memory_rate: int = 0
    dirty_rate: int = 0
    rounds: int = 0
    throttle_percent: int = 0
    blackout_ms: Range | None = None
    eta_ms: Range | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a migration ended as it did, or what it waits for: a stable code, what happened, what to do."""

    code: str
    message: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class MigrationView:
    """A migration as its host shows it to CLI, API and pages."""

    id: str
    vm: str
    vm_id: str
    role: Role
    source: str
    target: str
    mode: Mode
    phase: Phase
    outcome: Outcome
    generation: int
    started_at: str
    ended_at: str
    phases: tuple[PhaseTime, ...]
    progress: Progress
    options: MigrateOptions
    reason: Reason | None = None
    prediction: Prediction | None = None
    blackout_ms: float | None = None
    total_ms: float | None = None
