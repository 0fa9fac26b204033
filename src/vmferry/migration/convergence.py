"""Does memory converge, and when is the moment to switch over? A pure function of what was measured.

The measure that counts is what is left at the *start* of a pass: QEMU's `dirty_pages_rate` saturates at what a pass
can carry, so "rate below bandwidth" proves nothing (qemu-notes.md, 4.2). No I/O, no clock: times come in.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

# A pass that is worth less than this much blackout is as good as it gets: another one costs more than it brings.
_GOOD_ENOUGH_MS = 12.0
# Passes stop shrinking when the best one of the last three is not this much better than the best one before.
_WORTHWHILE = 0.85
_THROTTLE_STEP_PERCENT = 20


@dataclass(frozen=True, slots=True)
class PassStart:
    """A pass of pre-copy as it began: what is left to send, and the rate (bytes per second) lately achieved."""

    number: int
    at_ms: float
    remaining_bytes: int
    rate: int
    throttle_percent: int = 0

    @property
    def send_ms(self) -> float:
        """How long sending what is left takes at the present rate; infinite when nothing moves."""
        return self.remaining_bytes / self.rate * 1000 if self.rate > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class Goal:
    """What the user accepts. `fixed_blackout_ms` is what a switchover costs besides sending memory."""

    max_blackout_ms: int
    max_slowdown_percent: int
    allow_post_copy: bool
    fixed_blackout_ms: float = 10.0
    deadline_ms: float = 0.0  # since the first pass; 0: none


class Step(StrEnum):
    """What to do about the memory."""

    GO_ON = "go-on"
    SWITCH = "switch"
    THROTTLE = "throttle"
    POST_COPY = "post-copy"
    GIVE_UP = "give-up"


@dataclass(frozen=True, slots=True)
class Advice:
    """The step, its figure (percent for a throttle) and why, in words for the user."""

    step: Step
    why: str
    throttle_percent: int = 0


def decide(passes: tuple[PassStart, ...], goal: Goal, now_ms: float) -> Advice:
    """What to do after the newest pass began.

    Waits for a good moment as long as passes shrink; switches at a local minimum within the goal when they no longer
    do; then throttles within the accepted slow-down, then post-copy if allowed, else gives up with the numbers.
    """
    # The first pass carries all memory: what it takes says nothing about the guest.
    if len(passes) < 2:
        return Advice(Step.GO_ON, "the first pass is under way")
    last = passes[-1]
    blackout_ms = last.send_ms + goal.fixed_blackout_ms
    if last.send_ms <= _GOOD_ENOUGH_MS and blackout_ms <= max(goal.max_blackout_ms, goal.fixed_blackout_ms):
        return Advice(Step.SWITCH, f"{blackout_ms:.0f} ms of blackout is as good as it gets")
    late = 0 < goal.deadline_ms <= now_ms - passes[0].at_ms
    if not late and _still_shrinking(passes):
        return Advice(Step.GO_ON, "each pass is smaller than the one before")
    best_ms = min(start.send_ms for start in passes[1:] if start.throttle_percent == last.throttle_percent)
    if blackout_ms <= goal.max_blackout_ms and (late or last.send_ms <= best_ms * 1.1):
        return Advice(Step.SWITCH, f"passes no longer shrink and {blackout_ms:.0f} ms is within the goal")
    if not late and best_ms + goal.fixed_blackout_ms <= goal.max_blackout_ms:
        return Advice(Step.GO_ON, "waiting for a moment as good as the best one seen")
    return _press(last, goal, best_ms, late)


def _still_shrinking(passes: tuple[PassStart, ...]) -> bool:
    """Whether waiting still pays: judged over passes of the same throttle, the first (full) one left out."""
    same = [p.send_ms for p in passes[1:] if p.throttle_percent == passes[-1].throttle_percent]
    if len(same) < 4:
        return True
    return min(same[-3:]) < _WORTHWHILE * min(same[:-3])


def _press(last: PassStart, goal: Goal, best_ms: float, late: bool) -> Advice:
    needs = (
        f"the guest dirties memory so fast that the blackout would be {best_ms + goal.fixed_blackout_ms:.0f} ms, "
        f"the goal is {goal.max_blackout_ms} ms"
    )
    throttle = min(last.throttle_percent + _THROTTLE_STEP_PERCENT, goal.max_slowdown_percent)
    if not late and throttle > last.throttle_percent:
        return Advice(Step.THROTTLE, f"{needs}; slowing it by {throttle}%", throttle)
    if goal.allow_post_copy:
        return Advice(Step.POST_COPY, f"{needs}; the rest follows after the switchover")
    return Advice(Step.GIVE_UP, f"{needs}{' and the deadline has passed' if late else ''}")
