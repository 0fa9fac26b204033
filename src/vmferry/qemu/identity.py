"""Which process is meant: by PID and start time, never by PID alone; and what /proc says of it. For `qemu/process`."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmferry.model.errors import Failed

_SYS_PIDFD_GETFD = 438  # the same on all architectures (asm-generic/unistd.h); Python 3.11 has no wrapper
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process, also after our restart. Start time in clock ticks since boot (proc_pid_stat(5), field 22).

    `boot_id` tells a process of before a reboot from another with the same numbers; empty if it was not recorded.
    """

    pid: int
    start_time_ticks: int
    boot_id: str = ""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A descriptor of another process: its number, what /proc/PID/fd points to, and the text of fdinfo."""

    fd: int
    target: str
    info: str


FdPredicate = Callable[[OpenFile], bool]


def observe_identity(pid: int) -> ProcessIdentity | None:
    """The identity of the process that has this PID now; None if there is none or it is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # the name before it may hold blanks and brackets
    if fields[0] in (b"Z", b"X"):
        return None
    return ProcessIdentity(pid, int(fields[19]), _BOOT_ID.read_text().strip())


def open_process(identity: ProcessIdentity) -> int | None:
    """A pidfd of just this process; None if it is gone. The caller closes it."""
    try:
        pidfd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return None
    # The order counts: what is alive with this start time after pidfd_open is what the pidfd refers to.
    now = observe_identity(identity.pid)
    same = now is not None and now.start_time_ticks == identity.start_time_ticks
    if now is None or not same or (identity.boot_id and identity.boot_id != now.boot_id):
        os.close(pidfd)
        return None
    return pidfd


def send_signal(pidfd: int, number: signal.Signals) -> None:
    """Sends a signal; a process that has ended already is fine."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return


def open_files(pid: int) -> Iterator[OpenFile]:
    """The descriptors of a process of ours, none if it has ended. Those closed meanwhile are left out."""
    try:
        entries = list(Path(f"/proc/{pid}/fd").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return
    for entry in entries:
        try:
            target = str(entry.readlink())
            info = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        yield OpenFile(int(entry.name), target, info)


def duplicate_fd(pidfd: int, fd: int) -> int:
    """A duplicate of another process's descriptor (pidfd_getfd(2)). Raises Failed `descriptor-not-given`."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0))
    if result < 0:
        reason = os.strerror(ctypes.get_errno())
        raise Failed(
            "descriptor-not-given",
            f"A descriptor of the guest's process cannot be duplicated: {reason}.",
            "The daemon needs the guest's user or CAP_SYS_PTRACE.",
        )
    os.set_inheritable(result, False)
    return result
