"""The conversation with one QEMU process over QMP: commands, out-of-band commands, events, the loss of the connection.

The only door to the library `qemu.qmp` (pinned: it is alpha). Everything in `qemu/` and `migration/` speaks to a guest
through a `Monitor`. It must not decide anything and must not know what a migration is.

QEMU serves one client per monitor socket: a second `connect` to the same socket waits until the first one is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError
from qemu.qmp.protocol import Runstate, StateError

from vmferry.model.errors import Failed, OutcomeUnknown, Unreachable

_DEFAULT_LIMIT_S = 30.0
_LIMITS_S = {
    # May wait for requests in flight, for a format's metadata or for a TLS handshake.
    "blockdev-add": 60.0,
    "blockdev-del": 60.0,
    "stop": 60.0,
    "cont": 60.0,
    "nbd-server-stop": 60.0,
    "query-qmp-schema": 60.0,
}
_OOB_LIMIT_S = 5.0
_LATEST_NS = 1_000_000_000  # that an event was read so long after it happened is less likely than a clock that was set

Yankable: TypeAlias = Mapping[str, str]
YANK_MIGRATION: Yankable = {"type": "migration"}


def yank_node(node_name: str) -> Yankable:
    """The yank instance of a network block node (an NBD target)."""
    return {"type": "block-node", "node-name": node_name}


class QmpRefused(Failed):
    """QEMU said no: the command had no effect. `error_class` and `desc` are QEMU's own words."""

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__("qmp-refused", f"QEMU refused {command}: {desc}.".replace("..", "."))
        self.command = command
        self.error_class = error_class
        self.desc = desc


class QmpLost(Unreachable):
    """There is no connection to QEMU (any more); the command at hand was certainly not sent."""

    def __init__(self, what: str) -> None:
        super().__init__("qmp-lost", f"The connection to QEMU is lost: {what}.", "Look whether its process still runs.")


class QmpInterrupted(OutcomeUnknown):
    """The connection was lost after a command was sent and before its answer: it may or may not have happened."""

    def __init__(self, command: str, what: str) -> None:
        super().__init__(
            "qmp-interrupted",
            f"The connection to QEMU was lost while it was at {command}: {what}.",
            "Look whether its process still runs and in what state the guest is.",
        )
        self.command = command


class QmpTimeout(OutcomeUnknown):
    """QEMU did not answer in time: the command may still happen."""

    def __init__(self, command: str, limit_s: float) -> None:
        super().__init__(
            "qmp-timeout",
            f"QEMU did not answer {command} within {limit_s:g} s.",
            "It may still do it. If its main loop hangs on a dead peer, yank frees it.",
        )
        self.command = command


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """An event. `at_ns` is time.monotonic_ns() when it happened; `qemu_us` the same by QEMU's wall clock (Unix epoch).

    It is read some time later, on a busy host by many milliseconds.
    """

    name: str
    data: Mapping[str, Any]
    at_ns: int
    qemu_us: int


_Sink: TypeAlias = Callable[[QmpEvent], None]
Predicate: TypeAlias = Callable[[QmpEvent], bool]


class _SilentLogger(logging.Logger):
    """Swallows the library's own log: everything it says there it also raises, and we translate that."""

    def __init__(self) -> None:
        super().__init__("vmferry.qemu.qmp", logging.CRITICAL + 1)


class _Tap(EventListener):
    """Hands every event on synchronously from the reader task: no queue and no task switch in between."""

    def __init__(self, sink: Callable[[Message, int], None]) -> None:
        super().__init__()
        self._sink = sink

    async def put(self, event: Message) -> None:
        self._sink(event, time.monotonic_ns())


class _Client(QMPClient):
    """The library's client without its log of every message and without its ever-growing history of events."""

    def __init__(self, sink: Callable[[Message, int], None]) -> None:
        super().__init__()
        self.logger = _SilentLogger()
        self.events.event_filter = lambda _event: False
        self.register_listener(_Tap(sink))

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    def _cb_outbound(self, msg: Message) -> Message:
        return msg


class EventStream:
    """The events of some names in the order of their arrival. After the connection is lost: the rest, then QmpLost."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[QmpEvent | QmpLost] = asyncio.Queue()

    def _put(self, event: QmpEvent | QmpLost) -> None:
        self._queue.put_nowait(event)

    async def get(self) -> QmpEvent:
        """The next event. Raises QmpLost once the connection is lost and nothing is left."""
        item = await self._queue.get()
        if isinstance(item, QmpLost):
            self._queue.put_nowait(item)
            raise item
        return item

    def take(self) -> list[QmpEvent]:
        """What has come and was not asked for yet, without waiting."""
        found = []
        while not self._queue.empty():
            item = self._queue.get_nowait()
            if isinstance(item, QmpLost):
                self._queue.put_nowait(item)  # for the next `get`
                break
            found.append(item)
        return found

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> QmpEvent:
        return await self.get()


class Monitor:
    """One QMP connection. Made by `Monitor.connect`; `close` it, or use it as an async context manager."""

    def __init__(self) -> None:
        self._client = _Client(self._dispatch)
        self._sinks: list[tuple[frozenset[str], _Sink]] = []
        self._lost: QmpLost | None = None
        self._on_lost: list[Callable[[QmpLost], None]] = []
        self._watch: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    @classmethod
    async def connect(cls, path: Path | str | socket.socket, timeout_s: float = 10.0) -> Self:
        """Connects (a connected socket will do too, and is ours from then on) and negotiates out-of-band execution.

        Raises QmpLost if nobody listens there or it hangs up, QmpTimeout if QEMU does not greet us in time (its main
        loop hangs, or another client holds the socket).
        """
        monitor = cls()
        try:
            async with asyncio.timeout(timeout_s):
                await monitor._client.connect(path if isinstance(path, socket.socket) else _open_socket(Path(path)))
        except TimeoutError as error:
            raise QmpTimeout("connect", timeout_s) from error
        except (ConnectError, OSError) as error:
            raise QmpLost(f"{path} does not answer ({_root_cause(error)})") from error
        monitor._watch = asyncio.create_task(monitor._watch_connection())
        return monitor

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Hangs up. Never raises for a connection that is lost already; the guest is not touched."""
        self._declare_lost(QmpLost("it was closed by us"))
        self._closing.set()
        if self._watch is not None:
            await asyncio.shield(self._watch)  # the only one to call disconnect: two at a time confuse the library

    @property
    def lost(self) -> bool:
        """Whether the connection is gone (closed by us counts)."""
        return self._lost is not None

    def on_lost(self, callback: Callable[[QmpLost], None]) -> Callable[[], None]:
        """Calls back once when the connection is lost (at once if it is already); gives the off switch."""
        if self._lost is not None:
            callback(self._lost)
            return lambda: None
        self._on_lost.append(callback)
        return lambda: _discard(self._on_lost, callback)

    async def execute(
        self,
        command: str,
        /,
        *,
        arguments: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        **keywords: Any,
    ) -> Any:
        """QEMU's answer to a command. Keywords become arguments with `_` as `-`; `arguments` are taken as they are.

        Raises QmpRefused (QEMU said no), QmpLost (was not sent), QmpInterrupted (sent, answer lost) and QmpTimeout
        (30 s unless the command is known to take longer or `timeout_s` is given).
        """
        limit_s = timeout_s if timeout_s is not None else _LIMITS_S.get(command, _DEFAULT_LIMIT_S)
        return await self._run(command, _merge(arguments, keywords), False, limit_s)

    async def execute_oob(
        self, command: str, /, *, arguments: Mapping[str, Any] | None = None, timeout_s: float = _OOB_LIMIT_S
    ) -> Any:
        """Like `execute`, but out of band: overtakes a command at which QEMU's main loop hangs."""
        return await self._run(command, dict(arguments or {}), True, timeout_s)

    async def yank(self, instances: Sequence[Yankable]) -> None:
        """Cuts network connections of a QEMU that hangs on a dead peer (out of band). Raises as `execute` does."""
        await self.execute_oob("yank", arguments={"instances": [dict(instance) for instance in instances]})

    async def pass_fd(self, fd: int, name: str) -> None:
        """Gives QEMU a duplicate of a descriptor under a name (`getfd`). Raises as `execute` does."""
        self._require_connection()
        # The descriptor must arrive with or before the command's first byte; nothing else is written in between.
        self._client.send_fd_scm(fd)
        await self.execute("getfd", fdname=name)

    def expect(self, name: str, predicate: Predicate | None = None) -> asyncio.Future[QmpEvent]:
        """A future of the next such event, armed at once: create it before the command that causes the event.

        Ends with QmpLost if the connection is lost. Cancel it when it is no longer wanted.
        """
        return self.expect_any((name,), predicate)

    def expect_any(self, names: Iterable[str], predicate: Predicate | None = None) -> asyncio.Future[QmpEvent]:
        """Like `expect`, for the first event of any of these names."""
        future: asyncio.Future[QmpEvent] = asyncio.get_running_loop().create_future()
        if self._lost is not None:
            future.set_exception(self._lost)
            future.exception()  # someone who never looks at it gets no warning from asyncio
            return future

        def sink(event: QmpEvent) -> None:
            if not future.done() and (predicate is None or predicate(event)):
                future.set_result(event)

        def fail(error: QmpLost) -> None:
            if not future.done():
                future.set_exception(error)

        entry = (frozenset(names), sink)
        self._sinks.append(entry)
        forget = self.on_lost(fail)

        def finish(done: asyncio.Future[QmpEvent]) -> None:
            _discard(self._sinks, entry)
            forget()
            if not done.cancelled():
                done.exception()

        future.add_done_callback(finish)
        return future

    def listen(self, names: Iterable[str], sink: Callable[[QmpEvent], None]) -> Callable[[], None]:
        """Calls `sink` from the reader for every such event (it must be quick and not raise); gives the off switch."""
        entry = (frozenset(names), sink)
        self._sinks.append(entry)
        return lambda: _discard(self._sinks, entry)

    @contextlib.asynccontextmanager
    async def subscribe(self, names: Iterable[str]) -> AsyncIterator[EventStream]:
        """A stream of all events of these names from now on, until the block is left."""
        stream = EventStream()
        stop = self.listen(names, stream._put)
        forget = self.on_lost(stream._put)
        try:
            yield stream
        finally:
            stop()
            forget()

    def _dispatch(self, message: Message, received_ns: int) -> None:
        stamp: Any = message.get("timestamp") or {}
        qemu_us = int(stamp.get("seconds", 0)) * 1_000_000 + int(stamp.get("microseconds", 0))
        late_ns = time.time_ns() - (time.monotonic_ns() - received_ns) - qemu_us * 1000
        event = QmpEvent(
            name=str(message["event"]),
            data=message.get("data") or {},  # type: ignore[arg-type]
            at_ns=received_ns - (late_ns if 0 < late_ns < _LATEST_NS else 0),  # else somebody has set the clock
            qemu_us=qemu_us,
        )
        for names, sink in tuple(self._sinks):
            if event.name in names:
                sink(event)

    async def _run(self, command: str, arguments: Mapping[str, Any], oob: bool, limit_s: float) -> Any:
        self._require_connection()
        try:
            async with asyncio.timeout(limit_s):
                return await self._client.execute(command, arguments, oob=oob)
        except TimeoutError as error:
            raise QmpTimeout(command, limit_s) from error
        except ExecuteError as error:
            raise QmpRefused(command, error.error_class, error.error.error.desc) from error
        except StateError as error:
            raise QmpLost("it is being closed") from error
        except (ExecInterruptedError, QMPError) as error:
            raise QmpInterrupted(command, _root_cause(error)) from error

    def _require_connection(self) -> None:
        if self._lost is not None:
            raise QmpLost(self._lost.message)

    async def _watch_connection(self) -> None:
        changed = asyncio.create_task(self._wait_for_change())
        closing = asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait((changed, closing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
            closing.cancel()
        cause = "QEMU hung up"
        try:
            await self._client.disconnect()
        except EOFError:
            pass
        except (QMPError, OSError) as error:
            cause = _root_cause(error)
        self._declare_lost(QmpLost(cause))

    async def _wait_for_change(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    def _declare_lost(self, error: QmpLost) -> None:
        if self._lost is not None:
            return
        self._lost = error
        callbacks, self._on_lost = self._on_lost, []
        for callback in callbacks:
            callback(error)


def _open_socket(path: Path) -> socket.socket:
    """A connected Unix socket. Through the directory's descriptor, so that a long path does not matter (limit: 107)."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        client.connect(f"/proc/self/fd/{directory}/{path.name}")
    except BaseException:
        client.close()
        raise
    finally:
        os.close(directory)
    return client


def _merge(arguments: Mapping[str, Any] | None, keywords: Mapping[str, Any]) -> dict[str, Any]:
    merged = {key.replace("_", "-"): value for key, value in keywords.items()}
    merged.update(arguments or {})
    return merged


def _discard(entries: list[Any], entry: object) -> None:
    with contextlib.suppress(ValueError):
        entries.remove(entry)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
