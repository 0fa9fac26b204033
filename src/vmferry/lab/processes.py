"""Which processes belong to a lab, and ending them without ever hitting another one.

For `lab.namespaces`. A process is named by PID and start time, never by PID alone, and signalled through a pidfd.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from vmferry.lab.layout import LabLayout, existing_namespaces
from vmferry.model.errors import Failed

_END_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Process:
    """`start_ticks` is field 22 of /proc/PID/stat (proc(5)): clock ticks since the machine booted."""

    pid: int
    start_ticks: int


def observe_process(pid: int) -> Process | None:
    """The process that has this PID now; None if there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else Process(pid, int(fields[19]))


def is_running(process: Process) -> bool:
    return observe_process(process.pid) == process


def reap(process: Process) -> None:
    """Takes the exit status of an ended child, so that no zombie stays; nothing if it is not our child."""
    with suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)


def send_signal(process: Process, number: int) -> bool:
    """Signals exactly this process; False if it is gone."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not is_running(process):
            return False
        signal.pidfd_send_signal(handle, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)


def end_processes(processes: Iterable[Process]) -> None:
    """Kills them and waits until they are gone. Raises Failed `lab-process-stuck` if one does not go."""
    with ExitStack() as handles:
        waiting: dict[int, int] = {}
        for process in processes:
            with suppress(ProcessLookupError):
                handle = os.pidfd_open(process.pid)
                handles.callback(os.close, handle)
                if is_running(process):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    waiting[handle] = process.pid
        _wait_for_end(waiting)


def _wait_for_end(waiting: dict[int, int]) -> None:
    poll = select.poll()
    for handle in waiting:
        poll.register(handle, select.POLLIN)  # a pidfd is readable once the process has ended, pidfd_open(2)
    deadline = time.monotonic() + _END_LIMIT_S
    while waiting:
        ended = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not ended:
            pids = ", ".join(map(str, waiting.values()))
            raise Failed("lab-process-stuck", f"Killed, but not gone: process {pids}.", "Look what the disk is doing.")
        for handle, _ in ended:
            poll.unregister(handle)
            del waiting[handle]


def find_lab_processes(prefix: str) -> list[Process]:
    """Everything that runs in the lab's namespaces, and daemons and QEMUs that use its directories.

    The second matters when a namespace's name is gone already. This process and its parents are left out.
    """
    inodes = {path.stat().st_ino for path in existing_namespaces(prefix)}
    directory = f"{LabLayout(prefix).state_root}/"
    own = set(_own_line())
    found = []
    for pid in _all_pids():
        if pid in own:
            continue
        process = observe_process(pid)
        if process and (_namespace_of(pid) in inodes or _uses(pid, directory)):
            found.append(process)
    return found


def _all_pids() -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def _own_line() -> Iterator[int]:
    pid = os.getpid()
    while pid > 1:
        yield pid
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:
            return


def _namespace_of(pid: int) -> int:
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:  # it ended, or it is a kernel thread that does not show
        return 0


def _uses(pid: int, directory: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    ours = "qemu-" in Path(words[0]).name or "vmferry.host.main" in words
    return ours and any(directory in word for word in words)
