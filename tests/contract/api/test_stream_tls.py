"""The stream certificates with real QEMU (GnuTLS): who is let in, who is not, and how QEMU spells the names."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from vmferry.api import pki
from vmferry.model.errors import Failed, VmferryError
from vmferry.storage.nbd import NbdAddress, NbdClient

DEADLINE_S = 30


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TLS directories of host1, host2, host3 of one CA, and of "foreign", which says that it is host2 of another."""
    base = tmp_path_factory.mktemp("tls")
    pki.create_ca(base / "host1", "test CA")
    pki.issue_host(base / "host1", "host1", ["127.0.0.1"])
    for name in ("host2", "host3"):
        requests = pki.make_csr(base / name, name)
        pki.install_certificates(base / name, pki.sign_csr(base / "host1", requests, []))
    pki.create_ca(base / "foreign", "other CA")
    pki.issue_host(base / "foreign", "host2", [])
    return base


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.raw"
    path.write_bytes(b"vmferry!" * 8192)
    return path


@contextmanager
def export(image: Path, tls: Path, allowed: str) -> Iterator[tuple[str, int]]:
    """qemu-nbd with TLS as the host of `tls`, open for the stream identity `allowed`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *("qemu-nbd", "-r", "-f", "raw", "-x", "disk", "-t", "-e", "4", "-b", "127.0.0.1", "-p", str(port)),
        *("--object", f"tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir={pki.stream_dir(tls)}"),
        *("--object", "authz-simple,id=a,identity=" + allowed.replace(",", ",,")),
        *("--tls-creds", "t", "--tls-authz", "a", str(image)),
    ]
    process = subprocess.Popen(command)
    try:
        end = time.monotonic() + DEADLINE_S
        while True:
            assert process.poll() is None and time.monotonic() < end
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.01)
        yield "127.0.0.1", port
    finally:
        process.kill()
        process.wait(DEADLINE_S)


def read_with_qemu(where: tuple[str, int], tls: Path, server_name: str) -> bool:
    """Whether QEMU as NBD client, with the stream identity of `tls`, can read the export."""
    node = f"driver=nbd,server.type=inet,server.host={where[0]},server.port={where[1]},export=disk,tls-creds=c"
    command = [
        *("qemu-img", "info", "--image-opts"),
        *("--object", f"tls-creds-x509,id=c,endpoint=client,verify-peer=on,dir={pki.stream_dir(tls)}"),
        f"{node},tls-hostname={server_name}",
    ]
    return subprocess.run(command, check=False, capture_output=True, timeout=DEADLINE_S).returncode == 0


def own_client(where: tuple[str, int], context: ssl.SSLContext, name: str) -> NbdClient:
    return NbdClient.connect(NbdAddress(where, "disk", tls=context, tls_name=name, timeout_s=DEADLINE_S))


def stream_context(tls: Path) -> ssl.SSLContext:
    context = pki.joiner_context(pki.ca_pem(tls))
    context.load_cert_chain(pki.stream_dir(tls) / "client-cert.pem", pki.stream_dir(tls) / "client-key.pem")
    return context


def test_qemu_lets_the_named_host_in_and_no_other(hosts: Path, image: Path) -> None:
    assert pki.stream_identity("host2") == "CN=stream.host2,O=vmferry"
    with export(image, hosts / "host1", pki.stream_identity("host2")) as where:
        assert read_with_qemu(where, hosts / "host2", pki.stream_name("host1"))
        assert not read_with_qemu(where, hosts / "host3", pki.stream_name("host1"))
        assert not read_with_qemu(where, hosts / "foreign", pki.stream_name("host1"))


def test_qemu_checks_the_server_s_name(hosts: Path, image: Path) -> None:
    with export(image, hosts / "host1", pki.stream_identity("host2")) as where:
        for wrong in (pki.stream_name("host3"), "host1", "127.0.0.1"):
            assert not read_with_qemu(where, hosts / "host2", wrong), wrong


def test_our_nbd_client_with_tls(hosts: Path, image: Path) -> None:
    with export(image, hosts / "host1", pki.stream_identity("host2")) as where:
        with own_client(where, stream_context(hosts / "host2"), pki.stream_name("host1")) as client:
            assert client.read(0, 65536) == image.read_bytes()
        with pytest.raises(Failed) as caught:
            own_client(where, stream_context(hosts / "host2"), pki.stream_name("host3"))
        assert caught.value.code == "nbd-untrusted"
        for stranger in ("host3", "foreign"):
            with pytest.raises(VmferryError):
                own_client(where, stream_context(hosts / stranger), pki.stream_name("host1"))
        with pytest.raises(Failed) as caught:
            NbdClient.connect(NbdAddress(where, "disk"))
        assert caught.value.code == "nbd-tls-required"


def test_a_host_s_own_certificate_does_not_open_a_stream(hosts: Path, image: Path) -> None:
    with (
        export(image, hosts / "host1", pki.stream_identity("host2")) as where,
        pytest.raises(VmferryError),
        own_client(where, pki.client_context(hosts / "host2"), pki.stream_name("host1")) as client,
    ):
        client.read(0, 512)


def test_tls_where_none_is_offered(image: Path, hosts: Path, tmp_path: Path) -> None:
    sock = tmp_path / "plain.sock"
    process = subprocess.Popen(["qemu-nbd", "-r", "-f", "raw", "-x", "disk", "-t", "-k", str(sock), str(image)])
    try:
        end = time.monotonic() + DEADLINE_S
        while not sock.exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        context = stream_context(hosts / "host2")
        with pytest.raises(Failed) as caught:
            NbdClient.connect(NbdAddress(sock, "disk", tls=context, tls_name="stream.host1"))
        assert caught.value.code == "nbd-no-tls"
    finally:
        process.kill()
        process.wait(DEADLINE_S)
