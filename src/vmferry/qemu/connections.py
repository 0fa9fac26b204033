"""What is on the way over a guest process's TCP connections, asked of the kernel through duplicates of descriptors."""

from __future__ import annotations

import ctypes
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Sequence

from vmferry.model.errors import Failed, WrongInput
from vmferry.qemu.process import GuestProcess

_INT = struct.Struct("@i")
_TCP_INFO = 11
_TCP_NOTSENT_LOWAT = 25
# struct tcp_info of linux/tcp.h: tcpi_bytes_acked is the u64 at 120, since Linux 4.1.
_BYTES_ACKED = struct.Struct("@120xQ")

_SO_ATTACH_FILTER = 26
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD_BYTE, _LOAD_WORD, _SHIFT_RIGHT, _EQUAL, _RETURN = 0x30, 0x20, 0x74, 0x15, 0x06
_NETWORK = 0xFFF00000  # SKF_NET_OFF: offsets from here count from the IP header
_WHOLE = 0xFFFFFFFF

_SIOCOUTQ = 0x5411  # tcp(7): bytes in the send queue, sent and not acknowledged ones included


def sum_sent(process: GuestProcess, port: int) -> int:
    """Bytes that the process sent on its connections to this remote port and that were acknowledged.

    With encryption and framing, without TCP's and IP's headers. Blocks for a moment; 0 if there is no connection.
    """
    total = 0
    for sock in _connections(process, port):
        info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
        total += int(_BYTES_ACKED.unpack_from(info)[0])
    return total


class SendQueues:
    """The process's connections to a remote port, as they are now; held open until `close`."""

    def __init__(self, process: GuestProcess, port: int) -> None:
        """Blocks for a moment."""
        # Not sock.dup(): that makes QEMU's own socket a blocking one (the flag belongs to the shared description).
        self._sockets = [socket.socket(fileno=os.dup(sock.fileno())) for sock in _connections(process, port)]

    def waiting_bytes(self) -> int:
        """Bytes that were written and have not been acknowledged."""
        total = 0
        for sock in self._sockets:
            (waiting,) = _INT.unpack(fcntl.ioctl(sock, _SIOCOUTQ, bytes(_INT.size)))
            total += waiting
        return total

    def keep_short(self, unsent_bytes: int) -> None:
        """From now on the process waits while more than that is written and not even sent (TCP_NOTSENT_LOWAT).

        What is sent already is little, too: the kernel gives a network device a few packets of a connection at a time.
        """
        for sock in self._sockets:
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, unsent_bytes)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets = []


def prepare_listeners(process: GuestProcess, allowed: Sequence[str]) -> None:
    """The process's TCP listeners answer these addresses only, and what they accept is sent at once. Blocks a moment.

    The first, because QEMU reads a new migration connection's TLS handshake without looking at anything else: whoever
    connects and says nothing stops it for good, and with it every guest whose disk is mirrored to it.

    The second (TCP_NODELAY is inherited), because a TLS server's first flight is several small writes: each handshake
    waits 40 ms for the other side's delayed acknowledgement otherwise. Raises WrongInput for what is no address.
    """
    try:
        program = compile_source_filter(allowed)
    except ValueError as error:
        raise WrongInput("bad-address", f"{error}.", "Is the other host's version known?") from error
    for sock in _sockets(process):
        if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        ):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            buffer = ctypes.create_string_buffer(program)
            count = len(program) // _INSTRUCTION.size
            sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HL", count, ctypes.addressof(buffer)))


def compile_source_filter(allowed: Sequence[str]) -> bytes:
    """A classic BPF program (linux/filter.h) that drops packets which come from other addresses. Pure.

    Raises ValueError for what is no address.
    """
    program: list[tuple[int, int, int, int]] = []
    for text in allowed:
        address = ipaddress.ip_address(text.partition("%")[0])
        words = [int.from_bytes(address.packed[i : i + 4], "big") for i in range(0, len(address.packed), 4)]
        offset = 12 if address.version == 4 else 8
        part = [(_LOAD_BYTE, 0, 0, _NETWORK), (_SHIFT_RIGHT, 0, 0, 4), (_EQUAL, 0, 0, address.version)]
        for number, word in enumerate(words):
            part += [(_LOAD_WORD, 0, 0, _NETWORK + offset + 4 * number), (_EQUAL, 0, 0, word)]
        part.append((_RETURN, 0, 0, _WHOLE))
        for at, (code, yes, no, value) in enumerate(part):
            behind = len(part) - at - 1  # where a comparison that fails goes on: at the next address
            program.append((code, yes, behind if code == _EQUAL else no, value))
    program.append((_RETURN, 0, 0, 0))
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)


def _connections(process: GuestProcess, port: int) -> Iterator[socket.socket]:
    """Duplicates, each closed when the next one is asked for."""
    for sock in _sockets(process):
        try:
            peer = sock.getpeername()
        except OSError:
            continue  # a listening or closed socket
        if sock.family in (socket.AF_INET, socket.AF_INET6) and peer[1] == port:
            yield sock


def _sockets(process: GuestProcess) -> Iterator[socket.socket]:
    """Duplicates of all, each closed when the next one is asked for."""
    for file in process.find_fds(lambda file: file.target.startswith("socket:")):
        try:
            fd = process.duplicate(file.fd)
        except Failed:
            continue  # closed since we looked
        with socket.socket(fileno=fd) as sock:
            yield sock
