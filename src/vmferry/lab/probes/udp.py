"""UDP echo probe: n requests a second, every reply accounted for.

The guest appends to each reply how many requests of this client it has seen (guest_src/echo.c), which tells a lost
request from a lost reply. Times of arrival are the kernel's (SO_TIMESTAMPNS), so that a slow probe measures no gap.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from array import array
from typing import Any

from vmferry.lab.probes.gaps import count_inversions, find_gaps, find_runs, longest_ms
from vmferry.lab.probes.pacing import NS, Pacer, Progress, StopFlag, wall_time

_REQUEST = struct.Struct("!QQ")
_REPLY = struct.Struct("!QQQ")
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("qq")
_BUFFER_BYTES = 8 << 20


class UdpProbe:
    """One run. `rows` in order of arrival: number, guest's count, time."""

    def __init__(self, target: str, port: int, size: int) -> None:
        self._padding = b"\0" * max(0, size - _REQUEST.size)
        self._sent_ns = array("q")
        self._numbers, self._counts, self._arrived_ns = array("q"), array("q"), array("q")
        self._answered: set[int] = set()  # a reply may come twice
        self._refused = self._send_errors = self._strange = 0
        self.socket = _open(target, port)

    @property
    def outstanding(self) -> int:
        """Requests without a reply so far."""
        return len(self._sent_ns) - len(self._answered)

    def send(self) -> None:
        """Sends the next request. Errors (no route, no neighbour) are counted, the number is used up."""
        now = time.time_ns()
        number = len(self._sent_ns)
        self._sent_ns.append(now)
        try:
            self.socket.send(_REQUEST.pack(number, now) + self._padding)
        except ConnectionRefusedError:
            self._refused += 1
        except OSError:
            self._send_errors += 1

    def receive(self) -> None:
        """Takes everything that has arrived."""
        while True:
            try:
                data, extra, _, _ = self.socket.recvmsg(2048, 128)
            except BlockingIOError:
                return
            except OSError:
                self._refused += 1
                continue
            self._note(data, extra)

    def _note(self, data: bytes, extra: list[tuple[int, int, bytes]]) -> None:
        if len(data) < _REPLY.size:
            self._strange += 1
            return
        number, sent_ns = _REQUEST.unpack_from(data)
        if number >= len(self._sent_ns) or self._sent_ns[number] != sent_ns:
            self._strange += 1
            return
        self._numbers.append(number)
        self._answered.add(number)
        self._counts.append(int.from_bytes(data[-8:], "big"))
        self._arrived_ns.append(_kernel_time(extra))

    def progress(self) -> dict[str, Any]:
        """Cheap: looks at the newest two seconds only."""
        newest = self._arrived_ns[-2000:]
        rtt = (newest[-1] - self._sent_ns[self._numbers[-1]]) / 1e6 if newest else None
        silent = (time.time_ns() - newest[-1]) / 1e6 if newest else None
        return {
            "sent": len(self._sent_ns),
            "received": len(self._numbers),
            "rtt_ms": rtt,
            "silent_ms": silent,
            "recent_gap_ms": longest_ms(newest),
        }

    def report(self, latest_ns: int) -> dict[str, Any]:
        """Everything, once the run is over."""
        seen = self._answered
        lost = [number for number in range(len(self._sent_ns)) if number not in seen]
        lost_replies = max(0, max(self._counts, default=0) - len(self._numbers))
        arrived = sorted(self._arrived_ns)
        gaps = [self._with_sends(gap) for gap in find_gaps(arrived)]
        by_count = [number for _, number in sorted(zip(self._counts, self._numbers, strict=True))]
        rtts = sorted(
            (at - self._sent_ns[number]) / 1e6 for at, number in zip(self._arrived_ns, self._numbers, strict=True)
        )
        return {
            "probe": "udp",
            "sent": len(self._sent_ns),
            "received": len(seen),
            "lost": len(lost),
            "lost_replies": lost_replies,
            "lost_requests": max(0, len(lost) - lost_replies),
            "lost_runs": [
                {"first": first, "count": count, "at": wall_time(self._sent_ns[first])}
                for first, count in find_runs(lost)
            ],
            "duplicates": len(self._numbers) - len(seen),
            "reordered_requests": count_inversions(by_count),
            "reordered_replies": count_inversions(self._counts),
            "longest_gap_ms": gaps[0]["ms"] if gaps else None,
            "gaps": gaps,
            "rtt_ms": {"median": rtts[len(rtts) // 2], "max": rtts[-1]} if rtts else None,
            "refused": self._refused,
            "send_errors": self._send_errors,
            "strange": self._strange,
            "send_late_max_ms": latest_ns / 1e6,
            "longest_send_gap_ms": longest_ms(self._sent_ns),
            "begin": wall_time(self._sent_ns[0]) if self._sent_ns else None,
            "silent_at_end_ms": (self._sent_ns[-1] - arrived[-1]) / 1e6 if arrived else None,
        }

    def _with_sends(self, gap: dict[str, Any]) -> dict[str, Any]:
        """Adds the longest time in which we sent nothing ourselves: a starved probe shows here."""
        within = [at for at in self._sent_ns if gap["begin_ns"] <= at <= gap["end_ns"]]
        return {**gap, "longest_send_gap_ms": longest_ms(within), "sent_in_gap": len(within)}


def _open(target: str, port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    for force, plain in ((33, socket.SO_RCVBUF), (32, socket.SO_SNDBUF)):  # SO_RCVBUFFORCE, SO_SNDBUFFORCE: as root
        try:
            made.setsockopt(socket.SOL_SOCKET, force, _BUFFER_BYTES)
        except PermissionError:
            made.setsockopt(socket.SOL_SOCKET, plain, _BUFFER_BYTES)
    made.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    made.connect((target, port))
    return made


def _kernel_time(extra: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in extra:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
            seconds, ns = _TIMESPEC.unpack_from(data)
            return int(seconds) * NS + int(ns)
    return time.time_ns()


def run_udp(target: str, port: int, rate: float, size: int, stop: StopFlag, progress: Progress) -> dict[str, Any]:
    """Probes until stopped, then waits up to a second for the last replies."""
    probe = UdpProbe(target, port, size)
    pacer = Pacer(rate)
    with contextlib.closing(probe.socket):
        while not stop.is_raised():
            while pacer.take_due():
                probe.send()
            probe.receive()
            progress.show(probe.progress)
            pacer.wait(probe.socket)
        latest_ns = pacer.latest_ns
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and probe.outstanding > 0:
            pacer.take_due()
            pacer.wait(probe.socket)
            probe.receive()
    return probe.report(latest_ns)
