"""A guest's serial console on this terminal. For `vm console` only."""

from __future__ import annotations

import os
import select
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmferry.api.client import HostClient
from vmferry.cli.display import print_note
from vmferry.model.errors import Conflict, Failed, Unreachable
from vmferry.model.views import VmView

_LEAVE = 0x1D  # Ctrl-], as telnet and virsh have it
_CHUNK = 65536


def require_console(client: HostClient, view: VmView) -> Path:
    """The console's socket on this machine. Raises Conflict `no-console`, Failed `console-elsewhere`."""
    name = view.spec.name
    if not view.console:
        raise Conflict("no-console", f"{name} is {view.state.value} and has no console.", f"vmferry vm start {name}")
    if client.endpoint.socket is None:
        message = f"The console of {name} is a socket on {view.host}, not on this machine."
        raise Failed("console-elsewhere", message, f"Run vmferry vm console {name} on {view.host}.")
    return Path(view.console)


def attach(path: Path) -> None:
    """Joins terminal and console until Ctrl-], the end of the input, or the end of the guest.

    Raises Unreachable `console-closed` when the console cannot be opened.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as console:
        try:
            console.connect(str(path))
        except OSError as error:
            fix = "Is the guest still here, and may you open that socket? See vmferry vm list."
            raise Unreachable("console-closed", f"{path} cannot be opened: {error.strerror}.", fix) from error
        print_note("connected; Ctrl-] leaves")
        with _raw_terminal():
            ended = _pump(console, sys.stdin.fileno(), sys.stdout.fileno())
    print_note("")  # the guest may have left the cursor anywhere
    print_note(ended)


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Keys go to the guest as they are, Ctrl-C too. Nothing is changed when the input is no terminal."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setraw(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _pump(console: socket.socket, keys: int, screen: int) -> str:
    """Copies both ways; says why it ended."""
    while True:
        ready, _, _ = select.select([console.fileno(), keys], [], [])
        if console.fileno() in ready:
            try:
                said = console.recv(_CHUNK)
            except ConnectionError:
                said = b""
            if not said:
                return "the console is closed (the guest ended, or moved to another host)"
            _write_all(screen, said)
        if keys in ready:
            typed = os.read(keys, _CHUNK)
            before, leave, _ = typed.partition(bytes([_LEAVE]))
            try:
                console.sendall(before)
            except ConnectionError:
                return "the console is closed (the guest ended, or moved to another host)"
            if leave or not typed:
                return "left"


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
