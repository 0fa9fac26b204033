"""How much one peer may ask at once: the answering side of the connection between hosts, without TLS."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from vmferry.host import peering
from vmferry.host.peering import serve_peer
from vmferry.migration import messages as m
from vmferry.migration.handoff import PeerSays

Socket = aiohttp.ClientWebSocketResponse


@asynccontextmanager
async def peer_of(handler: Callable[[m.Request, bytes], Awaitable[object]]) -> AsyncIterator[Socket]:
    async def closed() -> None:
        return

    async def answer(request: web.Request) -> web.StreamResponse:
        return await serve_peer(request, handler, closed)

    app = web.Application()
    app.router.add_get("/", answer)
    async with TestClient(TestServer(app)) as client, client.ws_connect("/") as socket:
        yield socket


class Answers:
    """Everything waits for `go`, except a question for the outcome."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun = 0

    async def handle(self, request: m.Request, _data: bytes) -> object:
        self.begun += 1
        if isinstance(request, m.Inquire):
            return m.Answer(PeerSays.ABSENT)
        await self.go.wait()
        return m.Done()


async def ask(socket: Socket, number: int, call: str, **body: Any) -> None:
    await socket.send_str(json.dumps({"n": number, "call": call, "body": body}))


async def hear(socket: Socket) -> dict[str, Any]:
    answer: dict[str, Any] = await asyncio.wait_for(socket.receive_json(), 10)
    return answer


async def test_more_than_enough_are_refused_until_some_are_answered() -> None:
    answers, most = Answers(), peering._MOST_IN_FLIGHT
    async with peer_of(answers.handle) as socket:
        for number in range(most + 3):
            await ask(socket, number, "StandBy", migration_id="m-1")
        refused = [await hear(socket) for _ in range(3)]
        assert [answer["n"] for answer in refused] == [most, most + 1, most + 2]
        assert {answer["problem"]["code"] for answer in refused} == {"too-many-requests"}
        assert answers.begun == most
        answers.go.set()
        assert sorted([(await hear(socket))["n"] for _ in range(most)]) == list(range(most))
        await ask(socket, most + 9, "StandBy", migration_id="m-1")
        assert await hear(socket) == {"n": most + 9, "body": {}}


async def test_the_outcome_can_be_asked_for_whatever_is_under_way() -> None:
    answers, most = Answers(), peering._MOST_IN_FLIGHT
    async with peer_of(answers.handle) as socket:
        for number in range(most):
            await ask(socket, number, "StandBy", migration_id="m-1")
        await ask(socket, 1000, "Inquire", migration_id="m-1", vm_id="v", generation=2, refuse=True)
        assert (await hear(socket))["body"] == {"says": "absent"}
        await ask(socket, 1001, "Take", migration_id="m-1", generation=2, run=True)
        await ask(socket, 1002, "StandBy", migration_id="m-1")
        assert (await hear(socket))["n"] == 1002
        assert answers.begun == most + 2


async def test_large_ones_count_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peering, "_MOST_BYTES_IN_FLIGHT", 1000)
    answers = Answers()
    async with peer_of(answers.handle) as socket:
        await ask(socket, 1, "StandBy", migration_id="m" * 1000)
        await ask(socket, 2, "StandBy", migration_id="m-1")
        assert (await hear(socket))["problem"]["code"] == "too-many-requests"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "1", '"x"', "{}", '{"n": 1}', '{"n": 1, "call": "StandBy"}', "[" * 99999]
)
async def test_what_is_no_request_is_told_so(text: str) -> None:
    async with peer_of(Answers().handle) as socket:
        await socket.send_str(text)
        assert (await hear(socket))["problem"]["code"] == "bad-request"
        await socket.send_str('{"n": 2, "call": ["Take"], "body": {}}')
        assert (await hear(socket))["problem"]["code"] == "unknown-request"
