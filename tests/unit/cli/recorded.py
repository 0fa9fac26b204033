"""A host that answers with recorded documents on a real Unix socket, and documents to record.

For the tests of the command line: they are about what is asked, read and printed, not about what a host does.
"""

from __future__ import annotations

import json
import socketserver
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from vmferry.api.codec import encode, problem
from vmferry.model.errors import NotFound, VmferryError
from vmferry.model.findings import Finding, Severity
from vmferry.model.migration import (
    CheckResult,
    MigrateOptions,
    MigrationView,
    Mode,
    Outcome,
    Phase,
    PhaseTime,
    Prediction,
    Progress,
    Range,
    Role,
)
from vmferry.model.receipt import (
    Bytes,
    DiskDigests,
    Frames,
    MemoryDigests,
    NetworkProof,
    PredictedTimes,
    Receipt,
    Step,
    Verified,
)
from vmferry.model.views import HostView, PoolView, SwitchView, VmView
from vmferry.model.vm import DirectBoot, Disk, Nic, RunState, VmSpec

MIB = 1 << 20
ID = "m-0123456789ab"
HOSTILE = "evil\x1b[2J\x9b31m[bold red]\u202ename\n"

SPEC = VmSpec(
    id="0b9e",
    name="web1",
    cpus=2,
    memory_bytes=512 * MIB,
    machine="pc-q35-10.0",
    cpu="qemu64",
    boot=DirectBoot("kernel", "initrd", "console=ttyS0"),
    disks=(Disk("root", "local", 2048 * MIB, "qcow2", "/pools/local/web1-root.qcow2"),),
    nics=(Nic("lan", "52:54:00:12:34:56"),),
)
VM = VmView(SPEC, "host1", RunState.RUNNING, pid=4711, console="/run/vmferry/web1/console.sock")
HOST = HostView(
    name="host1",
    address="10.78.0.1:7443",
    reachable=True,
    version="0.1.0",
    accel="tcg",
    accel_reason="KVM opens, but a tiny guest did not run within 5 s",
    qemu_version="10.0.2",
    kernel="6.18.0",
    cpus=2,
    memory_total_bytes=24 << 30,
    memory_free_bytes=20 << 30,
    vms=1,
    pools=(PoolView("local", "directory", "/pools/local", 100 << 30, 60 << 30),),
    switches=(SwitchView("lan", "bridge", "br-lan", 1500, ("lan0",), 1),),
    certificate_expires_at="2027-11-23T10:00:00Z",
)
PREDICTION = Prediction(
    memory_bytes=540 * MIB,
    disk_bytes=410 * MIB,
    total_ms=Range(8200, 11400),
    blackout_ms=Range(9, 28),
    rounds=4,
    dirty_bytes_per_s=30 * MIB,
    link_bytes_per_s=118 * MIB,
    feasible=True,
)
CHECK = CheckResult(
    "web1",
    "host1",
    "host2",
    True,
    (
        Finding("cpu-features", Severity.OK, "host2 can give the guest every CPU feature it has.", host="host2"),
        Finding("clock-differs", Severity.WARNING, "The clocks differ by 1.4 s.", "Run an NTP client.", "host2"),
        Finding("memory-streams", Severity.OK, "QEMU names no blocker.", host="host1"),
    ),
    PREDICTION,
)
REFUSED_CHECK = replace(
    CHECK,
    ok=False,
    prediction=None,
    findings=(
        *CHECK.findings,
        Finding("switch-missing", Severity.ERROR, "host2 has no switch “lan”.", "Map it: --network lan=…", "host2"),
    ),
)
PHASES = (
    PhaseTime(Phase.CHECK, "2026-11-23T10:00:00Z", "2026-11-23T10:00:01Z"),
    PhaseTime(Phase.PREPARE, "2026-11-23T10:00:01Z", "2026-11-23T10:00:02Z"),
    PhaseTime(Phase.COPY, "2026-11-23T10:00:02Z"),
)
PROGRESS = Progress(
    disk_total_bytes=410 * MIB,
    disk_done_bytes=300 * MIB,
    disk_rate=60 * MIB,
    memory_total_bytes=512 * MIB,
    memory_remaining_bytes=100 * MIB,
    memory_sent_bytes=412 * MIB,
    memory_rate=58 * MIB,
    dirty_rate=30 * MIB,
    rounds=2,
    throttle_percent=20,
    blackout_ms=Range(12, 40),
    eta_ms=Range(2100, 4800),
)
RUNNING = MigrationView(
    id=ID,
    vm="web1",
    vm_id="0b9e",
    role=Role.SOURCE,
    source="host1",
    target="host2",
    mode=Mode.LIVE,
    phase=Phase.COPY,
    outcome=Outcome.RUNNING,
    generation=2,
    started_at="2026-11-23T10:00:00Z",
    ended_at="",
    phases=PHASES,
    progress=PROGRESS,
    options=MigrateOptions(),
    prediction=PREDICTION,
)
COMPLETED = replace(
    RUNNING,
    phase=Phase.FINISH,
    outcome=Outcome.COMPLETED,
    ended_at="2026-11-23T10:00:09Z",
    phases=tuple(PhaseTime(phase, "2026-11-23T10:00:02Z", "2026-11-23T10:00:03Z") for phase in Phase),
    blackout_ms=17.4,
    total_ms=9120.0,
    progress=replace(PROGRESS, disk_done_bytes=410 * MIB, memory_remaining_bytes=0),
)
RECEIPT = Receipt(
    id=ID,
    vm="web1",
    kind=Mode.LIVE,
    source="host1",
    target="host2",
    outcome=Outcome.COMPLETED,
    started_at="2026-11-23T10:00:00Z",
    phases=COMPLETED.phases,
    total_ms=9120.0,
    blackout_ms=17.4,
    predicted=PredictedTimes(PREDICTION.total_ms, PREDICTION.blackout_ms),
    rounds=4,
    bytes=Bytes(548 * MIB, 412 * MIB),
    frames=Frames(11, 14, 0),
    verified=Verified(
        MemoryDigests("xxh3:9f86d081884c7d65", "xxh3:9f86d081884c7d65", True),
        (DiskDigests("root", "top", "blake3:af1349b9f5f9a1a6", "blake3:af1349b9f5f9a1a6", True),),
    ),
    network=NetworkProof(True, True),
    options=MigrateOptions(),
    versions={"vmferry": "0.1.0", "qemu": "10.0.2"},
    generation=2,
    switchover=(Step("gate closed", -3.2), Step("stop", 0.0), Step("resume", 17.4)),
    signature="c2ln",
)


@dataclass
class RecordedHost:
    """What a host answers. A value is a document, an error, or a list of documents for JSON lines; a path that is not
    named is 404. `asked` is what it was asked: (method, path, body)."""

    name: str
    socket: Path
    answers: dict[tuple[str, str], Any] = field(default_factory=dict)
    asked: list[tuple[str, str, Any]] = field(default_factory=list)

    def on(self, method: str, path: str, answer: Any) -> RecordedHost:
        self.answers[(method, path)] = answer
        return self


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        host: RecordedHost = self.server.recorded  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        host.asked.append((self.command, self.path, json.loads(body) if body else None))
        answer = host.answers.get((self.command, self.path), NotFound("no-such", f"{self.path} is not here."))
        if isinstance(answer, VmferryError):
            self._send(answer.http_status, json.dumps(problem(answer)).encode())
        elif isinstance(answer, bytes):
            self._send(200, answer)
        elif hasattr(answer, "__next__"):
            self._stream(answer)
        else:
            self._send(200, json.dumps(encode(answer)).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, views: Iterable[Any]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for view in views:
            line = json.dumps(encode(view)).encode() + b"\n"
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def address_string(self) -> str:
        return "local"

    def log_message(self, format: str, *args: Any) -> None:
        return


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients that leave are what some tests are about
            super().handle_error(request, client_address)


@contextmanager
def serving(host: RecordedHost) -> Iterator[RecordedHost]:
    """The host while it answers."""
    with _Server(str(host.socket), _Handler) as server:
        server.recorded = host  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield host
        finally:
            server.shutdown()
            thread.join()
            host.socket.unlink()
