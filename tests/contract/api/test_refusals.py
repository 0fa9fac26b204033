"""A client whose certificate the daemon's real door refuses is told that, and why: over loopback, with real TLS."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from vmferry.api import certificates as certs
from vmferry.api import pki
from vmferry.api.client import HostClient
from vmferry.api.endpoints import Endpoint
from vmferry.api.transport import exchange
from vmferry.host.config import parse_config
from vmferry.host.daemon import Daemon
from vmferry.host.doors import Doors
from vmferry.host.joining import Joining
from vmferry.host.journal import Journal
from vmferry.host.peering import fetch_host
from vmferry.host.peers import Peers
from vmferry.model.errors import Refused, Unreachable, VmferryError

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def host1(tmp_path: Path) -> Path:
    """The identity of the host that has the CA, and so lets newcomers knock."""
    pki.create_ca(tmp_path / "host1", "test CA")
    pki.issue_host(tmp_path / "host1", "host1", [LOOPBACK])
    return tmp_path / "host1"


@pytest.fixture(params=["host1", "host2"])
async def door(host1: Path, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Endpoint]:
    """A door as the daemon opens it, on the CA's host and on another one; `tls_dir` is a right client's."""
    name: str = request.param
    for other in ("host2", "host3"):
        requests = pki.make_csr(tmp_path / other, other)
        pki.install_certificates(tmp_path / other, pki.sign_csr(host1, requests, [LOOPBACK]))
    port = free_port()
    config = parse_config(
        f'[host]\nname = "{name}"\nstate_dir = "{tmp_path}"\nrun_dir = "{tmp_path}"\n'
        f'[tls]\ndir = "{tmp_path}/{name}"\n[migration]\naddress = "{LOOPBACK}"\nport = {port}\n'
    )
    daemon = Daemon(config)
    journal = Journal(tmp_path / "journal.sqlite")
    await journal.open()
    daemon.peers = Peers(config, journal, lambda: pki.client_context(config.tls_dir))
    daemon.joining = Joining(config, journal, daemon.peers)
    doors = Doors(daemon)
    await doors.open()
    yield Endpoint(name, address=f"{LOOPBACK}:{port}", tls_dir=tmp_path / "host3")
    await doors.close()
    await journal.close()


def wrong_identity(tmp_path: Path, kind: str) -> Path:
    """A directory with a certificate that should not be taken, and the CA of those who should not take it."""
    ca_dir = tmp_path / "host1"
    ca = certs.certificate_from_pem((ca_dir / "ca.pem").read_bytes(), "ca.pem")
    ca_key = certs.key_from_pem((ca_dir / "ca" / "ca.key").read_bytes(), "ca.key")
    now = certs.utc_now()
    if kind == "other CA":
        ca_key = certs.create_key()
        ca = certs.create_ca_certificate(ca_key, "another CA", now)
    elif kind == "same name":  # as if the CA had been made anew under its old name
        ca_key = certs.create_key()
        ca = certs.create_ca_certificate(ca_key, "test CA", now)
    elif kind == "expired":
        now -= certs.VALIDITY + timedelta(days=1)
    elif kind == "not yet":
        now += timedelta(days=3)
    key = certs.create_key()
    signed = certs.sign_host(ca, ca_key, certs.create_request(key, "host3"), "host3", [LOOPBACK], now)
    place = tmp_path / "wrong"
    place.mkdir()
    (place / "ca.pem").write_bytes((ca_dir / "ca.pem").read_bytes())
    (place / "host.pem").write_bytes(certs.certificate_to_pem(signed))
    (place / "host.key").write_bytes(certs.key_to_pem(key))
    return place


def careless_context(directory: Path) -> ssl.SSLContext:
    """As `client_context`, without the look at our own certificate's dates: by our clock it may be valid."""
    context = pki.joiner_context((directory / "ca.pem").read_text())
    context.load_cert_chain(directory / "host.pem", directory / "host.key")
    return context


KINDS = [
    ("other CA", "tls-own-other-ca", "CA of our certificate"),
    ("same name", "tls-own-other-ca", "CA of our certificate"),
    ("expired", "tls-own-expired", "certificate has expired"),
    ("not yet", "tls-own-bad", "our certificate"),
]


@pytest.mark.parametrize(("kind", "code", "words"), KINDS)
@pytest.mark.parametrize("act", ["read", "change"])
async def test_a_refused_client_is_told(
    door: Endpoint, tmp_path: Path, kind: str, code: str, words: str, act: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one whose long request is under way when it is refused; a change was then certainly not carried out."""
    context = careless_context(wrong_identity(tmp_path, kind))
    method, path, body = ("GET", "/v1/peers", None) if act == "read" else ("POST", "/v1/vms", {"x": "y" * 300_000})
    for _ in range(5):
        with pytest.raises(Unreachable) as caught:
            await asyncio.to_thread(exchange, door, method, path, body, 10.0, context)
        assert (caught.value.code, door.name in caught.value.message) == (code, True), caught.value
        assert words in caught.value.message and caught.value.fix
    assert caplog.text.count("tls-refused") == 5  # the host's own log says so, too, and once each time


async def test_the_command_line_says_that_it_is_the_certificate(door: Endpoint, tmp_path: Path) -> None:
    wrong_identity(tmp_path, "other CA")
    config = tmp_path / "client.toml"
    config.write_text(f'[[host]]\nname = "{door.name}"\naddress = "{door.address}"\ntls_dir = "wrong"\n')
    argv = [sys.executable, "-m", "vmferry.cli.main", "vm", "show", "web", "--config", str(config)]
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, said = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1 and "CA of our certificate" in said.decode(), said


async def test_another_host_hears_it_too(door: Endpoint, tmp_path: Path) -> None:
    context = careless_context(wrong_identity(tmp_path, "expired"))
    with pytest.raises(Unreachable) as caught:
        await fetch_host(door.name, door.address, context, 10.0)
    problem = pki.tls_problem(caught.value, door.name)
    assert problem is not None and problem.code == "tls-own-expired"


async def test_the_right_client_is_served(door: Endpoint) -> None:
    assert await asyncio.to_thread(HostClient(door).peers) == {}


async def test_a_client_without_a_certificate(door: Endpoint, tmp_path: Path) -> None:
    """The host with the CA talks to newcomers, but not about this; any other does not talk to them."""
    context = pki.joiner_context((tmp_path / "host1" / "ca.pem").read_text())
    with pytest.raises(VmferryError) as caught:
        await asyncio.to_thread(exchange, door, "GET", "/v1/peers", None, 10.0, context)
    if door.name == "host1":
        assert isinstance(caught.value, Refused) and caught.value.code == "no-certificate"
    else:
        assert isinstance(caught.value, Unreachable) and caught.value.code == "tls-no-certificate"


async def test_an_old_tls_is_told(door: Endpoint, tmp_path: Path) -> None:
    context = pki.joiner_context((tmp_path / "host1" / "ca.pem").read_text())
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(Unreachable) as caught:
        await asyncio.to_thread(exchange, door, "GET", "/v1/peers", None, 10.0, context)
    assert caught.value.code == "tls-version"


@pytest.mark.parametrize(
    "words", [b"GET /v1/host HTTP/1.1\r\n\r\n", b"\0" * 64, b"SSH-2.0-x\r\n" * 9], ids=["HTTP", "zeros", "SSH"]
)
async def test_what_is_no_tls_is_cut_off_at_once(door: Endpoint, words: bytes) -> None:
    """There is no alert to wait for."""
    reader, writer = await asyncio.open_connection(*door.address.split(":"))
    writer.write(words)
    with contextlib.suppress(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 10)
    writer.close()


async def test_a_refused_connection_does_not_stay(door: Endpoint, tmp_path: Path) -> None:
    """Whatever the refused one says next ends it; it need not have read why."""
    context = careless_context(wrong_identity(tmp_path, "other CA"))
    reader, writer = await asyncio.open_connection(*door.address.split(":"), ssl=context, server_hostname=door.name)
    with contextlib.suppress(OSError):
        for _ in range(100):
            writer.write(b"x" * 1000)
            await writer.drain()
    with pytest.raises(OSError):
        await asyncio.wait_for(reader.readexactly(1), 10)
    writer.close()
