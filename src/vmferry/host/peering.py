"""The connection between two hosts: requests and answers as JSON on one WebSocket over mutual TLS.

What goes with a request as it is (boot files) comes in one binary frame with it: the length of the JSON, the JSON,
the data. A frame without any JSON is a sample that measures the link; it is only acknowledged.

`connect_peer` is the asking side (a `PeerLink`), `serve_peer` the answering one. Who is speaking is what the
certificate says, never what a message says. Late answers to requests that were given up are dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import struct
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import aiohttp
from aiohttp import web

from vmferry.api.codec import decode, encode, error_from_problem, problem
from vmferry.api.tls import tls_problem
from vmferry.host import log
from vmferry.migration import messages
from vmferry.migration.messages import REPLIES, Request
from vmferry.model.errors import Failed, OutcomeUnknown, Refused, Unreachable, VmferryError, WrongInput
from vmferry.model.views import HostView

R = TypeVar("R")
PEER_PATH = "/v1/peer"
_KINDS: dict[str, type] = {kind.__name__: kind for kind in REPLIES}
_LARGEST_MESSAGE = 64 << 20
_SAMPLE_BYTES = 2 << 20
_SAMPLES = 3
_SHORTEST_S = 2e-4  # a faster link than 10 GB/s is none
_SAMPLE_LIMIT_S = 20.0
# A ping after so much of the silence that is borne; the answer may take half as long again.
_HEARTBEAT_SHARE = 2 / 3

# Of one connection, not yet answered: far more than a migration of a VM with many disks ever has. Requests on which the
# outcome hangs are counted by themselves, so that they get through whatever else is under way.
_MOST_IN_FLIGHT = 256
_MOST_BYTES_IN_FLIGHT = 4 * _LARGEST_MESSAGE
_DECISIVE = frozenset({"AwaitLoaded", "Take", "Abort", "Inquire"})

_LENGTH = struct.Struct(">I")
_SAMPLE = _LENGTH.pack(0)

Handler = Callable[[Request, bytes], Awaitable[object]]


def warm_codecs() -> None:
    """Builds every decoder now: the first message of a kind must not pay for it inside a blackout."""
    for kind, reply in REPLIES.items():
        for each in (kind, reply):
            try:
                decode(each, {})
            except WrongInput:
                continue


class WebSocketLink:
    """The asking side. See `vmferry.migration.link.PeerLink` for what it guarantees."""

    def __init__(self, peer: str, socket: aiohttp.ClientWebSocketResponse, session: aiohttp.ClientSession) -> None:
        self._peer = peer
        self._socket = socket
        self._session = session
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._next = 0
        self._rtt_ms = float("inf")
        self._lost: str | None = None
        self._received: asyncio.Future[None] | None = None
        self._ended = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    @property
    def peer(self) -> str:
        """The other host's name, as its certificate has it."""
        return self._peer

    @property
    def local_address(self) -> str:
        """Our address on this link's network."""
        return str(self._socket.get_extra_info("sockname")[0])

    @property
    def peer_address(self) -> str:
        """The other host's address on this link's network."""
        return str(self._socket.get_extra_info("peername")[0])

    @property
    def rtt_ms(self) -> float:
        """The shortest time between a request and its answer."""
        return self._rtt_ms

    async def call(self, request: Request, reply: type[R], timeout_s: float = 30.0, data: bytes = b"") -> R:
        """See PeerLink.call."""
        if self._lost is not None:
            raise Unreachable("link-lost", f"The connection to {self._peer} is lost: {self._lost}.", "Is the host up?")
        self._next += 1
        number = self._next
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        text = json.dumps({"n": number, "call": type(request).__name__, "body": encode(request)})
        started = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                if data:
                    await self._socket.send_bytes(_with_data(text, data))
                else:
                    await self._socket.send_str(text)
                answer = await future
        except TimeoutError as error:
            raise OutcomeUnknown(
                "peer-silent",
                f"{self._peer} did not answer {type(request).__name__} within {timeout_s:g} s.",
                "Look whether the host and the migration network are up.",
            ) from error
        except (ConnectionError, aiohttp.ClientError) as error:
            raise self._unknown(str(error)) from error
        finally:
            self._waiting.pop(number, None)
        self._rtt_ms = min(self._rtt_ms, (time.monotonic() - started) * 1000)
        return decode(reply, answer)

    async def measure_rate(self) -> int:
        """See PeerLink.measure_rate. Of a large and a small message, because their difference leaves the way out."""
        payload = os.urandom(_SAMPLE_BYTES)
        small_s, large_s = [], []
        for _ in range(_SAMPLES):
            small_s.append(await self._time_bytes(payload[:1]))
            large_s.append(await self._time_bytes(payload))
        # The shortest of each: a wait for the processor is in some of them, never in all the other way round.
        return int(_SAMPLE_BYTES / max(_SHORTEST_S, min(large_s) - min(small_s)))

    async def _time_bytes(self, payload: bytes) -> float:
        self._received = asyncio.get_running_loop().create_future()
        started = time.monotonic()
        try:
            async with asyncio.timeout(_SAMPLE_LIMIT_S):
                await self._socket.send_bytes(_SAMPLE + payload)
                await self._received
        except (TimeoutError, ConnectionError, aiohttp.ClientError) as error:
            raise self._unknown(f"no answer to a sample ({error})") from error
        return time.monotonic() - started

    async def wait_lost(self) -> VmferryError:
        """See PeerLink.wait_lost."""
        await self._ended.wait()
        return self._unknown(self._lost or "it was closed")

    async def close(self) -> None:
        """See PeerLink.close."""
        self._lose("it was closed")
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._socket.close()
        await self._session.close()

    def _unknown(self, why: str) -> OutcomeUnknown:
        return OutcomeUnknown("link-lost", f"The connection to {self._peer} was lost: {why}.", "Is the host up?")

    async def _read(self) -> None:
        try:
            async for message in self._socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    break
                self._deliver(json.loads(message.data))
        finally:
            self._lose("the other side hung up or fell silent")

    def _deliver(self, document: dict[str, Any]) -> None:
        if "received" in document:
            if self._received is not None and not self._received.done():
                self._received.set_result(None)
            return
        future = self._waiting.get(document["n"])
        if future is None or future.done():
            return
        if "problem" in document:
            future.set_exception(error_from_problem(document["problem"]))
        else:
            future.set_result(document["body"])

    def _lose(self, why: str) -> None:
        if self._lost is None:
            self._lost = why
        self._ended.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self._unknown(why))


async def connect_peer(
    name: str, address: str, context: ssl.SSLContext, timeout_s: float = 5.0, silence_s: float = 4.5
) -> WebSocketLink:
    """A link to the host `name`, whose certificate must say so.

    Raises Unreachable `host-unreachable` or `host-not-trusted` (certificate of another CA, another name, expired);
    nothing was sent then.
    """
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context))
    try:
        async with asyncio.timeout(timeout_s):
            socket = await session.ws_connect(
                f"https://{address}{PEER_PATH}",
                server_hostname=name,
                heartbeat=silence_s * _HEARTBEAT_SHARE,
                compress=0,
                max_msg_size=_LARGEST_MESSAGE,
            )
    except BaseException as error:
        await session.close()
        if isinstance(error, TimeoutError | OSError | aiohttp.ClientError):
            raise _connect_error(name, address, error) from error
        raise
    return WebSocketLink(name, socket, session)


async def fetch_host(name: str, address: str, context: ssl.SSLContext, timeout_s: float) -> HostView:
    """What another host says of itself. Raises as `connect_peer` does."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        try:
            async with asyncio.timeout(timeout_s):
                answer = await session.get(f"https://{address}/v1/host", server_hostname=name)
                document = await answer.json(content_type=None)
        except (TimeoutError, OSError, aiohttp.ClientError, ValueError) as error:
            raise _connect_error(name, address, error) from error
    if answer.status != 200:
        raise error_from_problem(document)
    return decode(HostView, document)


def _connect_error(name: str, address: str, error: BaseException) -> VmferryError:
    untrusted = tls_problem(error, f"{name} at {address}")
    if untrusted is not None:  # it does not trust us, or we do not trust it
        return Unreachable("host-not-trusted", untrusted.message, untrusted.fix)
    if isinstance(error, aiohttp.WSServerHandshakeError):
        return Failed("host-refused-us", f"{name} refused this host: {error.message} ({error.status}).", "See its log.")
    why = "it did not answer in time" if isinstance(error, TimeoutError) else str(error)
    return Unreachable(
        "host-unreachable",
        f"{name} cannot be reached at {address}: {why}.",
        "Is vmferryd running there, and is the migration network up?",
    )


async def serve_peer(
    request: web.Request, handler: Handler, on_closed: Callable[[], Awaitable[None]], silence_s: float = 4.5
) -> web.WebSocketResponse:
    """Answers one peer until it hangs up; then `on_closed`. Requests are started in the order in which they come.

    One that has too many under way is refused more of them, and not read from while it does not take the refusals.
    """
    socket = web.WebSocketResponse(
        heartbeat=silence_s * _HEARTBEAT_SHARE, compress=False, max_msg_size=_LARGEST_MESSAGE
    )
    await socket.prepare(request)
    running = {True: _InFlight(), False: _InFlight()}  # the decisive ones, and the others
    try:
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                text, data = _split(message.data)
                if not text:
                    await socket.send_str(json.dumps({"received": len(data)}))
                    continue
            elif message.type is aiohttp.WSMsgType.TEXT:
                text, data = message.data, b""
            else:
                break
            document = _document_of(text)
            in_flight = running[str(document.get("call")) in _DECISIVE]
            if in_flight.full:
                await _send(socket, {"n": document.get("n", 0), "problem": problem(_too_many())})
                continue
            in_flight.add(asyncio.create_task(_answer(socket, document, data, handler)), len(message.data))
    except (ConnectionError, aiohttp.ClientError):
        log.event("peer-hung-up", who=request.remote)  # in the middle of something, its reset came first
    finally:
        for in_flight in running.values():
            await in_flight.end()
        await asyncio.shield(on_closed())
    return socket


class _InFlight:
    """Requests that are being answered, and how large they were."""

    def __init__(self) -> None:
        self._sizes: dict[asyncio.Task[None], int] = {}

    @property
    def full(self) -> bool:
        """Whether no more are to be begun."""
        return len(self._sizes) >= _MOST_IN_FLIGHT or sum(self._sizes.values()) >= _MOST_BYTES_IN_FLIGHT

    def add(self, task: asyncio.Task[None], size_bytes: int) -> None:
        """Counts it until it is answered."""
        self._sizes[task] = size_bytes
        task.add_done_callback(self._sizes.pop)

    async def end(self) -> None:
        """Cancels all and waits for their ends."""
        tasks = list(self._sizes)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _too_many() -> Refused:
    return Refused("too-many-requests", "Too many requests of this connection are not answered yet.", "Wait for some.")


def _document_of(text: str | bytes) -> dict[str, Any]:
    """The request, or {} for what is none. Pure."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _with_data(text: str, data: bytes) -> bytes:
    head = text.encode()
    return b"".join((_LENGTH.pack(len(head)), head, data))


def _split(frame: bytes) -> tuple[bytes, bytes]:
    """The JSON and the data of a binary frame; what is no such frame has JSON that cannot be read. Pure."""
    if len(frame) < _LENGTH.size:
        return frame, b""
    end = _LENGTH.size + _LENGTH.unpack_from(frame)[0]
    return frame[_LENGTH.size : end], frame[end:]


async def _answer(socket: web.WebSocketResponse, document: dict[str, Any], data: bytes, handler: Handler) -> None:
    number = 0
    try:
        if not {"n", "call", "body"} <= document.keys():
            raise WrongInput("bad-request", "This is no request.", "Same vmferry version?")
        number = int(document["n"])
        kind = _KINDS.get(str(document["call"]))
        if kind is None:
            raise WrongInput("unknown-request", f"This host does not know {document['call']}.", "Same vmferry version?")
        reply: dict[str, Any] = {
            "n": number,
            "body": encode(await handler(cast(Request, decode(kind, document["body"])), data)),
        }
    except VmferryError as error:
        reply = {"n": number, "problem": problem(error)}
    except Exception as error:  # noqa: BLE001 - the door: a bug must become an answer and a log line, not a hang
        log.defect("peer-request-failed", error)
        failed = Failed("internal", f"vmferryd failed at this ({type(error).__name__}).", "See its log.")
        reply = {"n": number, "problem": problem(failed)}
    await _send(socket, reply)


async def _send(socket: web.WebSocketResponse, reply: dict[str, Any]) -> None:
    if not socket.closed:
        with contextlib.suppress(ConnectionError, aiohttp.ClientError):  # nobody waits for it any more
            await socket.send_str(json.dumps(reply))


def protocol_version() -> int:
    """The version of the messages that this host speaks."""
    return messages.PROTOCOL_VERSION
