"""Guest memory on its way: rounds of pre-copy until a good moment, then the stop at just that moment.

The rules are in `convergence` (pure); this feeds it and does what it says. QEMU is kept from stopping the guest by
itself with a limit of one byte: it then ends a pass, looks what was dirtied meanwhile, and goes on as long as that is
anything at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from vmferry.migration.convergence import Goal, PassStart, Step, decide
from vmferry.migration.guest import RunningGuest
from vmferry.migration.switchover import Switchover
from vmferry.model.errors import Failed
from vmferry.model.migration import Range
from vmferry.qemu.memory_stream import (
    MemorySample,
    observe_migration,
    set_bandwidth,
    set_switchover_limit,
    set_throttle,
    start_outgoing,
    start_postcopy,
)
from vmferry.qemu.monitor import EventStream, QmpEvent

_LOOK_EVERY_S = 0.05
_HOLD_BYTES_PER_S = 1 << 20
_NEAR_S = 0.25  # of what is left of a pass, at the present rate
_CLOSE_BEFORE_END_S = 0.004
_SMALLEST_RATE = 1 << 20
_EVENTS = ("MIGRATION_PASS", "MIGRATION", "STOP")


class MemoryCopy:
    """The memory of one migration. `report` takes changes of the shown progress."""

    def __init__(self, guest: RunningGuest, goal: Goal, bandwidth: int, report: Callable[..., None]) -> None:
        self._guest = guest
        self._goal = goal
        self._bandwidth = bandwidth  # bytes a second, 0: no limit
        self._report = report
        self._passes: list[PassStart] = []
        self._rate = 0
        self._held = False
        self._near = False
        self._began = 0.0
        self._throttle = 0
        self._moved_at = 0.0
        self._last_transferred = -1
        self.sent_bytes = 0
        self.rounds = 0
        self.post_copy = False

    async def start(self, host: str, port: int) -> None:
        """Starts the stream with QEMU's own stop rule switched off."""
        monitor = self._guest.monitor
        await set_switchover_limit(monitor, 1, 1000)  # 1 ms at 1000 B/s: one byte
        self._began = self._moved_at = time.monotonic()
        await start_outgoing(monitor, host, port)

    async def converge(self, rest_is_ready: Callable[[bool], bool], stall_s: float) -> None:
        """Rounds until it is time to switch over.

        `rest_is_ready` is told whether the end is near, and says whether everything else is ready for it. Raises Failed
        `not-converging` with the numbers, `memory-stalled`, `memory-stream`. Returns at once when QEMU has stopped the
        guest by itself (nothing was left).
        """
        async with self._guest.monitor.subscribe(_EVENTS) as events:
            async for event in _events_or_ticks(events):
                sample = await observe_migration(self._guest.monitor)
                self._watch_progress(sample, stall_s)
                if _stopped(event):
                    return
                if sample.status in ("failed", "cancelled"):
                    raise Failed("memory-stream", f"The memory stream broke: {sample.error_desc or sample.status}.", "")
                ready = rest_is_ready(self._is_near(sample))
                await self._hold(sample, ready)
                if event is not None and event.name == "MIGRATION_PASS":
                    self._note_pass(sample)
                    if ready and await self._advised(sample):
                        return

    def _is_near(self, sample: MemorySample) -> bool:
        """Whether the switchover may come soon: what is left of the pass is short (with hysteresis)."""
        limit_s = max(_NEAR_S, self._goal.max_blackout_ms / 1000) * (4 if self._near else 1)
        left_s = sample.remaining_bytes / max(self._rate, _SMALLEST_RATE)
        self._near = sample.dirty_sync_count > 0 and sample.status == "active" and left_s < limit_s
        return self._near

    def _watch_progress(self, sample: MemorySample, stall_s: float) -> None:
        now = time.monotonic()
        self._rate = max(self._rate, int(sample.mbps * 125_000))
        self.sent_bytes, self.rounds = sample.transferred_bytes, max(self.rounds, sample.dirty_sync_count)
        if sample.transferred_bytes != self._last_transferred or self._held:
            self._moved_at, self._last_transferred = now, sample.transferred_bytes
        elif now - self._moved_at > stall_s:
            raise Failed(
                "memory-stalled",
                f"No byte of memory got through for {stall_s:g} s.",
                "Look at the migration network and at the target.",
            )
        rate = max(self._rate, _SMALLEST_RATE)
        left_ms = sample.remaining_bytes / rate * 1000
        self._report(
            memory_total_bytes=sample.total_bytes,
            memory_remaining_bytes=sample.remaining_bytes,
            memory_sent_bytes=sample.transferred_bytes,
            memory_rate=int(sample.mbps * 125_000),
            dirty_rate=sample.dirty_pages_rate * sample.page_size,
            rounds=sample.dirty_sync_count,
            throttle_percent=self._throttle,
            eta_ms=Range(round(left_ms), round(left_ms * 2 + 200)),
        )

    async def _hold(self, sample: MemorySample, ready: bool) -> None:
        """Keeps a pass from ending while the rest is not ready: an idle guest would be stopped at its end."""
        if self._near and not ready and not self._held:
            self._held = True
            await set_bandwidth(self._guest.monitor, _HOLD_BYTES_PER_S)
        elif self._held and (ready or not self._near):
            self._held = False
            await set_bandwidth(self._guest.monitor, self._bandwidth)

    def _note_pass(self, sample: MemorySample) -> None:
        self._passes.append(
            PassStart(
                number=sample.dirty_sync_count,
                at_ms=(time.monotonic() - self._began) * 1000,
                remaining_bytes=sample.remaining_bytes,
                rate=max(self._rate, _SMALLEST_RATE),
                throttle_percent=self._throttle,
            )
        )
        expected_ms = self._passes[-1].send_ms + self._goal.fixed_blackout_ms
        self._report(blackout_ms=Range(round(min(expected_ms, self._goal.fixed_blackout_ms), 1), round(expected_ms, 1)))

    async def _advised(self, sample: MemorySample) -> bool:
        advice = decide(tuple(self._passes), self._goal, (time.monotonic() - self._began) * 1000)
        self._report(note=advice.why)
        match advice.step:
            case Step.GO_ON:
                return False
            case Step.SWITCH:
                return True
            case Step.THROTTLE:
                await self._slow_down(advice.throttle_percent)
                return False
            case Step.POST_COPY:
                self.post_copy = True
                return True
            case Step.GIVE_UP:
                raise Failed(
                    "not-converging",
                    f"The memory did not converge: {advice.why}.",
                    "Allow a longer --max-blackout or a larger --max-slowdown, more --bandwidth, or --post-copy allow.",
                )

    async def _slow_down(self, percent: int) -> None:
        """Raises QEMU's auto-converge, which is on from the start with at most 1 percent."""
        self._throttle = percent
        await set_throttle(self._guest.monitor, percent, percent, percent)

    async def switch(self, switchover: Switchover) -> None:
        """Closes the gate just before a pass ends, lets QEMU stop the guest, sees everything to the target."""
        async with self._guest.monitor.subscribe(_EVENTS) as events:
            if not switchover.stopped.done():
                await switchover.plug()
                await self._wait_for_pass_end(events, switchover)
            elif switchover.gates:
                await switchover.plug()
            if self.post_copy:
                await switchover.close_gate_and_stop(self._goal.max_blackout_ms, max(self._rate, _SMALLEST_RATE))
                await start_postcopy(self._guest.monitor)
            else:
                await switchover.close_gate_and_stop(
                    max(self._goal.max_blackout_ms, 20), max(self._rate, _SMALLEST_RATE)
                )
        await switchover.transfer()
        sample = await observe_migration(self._guest.monitor)
        self.sent_bytes, self.rounds = sample.transferred_bytes, sample.dirty_sync_count

    async def _wait_for_pass_end(self, events: EventStream, switchover: Switchover) -> None:
        """Until a few milliseconds before the present pass ends (or QEMU stops the guest by itself)."""
        sample = await observe_migration(self._guest.monitor)
        left_s = sample.remaining_bytes / max(self._rate, _SMALLEST_RATE) - _CLOSE_BEFORE_END_S
        if left_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(switchover.stopped), left_s)


def _stopped(event: QmpEvent | None) -> bool:
    return event is not None and event.name == "STOP"


async def _events_or_ticks(events: EventStream) -> AsyncIterator[QmpEvent | None]:
    """Every event as it comes, and None when there was none for a while."""
    while True:
        try:
            yield await asyncio.wait_for(events.get(), _LOOK_EVERY_S)
        except TimeoutError:
            yield None
