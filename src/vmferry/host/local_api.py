"""The host's API (docs/api.md) for people and programs: routes, nothing else. What they do is in the host's parts."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from aiohttp import web

from vmferry.api.codec import decode, encode
from vmferry.host.definition import read_definition
from vmferry.host.web_errors import answer, problems, read_body
from vmferry.model.errors import NotFound, WrongInput
from vmferry.model.migration import MigrateOptions, Outcome
from vmferry.model.names import require_name

if TYPE_CHECKING:
    from vmferry.host.daemon import Daemon

_DAEMON: web.AppKey[Daemon] = web.AppKey("daemon")
_LONGEST_STOP_MS = 3_600_000
_EVENT_PAUSE_S = 0.1
_LARGEST_BODY = 1 << 20


def build_app(daemon: Daemon) -> web.Application:
    """The application that both doors serve (Unix socket, mutual TLS)."""
    app = web.Application(middlewares=[problems], client_max_size=_LARGEST_BODY)
    app[_DAEMON] = daemon
    app.add_routes(
        [
            web.get("/v1/host", _host),
            web.get("/v1/hosts", _hosts),
            web.post("/v1/host/probe", _probe),
            web.get("/v1/vms", _vms),
            web.post("/v1/vms", _create),
            web.get("/v1/vms/{name}", _vm),
            web.delete("/v1/vms/{name}", _delete),
            web.post("/v1/vms/{name}/{act:start|stop|kill|pause|resume}", _act),
            web.post("/v1/vms/{name}/check", _check),
            web.post("/v1/vms/{name}/migrate", _migrate),
            web.get("/v1/migrations", _migrations),
            web.get("/v1/migrations/{id}", _migration),
            web.get("/v1/migrations/{id}/check", _migration_check),
            web.get("/v1/migrations/{id}/events", _events),
            web.post("/v1/migrations/{id}/cancel", _cancel),
            web.post("/v1/migrations/{id}/recover", _recover),
            web.get("/v1/migrations/{id}/receipt", _receipt),
            web.post("/v1/migrations/{id}/receipt/check", _receipt_check),
            web.post("/v1/tokens", _token),
            web.get("/v1/peers", _peers),
            web.put("/v1/peers/{name}", _put_peer),
            web.delete("/v1/peers/{name}", _delete_peer),
        ]
    )
    return app


def daemon_of(request: web.Request) -> Daemon:
    """The daemon behind a request."""
    return request.app[_DAEMON]


def _name(request: web.Request, what: str = "VM") -> str:
    try:
        return require_name(request.match_info["name"], what)
    except WrongInput as error:
        raise NotFound(
            "no-such-" + what.lower(), f"There is no {what} of that name here: {error.message}", ""
        ) from error


async def _host(request: web.Request) -> web.Response:
    return answer(await daemon_of(request).describe())


async def _hosts(request: web.Request) -> web.Response:
    return answer(await daemon_of(request).describe_all())


async def _probe(request: web.Request) -> web.Response:
    return answer(await daemon_of(request).probe())


async def _vms(request: web.Request) -> web.Response:
    return answer(daemon_of(request).vms.list_views())


async def _vm(request: web.Request) -> web.Response:
    return answer(daemon_of(request).vms.view(_name(request)))


async def _create(request: web.Request) -> web.Response:
    body = await read_body(request, {"spec": dict})
    definition = read_definition(body.get("spec", {}))
    return answer(await daemon_of(request).vms.create(definition), status=201)


async def _delete(request: web.Request) -> web.Response:
    await daemon_of(request).vms.delete(_name(request))
    return web.json_response({})


async def _act(request: web.Request) -> web.Response:
    vms, name, act = daemon_of(request).vms, _name(request), request.match_info["act"]
    body = await read_body(request, {"timeout_ms": int} if act == "stop" else {})
    match act:
        case "start":
            await vms.start(name)
        case "stop":
            timeout_ms = body.get("timeout_ms", 60_000)
            if not 0 < timeout_ms <= _LONGEST_STOP_MS:
                raise WrongInput("bad-value", "timeout_ms must be 1 to 3600000.", "It is in milliseconds.")
            await vms.stop(name, timeout_ms / 1000)
        case "kill":
            await vms.kill(name)
        case "pause":
            await vms.pause(name)
        case _:
            await vms.resume(name)
    return answer(vms.view(name))


async def _read_move(request: web.Request) -> tuple[str, MigrateOptions]:
    body = await read_body(request, {"to": str, "options": dict})
    if "to" not in body:
        raise WrongInput("no-target", "The request does not say where to.", 'Give "to": HOST.')
    return require_name(body["to"], "host"), decode(MigrateOptions, body.get("options", {}))


async def _check(request: web.Request) -> web.Response:
    to, options = await _read_move(request)
    return answer(await daemon_of(request).migrations.check(_name(request), to, options))


async def _migrate(request: web.Request) -> web.Response:
    to, options = await _read_move(request)
    return answer(await daemon_of(request).migrations.begin(_name(request), to, options), status=202)


async def _migrations(request: web.Request) -> web.Response:
    return answer(daemon_of(request).migrations.list_views())


async def _migration(request: web.Request) -> web.Response:
    return answer(daemon_of(request).migrations.view(request.match_info["id"]))


async def _migration_check(request: web.Request) -> web.Response:
    return web.json_response(await daemon_of(request).migrations.document(request.match_info["id"], "checked"))


async def _events(request: web.Request) -> web.StreamResponse:
    migrations, migration_id = daemon_of(request).migrations, request.match_info["id"]
    view = migrations.view(migration_id)
    response = web.StreamResponse(headers={"Content-Type": "application/jsonl"})
    await response.prepare(request)
    while True:
        await response.write(json.dumps(encode(view)).encode() + b"\n")
        if view.outcome is not Outcome.RUNNING:
            return response
        await asyncio.sleep(_EVENT_PAUSE_S)  # the promised rate of at most 10/s
        view = await migrations.changed(migration_id, view)


async def _cancel(request: web.Request) -> web.Response:
    return answer(await daemon_of(request).migrations.cancel(request.match_info["id"]))


async def _recover(request: web.Request) -> web.Response:
    body = await read_body(request, {"host_is_dead": (str, type(None))})
    return answer(await daemon_of(request).migrations.recover(request.match_info["id"], body.get("host_is_dead")))


async def _receipt(request: web.Request) -> web.Response:
    return web.json_response(await daemon_of(request).migrations.document(request.match_info["id"], "receipt"))


async def _receipt_check(request: web.Request) -> web.Response:
    return web.json_response(await daemon_of(request).migrations.check_receipt(request.match_info["id"]))


async def _token(request: web.Request) -> web.Response:
    return web.json_response(await daemon_of(request).joining.issue_token())


async def _peers(request: web.Request) -> web.Response:
    return web.json_response(daemon_of(request).peers.addresses())


async def _put_peer(request: web.Request) -> web.Response:
    body = await read_body(request, {"address": str})
    await daemon_of(request).peers.put(_name(request, "host"), body.get("address", ""))
    return web.json_response({})


async def _delete_peer(request: web.Request) -> web.Response:
    await daemon_of(request).peers.remove(_name(request, "host"))
    return web.json_response({})
