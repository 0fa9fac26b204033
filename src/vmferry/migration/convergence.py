"""Does memory converge, and when is the moment to switch over? A pure function of what was measured.

The measure that counts is what is left at the *start* of a pass: QEMU's `dirty_pages_rate` saturates at what a pass
can carry, so "rate below bandwidth" proves nothing (qemu-notes.md, 4.2). No I/O, no clock: times come in.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import isfinite

# A next pass that takes no longer than this is as good as it gets: waiting longer brings less than it costs.
_GOOD_ENOUGH_MS = 12.0
# Passes still shrink while the best of the last three is this much better than the best before.
_WORTHWHILE = 0.85
# The best of so many passes is the moment to wait for: one that was better long ago may never come again.
_REMEMBERED = 8
_THROTTLE_STEP_PERCENT = 20
# What a guest that seems to do nothing is reckoned to write: its kernel's timers and queues (0.1 to 0.5 MB/s seen).
_LEAST_DIRTY_RATE = 1 << 19


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


def lately_dirtied(passes: tuple[PassStart, ...], goal: Goal, window_ms: float = 200.0) -> int:
    """Bytes a second that the guest has dirtied in the last passes, so many milliseconds or at least one pass of them.

    A single short pass says little of a guest that writes now and then. As `dirty_rate` before there were two. Passes
    that were too short to be seen count as those that were.
    """
    newest = passes[-1].at_ms
    first = max((i for i, each in enumerate(passes[:-1]) if newest - each.at_ms >= window_ms), default=0)
    span_ms = newest - passes[first].at_ms
    if span_ms <= 0:
        return dirty_rate(passes, goal)
    seen = [each.remaining_bytes for each in passes[first + 1 :]]
    happened = passes[-1].number - passes[first].number
    return int(sum(seen) / len(seen) * happened / span_ms * 1000)


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
    Past the deadline it switches if the goal is met, and neither waits nor throttles.
    """
    last, first = passes[-1], len(passes) < 2
    following_ms = next_pass_ms(passes, goal)
    if _is_good_enough(following_ms, None if first else last.send_ms, goal):
        blackout_ms = following_ms + goal.fixed_blackout_ms
        return Advice(Step.SWITCH, f"about {blackout_ms:.0f} ms of blackout is as good as it gets")
    expected_ms = goal.fixed_blackout_ms + (following_ms if first else max(last.send_ms, following_ms))
    if 0 < goal.deadline_ms <= now_ms - passes[0].at_ms:
        if expected_ms <= goal.max_blackout_ms:
            return Advice(Step.SWITCH, f"the deadline has passed, and {expected_ms:.0f} ms is within the goal")
        return _press(last, goal, expected_ms, late=True)
    if first:
        return Advice(Step.GO_ON, "the first pass is under way")
    if _still_shrinking(passes):
        return Advice(Step.GO_ON, "each pass is smaller than the one before")
    best_ms = min(_like_the_last(passes)[-_REMEMBERED:])
    if expected_ms <= goal.max_blackout_ms and last.send_ms <= best_ms * 1.1:
        return Advice(Step.SWITCH, f"passes no longer shrink, and {expected_ms:.0f} ms is within the goal")
    if best_ms + goal.fixed_blackout_ms <= goal.max_blackout_ms:
        return Advice(Step.GO_ON, "waiting for a moment as good as the best one seen")
    return _press(last, goal, best_ms + goal.fixed_blackout_ms, late=False)


def _is_good_enough(following_ms: float, send_ms: float | None, goal: Goal) -> bool:
    """Whether the next pass is as short as it gets, and within the goal (next to nothing where that leaves nothing).

    The present pass must be short itself: what was written in a long one says little of a short one, because a guest
    that writes few pages over and over has dirtied all of them again in a fraction of the time.
    """
    left_ms = max(1.0, goal.max_blackout_ms - goal.fixed_blackout_ms)
    if send_ms is not None and send_ms > min(2 * _GOOD_ENOUGH_MS, left_ms):
        return False
    return following_ms <= min(_GOOD_ENOUGH_MS, left_ms)


def _like_the_last(passes: tuple[PassStart, ...]) -> list[float]:
    """How long the passes with the present throttle take; the first one, which carries everything, left out."""
    return [start.send_ms for start in passes[1:] if start.throttle_percent == passes[-1].throttle_percent]


def _still_shrinking(passes: tuple[PassStart, ...]) -> bool:
    """Whether waiting still pays."""
    same = _like_the_last(passes)
    if len(same) < 4:
        return True
    return min(same[-3:]) < _WORTHWHILE * min(same[:-3])


def _press(last: PassStart, goal: Goal, expected_ms: float, late: bool) -> Advice:
    needs = "nothing gets through"
    if isfinite(expected_ms):
        needs = (
            f"the guest dirties memory so fast that the blackout would be {expected_ms:.0f} ms, "
            f"the goal is {goal.max_blackout_ms} ms"
        )
    throttle = min(last.throttle_percent + _THROTTLE_STEP_PERCENT, goal.max_slowdown_percent)
    if not late and throttle > last.throttle_percent:
        return Advice(Step.THROTTLE, f"{needs}; slowing it by {throttle}%", throttle)
    if goal.allow_post_copy:
        return Advice(Step.POST_COPY, f"{needs}; the rest follows after the switchover")
    return Advice(Step.GIVE_UP, f"{needs}{' and the deadline has passed' if late else ''}")
