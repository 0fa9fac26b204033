"""The daemon's listeners: a Unix socket for people on this host, mutual TLS for other hosts and remote clients."""

from __future__ import annotations

import asyncio
import grp
import os
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from vmferry.api.pki import has_ca
from vmferry.host import log
from vmferry.host.local_api import build_app
from vmferry.host.peering import PEER_PATH, serve_peer, warm_codecs
from vmferry.host.web_errors import problem_response
from vmferry.model.errors import Failed, VmferryError, WrongInput

if TYPE_CHECKING:
    from vmferry.host.daemon import Daemon

_OPEN_TO_NEWCOMERS = frozenset({"/v1/ca", "/v1/join"})
_CLOSE_S = 1.0
_FATAL = b"\x02"  # AlertLevel, RFC 8446, section 6


class Doors:
    """Opens and closes them."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._runners: list[web.AppRunner] = []

    async def open(self) -> None:
        """Listens. Raises Failed `cannot-listen`, and what is wrong with the certificates."""
        config = self._daemon.config
        if config.migration.address:
            await asyncio.to_thread(warm_codecs)
            joining = has_ca(config.tls_dir)
            context = self._daemon.server_context(joining=joining)
            _tell_refusals(context)
            runner = await self._runner(self._peer_app(joining=joining))
            site = web.TCPSite(runner, config.migration.address, config.migration.port, ssl_context=context)
            await self._start(site, f"{config.migration.address}:{config.migration.port}")
        runner = await self._runner(build_app(self._daemon))
        path = config.socket_path
        path.unlink(missing_ok=True)
        old = os.umask(0o177)
        try:
            await self._start(web.UnixSite(runner, str(path)), str(path))
        finally:
            os.umask(old)
        if config.socket_group:
            _give_to_group(path, config.socket_group)

    async def _runner(self, app: web.Application) -> web.AppRunner:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_CLOSE_S, handle_signals=False)
        await runner.setup()
        self._runners.append(runner)
        return runner

    async def _start(self, site: web.BaseSite, where: str) -> None:
        try:
            await site.start()
        except OSError as error:
            raise Failed(
                "cannot-listen", f"{where} cannot be listened on: {error.strerror}.", "Is it in use?"
            ) from error

    async def close(self) -> None:
        """No one gets in any more; open requests get a second."""
        for runner in self._runners:
            await runner.cleanup()

    def _peer_app(self, *, joining: bool) -> web.Application:
        app = build_app(self._daemon)
        app.middlewares.append(self._authenticated)
        app.router.add_get(PEER_PATH, self._serve_peer)
        if joining:
            app.router.add_get("/v1/ca", self._daemon.joining.ca)
            app.router.add_post("/v1/join", self._daemon.joining.join)
        return app

    @web.middleware
    async def _authenticated(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path in _OPEN_TO_NEWCOMERS:
            return await handler(request)
        try:
            request["peer"] = await self._daemon.authenticate(request)
        except VmferryError as error:
            log.alarm("refused", who=request.remote, path=request.path, why=error.message)
            return problem_response(error)
        return await handler(request)

    async def _serve_peer(self, request: web.Request) -> web.StreamResponse:
        session = self._daemon.incoming.session(request["peer"])
        silence_s = self._daemon.config.limits.peer_silence_ms / 1000
        return await serve_peer(request, session.handle, session.close, silence_s)


def _tell_refusals(context: ssl.SSLContext) -> None:
    """Logs why a certificate was refused: asyncio drops what ends a handshake, and aiohttp never hears of it.

    The module's own hook for what goes over the line (CPython Lib/ssl.py, `_msg_callback`, there since 3.8); the
    address of the other side is not known to it.
    """

    def look(_: object, direction: str, version: object, content: object, kind: object, data: bytes) -> None:
        if direction == "write" and getattr(content, "name", "") == "ALERT" and data[:1] == _FATAL:
            why = str(getattr(kind, "name", kind)).lower().replace("_", " ")
            log.alarm("tls-refused", why=why, fix="A host of another CA, one without a certificate, or clocks apart?")

    setattr(context, "_msg_callback", look)  # noqa: B010 - typeshed does not know it


def _give_to_group(path: Path, name: str) -> None:
    try:
        os.chown(path, -1, grp.getgrnam(name).gr_gid)
        path.chmod(0o660)
    except KeyError as error:
        raise WrongInput("no-group", f"[host] socket_group: there is no group {name!r}.", "Make it.") from error
