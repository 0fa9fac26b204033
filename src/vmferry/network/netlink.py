"""Speaks rtnetlink: encodes requests, sends one or many in a single send, reads the answers, translates errors.

For the other modules of `network/` only. It knows the wire, not what the requests mean (see `messages`); it must not
retry or guess. It is written on the plain socket because the switchover needs what a library hides: requests encoded
long before, several in one send, and the answer read without an event loop in between (about 0.05 ms each).
Source of the format: include/uapi/linux/netlink.h and rtnetlink(7).
"""

from __future__ import annotations

import asyncio
import errno as errnos
import itertools
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Self, TypeVar

from vmferry.model.errors import Failed, OutcomeUnknown

NLM_F_REQUEST: Final = 0x1
NLM_F_ACK: Final = 0x4
NLM_F_DUMP: Final = 0x300
NLM_F_REPLACE: Final = 0x100
NLM_F_EXCL: Final = 0x200
NLM_F_CREATE: Final = 0x400
_NLM_F_CAPPED: Final = 0x100
_NLM_F_ACK_TLVS: Final = 0x200
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLMSGERR_ATTR_MSG: Final = 1
_SOL_NETLINK: Final = 270
_NETLINK_CAP_ACK: Final = 10
_NETLINK_EXT_ACK: Final = 11
_NETLINK_GET_STRICT_CHK: Final = 12
_HEADER: Final = struct.Struct("=IHHII")
_ANSWER_SECONDS: Final = 10.0

Result = TypeVar("Result")


class KernelRefused(Failed):
    """The kernel said no; `errno` says why. The request was not carried out."""

    def __init__(self, what: str, errno: int, detail: str) -> None:
        name = errnos.errorcode.get(errno, str(errno)).lower()
        reason = f"{os.strerror(errno)}: {detail}" if detail else os.strerror(errno)
        super().__init__(f"net-{name}", f"The kernel refused to {what} ({reason}).", _fix_of(errno))
        self.errno = errno


def _fix_of(errno: int) -> str:
    if errno in (errnos.EPERM, errnos.EACCES):
        return "vmferryd needs CAP_NET_ADMIN and CAP_NET_RAW in its network namespace."
    if errno in (errnos.ENOENT, errnos.EOPNOTSUPP):
        return "The kernel may lack the feature; see `vmferry host probe`."
    return ""


@dataclass(frozen=True, slots=True)
class Request:
    """One request without sequence number. `what` completes "The kernel refused to ..."."""

    kind: int
    flags: int
    body: bytes
    what: str

    def encode(self, seq: int) -> bytes:
        length = _HEADER.size + len(self.body)
        return _HEADER.pack(length, self.kind, self.flags | NLM_F_REQUEST, seq, 0) + self.body


@dataclass(frozen=True, slots=True)
class Answer:
    """One message of a dump: its kind and its body."""

    kind: int
    body: bytes


def attribute(kind: int, payload: bytes) -> bytes:
    """One netlink attribute, padded to four bytes."""
    return struct.pack("=HH", 4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def u8(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=B", value))


def u16be(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("!H", value))


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def nest(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind, b"".join(attributes))


def attributes_of(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes of a message body after its fixed part, by kind, flags of the kind removed."""
    found: dict[int, bytes] = {}
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def _split(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, seq, _ = _HEADER.unpack_from(data, offset)
        yield kind, flags, seq, data[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3


def _errno_of(body: bytes) -> int:
    return -int(struct.unpack_from("=i", body)[0])


def _detail_of(flags: int, body: bytes) -> str:
    if not flags & _NLM_F_ACK_TLVS or not flags & _NLM_F_CAPPED:
        return ""
    message = attributes_of(body, 4 + _HEADER.size).get(_NLMSGERR_ATTR_MSG, b"")
    return message.rstrip(b"\0").decode(errors="replace")


def _open_socket() -> socket.socket:
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    except OSError as error:
        raise KernelRefused("open a netlink socket", error.errno or errnos.EIO, "") from error
    sock.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
    sock.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
    sock.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)  # lets dumps be filtered in the kernel
    sock.settimeout(_ANSWER_SECONDS)
    sock.bind((0, 0))
    return sock


class PreparedBatch:
    """Requests encoded once, with a socket of their own, to be sent in one go at a moment that counts.

    `fire` may be called again. Not for use by two threads at once.
    """

    def __init__(self, requests: tuple[Request, ...]) -> None:
        self._requests = requests
        self._socket = _open_socket()
        self._data = b""
        for seq, request in enumerate(requests, 1):
            encoded = Request(request.kind, request.flags | NLM_F_ACK, request.body, "").encode(seq)
            self._data += encoded + b"\0" * (-len(encoded) % 4)

    def fire(self, accept: frozenset[int] = frozenset()) -> None:
        """Sends all and waits for all answers (well under 1 ms for a few requests).

        The kernel goes on after a request that it refuses; the first refusal whose errno is not in `accept` is raised
        as KernelRefused when all are answered. Raises OutcomeUnknown `net-no-answer`.
        """
        failure: KernelRefused | None = None
        try:
            self._socket.send(self._data)
            missing = len(self._requests)
            while missing:
                for kind, flags, seq, body in _split(self._socket.recv(65536)):
                    if kind != _NLMSG_ERROR:
                        continue
                    missing -= 1
                    code = _errno_of(body)
                    if code and code not in accept and failure is None:
                        failure = KernelRefused(self._requests[seq - 1].what, code, _detail_of(flags, body))
        except OSError as error:
            raise _no_answer(self._requests[0].what) from error
        if failure is not None:
            raise failure

    def close(self) -> None:
        self._socket.close()


def _no_answer(what: str) -> OutcomeUnknown:
    return OutcomeUnknown("net-no-answer", f"The kernel did not answer the request to {what}.", "Look at `ip link`.")


class Netlink:
    """The daemon's rtnetlink socket in its network namespace. Thread-safe; requests go one after the other.

    `run` and `dump` block: mostly 0.1 ms, but removing a device or leaving a bridge takes up to 50 ms, so from the
    event loop use `aside(nl.run, ...)`. For the switchover use `prepare`.
    """

    def __init__(self) -> None:
        self._socket = _open_socket()
        self._lock = threading.Lock()
        self._seq = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def run(self, *requests: Request, accept: frozenset[int] = frozenset()) -> None:
        """Carries out the requests in order and stops at the first refusal whose errno is not in `accept`.

        Raises KernelRefused, OutcomeUnknown `net-no-answer`.
        """
        for request in requests:
            with self._lock:
                self._one(request, accept)

    def _one(self, request: Request, accept: frozenset[int]) -> None:
        seq = next(self._seq)
        acked = Request(request.kind, request.flags | NLM_F_ACK, request.body, request.what)
        for kind, flags, body in self._answers(acked, seq):
            if kind == _NLMSG_ERROR:
                code = _errno_of(body)
                if code and code not in accept:
                    raise KernelRefused(request.what, code, _detail_of(flags, body))
                return

    def dump(self, request: Request) -> list[Answer]:
        """All messages of a dump, or the one answer of a plain get. Raises KernelRefused, OutcomeUnknown."""
        wants_all = request.flags & NLM_F_DUMP == NLM_F_DUMP
        found: list[Answer] = []
        with self._lock:
            for kind, flags, body in self._answers(request, next(self._seq)):
                if kind == _NLMSG_DONE:
                    break
                if kind == _NLMSG_ERROR:
                    code = _errno_of(body)
                    if code:
                        raise KernelRefused(request.what, code, _detail_of(flags, body))
                    break
                found.append(Answer(kind, body))
                if not wants_all:
                    break
        return found

    def _answers(self, request: Request, seq: int) -> Iterator[tuple[int, int, bytes]]:
        try:
            self._socket.send(request.encode(seq))
            while True:
                for kind, flags, answer_seq, body in _split(self._socket.recv(1 << 18)):
                    if answer_seq == seq:
                        yield kind, flags, body
        except OSError as error:
            raise _no_answer(request.what) from error

    def prepare(self, *requests: Request) -> PreparedBatch:
        """Encodes the requests for one later send. The caller closes the batch."""
        return PreparedBatch(requests)


async def aside(
    function: Callable[..., Result], *arguments: object, undo: Callable[[Result], object] | None = None
) -> Result:
    """Runs a blocking step of this package in a thread. When it returns or raises, the step is over.

    A cancellation waits for the end of the step (well under a second), undoes it with `undo` and is raised again.
    """
    step = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(step)
    except asyncio.CancelledError:
        await asyncio.wait([step])
        if not step.cancelled() and step.exception() is None and undo is not None:
            undo(step.result())
        raise
