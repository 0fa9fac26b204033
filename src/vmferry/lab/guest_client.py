"""Asks a lab guest how it is: its status service answers one UDP request with one JSON document (guest_src/status.c).

For the demo, the bench and tests. Blocking; call it through a thread from asyncio.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from dataclasses import dataclass
from typing import Any

from vmferry.lab.netns import open_socket
from vmferry.model.errors import Failed, Unreachable

STATUS_PORT = 8
_TRY_S = 0.3


@dataclass(frozen=True, slots=True)
class MemoryStatus:
    """The memory workload. `errors` counts pages found torn, changed or stale."""

    wss_bytes: int
    rate_bytes: int
    pages_written: int
    pages_checked: int
    errors: int
    first_error: str


@dataclass(frozen=True, slots=True)
class DiskStatus:
    """The disk workload. `state`: none, reading, filling, writing, verifying, failed. `found`: last record at boot."""

    state: str
    size_bytes: int
    rate: int
    found: int
    written: int
    errors: int
    io_errors: int
    max_write_us: int
    fill_bytes: int
    fill_done: bool
    first_error: str


@dataclass(frozen=True, slots=True)
class GuestStatus:
    """`boot_id` is random at each boot; `dead` counts workload processes that ended (none should)."""

    boot_id: str
    uptime_ms: int
    beats: int
    dead: int
    memory: MemoryStatus
    disk: DiskStatus
    udp: dict[str, int]
    tcp: dict[str, int]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """A walk over all records or pages."""

    checked: int
    errors: int
    first_error: str


class GuestClient:
    """Speaks to one guest from a namespace (None: this process's own). Close it, or use it in `with`."""

    def __init__(self, address: str, namespace: str | None = None, port: int = STATUS_PORT) -> None:
        self._place = (address, port)
        self._namespace = namespace
        self._socket = self._open()

    def _open(self) -> socket.socket:
        made = open_socket(self._namespace, socket.AF_INET, socket.SOCK_DGRAM)
        made.settimeout(_TRY_S)
        return made

    def __enter__(self) -> GuestClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def status(self, within_s: float = 10.0) -> GuestStatus:
        """Asks until an answer comes. Raises Unreachable `guest-silent`."""
        return _status_of(self._ask("status", within_s))

    def set_load(
        self, dirty_mb: int | None = None, disk_rate: int | None = None, within_s: float = 10.0
    ) -> GuestStatus:
        """Changes the load: MB/s of memory dirtied, disk records/s. The workloads must have been started at boot."""
        document: dict[str, Any] = {}
        for name, value in (("dirty", dirty_mb), ("diskrate", disk_rate)):
            document = self._ask("status" if value is None else f"set {name}={value}", within_s)
        return _status_of(document)

    def verify_disk(self, within_s: float = 60.0) -> CheckResult:
        """Lets the guest read and check all disk records and the fill. Raises Unreachable, Failed `guest-check`."""
        return self._run_job("verify", within_s)

    def check_memory(self, within_s: float = 60.0) -> CheckResult:
        """Lets the guest check its whole working set. Raises Unreachable, Failed `guest-check`."""
        return self._run_job("check", within_s)

    def power_off(self) -> None:
        """Asks once; there may be no answer."""
        self._socket.sendto(b"poweroff", self._place)

    def _run_job(self, verb: str, within_s: float) -> CheckResult:
        token = secrets.token_hex(8)
        deadline = time.monotonic() + within_s
        while True:
            answer = self._ask(f"{verb} {token}", deadline - time.monotonic())
            if answer["state"] == "done":
                return CheckResult(answer["checked"], answer["errors"], answer["first_error"])
            if answer["state"] == "impossible":
                raise Failed("guest-check", f"The guest cannot {verb}: {answer['reason']}.", "See its command line.")
            time.sleep(0.05)

    def _ask(self, request: str, within_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + within_s
        self._forget_late_answers()
        while True:
            began = time.monotonic()
            try:
                self._socket.sendto(request.encode(), self._place)
                answer: dict[str, Any] = json.loads(self._socket.recv(65536))
                return answer
            except OSError as error:  # nothing in time, or not reachable yet
                if time.monotonic() >= deadline:
                    text = f"The guest at {self._place[0]} did not answer within {within_s:.1f} s."
                    raise Unreachable("guest-silent", text, "Does it run? See its console.") from error
                time.sleep(max(0.0, began + _TRY_S / 3 - time.monotonic()))

    def _forget_late_answers(self) -> None:
        """A new port: what a slow guest still answers to earlier requests cannot be taken for the answer to this."""
        self._socket.close()
        self._socket = self._open()


def _status_of(document: dict[str, Any]) -> GuestStatus:
    memory, disk = MemoryStatus(**document.pop("memory")), DiskStatus(**document.pop("disk"))
    return GuestStatus(memory=memory, disk=disk, **document)
