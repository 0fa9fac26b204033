"""A guest that writes memory while it is copied, and a copy that does what `convergence.decide` says.

The guest writes pages of its working set at random: of W bytes, W(1 - e^(-rt/W)) are dirty after t seconds at r bytes a
second. A pass of R bytes over a link of B takes R/B, and some fixed time for the bitmaps. Time is simulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from vmferry.migration.convergence import Advice, Goal, PassStart, Step, decide, next_pass_ms

_SYNC_MS = 2.0
_MOST_PASSES = 200
_LOOKS = 2  # a pass


@dataclass(frozen=True)
class Guest:
    """Bytes, bytes a second. `rates`: factor of the dirty rate by the number of the pass."""

    memory: int
    working_set: int
    dirty_rate: int
    factor: Callable[[int], float] = lambda _: 1.0

    def dirtied(self, ms: float, number: int, throttle_percent: int) -> int:
        written = self.dirty_rate * self.factor(number) * (100 - throttle_percent) / 100 * ms / 1000
        return int(self.working_set * (1 - math.exp(-written / self.working_set)))


@dataclass(frozen=True)
class Ended:
    """How the copy ended. `predicted_ms`: the blackout foreseen by the passes; `blackout_ms`: what it then was."""

    advice: Advice
    passes: tuple[PassStart, ...]
    at_ms: float
    predicted_ms: float
    blackout_ms: float
    throttles: tuple[int, ...]


def copy(guest: Guest, link: int, goal: Goal) -> Ended:
    """Runs the copy to its end."""
    passes = [PassStart(1, 0.0, guest.memory, link)]
    now, throttle, throttles = 0.0, 0, []
    while len(passes) < _MOST_PASSES:
        last = passes[-1]
        pass_ms = last.remaining_bytes / link * 1000 + _SYNC_MS
        advice = Advice(Step.GO_ON, "")
        for look in range(_LOOKS + 1):
            advice = decide(tuple(passes), goal, now + pass_ms * look / _LOOKS)
            if advice.step is not Step.GO_ON:
                break
        if advice.step is Step.THROTTLE:
            throttle = advice.throttle_percent
            throttles.append(throttle)
        elif advice.step is not Step.GO_ON:
            left = guest.dirtied(pass_ms, last.number, throttle)
            predicted = next_pass_ms(tuple(passes), goal) + goal.fixed_blackout_ms
            blackout = left / link * 1000 + goal.fixed_blackout_ms
            return Ended(advice, tuple(passes), now + pass_ms, predicted, blackout, tuple(throttles))
        now += pass_ms
        remaining = guest.dirtied(pass_ms, last.number, throttle)
        passes.append(PassStart(last.number + 1, now, remaining, link, throttle))
    raise AssertionError(f"no end after {_MOST_PASSES} passes: {advice}, {passes[-3:]}")
