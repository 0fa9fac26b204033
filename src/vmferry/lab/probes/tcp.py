"""TCP probes: one connection kept open, an echo or a stream of numbers, every byte checked in order.

A stall is a time in which nothing moved although something was under way.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import time
from array import array
from collections.abc import Iterator
from typing import Any

from vmferry.lab.probes.gaps import find_gaps
from vmferry.lab.probes.pacing import Pacer, Progress, StopFlag, wall_time

_CONNECT_S = 10.0
_CHUNK = 8192
# Offsets in struct tcp_info, include/uapi/linux/tcp.h
_TCP_INFO_BYTES = 232
_U32_FIELDS = {"rto_us": 8, "rtt_us": 68, "retransmits": 100, "out_of_order": 224}
_BYTES_ACKED = 120


def observe_tcp(connection: socket.socket) -> dict[str, int]:
    """The kernel's counters for this end: retransmitted segments, segments that came out of order, timeouts."""
    raw = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES).ljust(_TCP_INFO_BYTES, b"\0")
    fields = {name: int(struct.unpack_from("=I", raw, offset)[0]) for name, offset in _U32_FIELDS.items()}
    return {**fields, "bytes_acked": int(struct.unpack_from("=Q", raw, _BYTES_ACKED)[0])}


def numbers_from(place: int, size: int) -> bytes:
    """`size` bytes of the stream 0, 1, 2, ... (8 bytes each, big endian), from byte `place` on."""
    first, skip = divmod(place, 8)
    count = (skip + size + 7) // 8
    return struct.pack(f"!{count}Q", *range(first, first + count))[skip : skip + size]


class Talk:
    """One connection: what was sent, what came back, when it moved."""

    def __init__(self, target: str, port: int) -> None:
        self.socket = socket.create_connection((target, port), timeout=_CONNECT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.sent_bytes = self.received_bytes = self.errors = 0
        self.broken = ""
        self.moved_ns = array("q")
        self._acked = 0
        self._unsent = b""

    def send(self, data: bytes) -> None:
        """Queues and sends what the kernel takes."""
        self._unsent += data
        with self._noting_breaks(), contextlib.suppress(BlockingIOError):
            while self._unsent:
                taken = self.socket.send(self._unsent)
                self.sent_bytes += taken
                self._unsent = self._unsent[taken:]

    @property
    def unsent_bytes(self) -> int:
        return len(self._unsent)

    def take_unsent(self) -> bytes:
        """What the kernel has not taken yet; it is the caller's from now on."""
        rest, self._unsent = self._unsent, b""
        return rest

    def receive_numbers(self) -> None:
        """Takes what there is, a few MiB at most, and checks it."""
        with self._noting_breaks(), contextlib.suppress(BlockingIOError):
            for _ in range(32):
                data = self.socket.recv(65536)
                if not data:
                    self.broken = "closed by the guest"
                    return
                expected = numbers_from(self.received_bytes, len(data))
                if data != expected:
                    self.errors += sum(a != b for a, b in zip(data, expected, strict=True))
                self.received_bytes += len(data)
                self._move()

    def note_acknowledged(self) -> None:
        """For a stream that only goes out: it moves when bytes are acknowledged."""
        acked = observe_tcp(self.socket)["bytes_acked"]
        if acked != self._acked:
            self._acked = acked
            self._move()

    @contextlib.contextmanager
    def _noting_breaks(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.broken = error.strerror or type(error).__name__

    def _move(self) -> None:
        """Notes that something moved now. Times less than a millisecond apart are kept as one."""
        now, times = time.time_ns(), self.moved_ns
        if len(times) > 1 and now - times[-2] < 1_000_000:
            times[-1] = now
        else:
            times.append(now)

    def progress(self) -> dict[str, Any]:
        silent = (time.time_ns() - self.moved_ns[-1]) / 1e6 if self.moved_ns else None
        return {
            "sent": self.sent_bytes,
            "received": self.received_bytes,
            "errors": self.errors,
            "silent_ms": silent,
            "broken": self.broken,
        }

    def report(self, name: str, pacer: Pacer) -> dict[str, Any]:
        stalls = find_gaps(self.moved_ns)
        return {
            "probe": name,
            "bytes_sent": self.sent_bytes,
            "bytes_received": self.received_bytes,
            "content_errors": self.errors,
            "broken": bool(self.broken),
            "reason": self.broken,
            "longest_stall_ms": stalls[0]["ms"] if stalls else None,
            "stalls": stalls,
            "silent_at_end_ms": (time.time_ns() - self.moved_ns[-1]) / 1e6 if self.moved_ns else None,
            "tcp": observe_tcp(self.socket),
            "late_max_ms": pacer.latest_ns / 1e6,
            "ended": wall_time(time.time_ns()),
        }


def run_echo(target: str, port: int, rate: float, size: int, stop: StopFlag, progress: Progress) -> dict[str, Any]:
    """`rate` messages of `size` bytes a second, each echoed."""
    talk, pacer, place = Talk(target, port), Pacer(rate), 0
    with contextlib.closing(talk.socket):
        while not stop.is_raised() and not talk.broken:
            while pacer.take_due():
                if talk.unsent_bytes < 1 << 20:  # a stalled connection: do not queue without end
                    talk.send(numbers_from(place, size))
                    place += size
            talk.receive_numbers()
            progress.show(talk.progress)
            pacer.wait(talk.socket)
        _await_rest(talk, pacer, place)
        document = talk.report("tcp", pacer)
    return {**document, "complete": talk.received_bytes == place}


def _await_rest(talk: Talk, pacer: Pacer, wanted: int) -> None:
    deadline = time.monotonic() + 2.0
    while talk.received_bytes < wanted and not talk.broken and time.monotonic() < deadline:
        talk.send(b"")
        talk.receive_numbers()
        pacer.take_due()
        pacer.wait(talk.socket)


def run_down(target: str, port: int, bytes_per_s: int, stop: StopFlag, progress: Progress) -> dict[str, Any]:
    """The guest sends numbers; 0 bytes/s is as fast as it can."""
    talk, pacer = Talk(target, port), Pacer(1000)
    with contextlib.closing(talk.socket):
        talk.send(f"SEND {bytes_per_s}\n".encode())
        while not stop.is_raised() and not talk.broken:
            pacer.wait(talk.socket)
            pacer.take_due()
            talk.receive_numbers()
            progress.show(talk.progress)
        return talk.report("stream-down", pacer)


def run_up(target: str, port: int, bytes_per_s: int, stop: StopFlag, progress: Progress) -> dict[str, Any]:
    """We send numbers and the guest checks them; `guest` in the report is what it says of them at the end."""
    talk, pacer, place = Talk(target, port), Pacer(1000), 0
    fast = bytes_per_s == 0
    size = _CHUNK if fast else max(1, bytes_per_s // 1000)
    with contextlib.closing(talk.socket):
        talk.send(b"SINK\n")
        while not stop.is_raised() and not talk.broken:
            talk.send(b"")
            while (pacer.take_due() or fast) and talk.unsent_bytes < _CHUNK and not talk.broken:
                talk.send(numbers_from(place, size))
                place += size
            talk.note_acknowledged()
            progress.show(talk.progress)
            pacer.wait(talk.socket, writable=fast)
        document = talk.report("stream-up", pacer)
        answer = "" if talk.broken else _closing_words(talk)
    said = re.fullmatch(r"bytes=(\d+) errors=(\d+)\n", answer)
    guest = {"bytes": int(said[1]), "errors": int(said[2])} if said else None
    errors = guest["errors"] if guest else 0
    return {**document, "guest": guest, "content_errors": errors, "complete": bool(guest and guest["bytes"] == place)}


def _closing_words(talk: Talk) -> str:
    talk.socket.setblocking(True)
    talk.socket.settimeout(5.0)
    try:
        talk.socket.sendall(talk.take_unsent())
        talk.socket.shutdown(socket.SHUT_WR)
        return talk.socket.recv(200).decode(errors="replace")
    except OSError:
        return ""
