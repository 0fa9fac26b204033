"""What needs a terminal: the live picture and the console, each on a real pseudo-terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from recorded import COMPLETED, ID, RECEIPT, RUNNING, VM, RecordedHost

LIMIT_S = 30


@dataclass
class Terminal:
    """A command on a terminal of 80 columns."""

    process: subprocess.Popen[bytes]
    descriptor: int
    seen: bytes = b""

    def wait_for(self, text: bytes) -> None:
        deadline = time.monotonic() + LIMIT_S
        while text not in self.seen:
            ready, _, _ = select.select([self.descriptor], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come; seen: {self.seen!r}"
            try:
                self.seen += os.read(self.descriptor, 65536)
            except OSError as error:  # EIO: the command has ended
                raise AssertionError(f"{text!r} did not come; seen: {self.seen!r}") from error

    def type(self, keys: bytes) -> None:
        os.write(self.descriptor, keys)


@contextmanager
def on_terminal(tmp_path: Path, *arguments: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = {**os.environ, "VMFERRY_CONFIG": str(tmp_path / "client.toml"), "TERM": "xterm"}
    argv = [sys.executable, "-m", "vmferry.cli.main", *arguments]
    process = subprocess.Popen(
        argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    terminal = Terminal(process, ours)
    try:
        yield terminal
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(theirs)
        os.close(ours)


def migrating(host: RecordedHost, events: Any) -> None:
    host.on("GET", "/v1/vms/web1", VM).on("POST", "/v1/vms/web1/migrate", RUNNING)
    host.on("GET", f"/v1/migrations/{ID}", RUNNING).on("GET", f"/v1/migrations/{ID}/events", events)
    host.on("GET", f"/v1/migrations/{ID}/receipt", RECEIPT)


def test_the_picture_follows_to_the_receipt(hosts: list[RecordedHost], tmp_path: Path) -> None:
    go_on = threading.Event()

    def events() -> Any:
        yield RUNNING
        go_on.wait(LIMIT_S)
        yield COMPLETED

    migrating(hosts[0], events())
    with on_terminal(tmp_path, "vm", "migrate", "web1", "--to", "host2") as terminal:
        terminal.wait_for("▶ copy".encode())
        terminal.wait_for(b"110.0 MiB left")
        go_on.set()
        terminal.wait_for("✔ finish".encode())
        terminal.wait_for(b"reachable before")
        terminal.wait_for(b"\x1b[?25h")  # the cursor is shown again
        assert terminal.process.wait(LIMIT_S) == 0


def test_ctrl_c_in_the_picture_only_ends_the_watching(hosts: list[RecordedHost], tmp_path: Path) -> None:
    go_on = threading.Event()

    def events() -> Any:
        yield RUNNING
        go_on.wait(LIMIT_S)

    migrating(hosts[0], events())
    with on_terminal(tmp_path, "vm", "migrate", "web1", "--to", "host2") as terminal:
        terminal.wait_for(b"110.0 MiB left")
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.wait_for(f"vmferry migration cancel {ID}".encode())
        assert b"\x1b[?25h" in terminal.seen
        assert terminal.process.wait(LIMIT_S) == 130
    go_on.set()
    assert not any(path.endswith("/cancel") for _, path, _ in hosts[0].asked)


@pytest.fixture
def guest_console(hosts: list[RecordedHost], tmp_path: Path) -> Iterator[socket.socket]:
    path = tmp_path / "console.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(LIMIT_S)
        hosts[0].on("GET", "/v1/vms/web1", replace(VM, console=str(path)))
        yield listener


def test_the_console_carries_all_keys_but_one(guest_console: socket.socket, tmp_path: Path) -> None:
    with on_terminal(tmp_path, "vm", "console", "web1") as terminal:
        guest, _ = guest_console.accept()
        guest.settimeout(LIMIT_S)
        with guest:
            terminal.wait_for(b"Ctrl-] leaves")
            guest.sendall(b"login: ")
            terminal.wait_for(b"login: ")
            terminal.type(b"\x03\x1a root\r")
            got = b""
            while not got.endswith(b"\r"):
                got += guest.recv(100)
            assert got == b"\x03\x1a root\r"
            terminal.type(b"x\x1dy")
            assert guest.recv(100) == b"x"
            assert guest.recv(100) == b""
        assert terminal.process.wait(LIMIT_S) == 0
        flags = termios.tcgetattr(terminal.descriptor)[3]
        assert flags & termios.ICANON and flags & termios.ECHO


def test_a_guest_that_ends_ends_the_console(guest_console: socket.socket, tmp_path: Path) -> None:
    with on_terminal(tmp_path, "vm", "console", "web1") as terminal:
        guest_console.accept()[0].close()
        terminal.wait_for(b"the console is closed")
        assert terminal.process.wait(LIMIT_S) == 0
