"""Bytes, duration and blackout before anything moves, as ranges, from a measured dirty rate and a measured link.

Pure. The model (qemu-notes.md, 4.2): a pass of R bytes lasts R/B; meanwhile the guest dirties D(t) different bytes,
D(t) = rate x t up to its working set; the next pass carries that. Its fixpoint is what must be sent in the blackout.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmferry.model.migration import MigrateOptions, PostCopy, Prediction, Range, Verify
from vmferry.model.units import format_ms, format_rate

_CHECKED_MS = 500  # rehearsal, probes
_PREPARED_MS = 350
_FINISHED_MS = 450  # late frames are waited for
_FIXED_BLACKOUT_MS = 10.0
_SMALLEST_PASS_MS = 4.0  # two bitmap syncs and the way to the other host
_MOST_ROUNDS = 30
_DIGEST_RATE = 2_500_000_000  # bytes of memory a second; both hosts at the same time
_THROTTLES = range(20, 100, 20)  # convergence's steps; it looks at about four passes with each
_PASSES_A_THROTTLE = 4
_POST_COPY_MS = 200.0  # the pages that the guest needs at once come one by one


@dataclass(frozen=True, slots=True)
class Measured:
    """What the check measured; bytes and bytes per second."""

    memory_bytes: int  # allocated to the guest: what is not there costs nothing
    disk_bytes: int
    dirty_rate: int
    link_rate: int


def predict(measured: Measured, options: MigrateOptions) -> Prediction:
    """What the migration will take. `feasible` is False when neither pre-copy nor what the options allow converges."""
    rate = _rate(measured, options)
    rounds, copy_ms, floor_ms = _with_throttle(measured, options, rate)
    post_copy = options.post_copy is PostCopy.ALLOW and floor_ms > _most_floor_ms(options)
    total_ms = _CHECKED_MS + _PREPARED_MS + _FINISHED_MS + measured.disk_bytes / rate * 1000 + copy_ms
    if post_copy:
        total_ms, floor_ms = total_ms + floor_ms, min(floor_ms, _POST_COPY_MS)
    blackout_ms = floor_ms + _FIXED_BLACKOUT_MS
    if options.verify is Verify.ALL:
        blackout_ms += measured.memory_bytes / _DIGEST_RATE * 1000
    met = post_copy or floor_ms <= _most_floor_ms(options)
    feasible, reason = _feasible(measured, options, met, blackout_ms, total_ms)
    return Prediction(
        memory_bytes=measured.memory_bytes,
        disk_bytes=measured.disk_bytes,
        total_ms=Range(round(total_ms * 0.7), round(total_ms * 1.6 + 500)),
        blackout_ms=Range(round(blackout_ms * 0.4, 1), round(blackout_ms * 3 + 10, 1)),
        rounds=rounds,
        dirty_bytes_per_s=measured.dirty_rate,
        link_bytes_per_s=measured.link_rate,
        feasible=feasible,
        reason=reason,
    )


def _rate(measured: Measured, options: MigrateOptions) -> int:
    """Bytes a second that the migration may use."""
    allowed = options.bandwidth_bps // 8 or measured.link_rate
    return max(min(measured.link_rate, allowed), 1)


def _with_throttle(measured: Measured, options: MigrateOptions, rate: int) -> tuple[int, float, float]:
    """As `_rounds`, with the guest slowed down as far as it takes and the options allow."""
    memory = measured.memory_bytes
    rounds, copy_ms, floor_ms = unslowed = _rounds(memory, measured.dirty_rate, rate)
    steps = [*(step for step in _THROTTLES if step < options.max_slowdown_percent), options.max_slowdown_percent]
    for tried, percent in enumerate(steps, 1):
        if floor_ms <= _most_floor_ms(options):
            return rounds, copy_ms, floor_ms
        in_vain = tried * _PASSES_A_THROTTLE
        slowed = _rounds(memory, measured.dirty_rate * (100 - percent) // 100, rate)
        rounds, copy_ms, floor_ms = slowed[0] + in_vain, slowed[1] + in_vain * unslowed[2], slowed[2]
    return (rounds, copy_ms, floor_ms) if floor_ms <= _most_floor_ms(options) else unslowed


def _most_floor_ms(options: MigrateOptions) -> float:
    """What the goal leaves for memory; a goal below the fixed part is not known to be missed before it is tried."""
    return max(options.max_blackout_ms - _FIXED_BLACKOUT_MS, _SMALLEST_PASS_MS)


def _rounds(memory_bytes: int, dirty_rate: int, rate: int) -> tuple[int, float, float]:
    """Passes, their time in all, and the time of the last one, in milliseconds."""
    pass_ms = memory_bytes / rate * 1000
    copy_ms, rounds = pass_ms, 1
    while rounds < _MOST_ROUNDS:
        following_ms = max(min(dirty_rate * pass_ms / 1000, memory_bytes) / rate * 1000, _SMALLEST_PASS_MS)
        rounds += 1
        if following_ms > pass_ms * 0.9 or following_ms <= _SMALLEST_PASS_MS:
            return rounds, copy_ms, following_ms
        copy_ms += following_ms
        pass_ms = following_ms
    return rounds, copy_ms, pass_ms


def _feasible(
    measured: Measured, options: MigrateOptions, met: bool, blackout_ms: float, total_ms: float
) -> tuple[bool, str]:
    rate = _rate(measured, options)
    if options.deadline_ms and total_ms * 0.7 > options.deadline_ms:
        return False, (
            f"it takes about {format_ms(total_ms)} at {format_rate(rate * 8)}, the deadline is "
            f"{format_ms(options.deadline_ms)}"
        )
    if met:
        return True, ""
    return False, (
        f"the guest dirties {format_rate(measured.dirty_rate * 8)} and the link carries {format_rate(rate * 8)}: "
        f"the blackout would be about {format_ms(blackout_ms)}, the goal is {format_ms(options.max_blackout_ms)}"
    )
