"""A guest's process: started, found again after our restart, watched, ended; its descriptors.

Used by `host/` and `migration/`. A guest outlives the daemon: it has a session of its own and is not waited for by a
parent. It must not know what the guest is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmferry.model.errors import Failed
from vmferry.qemu.command import build_command
from vmferry.qemu.identity import (
    FdPredicate,
    OpenFile,
    ProcessIdentity,
    duplicate_fd,
    observe_identity,
    open_files,
    open_process,
    send_signal,
)
from vmferry.qemu.layout import (
    CONSOLE_LOG,
    CONSOLE_SOCKET,
    QEMU_LOG,
    QMP_SOCKET,
    YANK_SOCKET,
    GuestLayout,
    ListenFds,
)
from vmferry.qemu.monitor import Monitor, QmpInterrupted, QmpLost

__all__ = ["GuestProcess", "GuestUser", "OpenFile", "ProcessIdentity", "adopt_guest", "attach_process", "start_guest"]

_LOG_TAIL_BYTES = 4096
_VCPU_THREAD = "CPU "  # QEMU's names with debug-threads=on: CPU 0/KVM, CPU 0/TCG


@dataclass(frozen=True, slots=True)
class GuestUser:
    """Who the guest runs as. Root's capabilities are gone with the change of user (capabilities(7))."""

    uid: int
    gid: int
    extra_gids: tuple[int, ...] = ()


class GuestProcess:
    """A running QEMU and, once connected, its two monitors: `monitor` for work, `yank` kept for emergencies."""

    def __init__(
        self, identity: ProcessIdentity, run_dir: Path, pidfd: int, child: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.identity = identity
        self.run_dir = run_dir
        self._pidfd = pidfd
        self._child = child
        self._monitor: Monitor | None = None
        self._yank: Monitor | None = None
        loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int | None] = loop.create_future()
        loop.add_reader(pidfd, self._on_exit)

    @property
    def pid(self) -> int:
        return self.identity.pid

    @property
    def monitor(self) -> Monitor:
        """The monitor for all work. Raises QmpLost before `connect`."""
        if self._monitor is None:
            raise QmpLost("it was not opened")
        return self._monitor

    @property
    def yank(self) -> Monitor:
        """A monitor that nothing else is sent on. Raises QmpLost before `connect`."""
        if self._yank is None:
            raise QmpLost("it was not opened")
        return self._yank

    @property
    def running(self) -> bool:
        """Whether the process has not been seen to end."""
        return not self._exit.done()

    async def connect(self, timeout_s: float = 10.0) -> None:
        """Opens both monitors. Raises as `Monitor.connect` does; then neither is open."""
        monitor = await Monitor.connect(self.run_dir / QMP_SOCKET, timeout_s)
        try:
            self._yank = await Monitor.connect(self.run_dir / YANK_SOCKET, timeout_s)
        except BaseException:
            await monitor.close()
            raise
        self._monitor = monitor

    async def exited(self) -> int | None:
        """Waits until the process has ended. Exit status, negative for a signal; None if we are not its parent."""
        return await asyncio.shield(self._exit)

    def on_exit(self, callback: Callable[[int | None], None]) -> None:
        """Calls back when the process has ended."""
        self._exit.add_done_callback(lambda done: None if done.cancelled() else callback(done.result()))

    def terminate(self) -> None:
        """SIGTERM: QEMU flushes its disks and ends. Returns at once; an ended process is fine."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL. Returns at once; an ended process is fine."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:
            send_signal(self._pidfd, number)

    async def close(self) -> None:
        """Lets go of the process without touching it: monitors and descriptors of ours are closed."""
        for monitor in (self._monitor, self._yank):
            if monitor is not None:
                await monitor.close()
        self._release()
        if not self._exit.done():
            self._exit.cancel()
            if self._child is not None:
                self._child.returncode = 0  # not ours to wait for any more; keeps Popen from complaining

    def find_fds(self, predicate: FdPredicate) -> list[OpenFile]:
        """The descriptors of the process for which the predicate holds."""
        return [file for file in open_files(self.pid) if predicate(file)]

    def duplicate(self, fd: int) -> int:
        """A duplicate of that descriptor of the process; the caller closes it. Raises Failed `descriptor-not-given`."""
        return duplicate_fd(self._pidfd, fd)

    def steal_fd(self, predicate: FdPredicate) -> int:
        """A duplicate of the first such descriptor; the caller closes it. Raises Failed `descriptor-not-found`."""
        for file in self.find_fds(predicate):
            return duplicate_fd(self._pidfd, file.fd)
        raise Failed("descriptor-not-found", "The guest's process has no such descriptor open.")

    def steal_tap(self, interface: str) -> int:
        """A duplicate of the descriptor of a tap, by the interface's name. Raises as `steal_fd` does."""
        return self.steal_fd(lambda file: f"iff:\t{interface}\n" in file.info)

    def set_priority(self, nice: int, *, vcpus: bool = True) -> bool:
        """Sets the nice value of all threads there are, or of all but the vCPUs'.

        False if that is not allowed, or if the process has ended.
        """
        try:
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    if vcpus or not (task / "comm").read_text().startswith(_VCPU_THREAD):
                        os.setpriority(os.PRIO_PROCESS, int(task.name), nice)
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            return False
        return True

    def log_tail(self, lines: int = 8) -> list[str]:
        """The last lines of what QEMU wrote to its log (that is where its late errors are)."""
        return read_log_tail(self.run_dir / QEMU_LOG, lines)

    def _on_exit(self) -> None:
        status: int | None = None
        if self._child is not None:
            status = self._child.poll()
        else:
            with contextlib.suppress(ChildProcessError):  # usual: not our child
                os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        self._release()
        if not self._exit.done():
            self._exit.set_result(status)

    def _release(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


def read_log_tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log that may be large or missing."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


async def start_guest(
    layout: GuestLayout, fds: Sequence[int] = (), user: GuestUser | None = None, timeout_s: float = 20.0
) -> GuestProcess:
    """Starts QEMU and waits until its monitors answer. `fds` are the descriptors it inherits (the taps).

    The run directory must exist and the user must be able to enter it. Raises Failed `guest-start` with the last lines
    of qemu.log when QEMU does not come up; then no process is left.
    """
    spawning = asyncio.ensure_future(asyncio.to_thread(_spawn, layout, tuple(fds), user))
    try:
        process = await asyncio.shield(spawning)
    except asyncio.CancelledError:
        spawning.add_done_callback(_kill_unwanted)  # the thread cannot be stopped: its process must not be left behind
        raise
    guest = _own(process, layout.run_dir)
    try:
        await guest.connect(timeout_s)
    except (QmpLost, QmpInterrupted) as error:
        guest.kill()
        status = await guest.exited()
        tail = " / ".join(guest.log_tail())
        raise Failed("guest-start", f"QEMU did not start (status {status}): {tail or error.message}") from error
    except BaseException:
        guest.kill()
        await asyncio.shield(guest.exited())
        raise
    return guest


def attach_process(identity: ProcessIdentity, run_dir: Path) -> GuestProcess | None:
    """A guest's process of an earlier life of ours, without its monitors; None if it is gone."""
    pidfd = open_process(identity)
    return None if pidfd is None else GuestProcess(identity, run_dir, pidfd)


async def adopt_guest(identity: ProcessIdentity, run_dir: Path, timeout_s: float = 10.0) -> GuestProcess | None:
    """A guest of an earlier life of ours with its monitors open; None if it is gone.

    Raises QmpTimeout if it is there and does not answer (see `attach_process`).
    """
    guest = attach_process(identity, run_dir)
    if guest is None:
        return None
    try:
        await guest.connect(timeout_s)
    except QmpLost:
        if not await _ended_within(guest, 2.0):
            await guest.close()
            raise
        return None
    except BaseException:
        await guest.close()
        raise
    return guest


async def _ended_within(guest: GuestProcess, limit_s: float) -> bool:
    try:
        await asyncio.wait_for(guest.exited(), limit_s)
    except TimeoutError:
        return False
    return True


def _kill_unwanted(spawning: asyncio.Future[subprocess.Popen[bytes]]) -> None:
    if not spawning.cancelled() and spawning.exception() is None:
        process = spawning.result()
        process.kill()
        process.wait()


def _own(process: subprocess.Popen[bytes], run_dir: Path) -> GuestProcess:
    pidfd = os.pidfd_open(process.pid)  # not reaped yet, so the PID is certainly ours
    identity = observe_identity(process.pid) or ProcessIdentity(process.pid, 0)
    return GuestProcess(identity, run_dir, pidfd, process)


def _spawn(layout: GuestLayout, fds: tuple[int, ...], user: GuestUser | None) -> subprocess.Popen[bytes]:
    with contextlib.ExitStack() as stack:
        directory = os.open(layout.run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, directory)
        listen = [stack.enter_context(_listen(directory, name)) for name in (QMP_SOCKET, YANK_SOCKET, CONSOLE_SOCKET)]
        _prepare_console_log(layout.run_dir / CONSOLE_LOG, user)
        log = stack.enter_context((layout.run_dir / QEMU_LOG).open("ab"))
        numbers = [sock.fileno() for sock in listen]
        command = build_command(layout, ListenFds(*numbers))
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[*numbers, *fds],
                umask=0o077,
                user=user.uid if user else None,
                group=user.gid if user else None,
                extra_groups=user.extra_gids if user else None,
                cwd="/",
            )
        except OSError as error:
            raise Failed("guest-start", f"{layout.binary} cannot be run: {error}.", "Install QEMU.") from error


def _listen(directory: int, name: str) -> socket.socket:
    """A listening socket in a directory. Through its descriptor, so that a long path does not matter (limit: 107)."""
    path = f"/proc/self/fd/{directory}/{name}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        server.bind(path)
        Path(path).chmod(0o600)
        server.listen(4)
    except BaseException:
        server.close()
        raise
    return server


def _prepare_console_log(path: Path, user: GuestUser | None) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if user is not None:
            os.fchown(fd, user.uid, user.gid)
    finally:
        os.close(fd)
