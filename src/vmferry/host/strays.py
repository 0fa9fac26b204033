"""Processes of ours that no journal names: found by the run directory on their command line, ended by pidfd."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from pathlib import Path

_LIMIT_S = 10


async def end_processes_of(run_dir: str) -> int:
    """Ends every QEMU whose command line names this run directory; how many. Waits until they are gone."""
    if not run_dir:
        return 0
    return await asyncio.to_thread(_end, run_dir)


def _end(run_dir: str) -> int:
    found = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            pidfd = os.pidfd_open(int(entry.name))
        except OSError:
            continue
        try:
            # Looked at after the pidfd is open: it is this process's command line and no later one's.
            if _names(entry, run_dir):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], _LIMIT_S)
                found += 1
        finally:
            os.close(pidfd)
    return found


def _names(process: Path, run_dir: str) -> bool:
    try:
        command = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    wanted = f"logfile={run_dir}/".replace(",", ",,").encode()
    return b"qemu" in command[0] and any(wanted in argument for argument in command)
