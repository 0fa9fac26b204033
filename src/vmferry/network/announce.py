"""Tells the network where a MAC (and its addresses) now lives: RARP, gratuitous ARP, unsolicited neighbour adverts.

For the gate and `migration/`. Frames and sockets are made beforehand; sending takes microseconds.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Final, Self

from vmferry.model.names import require_mac
from vmferry.network.messages import mac_bytes
from vmferry.network.netlink import KernelRefused

_BROADCAST: Final = b"\xff" * 6
_SMALLEST_FRAME: Final = 60
# QEMU's defaults (migration parameters announce-*): five rounds, 50 ms after the first, then 100 ms more each time.
ROUND_PAUSES_MS: Final = (50, 150, 250, 350)


def rarp_frame(mac: str) -> bytes:
    """The frame QEMU announces with (net/announce.c): switches learn from its source address, nobody answers it."""
    own = mac_bytes(mac)
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 3) + own + bytes(4) + own + bytes(4)
    return (_BROADCAST + own + b"\x80\x35" + body).ljust(_SMALLEST_FRAME, b"\0")


def gratuitous_arp_frame(mac: str, address: str) -> bytes:
    """An ARP request for one's own address (RFC 5227, section 3: an announcement)."""
    own, ip = mac_bytes(mac), ipaddress.IPv4Address(address).packed
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + own + ip + bytes(6) + ip
    return (_BROADCAST + own + b"\x08\x06" + body).ljust(_SMALLEST_FRAME, b"\0")


def neighbour_advert_frame(mac: str, address: str) -> bytes:
    """An unsolicited neighbour advertisement with the override flag, to all nodes (RFC 4861, section 7.2.6)."""
    own, ip = mac_bytes(mac), ipaddress.IPv6Address(address).packed
    to = ipaddress.IPv6Address("ff02::1").packed
    body = struct.pack("!BBHI", 136, 0, 0, 0x20000000) + ip + b"\x02\x01" + own
    checksum = _checksum(ip + to + struct.pack("!II", len(body), 58) + body)
    body = body[:2] + struct.pack("!H", checksum) + body[4:]
    header = struct.pack("!IHBB", 0x60000000, len(body), 58, 255) + ip + to
    return bytes.fromhex("333300000001") + own + b"\x86\xdd" + header + body


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def announcement_frames(mac: str, addresses: Iterable[str] = ()) -> tuple[bytes, ...]:
    """RARP for the MAC and one frame for each IPv4 and IPv6 address. Raises WrongInput `bad-mac`."""
    mac = require_mac(mac)
    frames = [rarp_frame(mac)]
    for address in addresses:
        is_v4 = ipaddress.ip_address(address).version == 4
        frames.append(gratuitous_arp_frame(mac, address) if is_v4 else neighbour_advert_frame(mac, address))
    return tuple(frames)


class Announcer:
    """Sends prepared frames out of prepared sockets, one for each uplink. Use as a context manager or `close`."""

    def __init__(self, uplinks: Sequence[str], frames: Sequence[bytes]) -> None:
        self._frames = tuple(frames)
        self._sockets: list[socket.socket] = []
        try:
            for uplink in uplinks:
                self._sockets.append(self._open(uplink))
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _open(uplink: str) -> socket.socket:
        try:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
            try:
                sock.bind((uplink, 0))
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            raise KernelRefused(f"open a packet socket on {uplink}", error.errno or errno.EIO, "") from error
        return sock

    def send(self) -> int:
        """Sends every frame out of every uplink, without waiting; gives back how many were accepted.

        An uplink that is down accepts none. An announcement is repeated, so a refused one is no error.
        """
        accepted = 0
        for sock in self._sockets:
            for frame in self._frames:
                try:
                    accepted += bool(sock.send(frame))
                except OSError:
                    continue
        return accepted

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def announce_rounds(announcer: Announcer, pauses_ms: Sequence[int] = ROUND_PAUSES_MS) -> int:
    """Announces now and again after each pause, like QEMU; gives back the frames accepted. May be cancelled."""
    accepted = announcer.send()
    for pause in pauses_ms:
        await asyncio.sleep(pause / 1000)
        accepted += announcer.send()
    return accepted
