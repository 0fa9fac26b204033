"""Certificates for a new host, and the client over mutual TLS: against a real TLS server with a real CA."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from recorded import HOST

from vmferry.api import joining, pki
from vmferry.api.certificates import utc_now
from vmferry.api.client import HostClient
from vmferry.api.codec import encode, problem
from vmferry.api.endpoints import Endpoint
from vmferry.api.joining import Newcomer, read_newcomer
from vmferry.api.tokens import create_token, verify_token
from vmferry.model.errors import Conflict, Refused, Unreachable, VmferryError, WrongInput

LOOPBACK = "127.0.0.1"


class _CaHost(BaseHTTPRequestHandler):
    """The CA host's answers as api.joining describes them."""

    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server: Any = self.server
        try:
            document = self._reply(server, json.loads(body) if body else {})
            status = 200
        except VmferryError as error:
            document, status = problem(error), error.http_status
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _reply(self, server: Any, body: dict[str, Any]) -> Any:
        if self.path == "/v1/ca":
            return {"ca": pki.ca_pem(server.shown_ca)}
        if self.path == "/v1/join":
            verify_token(server.tokens, body["token_secret"], body["host_name"], utc_now())
            server.tokens.clear()
            requests = pki.HostRequests(body["host_name"], body["host_csr"], body["stream_csr"])
            issued = pki.sign_csr(server.directory, requests, [LOOPBACK])
            return {
                "ca": issued.ca_pem,
                "host_certificate": issued.host_pem,
                "stream_certificate": issued.stream_pem,
                "peers": {"host1": "127.0.0.1:7443"},
            }
        pki.peer_host_name(self.connection.getpeercert(True))  # type: ignore[attr-defined]
        return encode(HOST)

    do_GET = do_POST = _answer

    def log_message(self, format: str, *args: Any) -> None:
        return


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    directory: Path
    shown_ca: Path
    tokens: list[Any]

    def handle_error(self, request: Any, client_address: Any) -> None:
        return  # a client that does not trust us is what these tests are about


@contextmanager
def _serving(directory: Path) -> Iterator[_Server]:
    with _Server((LOOPBACK, 0), _CaHost) as server:
        context = pki.server_context(directory, joining=True)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        server.directory = server.shown_ca = directory
        server.tokens = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def newcomer(tmp_path: Path, name: str) -> Newcomer:
    return Newcomer(name, f"{LOOPBACK}:7443", tmp_path / name, tmp_path / "none.sock")


@pytest.fixture
def ca_host(tmp_path: Path) -> Iterator[_Server]:
    joining.init(newcomer(tmp_path, "host1"))
    with _serving(tmp_path / "host1") as server:
        yield server


def token_of(server: _Server, fingerprint: bytes | None = None) -> str:
    known = fingerprint or pki.ca_fingerprint(server.directory)
    text, stored = create_token(LOOPBACK, server.server_address[1], known, utc_now() + timedelta(minutes=5))
    server.tokens.append(stored)
    return text


def endpoint(server: _Server, name: str, tls_dir: Path) -> Endpoint:
    return Endpoint(name, address=f"{LOOPBACK}:{server.server_address[1]}", tls_dir=tls_dir)


def test_a_host_joins_and_is_then_trusted(ca_host: _Server, tmp_path: Path) -> None:
    host2 = newcomer(tmp_path, "host2")
    assert joining.join(host2, token_of(ca_host)) == {"host1": "127.0.0.1:7443"}
    assert pki.identity_name(host2.tls_dir) == "host2"
    assert pki.stream_dir(host2.tls_dir).is_dir()
    assert not pki.has_ca(host2.tls_dir)
    assert HostClient(endpoint(ca_host, "host1", host2.tls_dir)).host() == HOST


def test_a_token_counts_once(ca_host: _Server, tmp_path: Path) -> None:
    token = token_of(ca_host)
    joining.join(newcomer(tmp_path, "host2"), token)
    with pytest.raises(Refused) as caught:
        joining.join(newcomer(tmp_path, "host3"), token)
    assert caught.value.code == "token-unknown"
    assert not (tmp_path / "host3" / "host.pem").exists()


def test_an_impostor_gets_no_secret(ca_host: _Server, tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        joining.join(newcomer(tmp_path, "host2"), token_of(ca_host, bytes(32)))
    assert caught.value.code == "other-ca"
    assert len(ca_host.tokens) == 1


def test_an_impostor_that_shows_the_right_ca_gets_no_secret(ca_host: _Server, tmp_path: Path) -> None:
    joining.init(newcomer(tmp_path, "other"))
    with _serving(tmp_path / "other") as impostor:
        impostor.shown_ca = tmp_path / "host1"
        token = token_of(impostor, pki.ca_fingerprint(tmp_path / "host1"))
        with pytest.raises(Unreachable) as caught:
            joining.join(newcomer(tmp_path, "host2"), token)
        assert caught.value.code == "tls-other-ca"
        assert len(impostor.tokens) == 1


def test_the_host_with_a_ca_of_its_own_does_not_join(ca_host: _Server, tmp_path: Path) -> None:
    with pytest.raises(Conflict) as caught:
        joining.join(newcomer(tmp_path, "host1"), token_of(ca_host))
    assert caught.value.code == "own-ca"
    with pytest.raises(Conflict):
        joining.init(newcomer(tmp_path, "host1"))


def test_the_client_wants_the_host_that_it_was_told(ca_host: _Server, tmp_path: Path) -> None:
    joining.join(newcomer(tmp_path, "host2"), token_of(ca_host))
    joining.init(newcomer(tmp_path, "stranger"))
    with pytest.raises(Unreachable) as caught:
        HostClient(endpoint(ca_host, "host3", tmp_path / "host2")).host()
    assert caught.value.code == "tls-wrong-name"
    with pytest.raises(Unreachable) as caught:
        HostClient(endpoint(ca_host, "host1", tmp_path / "stranger")).host()
    assert caught.value.code == "tls-other-ca"
    with pytest.raises(VmferryError) as missing:
        HostClient(endpoint(ca_host, "host1", tmp_path / "nothing")).host()
    assert missing.value.code == "no-identity"


def test_a_server_of_another_ca_refuses_our_certificate(ca_host: _Server, tmp_path: Path) -> None:
    joining.init(newcomer(tmp_path, "stranger"))
    mixed = tmp_path / "stranger"
    (mixed / "ca.pem").write_bytes((tmp_path / "host1" / "ca.pem").read_bytes())  # trusts it, but is not trusted
    with pytest.raises(Unreachable) as caught:
        HostClient(endpoint(ca_host, "host1", mixed)).migrate("web1", "host2", options=_options())
    assert caught.value.code.startswith("tls-own")


def _options() -> Any:
    from vmferry.model.migration import MigrateOptions

    return MigrateOptions()


def test_nothing_listens(tmp_path: Path) -> None:
    joining.init(newcomer(tmp_path, "host1"))
    with ThreadingHTTPServer((LOOPBACK, 0), _CaHost) as server:
        port = server.server_address[1]
    with pytest.raises(Unreachable) as caught:
        HostClient(Endpoint("host1", address=f"{LOOPBACK}:{port}", tls_dir=tmp_path / "host1")).host()
    assert caught.value.code == "host-unreachable" and "refused" in caught.value.message


def test_the_daemons_settings_say_who_joins(tmp_path: Path) -> None:
    path = tmp_path / "vmferryd.toml"
    path.write_text(
        '[host]\nname = "host1"\nstate_dir = "/s"\nrun_dir = "/r"\nguest_user = ""\n[migration]\naddress = "fd00::1"\n'
    )
    found = read_newcomer(path)
    assert found == Newcomer("host1", "[fd00::1]:7443", Path("/s/tls"), Path("/r/vmferryd.sock"), None)
    said = read_newcomer(path, "other", "192.0.2.1:1", tmp_path)
    assert said == replace(found, name="other", address="192.0.2.1:1", tls_dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "no-name"),
        ('[host]\nname = "a"', "no-address"),
        ('[host]\nname = "A"\n[migration]\naddress = "192.0.2.1"', "bad-name"),
        ('[host]\nname = "a"\n[migration]\naddress = "192.0.2.1"\nport = "x"', "bad-address"),
        ("[host", "bad-config"),
        ("host = 1", "bad-config"),
    ],
)
def test_settings_with_which_no_host_can_join(tmp_path: Path, text: str, code: str) -> None:
    path = tmp_path / "vmferryd.toml"
    path.write_text(text)
    with pytest.raises(WrongInput) as caught:
        read_newcomer(path)
    assert caught.value.code == code


def test_init_and_join_as_commands(ca_host: _Server, run: Run, tmp_path: Path) -> None:
    settings = tmp_path / "vmferryd.toml"
    settings.write_text(
        f'[host]\nname = "host5"\nguest_user = ""\nrun_dir = "{tmp_path}"\n[tls]\ndir = "{tmp_path}/five"\n'
    )
    options = ("--address", "127.0.0.1:7443", "--daemon-config", str(settings))
    done = run("host", "init", *options, "--config-dir", str(tmp_path / "own"), "--json")
    assert (done.status, done.document["tls_dir"]) == (0, str(tmp_path / "own"))
    assert pki.has_ca(tmp_path / "own")
    done = run("host", "join", token_of(ca_host), *options)
    assert done.status == 0, done.err
    assert "host5 has certificates" in done.out and "vmferry host add host1 127.0.0.1:7443" in done.err
    assert pki.identity_name(tmp_path / "five") == "host5"
    assert run("host", "join", "rubbish", *options).status == 2


def test_plain_http_is_told_from_tls(tmp_path: Path) -> None:
    joining.init(newcomer(tmp_path, "host1"))
    with ThreadingHTTPServer((LOOPBACK, 0), _CaHost) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        target = Endpoint("host1", address=f"{LOOPBACK}:{server.server_address[1]}", tls_dir=tmp_path / "host1")
        with pytest.raises(Unreachable) as caught:
            HostClient(target).host()
    assert isinstance(caught.value.__cause__, ssl.SSLError | OSError)
