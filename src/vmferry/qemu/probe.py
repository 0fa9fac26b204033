"""A QEMU without a guest, started for a moment to be asked what it can do. For `features`, `cpu` and `accel`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence
from typing import IO

from vmferry.model.errors import Failed
from vmferry.qemu.monitor import Monitor, QmpInterrupted, QmpLost, QmpTimeout

_START_LIMIT_S = 20.0


@contextlib.asynccontextmanager
async def probe_qemu(binary: str, arguments: Sequence[str]) -> AsyncIterator[Monitor]:
    """A monitor of a stopped QEMU with these arguments; it is gone when the block is left.

    Raises Failed `probe-failed` with QEMU's own last words when it does not come up.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs, tempfile.TemporaryFile() as log:
        number = theirs.fileno()
        fixed = ("-nodefaults", "-no-user-config", "-display", "none", "-S")
        channel = ("-chardev", f"socket,id=qmp,fd={number}", "-mon", "chardev=qmp,mode=control")
        process = await spawn_probe([binary, *arguments, *fixed, *channel], log, (number,))
        try:
            theirs.close()
            try:
                monitor = await Monitor.connect(ours, _START_LIMIT_S)
            except (QmpLost, QmpInterrupted, QmpTimeout) as error:
                words = last_words(log)
                raise Failed("probe-failed", f"{binary} does not start: {words or error.message}") from error
            async with monitor:
                yield monitor
        finally:
            await end_probe(process)


async def spawn_probe(command: Sequence[str], log: IO[bytes], fds: Sequence[int] = ()) -> asyncio.subprocess.Process:
    """Starts a process that writes to the log. Raises Failed `probe-failed` if it cannot be run."""
    try:
        return await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=tuple(fds)
        )
    except OSError as error:
        raise Failed("probe-failed", f"{command[0]} cannot be run: {error}.", "Install QEMU.") from error


async def end_probe(process: asyncio.subprocess.Process) -> None:
    """Kills the process unless it has ended, and reaps it."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await asyncio.shield(process.wait())


def last_words(log: IO[bytes], lines: int = 3) -> str:
    """The last lines of a small log."""
    log.seek(0)
    return " / ".join(log.read().decode(errors="replace").splitlines()[-lines:])
