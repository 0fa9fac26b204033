"""The decision after any interruption: from what both sides wrote down and what is seen, to the next act.

Pure. Used by the running engine and by recovery alike; the rules are design.md's invariants 1, 2 and 4. What is not in
the table is *unknown*, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vmferry.migration.records import RecordState


class GuestSeen(StrEnum):
    """What this host sees of the guest's QEMU process.

    `loaded`: an incoming guest that has all of its state, paused, never run here. `incoming`: not all there yet.
    """

    RUNNING = "running"
    PAUSED = "paused"
    INCOMING = "incoming"
    LOADED = "loaded"
    GONE = "gone"


class PeerSays(StrEnum):
    """What the other side answered about this migration. `absent`: it answered, and has no record of it."""

    UNREACHABLE = "unreachable"
    ABSENT = "absent"
    ACTIVE = "active"
    HANDED_OVER = "handed-over"
    TAKEN = "taken"
    REFUSED = "refused"
    ENDED_HERE = "ended-here"  # ended, and the answering side owns the VM or its successor
    ENDED_AWAY = "ended-away"  # ended, and the answering side does not own it


class Act(StrEnum):
    """What to do next."""

    RUN_HERE = "run-here"  # the guest is ours: undo the migration and let it run
    ASK_REFUSAL = "ask-refusal"  # make the target write down that it will not take; then look again
    TAKE_BACK = "take-back"  # the target has refused for good: the VM is ours again
    FINISH = "finish"  # the target has it: forward only
    TAKE = "take"  # the source has handed over: write "mine", run
    REFUSE = "refuse"  # write down that we will not take, then remove everything
    CLEAN_UP = "clean-up"  # ended: remove what is left
    WAIT = "wait"  # unknown: ask again later, or `migration recover`


@dataclass(frozen=True, slots=True)
class Decision:
    """The act and why, in a sentence for the journal and the user."""

    act: Act
    why: str


def decide_source(state: RecordState, peer: PeerSays, can_run: bool) -> Decision:
    """What the source does. `can_run`: its QEMU still holds the guest's state (false after a crash of QEMU or host).

    Until the handoff is recorded the VM is the source's, whatever the target says: the target cannot have taken it,
    because it is only told to after that record is on disk.
    """
    match state:
        case RecordState.ACTIVE:
            return Decision(Act.RUN_HERE, "the handoff was never recorded, so the VM is still this host's")
        case RecordState.HANDED_OVER:
            return _decide_handed_over(peer, can_run)
        case RecordState.TAKEN:
            return Decision(Act.FINISH, "the target has taken the VM")
        case RecordState.ENDED | RecordState.REFUSED:
            return Decision(Act.CLEAN_UP, "the migration has ended")


def _decide_handed_over(peer: PeerSays, can_run: bool) -> Decision:
    match peer:
        case PeerSays.TAKEN | PeerSays.ENDED_HERE:
            return Decision(Act.FINISH, "the target says that it has taken the VM")
        case PeerSays.REFUSED | PeerSays.ENDED_AWAY:
            return Decision(Act.TAKE_BACK, "the target has durably refused the VM")
        case PeerSays.ACTIVE | PeerSays.ABSENT:
            where = "its guest can run here" if can_run else "its disks are here"
            return Decision(Act.ASK_REFUSAL, f"the target has not taken the VM, and {where}")
        case PeerSays.UNREACHABLE:
            return Decision(Act.WAIT, "the target may have taken the VM and cannot be asked")
        case PeerSays.HANDED_OVER:
            return Decision(Act.WAIT, "the target answers as a source would; its journal is not what it should be")


def decide_target(state: RecordState, peer: PeerSays, guest: GuestSeen) -> Decision:
    """What the target does when nobody is driving it (after a restart, or when the source has fallen silent)."""
    match state:
        case RecordState.ACTIVE:
            return _decide_reserved(peer, guest)
        case RecordState.TAKEN:
            return Decision(Act.FINISH, "this host has taken the VM")
        case RecordState.REFUSED:
            return Decision(Act.CLEAN_UP, "this host has refused the VM")
        case RecordState.ENDED:
            return Decision(Act.CLEAN_UP, "the migration has ended")
        case RecordState.HANDED_OVER:
            return Decision(Act.WAIT, "a target never hands over; the journal is not what it should be")


def _decide_reserved(peer: PeerSays, guest: GuestSeen) -> Decision:
    complete = guest is GuestSeen.LOADED
    match peer:
        case PeerSays.HANDED_OVER if complete:
            return Decision(Act.TAKE, "the source has handed the VM over and all of its state is here")
        case PeerSays.UNREACHABLE if complete:
            return Decision(Act.WAIT, "all of the guest's state is here, and the source may have handed it over")
        case PeerSays.HANDED_OVER:
            return Decision(Act.REFUSE, "the source has handed the VM over, but its state is not here any more")
        case _:
            return Decision(Act.REFUSE, "the VM was not handed over to this host")
