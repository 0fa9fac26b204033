"""What went over a guest process's TCP connections, asked of the kernel through duplicates of its descriptors."""

from __future__ import annotations

import socket
import struct

from vmferry.model.errors import Failed
from vmferry.qemu.process import GuestProcess

_TCP_INFO = 11
# struct tcp_info of linux/tcp.h: tcpi_bytes_acked is the u64 at 120, since Linux 4.1.
_BYTES_ACKED = struct.Struct("@120xQ")


def sum_sent(process: GuestProcess, port: int) -> int:
    """Bytes that the process sent on its connections to this remote port and that were acknowledged.

    With encryption and framing, without TCP's and IP's headers. Blocks for a moment; 0 if there is no connection.
    """
    total = 0
    for file in process.find_fds(lambda file: file.target.startswith("socket:")):
        try:
            fd = process.duplicate(file.fd)
        except Failed:
            continue  # closed since we looked
        with socket.socket(fileno=fd) as sock:
            try:
                peer = sock.getpeername()
            except OSError:
                continue  # a listening or closed socket
            if sock.family in (socket.AF_INET, socket.AF_INET6) and peer[1] == port:
                info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
                total += int(_BYTES_ACKED.unpack_from(info)[0])
    return total
