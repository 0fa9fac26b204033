"""A small blocking QMP client. For the bare script and the watcher; the product has its own (vmferry.qemu)."""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from vmferry.model.errors import Failed


@dataclass(frozen=True, slots=True)
class Event:
    """`at_us`: QEMU's own wall clock, microseconds since the epoch."""

    name: str
    data: dict[str, Any]
    at_us: int


class Qmp:
    """One monitor connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = b""
        self._events: deque[Event] = deque()

    @classmethod
    def connect(cls, path: Path, within_s: float = 20.0) -> Self:
        """Connects and negotiates. Raises Failed `bench-qmp`."""
        deadline = time.monotonic() + within_s
        while (connection := try_connect(path)) is None:
            if time.monotonic() > deadline:
                raise Failed("bench-qmp", f"Nobody answers at {path}.", "See the guest's log beside it.")
            time.sleep(0.002)
        connection.settimeout(within_s)
        qmp = cls(connection)
        qmp._receive()  # the greeting
        qmp.execute("qmp_capabilities")
        return qmp

    def execute(self, command: str, /, **arguments: Any) -> Any:
        """QEMU's answer; `_` in keywords stands for `-`. Raises Failed `bench-qmp`."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps(request).encode())
        while True:
            message = self._receive()
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise Failed("bench-qmp", f"QEMU refused {command}: {message['error']['desc']}", "")
            self._note(message)

    def wait_event(self, name: str, wanted: Callable[[dict[str, Any]], bool], within_s: float = 60.0) -> Event:
        """The next such event, of those that have come already too. Raises Failed `bench-qmp`."""
        deadline = time.monotonic() + within_s
        while True:
            while self._events:
                event = self._events.popleft()
                if event.name == name and wanted(event.data):
                    return event
            if time.monotonic() > deadline:
                raise Failed("bench-qmp", f"{name} did not come within {within_s:.0f} s.", "")
            self._note(self._receive())

    def drain(self) -> list[Event]:
        """All events that have come; the connection is closed."""
        self._socket.setblocking(False)
        try:
            while True:
                self._note(self._receive())
        except (OSError, Failed):
            pass
        finally:
            self._socket.close()
        return list(self._events)

    def close(self) -> None:
        self._socket.close()

    def _note(self, message: dict[str, Any]) -> None:
        if "event" in message:
            stamp = message["timestamp"]
            at_us = stamp["seconds"] * 1_000_000 + stamp["microseconds"]
            self._events.append(Event(message["event"], message.get("data", {}), at_us))

    def _receive(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = self._socket.recv(65536)
            if not data:
                raise Failed("bench-qmp", "QEMU hung up.", "See the guest's log.")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


def try_connect(path: Path) -> socket.socket | None:
    """A connection, or None if nobody listens there (yet)."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        return None
    return connection
