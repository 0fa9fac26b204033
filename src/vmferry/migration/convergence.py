"""Does memory converge, and when is the moment to switch over? A pure function of what was measured.

The measure that counts is what is left at the *start* of a pass: QEMU's `dirty_pages_rate` saturates at what a pass
can carry, so "rate below bandwidth" proves nothing (qemu-notes.md, 4.2). No I/O, no clock: times come in.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

# A next pass that takes no longer than this is as good as it gets: waiting longer brings less than it costs.
_GOOD_ENOUGH_MS = 12.0
# Passes still shrink while the best of the last three is this much better than the best before.
_WORTHWHILE = 0.85
_THROTTLE_STEP_PERCENT = 20
# What a guest that seems to do nothing is reckoned to write: its kernel's timers and queues.
_LEAST_DIRTY_RATE = 1 << 20


@dataclass(frozen=True, slots=True)
class PassStart:
    """A pass of pre-copy as it began: what is left to send, and the rate (bytes per second) lately achieved.

    The first one carries all memory.
    """

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
    """What the user accepts.

    `fixed_blackout_ms` is what a switchover costs besides sending memory; `dirty_rate` what the check measured, bytes
    a second, until the passes themselves tell.
    """

    max_blackout_ms: int
    max_slowdown_percent: int
    allow_post_copy: bool
    fixed_blackout_ms: float = 10.0
    deadline_ms: float = 0.0  # since the first pass; 0: none
    dirty_rate: int = 0


class Step(StrEnum):
    """What to do about the memory."""

    GO_ON = "go-on"
    SWITCH = "switch"  # in the pass that follows the present one
    THROTTLE = "throttle"
    POST_COPY = "post-copy"
    GIVE_UP = "give-up"


@dataclass(frozen=True, slots=True)
class Advice:
    """The step, its figure (percent for a throttle) and why, in words for the user."""

    step: Step
    why: str
    throttle_percent: int = 0


def dirty_rate(passes: tuple[PassStart, ...], goal: Goal) -> int:
    """Bytes a second that the guest dirties: from the last pass where there is one, else what the check measured."""
    if len(passes) >= 2 and passes[-1].at_ms > passes[-2].at_ms:
        return int(passes[-1].remaining_bytes / (passes[-1].at_ms - passes[-2].at_ms) * 1000)
    return max(goal.dirty_rate, _LEAST_DIRTY_RATE)


def next_pass_ms(passes: tuple[PassStart, ...], goal: Goal) -> float:
    """How long the pass after the present one will take: what the guest dirties during this one."""
    last = passes[-1]
    if last.rate <= 0:
        return float("inf")
    written = min(dirty_rate(passes, goal) * last.send_ms / 1000, passes[0].remaining_bytes)
    return written / last.rate * 1000


def decide(passes: tuple[PassStart, ...], goal: Goal, now_ms: float) -> Advice:
    """What to do in the present (last) pass.

    Waits for a good moment as long as passes shrink; switches at a local minimum within the goal when they no longer
    do; then throttles within the accepted slow-down, then post-copy if allowed, else gives up with the numbers.
    """
    following_ms = next_pass_ms(passes, goal)
    blackout_ms = following_ms + goal.fixed_blackout_ms
    if following_ms <= min(_GOOD_ENOUGH_MS, max(1, goal.max_blackout_ms)):
        return Advice(Step.SWITCH, f"about {blackout_ms:.0f} ms of blackout is as good as it gets")
    if len(passes) < 2:
        return Advice(Step.GO_ON, "the first pass is under way")
    late = 0 < goal.deadline_ms <= now_ms - passes[0].at_ms
    if not late and _still_shrinking(passes):
        return Advice(Step.GO_ON, "each pass is smaller than the one before")
    last = passes[-1]
    best_ms = min(start.send_ms for start in passes[1:] if start.throttle_percent == last.throttle_percent)
    if last.send_ms + goal.fixed_blackout_ms <= goal.max_blackout_ms and (late or last.send_ms <= best_ms * 1.1):
        return Advice(Step.SWITCH, f"passes no longer shrink, and {blackout_ms:.0f} ms is within the goal")
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
