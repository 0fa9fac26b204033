"""What each side of a migration writes down, and which changes of it are allowed.

Durable: every value here is in the host's journal before the act that it announces (design.md, invariant 5). Imported
by both sides' engines and by the journal; no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vmferry.model.errors import Conflict
from vmferry.model.migration import Role
from vmferry.model.vm import VmSpec


class RecordState(StrEnum):
    """How far a migration is, in the words of the handoff (design.md, "Handoff in detail").

    Source: active -> handed-over -> taken -> ended, or active -> ended (it failed and the guest is here), or
    handed-over -> ended (the target has proven that it refused). Target: active -> taken -> ended, or
    active -> refused -> ended.
    """

    ACTIVE = "active"
    HANDED_OVER = "handed-over"
    TAKEN = "taken"
    REFUSED = "refused"
    ENDED = "ended"


_ALLOWED: dict[Role, frozenset[tuple[RecordState, RecordState]]] = {
    Role.SOURCE: frozenset(
        {
            (RecordState.ACTIVE, RecordState.HANDED_OVER),
            (RecordState.ACTIVE, RecordState.ENDED),
            (RecordState.HANDED_OVER, RecordState.TAKEN),
            (RecordState.HANDED_OVER, RecordState.ENDED),
            (RecordState.TAKEN, RecordState.ENDED),
        }
    ),
    Role.TARGET: frozenset(
        {
            (RecordState.ACTIVE, RecordState.TAKEN),
            (RecordState.ACTIVE, RecordState.REFUSED),
            (RecordState.TAKEN, RecordState.ENDED),
            (RecordState.REFUSED, RecordState.ENDED),
        }
    ),
}


def require_transition(role: Role, old: RecordState, new: RecordState) -> None:
    """Raises Conflict `bad-transition` unless this side may go from `old` to `new`."""
    if (old, new) not in _ALLOWED[role]:
        raise Conflict(
            "bad-transition", f"A migration's {role} cannot go from {old} to {new}.", "Look at its state again."
        )


@dataclass(frozen=True, slots=True)
class Reserved:
    """What a side made, or is about to make, for this migration, so that it can be found and removed after a crash."""

    images: tuple[str, ...] = ()
    run_dir: str = ""
    vm_dir: str = ""
    gate_id: str = ""
    pid: int = 0
    start_ticks: int = 0


@dataclass(frozen=True, slots=True)
class AsideImage:
    """A source image that was renamed after the handoff; deleted or kept once the target's guest is seen to run."""

    disk: str
    path: str


@dataclass(frozen=True, slots=True)
class MigrationRecord:
    """One side's durable memory of one migration.

    `generation` is the one the target will own (the source's plus one). `spec` is the VM as this side would run it.
    """

    id: str
    role: Role
    vm_id: str
    vm_name: str
    peer: str
    generation: int
    state: RecordState
    spec: VmSpec
    reserved: Reserved = Reserved()
    keep_source: bool = False
    was_taken: bool = False  # the target's: it has owned the VM, whatever became of it later
