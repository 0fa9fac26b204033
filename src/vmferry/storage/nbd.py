"""A small NBD client: reads a disk as its guest sees it, and asks what of it is zero or dirty.

For digests through a read-only export of the QEMU that has the disk. Blocking sockets, made for threads: one thread
uses a client at a time, and `abort` from another one ends whatever it waits for. It cannot write.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vmferry.model.errors import Failed, Unreachable
from vmferry.storage import nbd_wire as wire

ALLOCATION = "base:allocation"
_ZERO = 1 << 1  # NBD_STATE_ZERO of base:allocation
_DIRTY = 1  # of qemu:dirty-bitmap (QEMU docs/interop/nbd.txt)
_STATUS_STEP = 1 << 31
_LARGEST_STATUS = 16 << 20
_READ_BYTES = 1 << 20
_IN_FLIGHT = 16  # as many as QEMU works on at a time (MAX_NBD_REQUESTS)
_IN_FLIGHT_BYTES = 4 << 20  # measured: more data under way than fits the CPU's cache is slower


@dataclass(frozen=True, slots=True)
class NbdAddress:
    """Where an export is: a Unix socket's path or (address, port).

    With `tls`, `tls_name` must be in the server's certificate. `contexts` are metadata contexts to ask for;
    `timeout_s` is the longest silence of the server.
    """

    where: Path | tuple[str, int]
    export: str
    contexts: tuple[str, ...] = (ALLOCATION,)
    tls: ssl.SSLContext | None = None
    tls_name: str = ""
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Extent:
    """A piece of a disk, in bytes; `flags` as the metadata context defines them."""

    offset: int
    length: int
    flags: int


def bitmap_context(name: str) -> str:
    """The metadata context of QEMU's dirty bitmap `name`."""
    return f"qemu:dirty-bitmap:{name}"


class NbdClient:
    """A connection to one export. Use `connect`; it is a context manager. All errors are errors of the model:

    Unreachable `nbd-unreachable`; Failed `nbd-lost` when the server hangs up, is silent for too long or was aborted;
    Failed `nbd-read-error` when it cannot read; and those of the handshake.
    """

    def __init__(self, address: NbdAddress, sock: socket.socket, export: wire.Export) -> None:
        self._address = address
        self._sock = sock
        self._export = export
        self._request_flags = wire.FLAG_DF if export.flags & wire.SEND_DF else 0
        self._cookie = 0
        self._buffers: list[bytearray] = []
        self.size_bytes = export.size_bytes
        self.read_only = bool(export.flags & wire.READ_ONLY)
        self.contexts = frozenset(export.contexts)

    @classmethod
    def connect(cls, address: NbdAddress) -> NbdClient:
        """Connects and enters transmission. A context that the server has not got is missing in `contexts` then."""
        sock = _open(address)
        try:
            with _translated(address):
                if address.tls is not None:
                    sock = wire.start_tls(sock, address.tls, address.tls_name)
                export = wire.negotiate(sock, address.export, address.contexts, greeted=address.tls is not None)
                _let_kernel_time(sock, address.timeout_s)
        except BaseException:
            sock.close()
            raise
        return cls(address, sock, export)

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Says goodbye and closes. Never raises."""
        with suppress(OSError, ValueError):
            self._sock.settimeout(1)
            self._sock.sendall(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_DISC, 0, 0, 0))
        self._sock.close()

    def abort(self) -> None:
        """From another thread: whatever waits in this client ends with Failed `nbd-lost`. Never raises."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a piece of the disk."""
        return b"".join(bytes(view) for _, view in self.stream([(offset, length)]))

    def stream(
        self, ranges: Iterable[tuple[int, int]], step_bytes: int = _READ_BYTES
    ) -> Iterator[tuple[int, memoryview]]:
        """(offset, bytes) of all ranges in pieces of at most `step_bytes`, in whatever order they arrive.

        Several requests are under way at a time. A view is good only until the next piece is asked for. Ranges must
        lie within the disk. An iterator that is not used up leaves the connection unusable: close it.
        """
        step = min(step_bytes, self._export.maximum_payload)
        pieces = _pieces(ranges, step)
        if not self._buffers or len(self._buffers[0]) != step:
            self._buffers = [bytearray(step) for _ in range(_IN_FLIGHT)]
        free = list(self._buffers)
        waiting: dict[int, tuple[int, int, bytearray]] = {}
        with _translated(self._address):
            while True:
                self._request_pieces(pieces, free, waiting)
                if not waiting:
                    return
                cookie = self._receive_piece(waiting)
                offset, length, buffer = waiting.pop(cookie)
                yield offset, memoryview(buffer)[:length]
                free.append(buffer)

    def _request_pieces(
        self, pieces: Iterator[tuple[int, int]], free: list[bytearray], waiting: dict[int, tuple[int, int, bytearray]]
    ) -> None:
        requests = b""
        under_way = sum(length for _, length, _ in waiting.values())
        while free and (not waiting or under_way < _IN_FLIGHT_BYTES) and (piece := next(pieces, None)) is not None:
            self._cookie += 1
            waiting[self._cookie] = (*piece, free.pop())
            under_way += piece[1]
            flags = self._request_flags
            requests += wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, wire.CMD_READ, self._cookie, *piece)
        if requests:
            self._sock.sendall(requests)

    def _receive_piece(self, waiting: dict[int, tuple[int, int, bytearray]]) -> int:
        """Receives chunks until one request is answered as a whole; its cookie."""
        while True:
            flags, kind, cookie, length = self._chunk_header()
            if cookie not in waiting:
                raise _broken("an answer to no request")
            start, size, buffer = waiting[cookie]
            if kind == wire.CHUNK_DATA:
                offset = struct.unpack(">Q", wire.receive(self._sock, 8))[0] - start
                self._check_within(offset, length - 8, size)
                wire.receive_into(self._sock, memoryview(buffer)[offset : offset + length - 8])
            elif kind == wire.CHUNK_HOLE:
                offset, count = struct.unpack(">QI", wire.receive(self._sock, 12))
                self._check_within(offset - start, count, size)
                buffer[offset - start : offset - start + count] = bytes(count)
            elif kind != wire.CHUNK_NONE:
                self._raise_error(kind, length)
            if flags & wire.REPLY_DONE:
                return cookie

    @staticmethod
    def _check_within(offset: int, length: int, size: int) -> None:
        if offset < 0 or length < 0 or offset + length > size:
            raise _broken("data that was not asked for")

    def status(self, context: str, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """The extents of a metadata context, in order and without gaps. Raises Failed `nbd-no-context`."""
        if context not in self._export.contexts:
            raise Failed("nbd-no-context", f"The export does not tell {context}.", "Look at QEMU's log.")
        end = self.size_bytes if length is None else offset + length
        with _translated(self._address):
            while offset < end:
                for size, flags in self._status_once(context, offset, min(end - offset, _STATUS_STEP)):
                    size = min(size, end - offset)
                    if size <= 0:
                        break
                    yield Extent(offset, size, flags)
                    offset += size

    def _status_once(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        self._cookie += 1
        length -= length % self._export.minimum_block if length > self._export.minimum_block else 0
        request = wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_BLOCK_STATUS, self._cookie, offset, length)
        self._sock.sendall(request)
        wanted = self._export.contexts[context]
        found: list[tuple[int, int]] = []
        while True:
            flags, kind, cookie, payload = self._chunk_header()
            if cookie != self._cookie:
                raise _broken("an answer to no request")
            if kind == wire.CHUNK_STATUS:
                if payload > _LARGEST_STATUS or payload % 8 != 4:
                    raise _broken("a list of extents of impossible length")
                data = wire.receive(self._sock, payload)
                if struct.unpack_from(">I", data)[0] == wanted:
                    found = [pair for pair in struct.iter_unpack(">II", data[4:]) if pair[0]]
            elif kind != wire.CHUNK_NONE:
                self._raise_error(kind, payload)
            if flags & wire.REPLY_DONE:
                if not found:
                    raise _broken("no extents")
                return found

    def _chunk_header(self) -> tuple[int, int, int, int]:
        magic, flags, kind, cookie, length = wire.STRUCTURED.unpack(wire.receive(self._sock, wire.STRUCTURED.size))
        if magic != wire.STRUCTURED_MAGIC:
            raise _broken("a reply that is not structured")
        return flags, kind, cookie, length

    def _raise_error(self, kind: int, length: int) -> None:
        if not kind & wire.CHUNK_ERROR_BIT or not 6 <= length <= 1 << 16:
            raise _broken(f"a chunk of unknown type {kind}")
        data = wire.receive(self._sock, length)
        code, said = struct.unpack_from(">IH", data)
        message = data[6 : 6 + said].decode(errors="replace") or os.strerror(code)
        raise Failed(
            "nbd-read-error", f"The disk cannot be read through NBD: {message}.", "See QEMU's and the kernel's log."
        )


def zero_extents(client: NbdClient, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
    """A piece of the disk in order, `flags` 1 where it reads as zeros without being read, else 0."""
    for extent in client.status(ALLOCATION, offset, length):
        yield Extent(extent.offset, extent.length, 1 if extent.flags & _ZERO else 0)


def dirty_extents(client: NbdClient, bitmap: str) -> tuple[Extent, ...]:
    """What QEMU's dirty bitmap `bitmap` marks. The client must have been connected with its `bitmap_context`."""
    return tuple(extent for extent in client.status(bitmap_context(bitmap)) if extent.flags & _DIRTY)


def _pieces(ranges: Iterable[tuple[int, int]], step: int) -> Iterator[tuple[int, int]]:
    """The ranges cut at multiples of `step`."""
    for offset, length in ranges:
        end = offset + length
        while offset < end:
            size = min(end, offset - offset % step + step) - offset
            yield offset, size
            offset += size


def _open(address: NbdAddress) -> socket.socket:
    try:
        if isinstance(address.where, tuple):
            sock = socket.create_connection(address.where, timeout=address.timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.settimeout(address.timeout_s)
        try:
            sock.connect(str(address.where))
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise Unreachable(
            "nbd-unreachable", f"No NBD server answers at {address.where}: {error}.", "Is QEMU up?"
        ) from error
    return sock


def _let_kernel_time(sock: socket.socket, timeout_s: float) -> None:
    """Python polls before every read of a socket with a timeout; the kernel's own timeout saves that."""
    if not isinstance(sock, ssl.SSLSocket):
        sock.setblocking(True)
        timeout = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1_000_000))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)


@contextmanager
def _translated(address: NbdAddress) -> Iterator[None]:
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        reason = error.verify_message
        raise Failed(
            "nbd-untrusted", f"The NBD server shows a wrong certificate: {reason}.", "Check both TLS setups."
        ) from error
    except (TimeoutError, BlockingIOError) as error:
        message = f"The NBD server at {address.where} was silent for {address.timeout_s:g} s."
        raise Failed("nbd-lost", message, "Is QEMU still up?") from error
    except (OSError, EOFError, struct.error, UnicodeDecodeError) as error:
        raise Failed(
            "nbd-lost", f"The NBD connection to {address.where} broke: {error}.", "Is QEMU still up?"
        ) from error


def _broken(what: str) -> Failed:
    return Failed("nbd-broken", f"The NBD server does not keep to the protocol: {what}.", "Look at QEMU's log.")
