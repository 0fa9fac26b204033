"""Whether a lab guest is the same, alive and unharmed: its heartbeat, boot id, memory and disk checks.

For demo, soak and system tests. `observe_*` ask the guest (blocking); `judge_*` are pure and give plain sentences,
none if all is well.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from vmferry.lab.guest_client import CheckResult, GuestClient, GuestStatus
from vmferry.model.errors import Failed


@dataclass(frozen=True, slots=True)
class Health:
    """A guest that answered. `memory` and `disk` are full checks, None where no such workload runs."""

    status: GuestStatus
    memory: CheckResult | None
    disk: CheckResult | None

    @property
    def guest_drops(self) -> int:
        """UDP requests that had arrived in the guest and which its own full socket buffer dropped."""
        return self.status.udp["buffer_drops"]


def observe_health(guest: GuestClient, since: GuestStatus, within_s: float = 90.0) -> Health:
    """Waits for the heartbeat to go on, then lets the guest check all of its memory workload and its disk.

    Raises Unreachable `guest-silent`, Failed `guest-still`, Failed `guest-check`.
    """
    status = wait_until_beating(guest, since, within_s)
    memory = guest.check_memory(within_s) if status.memory.wss_bytes else None
    disk = guest.verify_disk(within_s) if status.disk.state in ("writing", "verifying") else None
    return Health(guest.status(within_s), memory, disk)


def wait_until_beating(guest: GuestClient, since: GuestStatus, within_s: float = 30.0) -> GuestStatus:
    """Returns once two more beats than at `since` were counted, or the guest turns out to be another one.

    Raises Failed `guest-still` (it answers, but its clock or its processes do not go on), Unreachable `guest-silent`.
    """
    deadline = time.monotonic() + within_s
    while True:
        status = guest.status(within_s)
        if status.beats >= since.beats + 2 or status.boot_id != since.boot_id:
            return status
        if time.monotonic() > deadline:
            raise Failed("guest-still", f"The guest answers, but its heartbeat stands at {status.beats}.", "Report it.")
        time.sleep(0.05)


def judge_health(before: GuestStatus, after: Health) -> tuple[str, ...]:
    """What is wrong with the guest now, compared with `before`."""
    return (*judge_status(before, after.status), *_judge_checks(after))


def judge_status(before: GuestStatus, after: GuestStatus) -> tuple[str, ...]:
    """What the counters alone say; `before` must be the older one."""
    if after.boot_id != before.boot_id:
        return (f"the guest has rebooted (boot id {before.boot_id} is now {after.boot_id})",)
    wrong = []
    if after.uptime_ms < before.uptime_ms or after.beats < before.beats:
        wrong.append("the guest went back in time: its uptime or its heartbeat is lower than before")
    if after.dead > before.dead:
        wrong.append(f"{after.dead - before.dead} of the guest's processes ended")
    if after.memory.errors:
        wrong.append(f"the guest found {after.memory.errors} memory errors ({after.memory.first_error})")
    if after.disk.errors:
        wrong.append(f"the guest found {after.disk.errors} wrong disk records ({after.disk.first_error})")
    if after.disk.io_errors:
        wrong.append(f"the guest had {after.disk.io_errors} I/O errors on its disk")
    if after.disk.written < before.disk.written or after.memory.pages_written < before.memory.pages_written:
        wrong.append("the guest's workload has lost work: it counts less than before")
    return tuple(wrong)


def _judge_checks(health: Health) -> tuple[str, ...]:
    wrong = []
    for what, result in (("memory pages", health.memory), ("disk records", health.disk)):
        if result is not None and result.errors:
            wrong.append(f"of {result.checked} {what} the guest checked, {result.errors} are wrong")
        elif result is not None and not result.checked:
            wrong.append(f"the guest checked no {what}")
    return tuple(dict.fromkeys(wrong))
