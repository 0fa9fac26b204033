"""The host's HTTP doors: whatever is sent, a problem document comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from vmferry.host.web_errors import answer, problems, read_body
from vmferry.model.errors import Conflict, Failed, NotFound, OutcomeUnknown, Refused, Unreachable, WrongInput


async def echo(request: web.Request) -> web.Response:
    return answer(await read_body(request, {"name": str, "count": int, "flag": bool, "maybe": (str, type(None))}))


async def fail(request: web.Request) -> web.Response:
    kind = request.match_info["kind"]
    if kind == "defect":
        raise RuntimeError("secret words")
    kinds = {kind.__name__: kind for kind in (Conflict, Failed, NotFound, OutcomeUnknown, Refused, Unreachable)}
    raise kinds[kind]("some-code", "It happened.", "Do this.")


Client = TestClient[web.Request, web.Application]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    app = web.Application(middlewares=[problems], client_max_size=10_000)
    app.router.add_post("/echo", echo)
    app.router.add_get("/fail/{kind}", fail)
    async with TestClient(TestServer(app)) as found:
        yield found


async def problem_of(response: Any, status: int) -> Any:
    assert response.status == status
    assert response.content_type == "application/problem+json"
    return await response.json(content_type=None)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "bad-json"),
        (b"[1]", "bad-json"),
        (b"null", "bad-json"),
        (b"\xff\xfe", "bad-json"),
        (b"[" * 9000, "bad-json"),
        (b'{"zork": 1}', "unknown-key"),
        (b'{"\\u001b[2J": 1}', "unknown-key"),
        (b'{"name": 1}', "bad-value"),
        (b'{"count": true}', "bad-value"),
        (b'{"count": 1.5}', "bad-value"),
        (b'{"maybe": 1}', "bad-value"),
    ],
)
async def test_a_wrong_body(client: Client, body: bytes, code: str) -> None:
    problem = await problem_of(await client.post("/echo", data=body), 400)
    assert problem["code"] == code
    assert problem["detail"].isprintable() and problem["fix"]


async def test_an_unknown_charset(client: Client) -> None:
    headers = {"Content-Type": "application/json; charset=klingon"}
    assert (await problem_of(await client.post("/echo", data=b"{}", headers=headers), 400))["code"] == "bad-json"


@pytest.mark.parametrize("body", [b"", b"{}", b'{"name": "x", "count": 3, "flag": true, "maybe": null}'])
async def test_a_right_body(client: Client, body: bytes) -> None:
    response = await client.post("/echo", data=body)
    assert response.status == 200


@pytest.mark.parametrize(
    ("kind", "status"),
    [("Conflict", 409), ("Failed", 500), ("NotFound", 404), ("OutcomeUnknown", 504), ("Refused", 422),
     ("Unreachable", 502)],
)  # fmt: skip
async def test_an_error_is_a_problem(client: Client, kind: str, status: int) -> None:
    problem = await problem_of(await client.get(f"/fail/{kind}"), status)
    assert (problem["kind"], problem["code"], problem["detail"], problem["fix"]) == (
        kind, "some-code", "It happened.", "Do this.",
    )  # fmt: skip


async def test_a_defect_does_not_tell_its_inside(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    problem = await problem_of(await client.get("/fail/defect"), 500)
    assert problem["code"] == "internal"
    assert "secret" not in str(problem)
    assert "request-failed" in caplog.text


async def test_unknown_paths_methods_and_too_large_bodies(client: Client) -> None:
    assert (await problem_of(await client.get("/nothing\x1b"), 404))["code"] == "no-such-path"
    await problem_of(await client.get("/echo"), 405)
    await problem_of(await client.post("/echo", data=b"x" * 20_000), 413)


def test_wrong_input_is_the_asker_s() -> None:
    assert WrongInput("c", "m").http_status == 400
