"""Errors on the host's HTTP doors: every answer that is not a success is a problem document (RFC 9457)."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from vmferry.api.codec import PROBLEM_MEDIA_TYPE, encode, problem
from vmferry.host import log
from vmferry.model.errors import Failed, NotFound, VmferryError, WrongInput

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def answer(value: object, status: int = 200) -> web.Response:
    """A model value as JSON."""
    return web.json_response(encode(value), status=status)


def problem_response(error: VmferryError) -> web.Response:
    """The error as a problem document with its HTTP status."""
    return web.Response(
        body=json.dumps(problem(error)).encode(), status=error.http_status, content_type=PROBLEM_MEDIA_TYPE
    )


@web.middleware
async def problems(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Turns every error of a handler into a problem; an unexpected one is logged as the bug it is."""
    try:
        return await handler(request)
    except VmferryError as error:
        return problem_response(error)
    except web.HTTPNotFound:
        return problem_response(
            NotFound("no-such-path", f"There is nothing at {request.path[:200]!r}.", "See docs/api.md.")
        )
    except web.HTTPException as error:
        return problem_response(_from_http(error))
    except Exception as error:  # noqa: BLE001 - the door: a bug must become an answer and a log line, not a hang
        log.defect("request-failed", error, method=request.method, path=request.path)
        return problem_response(
            Failed("internal", f"vmferryd failed at this ({type(error).__name__}).", "See its log.")
        )


def _from_http(error: web.HTTPException) -> VmferryError:
    wrong = WrongInput("bad-request", f"{error.reason}.", "See docs/api.md.")
    wrong.http_status = error.status
    return wrong


async def read_body(request: web.Request, known: dict[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """The JSON object of a request. Raises WrongInput when it is none, has unknown keys or wrong types."""
    try:
        text = await request.text()
        body = json.loads(text) if text else {}
    except (ValueError, LookupError, RecursionError) as error:  # bytes, charset, depth
        raise WrongInput("bad-json", f"The request is not JSON: {error}.", "Send a JSON object.") from error
    if not isinstance(body, dict):
        raise WrongInput("bad-json", "The request is not a JSON object.", f"Its keys: {', '.join(known)}.")
    for key, value in body.items():
        if key not in known:
            raise WrongInput("unknown-key", f"There is no key {key[:40]!r}.", f"Known: {', '.join(known) or 'none'}.")
        if not isinstance(value, known[key]) or (isinstance(value, bool) and known[key] is int):
            raise WrongInput("bad-value", f"{key} has the wrong type.", "See docs/api.md.")
    return body
