"""How other hosts get their certificates from this one, if it has the CA: one-time tokens and signing."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aiohttp import web

from vmferry.api.codec import decode, encode
from vmferry.api.endpoints import split_address
from vmferry.api.identity import HostRequests, ca_pem
from vmferry.api.pki import ca_fingerprint, has_ca, sign_csr
from vmferry.api.tokens import StoredToken, create_token, verify_token
from vmferry.host import log
from vmferry.host.config import HostConfig
from vmferry.host.journal import Journal
from vmferry.host.peers import Peers
from vmferry.host.web_errors import read_body
from vmferry.model.errors import Conflict, NotFound, Refused
from vmferry.model.names import require_name

_VALID_FOR = timedelta(hours=1)


class Joining:
    """The CA's side of `host join`."""

    def __init__(self, config: HostConfig, journal: Journal, peers: Peers) -> None:
        self._config = config
        self._journal = journal
        self._peers = peers
        self._turn = asyncio.Lock()

    @property
    def _tls_dir(self) -> Path:
        return self._config.tls_dir

    def _require_ca(self) -> None:
        if not has_ca(self._tls_dir):
            raise NotFound(
                "no-ca", f"{self._config.name} has no CA.", "Ask on the host where `vmferry host init` was run."
            )
        if not self._config.migration.address:
            raise Conflict("no-address", "This host has no address for others.", "Set [migration] address.")

    async def issue_token(self) -> dict[str, str]:
        """A token that lets one host join within an hour. Raises NotFound `no-ca`."""
        self._require_ca()
        expires = datetime.now(UTC) + _VALID_FOR
        where = self._config.migration
        text, stored = create_token(
            where.address, where.port, await asyncio.to_thread(ca_fingerprint, self._tls_dir), expires
        )
        await self._journal.add_token(stored.secret_hash, encode(stored))
        log.event("join-token-issued", expires_at=stored.expires_at)
        return {"token": text, "expires_at": stored.expires_at}

    async def ca(self, _request: web.Request) -> web.Response:
        """`GET /v1/ca`: the CA's certificate, for anybody; it counts only with the token's fingerprint."""
        self._require_ca()
        return web.json_response({"ca": await asyncio.to_thread(ca_pem, self._tls_dir)})

    async def join(self, request: web.Request) -> web.Response:
        """`POST /v1/join`: certificates for a token. A token is used up by the first right use."""
        self._require_ca()
        keys = ("token_secret", "host_name", "address", "host_csr", "stream_csr")
        body = await read_body(request, dict.fromkeys(keys, str))
        name = require_name(body.get("host_name", ""), "host")
        address = body.get("address", "")
        ip, _ = split_address(address)
        async with self._turn:
            self._require_free(name, address)
            tokens = [decode(StoredToken, record) for record in await self._journal.list_tokens()]
            token = verify_token(tokens, body.get("token_secret", ""), name, datetime.now(UTC))
            await self._journal.take_token(token.secret_hash)
            requests = HostRequests(name, body.get("host_csr", ""), body.get("stream_csr", ""))
            issued = await asyncio.to_thread(sign_csr, self._tls_dir, requests, [ip])
            known = {**self._peers.addresses(), self._config.name: self._own_address()}
            await self._peers.put(name, address)
        log.event("host-joined", host=name, address=address)
        known.pop(name, None)
        return web.json_response(
            {
                "ca": issued.ca_pem,
                "host_certificate": issued.host_pem,
                "stream_certificate": issued.stream_pem,
                "peers": known,
            }
        )

    def _require_free(self, name: str, address: str) -> None:
        known = self._peers.addresses().get(name)
        if name == self._config.name or (known is not None and known != address):
            raise Refused("host-name-taken", f"There is a host named {name} already.", "Choose another [host] name.")

    def _own_address(self) -> str:
        where = self._config.migration
        return f"[{where.address}]:{where.port}" if ":" in where.address else f"{where.address}:{where.port}"
