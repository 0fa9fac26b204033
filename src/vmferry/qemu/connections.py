"""What is on the way over a guest process's TCP connections, asked of the kernel through duplicates of descriptors."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterator

from vmferry.model.errors import Failed
from vmferry.qemu.process import GuestProcess

_INT = struct.Struct("@i")
_TCP_INFO = 11
_TCP_NOTSENT_LOWAT = 25
# struct tcp_info of linux/tcp.h: tcpi_bytes_acked is the u64 at 120, since Linux 4.1.
_BYTES_ACKED = struct.Struct("@120xQ")


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
        self._sockets = [sock.dup() for sock in _connections(process, port)]

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


def send_at_once(process: GuestProcess) -> None:
    """Small writes on connections that the process accepts from now on are sent at once (TCP_NODELAY is inherited).

    QEMU leaves its migration sockets as they are, and a TLS server's first flight is several small writes: each
    handshake then waits 40 ms for the other side's delayed acknowledgement. Blocks for a moment.
    """
    for sock in _sockets(process):
        if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        ):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


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
