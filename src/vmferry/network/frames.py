"""Packet sockets that carry frames with their offload metadata, and record frames without taking them away.

For the gate, announcements and probes only. A frame with metadata is the 10-byte virtio-net header (checksum to be
filled in, segmentation) and then the Ethernet frame; the kernel calls it PACKET_VNET_HDR (linux/if_packet.h).
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import socket
import struct
from collections.abc import Callable
from enum import Enum
from typing import Final, Self

from vmferry.model.errors import Failed
from vmferry.network.netlink import KernelRefused
from vmferry.network.tap import SHORT_HEADER_BYTES

ETH_P_ALL: Final = 0x0003
_SOL_PACKET: Final = 263
_PACKET_STATISTICS, _PACKET_AUXDATA, _PACKET_VNET_HDR = 6, 8, 15
_PACKET_QDISC_BYPASS, _PACKET_IGNORE_OUTGOING = 20, 23
_SO_RCVBUFFORCE, _SO_SNDBUFFORCE, _SO_ATTACH_FILTER, _SO_TIMESTAMPNS = 33, 32, 26, 35
_AUXDATA: Final = struct.Struct("=IIIHHHH")
_TP_STATUS_VLAN_VALID: Final = 0x10
_LARGEST_FRAME: Final = 65536 + 4096
_BUFFER_BYTES: Final = 64 << 20
_KEEP_ALL: Final = 0x40000

# Classic BPF: keep what leaves through the device (pkt_type 4, PACKET_OUTGOING), i.e. what goes to the guest of a tap.
_OUTGOING_ONLY: Final = ((0x30, 0, 0, 0xFFFFF004), (0x15, 0, 1, 4), (0x06, 0, 0, _KEEP_ALL), (0x06, 0, 0, 0))
_EVERYTHING: Final = ((0x06, 0, 0, _KEEP_ALL),)
# Keep what comes in to a group address, except 01:80:c2:..., which a bridge keeps to itself.
_GROUPS_ONLY: Final = (
    (0x20, 0, 0, 0),  # the first four octets of the destination
    (0x45, 0, 3, 0x0100_0000),
    (0x54, 0, 0, 0xFFFF_FF00),
    (0x15, 1, 0, 0x0180_C200),
    (0x06, 0, 0, _KEEP_ALL),
    (0x06, 0, 0, 0),
)


class Recorded(Enum):
    """Which frames of a device are recorded."""

    TO_GUEST = _OUTGOING_ONLY  # what the host sends into a tap
    INCOMING = _EVERYTHING  # what the device brings in
    INCOMING_GROUPS = _GROUPS_ONLY  # broadcasts and multicasts it brings in


def _attach_filter(sock: socket.socket, program: tuple[tuple[int, int, int, int], ...]) -> None:
    code = b"".join(struct.pack("=HBBI", *step) for step in program)
    memory = ctypes.create_string_buffer(code)
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(memory)))


def _open(device: str, protocol: int, program: tuple[tuple[int, int, int, int], ...] = ()) -> socket.socket:
    """A packet socket on one device; it receives nothing before it is bound (no strays of other devices)."""
    try:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        try:
            if program:
                _attach_filter(sock, program)
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
            sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER_BYTES)
            sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            sock.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
            sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            sock.bind((device, protocol))
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise KernelRefused(f"open a packet socket on {device}", error.errno or errno.EIO, "") from error
    return sock


class _Owner:
    """Closes its socket once, also at the end of a `with`."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FrameSender(_Owner):
    """Sends frames with metadata out of a device.

    `bypass` leaves out the device's queueing and the hooks on it (the closed gate among them).
    """

    def __init__(self, device: str, *, bypass: bool = False) -> None:
        super().__init__(_open(device, 0))
        self._device = device
        self._socket.settimeout(1.0)
        if bypass:
            self._socket.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)

    def send(self, frame: bytes) -> None:
        """Raises Failed `frame-not-sent`; the frame is then lost."""
        try:
            self._socket.send(frame)
        except OSError as error:
            raise self._not_sent(error) from error

    def offer(self, frame: bytes) -> bool:
        """Whether the device had room for it: if not the frame is lost, and the kernel has counted it as dropped.

        A tap has no room when nobody reads it. Raises Failed `frame-not-sent` for what else keeps it from being sent.
        """
        try:
            self._socket.send(frame)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise self._not_sent(error) from error
            return False
        return True

    def _not_sent(self, error: OSError) -> Failed:
        reason = error.strerror or "no answer"
        return Failed("frame-not-sent", f"A frame could not be sent out of {self._device} ({reason}).")


class FrameRecorder(_Owner):
    """Keeps a copy of every frame of a device from now on, in the kernel, up to 64 MiB of it, oldest first."""

    def __init__(self, device: str, which: Recorded) -> None:
        super().__init__(_open(device, ETH_P_ALL, which.value))
        if which is not Recorded.TO_GUEST:
            self._socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._seen = 0
        self._missed = 0

    def seen(self) -> int:
        """All frames since the beginning, recorded or not."""
        self._read_counters()
        return self._seen

    def missed(self) -> int:
        """Frames that were not recorded because the buffer was full."""
        self._read_counters()
        return self._missed

    def _read_counters(self) -> None:
        packets, drops = struct.unpack("=II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        self._seen += packets
        self._missed += drops

    def take(self) -> list[bytes]:
        """The frames recorded and not yet taken, in order, with metadata. Raises Failed `frames-unread`."""
        return [frame for frame, _ in self.take_stamped()]

    def take_stamped(self) -> list[tuple[bytes, float]]:
        """Like `take`, each frame with the time (seconds since 1970) at which it went into the device."""
        frames: list[tuple[bytes, float]] = []
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_LARGEST_FRAME, 128)
            except BlockingIOError:
                return frames
            except OSError as error:
                raise Failed("frames-unread", f"Recorded frames cannot be read ({error.strerror}).") from error
            frames.append((with_vlan_tag(data, ancillary), _time_of(ancillary)))

    async def wait(self, seconds: float) -> bool:
        """Whether a frame is there to be taken, after at most that time."""
        arrived = asyncio.Event()
        self.call_on_arrival(arrived.set)
        try:
            async with asyncio.timeout(seconds):
                await arrived.wait()
        except TimeoutError:
            return False
        finally:
            self.ignore_arrival()
        return True

    def call_on_arrival(self, function: Callable[[], object]) -> None:
        """Calls it from the running event loop whenever frames are there, until `ignore_arrival` or `close`."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, function)

    def ignore_arrival(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._socket)
            self._loop = None

    def close(self) -> None:
        """Call it in the event loop if `call_on_arrival` was used."""
        self.ignore_arrival()
        super().close()


def _time_of(ancillary: list[tuple[int, int, bytes]]) -> float:
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("=qq", payload[:16])
            return float(seconds + nanoseconds / 1e9)
    return 0.0


def with_vlan_tag(data: bytes, ancillary: list[tuple[int, int, bytes]]) -> bytes:
    """The frame with the 802.1Q tag that the kernel has taken out of it put back, and the metadata's offsets moved."""
    for level, kind, payload in ancillary:
        if level != _SOL_PACKET or kind != _PACKET_AUXDATA or len(payload) < _AUXDATA.size:
            continue
        status, _, _, _, _, tci, tpid = _AUXDATA.unpack_from(payload)
        if not status & _TP_STATUS_VLAN_VALID:
            continue
        flags, gso, header_length, gso_size, start, offset = struct.unpack_from("=BBHHHH", data)
        moved = (flags, gso, header_length + 4 if header_length else 0, gso_size, start + 4 if flags & 1 else 0, offset)
        head = struct.pack("=BBHHHH", *moved)
        macs_end = SHORT_HEADER_BYTES + 12
        return head + data[SHORT_HEADER_BYTES:macs_end] + struct.pack("!HH", tpid or 0x8100, tci) + data[macs_end:]
    return data
