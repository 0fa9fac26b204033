"""Counts a VM's frames on a device, and notes its announcements (RARP, gratuitous ARP) with their times."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from typing import Any

from vmferry.lab.probes.pacing import Pacer, Progress, StopFlag, wall_time

_ETH_P_ALL = 3
_ARP, _RARP = 0x0806, 0x8035
_MOST_ANNOUNCEMENTS = 200


class FrameCounter:
    """Frames from, to and not concerning one MAC."""

    def __init__(self, mac: str) -> None:
        self._mac = bytes.fromhex(mac.replace(":", ""))
        self._counts = {"from": 0, "to": 0, "broadcast": 0, "other": 0}
        self._bytes = 0
        self._announcements: list[dict[str, Any]] = []

    def note(self, frame: bytes) -> None:
        target, source = frame[:6], frame[6:12]
        self._bytes += len(frame)
        if source == self._mac:
            self._counts["from"] += 1
            self._note_announcement(frame)
        elif target == self._mac:
            self._counts["to"] += 1
        elif target[0] & 1:
            self._counts["broadcast"] += 1
        else:
            self._counts["other"] += 1

    def _note_announcement(self, frame: bytes) -> None:
        (kind,) = struct.unpack_from("!H", frame, 12)
        gratuitous = kind == _ARP and len(frame) >= 42 and frame[28:32] == frame[38:42]
        if (kind == _RARP or gratuitous) and len(self._announcements) < _MOST_ANNOUNCEMENTS:
            name = "rarp" if kind == _RARP else "arp"
            self._announcements.append({"kind": name, "at": wall_time(time.time_ns())})

    def report(self) -> dict[str, Any]:
        return {
            "probe": "frames",
            "frames": dict(self._counts),
            "bytes": self._bytes,
            "announcements": self._announcements,
        }


def run_frames(device: str, mac: str, stop: StopFlag, progress: Progress) -> dict[str, Any]:
    """Counts until stopped. `missed` are frames that the kernel could not keep for us."""
    listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    counter, pacer = FrameCounter(mac), Pacer(100)
    with contextlib.closing(listener):
        listener.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        listener.bind((device, 0))
        listener.setblocking(False)
        while not stop.is_raised():
            pacer.wait(listener)
            pacer.take_due()
            with contextlib.suppress(BlockingIOError):
                while True:
                    counter.note(listener.recv(128))
            progress.show(counter.report)
        # PACKET_STATISTICS (6) at SOL_PACKET (263): packets, drops; packet(7)
        _, drops = struct.unpack("=II", listener.getsockopt(263, 6, 8))
    return {**counter.report(), "missed": drops}
