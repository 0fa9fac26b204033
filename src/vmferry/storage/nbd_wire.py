"""Numbers and layouts of the NBD protocol, and its handshake. For `storage.nbd` only.

Source: doc/proto.md of NetworkBlockDevice/nbd (fixed newstyle, structured replies, metadata contexts) and QEMU's
docs/interop/nbd.txt for `qemu:dirty-bitmap:NAME`.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from vmferry.model.errors import Failed, NotFound

NBDMAGIC, IHAVEOPT, REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
REQUEST_MAGIC, SIMPLE_MAGIC, STRUCTURED_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
CMD_READ, CMD_DISC, CMD_BLOCK_STATUS = 0, 2, 7
FLAG_DF, FLAG_REQ_ONE = 1 << 2, 1 << 3
REPLY_DONE = 1
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS = 0, 1, 2, 5
CHUNK_ERROR_BIT, CHUNK_ERROR_OFFSET = 1 << 15, (1 << 15) + 2
SEND_DF = 1 << 7
READ_ONLY = 1 << 1
REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
STRUCTURED = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
DEFAULT_PAYLOAD = 32 << 20

_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_ABORT, _OPT_STARTTLS, _OPT_GO, _OPT_STRUCTURED, _OPT_SET_META = 2, 5, 7, 8, 10
_REP_ACK, _REP_INFO, _REP_META = 1, 3, 4
_REP_ERROR = 1 << 31
_ERR_POLICY, _ERR_TLS_REQD, _ERR_UNKNOWN = _REP_ERROR + 2, _REP_ERROR + 5, _REP_ERROR + 6
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3
_LARGEST_REPLY = 1 << 16


@dataclass(frozen=True, slots=True)
class Export:
    """What the handshake said of an export. `contexts` maps the names that were granted to their numbers."""

    size_bytes: int
    flags: int
    contexts: dict[str, int]
    minimum_block: int
    maximum_payload: int


def receive(sock: socket.socket, length: int) -> bytes:
    """Exactly `length` bytes. Raises EOFError when the server hangs up before."""
    buffer = bytearray(length)
    receive_into(sock, memoryview(buffer))
    return bytes(buffer)


def receive_into(sock: socket.socket, view: memoryview) -> None:
    """Fills `view`. Raises EOFError when the server hangs up before, OSError."""
    # One system call for a whole piece doubles the throughput; TLS has its records anyway and takes no flags.
    flags = 0 if isinstance(sock, ssl.SSLSocket) else socket.MSG_WAITALL
    while view:
        count = sock.recv_into(view, len(view), flags)
        if count == 0:
            raise EOFError("the NBD server hung up")
        view = view[count:]


def start_tls(sock: socket.socket, context: ssl.SSLContext, server_name: str) -> ssl.SSLSocket:
    """Greets the server and goes over to TLS; never on without it. Raises Failed `nbd-no-tls`, ssl.SSLError."""
    _greet(sock)
    kind, _ = _option(sock, _OPT_STARTTLS, b"")[-1]
    if kind != _REP_ACK:
        raise Failed("nbd-no-tls", "The NBD server does not offer TLS.", "Turn TLS on or off on both hosts.")
    return context.wrap_socket(sock, server_hostname=server_name)


def negotiate(sock: socket.socket, export: str, contexts: Sequence[str], *, greeted: bool) -> Export:
    """Structured replies, the metadata contexts that the server has of `contexts`, and the way into transmission.

    Raises NotFound `nbd-no-export`, Failed `nbd-refused`.
    """
    if not greeted:
        _greet(sock)
    _require_ack(_option(sock, _OPT_STRUCTURED, b""), export)
    granted: dict[str, int] = {}
    if contexts:
        replies = _option(sock, _OPT_SET_META, _text(export) + _count(contexts) + b"".join(map(_text, contexts)))
        _require_ack(replies, export)
        for kind, data in replies:
            if kind == _REP_META:
                granted[data[4:].decode()] = int(struct.unpack_from(">I", data)[0])
    replies = _option(sock, _OPT_GO, _text(export) + struct.pack(">HH", 1, _INFO_BLOCK_SIZE))
    _require_ack(replies, export)
    return _export(replies, granted)


def _greet(sock: socket.socket) -> None:
    magic, options, flags = struct.unpack(">QQH", receive(sock, 18))
    if magic != NBDMAGIC or options != IHAVEOPT or not flags & _FIXED_NEWSTYLE:
        raise Failed("nbd-refused", "What answered is no NBD server of today (fixed newstyle).", "Check the address.")
    sock.sendall(struct.pack(">I", _FIXED_NEWSTYLE | (flags & _NO_ZEROES)))


def _option(sock: socket.socket, option: int, data: bytes) -> list[tuple[int, bytes]]:
    """All replies (type, data) to an option; the last one is an acknowledgement or an error."""
    sock.sendall(struct.pack(">QII", IHAVEOPT, option, len(data)) + data)
    replies = []
    while True:
        magic, answered, kind, length = struct.unpack(">QIII", receive(sock, 20))
        if magic != REPLY_MAGIC or answered != option or length > _LARGEST_REPLY:
            raise Failed("nbd-broken", "The NBD server does not keep to the protocol.", "Look at its log.")
        replies.append((kind, receive(sock, length)))
        if kind == _REP_ACK or kind & _REP_ERROR:
            return replies


def _require_ack(replies: list[tuple[int, bytes]], export: str) -> None:
    kind, data = replies[-1]
    if kind == _REP_ACK:
        return
    said = data.decode(errors="replace")[:300] or f"reply {kind - _REP_ERROR}"
    if kind == _ERR_UNKNOWN:
        raise NotFound("nbd-no-export", f"The NBD server has no export {export!r}: {said}.", "Was it ended meanwhile?")
    if kind in (_ERR_TLS_REQD, _ERR_POLICY):
        raise Failed("nbd-tls-required", f"The NBD server refuses: {said}.", "Turn TLS on or off on both hosts.")
    raise Failed("nbd-refused", f"The NBD server refuses export {export!r}: {said}.", "Look at QEMU's log.")


def _export(replies: list[tuple[int, bytes]], contexts: dict[str, int]) -> Export:
    size, flags, minimum, payload = -1, 0, 1, DEFAULT_PAYLOAD
    for kind, data in replies:
        if kind == _REP_INFO and data[:2] == b"\0\0" and len(data) >= 12:
            size, flags = struct.unpack_from(">QH", data, 2)
        elif kind == _REP_INFO and data[:2] == b"\0\3" and len(data) >= 14:
            minimum, _, payload = struct.unpack_from(">III", data, 2)
    if size < 0:
        raise Failed("nbd-broken", "The NBD server told no size.", "Look at its log.")
    return Export(size, flags, contexts, max(1, minimum), min(payload, DEFAULT_PAYLOAD))


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack(">I", len(encoded)) + encoded


def _count(items: Sequence[str]) -> bytes:
    return struct.pack(">I", len(items))
