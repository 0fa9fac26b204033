"""Whether a guest's vCPUs get on: QMP's "running" is no proof of it.

What it proves: the thread of a vCPU was on a CPU of the host since the first look, so the vCPU executes, or wakes up
from a halt because the guest's timers reach it. It does not prove that the guest does what it should: one that spins in
a loop, or has panicked with interrupts on, passes. One that is halted with interrupts off, or whose threads do not run
at all, fails.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from vmferry.qemu.monitor import Monitor
from vmferry.qemu.process import GuestProcess

_LOOK_EVERY_S = 0.02


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
        if any(later > earlier for earlier, later in zip(before, now, strict=True)):
            return True
        if not process.running:
            return False
    return False


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
