"""Guest memory on its way: rounds of pre-copy until a good moment, then the stop at just that moment.

The rules are in `convergence` (pure); this feeds it and does what it says. QEMU is kept from stopping the guest by
itself with a limit of one byte: it then ends a pass, looks what was dirtied meanwhile, and goes on as long as that is
anything at all. The gate is closed shortly before the end of a pass after which that may be nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from vmferry.migration.convergence import Goal, PassStart, Step, decide, dirty_rate, lately_dirtied, next_pass_ms
from vmferry.migration.guest import RunningGuest
from vmferry.migration.switchover import Switchover
from vmferry.model.errors import Failed
from vmferry.model.migration import Range
from vmferry.qemu.connections import SendQueues
from vmferry.qemu.memory_stream import (
    MemorySample,
    expect_status,
    observe_migration,
    set_bandwidth,
    set_switchover_limit,
    set_throttle,
    start_outgoing,
    start_postcopy,
)
from vmferry.qemu.monitor import EventStream, QmpEvent

_LOOK_EVERY_S = 0.05
_HOLD_BYTES_PER_S = 4096  # one page a window of 100 ms; below 10 it would mean "no limit"
_NEAR_S = 0.25  # what is left of a pass
_ENDING_S = 0.03  # the same, at the best pace: about two looks
_LOOK_NEAR_EVERY_S = 0.01
_STOP_BEFORE_END_S = 0.002
_LAST_PASS_S = 0.025  # the gate is closed and the guest still runs: its network waits for no longer than this
_SHRINKS = 0.7  # a next pass so much shorter is worth waiting for
_LEAST_LIMIT_MS = 20
_SMALLEST_RATE = 1 << 20
_QUIET_BYTES_PER_S = 8_000_000  # two pages a millisecond, which is what a short pass lasts
_FREE_S = 0.008  # multifd writes packets of up to 512 KiB: there is one more often than not
_UNSENT_S = 0.001
_CROWDED_S = 0.3
_CROWDED_LATE_S = 0.1
_LONG_PASS_S = 1.0
_BROKEN = "Look at the migration network and at the target's QEMU (its qemu.log), then migrate again."
_CALM_LOOK_EVERY_S = 0.005
_CALM_LOOKS = 3
_STOPPED = ("pre-switchover", "device", "completed")
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
        self._pace = 0.0
        self._seen = (0, 0, 0.0)
        self._held = False
        self._near = False
        self._ending = False
        self._began = 0.0
        self._throttle = 0
        self._moved_at = 0.0
        self._last_transferred = -1
        self._queues: SendQueues | None = None
        self._crowded_since = 0.0
        self._port = 0
        self.sent_bytes = 0
        self.rounds = 0
        self.post_copy = False

    async def start(self, host: str, port: int, limit_s: float) -> None:
        """Starts the stream with QEMU's own stop rule switched off; returns when all its connections are made.

        Raises Failed `memory-stalled` if they are not within `limit_s`. That the stream broke off `converge` says.
        """
        monitor = self._guest.monitor
        self._port = port
        await set_switchover_limit(monitor, 1, 1000)  # 1 ms at 1000 B/s: one byte
        made = expect_status(monitor, "active", "failed", "cancelled")
        try:
            async with asyncio.timeout(limit_s):
                self._began = time.monotonic()
                await start_outgoing(monitor, host, port)
                await made
        except TimeoutError as error:
            raise Failed(
                "memory-stalled",
                f"The memory stream was not ready within {limit_s:g} s.",
                "Look at the migration network and at the target's QEMU (its qemu.log), then migrate again.",
            ) from error
        finally:
            made.cancel()
        self._moved_at = time.monotonic()

    # -- rounds ------------------------------------------------------------------------------------------------------

    async def converge(self, rest_is_ready: Callable[[bool], Awaitable[bool]], stall_s: float) -> None:
        """Rounds until the end of the present pass is the time to switch over.

        `rest_is_ready` is told whether the end is near, and says whether everything else is ready for it. Raises Failed
        `not-converging` with the numbers, `memory-stalled`, `memory-stream`. Returns at once when QEMU has stopped the
        guest by itself (nothing was left).
        """
        async with self._guest.monitor.subscribe(_EVENTS) as events:
            while True:
                happened = await _events_or_tick(events, _LOOK_NEAR_EVERY_S if self._near else _LOOK_EVERY_S)
                if any(_has_stopped(event) for event in happened):
                    return
                sample = await self._look(stall_s)
                if sample.status in _STOPPED:
                    return  # before we listened
                self._note_pass(sample)
                near = self._is_near(sample)
                if near:
                    await self._keep_queues_short()
                ready = await rest_is_ready(near)
                advised = bool(self._passes) and ready and await self._advised()
                if advised and self._is_way_free():
                    return  # a pass that is being held is let go at the last moment: its end is what is waited for
                await self._hold(ready and not (advised and self._is_quiet()))

    async def _look(self, stall_s: float) -> MemorySample:
        sample = await observe_migration(self._guest.monitor)
        self._watch_progress(sample, stall_s)
        if sample.status in ("failed", "cancelled"):
            raise Failed(
                "memory-stream", f"The memory stream broke off: {sample.error_desc or sample.status}.", _BROKEN
            )
        return sample

    def _watch_progress(self, sample: MemorySample, stall_s: float) -> None:
        now = time.monotonic()
        self._watch_rate(sample)
        self._watch_pace(sample, now)
        self.sent_bytes, self.rounds = sample.transferred_bytes, max(self.rounds, sample.dirty_sync_count)
        if sample.transferred_bytes != self._last_transferred or self._held:
            self._moved_at, self._last_transferred = now, sample.transferred_bytes
        elif now - self._moved_at > stall_s:
            raise Failed(
                "memory-stalled",
                f"No byte of memory got through for {stall_s:g} s.",
                "Look at the migration network and at the target.",
            )
        left_ms = self._left_s(sample) * 1000
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

    def _watch_rate(self, sample: MemorySample) -> None:
        """The best rate counts, because a short pass or a hold shows less; but a long pass shows a link that slowed."""
        seen = int(sample.mbps * 125_000)
        if seen < self._rate and not self._held and sample.remaining_bytes > self._rate * _LONG_PASS_S:
            seen = (self._rate * 9 + seen) // 10
            self._rate = seen
        self._rate = max(self._rate, seen)

    def _watch_pace(self, sample: MemorySample, now: float) -> None:
        number, remaining, at = self._seen
        if number != sample.dirty_sync_count:
            self._pace = 0.0  # the first pass has most of the zeros
        elif now > at:
            self._pace = max(self._pace, (remaining - sample.remaining_bytes) / (now - at))
        self._seen = (sample.dirty_sync_count, sample.remaining_bytes, now)

    def _left_s(self, sample: MemorySample) -> float:
        """What is left of the present pass, in seconds, at the best pace seen in it: zeros pass many times faster."""
        return sample.remaining_bytes / max(self._pace, self._rate, _SMALLEST_RATE)

    def _is_near(self, sample: MemorySample) -> bool:
        """Whether the switchover may come soon: what is left of the pass is short (with hysteresis)."""
        slack = 4 if self._near else 1
        by_rate_s = sample.remaining_bytes / max(self._rate, _SMALLEST_RATE)
        near = (
            by_rate_s < max(_NEAR_S, self._goal.max_blackout_ms / 1000) * slack
            or self._left_s(sample) < _NEAR_S * slack
        )
        started = sample.dirty_sync_count > 0 and sample.status == "active"
        self._near = started and near
        self._ending = started and self._left_s(sample) < _ENDING_S
        return self._near

    def _is_quiet(self) -> bool:
        """Whether short passes may find nothing left at their end: then QEMU stops the guest, before the gate closes.

        That ends well, too, but costs time. It may have been quiet from the beginning, or have become so.
        """
        passes = tuple(self._passes)
        at_first, lately = dirty_rate(passes[:2], self._goal), lately_dirtied(passes, self._goal)
        return min(at_first, lately) < _QUIET_BYTES_PER_S

    async def _hold(self, ready: bool) -> None:
        """Keeps a pass from ending while not all is ready: an idle guest would be stopped at its end.

        A hold costs up to 0.1 s (QEMU's window). A guest that was seen to write much is not stopped, and not held.
        """
        may_stop = len(self._passes) < 2 or self._is_quiet()
        if self._ending and not ready and may_stop and not self._held:
            self._held = True
            await set_bandwidth(self._guest.monitor, _HOLD_BYTES_PER_S)
        elif self._held and ready:
            self._held = False
            await set_bandwidth(self._guest.monitor, self._bandwidth)

    def _note_pass(self, sample: MemorySample) -> None:
        """Remembers a pass when it is seen for the first time, and keeps the rate of the present one up to date."""
        if sample.dirty_sync_count == 0 or sample.status != "active":
            return
        rate = max(self._rate, _SMALLEST_RATE)
        if not self._passes or self._passes[-1].number < sample.dirty_sync_count:
            at_ms = (time.monotonic() - self._began) * 1000
            self._passes.append(PassStart(sample.dirty_sync_count, at_ms, sample.remaining_bytes, rate, self._throttle))
        else:
            last = self._passes[-1]
            self._passes[-1] = PassStart(last.number, last.at_ms, last.remaining_bytes, rate, last.throttle_percent)
        expected_ms = next_pass_ms(tuple(self._passes), self._goal) + self._goal.fixed_blackout_ms
        self._report(blackout_ms=Range(self._goal.fixed_blackout_ms, round(expected_ms, 1)))

    async def _advised(self) -> bool:
        now_ms = (time.monotonic() - self._began) * 1000
        advice = decide(self._passes_as_they_went(now_ms), self._goal, now_ms)
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

    def _passes_as_they_went(self, now_ms: float) -> tuple[PassStart, ...]:
        """The first pass carries all memory, of which most may be zeros: at its end we know how long it really took."""
        first = self._passes[0]
        if len(self._passes) > 1 or not self._ending:
            return tuple(self._passes)
        carried = int(first.rate * (now_ms - first.at_ms) / 1000)
        return (replace(first, remaining_bytes=min(first.remaining_bytes, carried)),)

    def _is_way_free(self) -> bool:
        """Whether what was sent has nearly all arrived: what is in the way would arrive before the guest's state.

        Sockets take many milliseconds' worth of a pass at once. Most of it goes in the short passes that follow; a
        guest that writes as fast as the network carries keeps it full, and is not waited for any longer then.
        """
        now = time.monotonic()
        if self._queued_s() <= _FREE_S:
            self._crowded_since = 0.0
            return True
        if self._crowded_since and now - self._crowded_since > _CROWDED_S:
            return True
        self._crowded_since = self._crowded_since or now
        return False

    async def _keep_queues_short(self) -> None:
        """What waits in QEMU's sockets arrives before all that the switchover sends, also before the disks' flush."""
        if self._queues is None:
            self._queues = await asyncio.to_thread(SendQueues, self._guest.process, self._port)
        self._queues.keep_short(int(max(self._rate, _SMALLEST_RATE) * _UNSENT_S))

    def _queued_s(self) -> float:
        """How long what QEMU has written takes to arrive."""
        waiting_bytes = self._queues.waiting_bytes() if self._queues is not None else 0
        return waiting_bytes / max(self._rate, _SMALLEST_RATE)

    async def _slow_down(self, percent: int) -> None:
        """Raises QEMU's auto-converge, which is on from the start with at most 1 percent."""
        self._throttle = percent
        await set_throttle(self._guest.monitor, percent, percent, percent)

    async def calm_down(self) -> None:
        """Before a stream is cancelled: nothing is being sent any more when this returns. The caller limits the time.

        QEMU 10.0 ends the TLS session of a multifd channel from its main loop while the channel's own thread may still
        be sending in it, and has died of that (1 in some hundred cancels). A thread that waits on a dead network it
        does not wait for: cutting the connection (yank) ends the thread first, and the migration then ends by itself.
        """
        if self._port == 0:
            return
        await set_bandwidth(self._guest.monitor, _HOLD_BYTES_PER_S)
        queues = await asyncio.to_thread(SendQueues, self._guest.process, self._port)
        try:
            empty_looks = 0
            while empty_looks < _CALM_LOOKS:
                await asyncio.sleep(_CALM_LOOK_EVERY_S)
                empty_looks = empty_looks + 1 if queues.waiting_bytes() == 0 else 0
        finally:
            queues.close()

    def close(self) -> None:
        """Lets go of QEMU's connections. Idempotent."""
        if self._queues is not None:
            self._queues.close()
            self._queues = None

    # -- the stop ----------------------------------------------------------------------------------------------------

    async def switch(self, switchover: Switchover, stall_s: float) -> None:
        """Closes the gate just before a pass ends, has the guest stopped soon after, sees everything to the target."""
        async with self._guest.monitor.subscribe(_EVENTS) as events:
            await self._land(switchover, events, stall_s)
        await (switchover.transfer_disks() if self.post_copy else switchover.transfer())

    async def measure(self) -> None:
        """What was sent in all; after the switchover."""
        sample = await observe_migration(self._guest.monitor)
        self.sent_bytes, self.rounds = sample.transferred_bytes, sample.dirty_sync_count

    async def _land(self, switchover: Switchover, events: EventStream, stall_s: float) -> None:
        """From the beginning of the next pass on the guest's frames go to the target, and it stops soon after."""
        await switchover.gates.arm()
        await self._hold(ready=True)
        await self._next_pass(events, switchover, stall_s)
        # At once, before anything is asked: a short pass is over in milliseconds, and QEMU may stop the guest then.
        switchover.close_gate()
        plugging = asyncio.create_task(switchover.plug())
        try:
            async with switchover.limited():  # also what QEMU does meanwhile: it hangs in a flush when the link is dead
                if self.post_copy:
                    await switchover.settle()
                    await start_postcopy(self._guest.monitor)
                else:
                    await self._last_pass(switchover)
                await plugging
        finally:
            plugging.cancel()
            await asyncio.gather(plugging, return_exceptions=True)

    async def _next_pass(self, events: EventStream, switchover: Switchover, stall_s: float) -> None:
        """Until a pass begins with little on its way, or the guest has stopped. A quiet guest's first one it is."""
        until = time.monotonic() + _CROWDED_LATE_S
        while not switchover.begun:
            happened = await _events_or_tick(events, _LOOK_EVERY_S)
            if not happened:
                await self._look(stall_s)
                continue
            if any(_has_stopped(event) or event.data.get("status") in ("failed", "cancelled") for event in happened):
                return
            free = self._is_quiet() or self._queued_s() <= _FREE_S or time.monotonic() > until
            if happened[-1].name == "MIGRATION_PASS" and free:
                return

    async def _last_pass(self, switchover: Switchover) -> None:
        """Lets the pass go almost to its end if the next one will be shorter; then QEMU may stop the guest."""
        monitor = self._guest.monitor
        sample = await observe_migration(monitor)
        if sample.status == "active" and not switchover.begun:
            self._note_pass(sample)
            send_s = self._passes[-1].send_ms / 1000
            shrinks = next_pass_ms(tuple(self._passes), self._goal) < send_s * 1000 * _SHRINKS
            if shrinks and send_s > _STOP_BEFORE_END_S:
                wait_s = min(send_s - _STOP_BEFORE_END_S, _LAST_PASS_S)
                await asyncio.wait([switchover.stopped], timeout=wait_s)
            await switchover.settle()
        if not switchover.begun:
            limit_ms = max(self._goal.max_blackout_ms, _LEAST_LIMIT_MS)
            await set_switchover_limit(monitor, limit_ms, max(self._rate, _SMALLEST_RATE))


def _has_stopped(event: QmpEvent) -> bool:
    return event.name == "STOP" or event.data.get("status") == "pre-switchover"


async def _events_or_tick(events: EventStream, within_s: float) -> list[QmpEvent]:
    """All events there are, after waiting so long for the first; short passes bring them faster than we look."""
    try:
        return [await asyncio.wait_for(events.get(), within_s), *events.take()]
    except TimeoutError:
        return []
