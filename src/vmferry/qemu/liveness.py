"""Whether a guest's vCPUs get on: QMP's "running" is no proof of it.

What it proves: the thread of a vCPU was on a CPU of the host since the first look, and not every vCPU is halted with
interrupts off. So one executes, or wakes up because the guest's timers reach it. It does not prove that the guest does
what it should: one that spins in a loop, or has panicked with interrupts on, passes. (The threads' time alone would not
do: an interrupt that comes to a vCPU which is halted for good wakes its thread all the same, under TCG at least.)
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from pathlib import Path

from vmferry.qemu.monitor import Monitor
from vmferry.qemu.process import GuestProcess

_LOOK_EVERY_S = 0.02
_HALT = re.compile(r"[ER]FL=([0-9a-f]+).*?HLT=(\d)", re.DOTALL)
_INTERRUPT_FLAG = 0x200


async def observe_vcpu_threads(monitor: Monitor) -> tuple[int, ...]:
    """The thread ids of the vCPUs (one for all under single-threaded TCG)."""
    return tuple(sorted({int(cpu["thread-id"]) for cpu in await monitor.execute("query-cpus-fast")}))


def read_vcpu_time(pid: int, threads: Sequence[int]) -> tuple[int, ...]:
    """Nanoseconds that each thread has run on a CPU; 0 for a thread that is gone (schedstat: sched-stats.rst)."""
    return tuple(_ran_ns(Path(f"/proc/{pid}/task/{thread}")) for thread in threads)


async def observe_vcpu_time(process: GuestProcess, monitor: Monitor) -> int:
    """Nanoseconds that the vCPUs have run on CPUs of the host, added up."""
    return sum(read_vcpu_time(process.pid, await observe_vcpu_threads(monitor)))


async def wait_vcpus_advance(process: GuestProcess, monitor: Monitor, deadline_s: float = 5.0) -> bool:
    """Whether the vCPUs were seen to run within the time: at least one of them.

    An idle guest keeps secondary vCPUs asleep for as long as it likes, so that all of them cannot be asked for.
    Raises as `Monitor.execute` does.
    """
    threads = await observe_vcpu_threads(monitor)
    before = read_vcpu_time(process.pid, threads)
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        await asyncio.sleep(_LOOK_EVERY_S)
        now = read_vcpu_time(process.pid, threads)
        ran = any(later > earlier for earlier, later in zip(before, now, strict=True))
        if ran and not await observe_dead_halt(monitor):
            return True
        if not process.running:
            return False
    return False


async def observe_dead_halt(monitor: Monitor) -> bool:
    """Whether all vCPUs are halted with interrupts off now: only a reset gets such a guest on.

    From the human monitor's register dump (QMP has nothing like it); False where that has another form.
    """
    dump = str(await monitor.execute("human-monitor-command", command_line="info registers -a"))
    found = [halted == "1" and not int(flags, 16) & _INTERRUPT_FLAG for flags, halted in _HALT.findall(dump)]
    return bool(found) and all(found)


def _ran_ns(task: Path) -> int:
    try:
        return int((task / "schedstat").read_text().split()[0])
    except FileNotFoundError:
        pass
    try:  # a kernel without CONFIG_SCHED_INFO: context switches tell as well that it ran
        status = (task / "status").read_text()
    except FileNotFoundError:
        return 0
    return sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)
