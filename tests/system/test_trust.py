"""Hosts trust certificates of their CA, for the right name and time, and nothing else; both sides say why."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from sysrig import SLOW, Guest, Rig, copying_disks, wait_for

from vmferry.api import certificates as certs
from vmferry.lab.netns import open_socket
from vmferry.model.migration import Outcome

pytestmark = pytest.mark.system

PORT = 7555  # of the hostile server


@dataclass(frozen=True)
class Pair:
    """A certificate with its key, shown by somebody whom nobody should trust."""

    certificate: Path
    key: Path


def make_pair(rig: Rig, place: Path, kind: str, host: str) -> Pair | None:
    """What the hostile side shows; None for nothing."""
    if kind == "no certificate":
        return None
    ca_dir = rig.host("host1").state_dir / "tls"
    ca = certs.certificate_from_pem((ca_dir / "ca.pem").read_bytes(), "ca.pem")
    ca_key = certs.key_from_pem((ca_dir / "ca" / "ca.key").read_bytes(), "ca.key")
    now = certs.utc_now()
    if kind == "other CA":
        ca_key = certs.create_key()
        ca = certs.create_ca_certificate(ca_key, "another CA", now)
    if kind == "expired":
        now -= certs.VALIDITY + timedelta(days=1)
    key = certs.create_key()
    request = certs.create_request(key, host)
    if kind == "a guest's":
        signed = certs.sign_stream(ca, ca_key, request, host, now)
    else:
        signed = certs.sign_host(ca, ca_key, request, host, ["10.78.0.2"], now)
    pair = Pair(place / "shown.pem", place / "shown.key")
    pair.certificate.write_bytes(certs.certificate_to_pem(signed))
    pair.key.write_bytes(certs.key_to_pem(key))
    return pair


def log_since(rig: Rig, host: str, begin: int) -> str:
    with rig.host(host).log.open("rb") as log:
        log.seek(begin)
        return log.read().decode(errors="replace")


def knock(rig: Rig, server: str, pair: Pair | None) -> str:
    """Asks the API from host2's place, or host1's if that is the server; what came of it."""
    number = rig.host(server).number
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(rig.host("host1").state_dir / "tls" / "ca.pem")
    if pair is not None:
        context.load_cert_chain(pair.certificate, pair.key)
    plain = open_socket(rig.host(rig.other(server)).namespace, socket.AF_INET, socket.SOCK_STREAM)
    plain.settimeout(10)
    try:
        plain.connect((f"10.78.0.{number}", 7443))
        with context.wrap_socket(plain, server_hostname=server) as tls:
            tls.sendall(b"GET /v1/vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = b""
            while part := tls.recv(65536):
                answer += part
            return answer.decode()
    except OSError as error:
        return str(error)
    finally:
        plain.close()


@pytest.mark.parametrize("server", ["host1", "host2"])  # host1 has the CA and lets newcomers knock
@pytest.mark.parametrize("kind", ["no certificate", "other CA", "expired", "a guest's"])
def test_client_is_refused(rig: Rig, tmp_path: Path, kind: str, server: str) -> None:
    begin = rig.host(server).log.stat().st_size
    answer = knock(rig, server, make_pair(rig, tmp_path, kind, rig.other(server)))
    # an alert; what our own programs make of it is below, and in tests/contract/api/test_refusals.py
    assert not answer.startswith("HTTP/1.1") or answer.startswith("HTTP/1.1 4"), answer
    print(answer)
    said = wait_for(f"{server} says that it refused", lambda: log_since(rig, server, begin), 5.0)
    assert re.search(r"refused|certificate", said), said


def test_refused_command_line(rig: Rig, tmp_path: Path) -> None:
    """The command on a host of another CA says that the certificate is why."""
    pair = make_pair(rig, tmp_path, "other CA", "host2")
    assert pair is not None
    pair.certificate.rename(tmp_path / "host.pem")
    pair.key.rename(tmp_path / "host.key")
    (tmp_path / "ca.pem").write_bytes((rig.host("host1").state_dir / "tls" / "ca.pem").read_bytes())
    config = tmp_path / "client.toml"
    config.write_text('[[host]]\nname = "host1"\naddress = "10.78.0.1:7443"\ntls_dir = "."\n')
    argv = ["ip", "netns", "exec", rig.host("host2").namespace, sys.executable, "-m", "vmferry.cli.main"]
    done = subprocess.run(
        [*argv, "vm", "show", "web", "--config", str(config)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and "certificate" in done.stderr, done


def test_right_client_is_served(rig: Rig, tmp_path: Path) -> None:
    """The same knock with the right certificate: the others are refused for what is wrong with theirs."""
    assert "200 OK" in knock(rig, "host1", make_pair(rig, tmp_path, "right", "host2"))


@contextlib.contextmanager
def hostile_server(rig: Rig, pair: Pair | None) -> Iterator[None]:
    """Answers at host2's address; without a pair in plain text."""
    listener = open_socket(rig.host("host2").namespace, socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("10.78.0.2", PORT))
    listener.listen()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if pair is not None:
        context.load_cert_chain(pair.certificate, pair.key)

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), plain:
                plain.settimeout(5)
                if pair is None:
                    plain.recv(4096)
                    plain.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    continue
                with context.wrap_socket(plain, server_side=True) as tls:
                    tls.recv(4096)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no certificate", "TLS|SSL|trust"),
        ("other CA", "CA"),
        ("expired", "expired"),
        ("wrong name", "name|another host"),
        ("a guest's", "name|another host"),
    ],
)
def test_server_is_not_trusted(rig: Rig, guest: Guest, tmp_path: Path, kind: str, words: str) -> None:
    """A migration to a host that shows the wrong certificate fails at once, says why, and nothing moves."""
    host, _ = rig.place(guest.name)
    name = "host8"
    pair = make_pair(rig, tmp_path, kind, "host2" if kind == "wrong name" else name)
    rig.on(host).put_peer(name, f"10.78.0.2:{PORT}")
    try:
        with hostile_server(rig, pair):
            begun = rig.on(host).migrate(guest.name, name, SLOW)
            ended = rig.wait_end(host, begun.id, 20.0)
    finally:
        rig.on(host).delete_peer(name)
    assert ended.outcome is Outcome.FAILED and ended.reason is not None
    assert re.search(words, ended.reason.message) and ended.reason.fix, ended.reason
    print(f"[{ended.reason.code}] {ended.reason.message} {ended.reason.fix}")
    rig.require_alive(guest, host)


def test_disk_stream_is_closed_to_others(rig: Rig, guest: Guest, tmp_path: Path) -> None:
    """The target's disk export during a migration: not without TLS, not with another guest's certificate."""
    begun, source, target = rig.begin(guest.name, SLOW)
    rig.wait_until(source, begun.id, copying_disks)
    port = nbd_port(rig, source)
    address = rig.host(target).migration_address
    plain = look_at_export(rig, source, f"driver=nbd,host={address},port={port},export=root")
    assert plain.returncode != 0 and "TLS" in plain.stderr, plain
    for kind, host in (("a guest's", "host7"), ("other CA", source)):
        pair = make_pair(rig, tmp_path, kind, host)
        assert pair is not None
        (tmp_path / "client-cert.pem").write_bytes(pair.certificate.read_bytes())
        (tmp_path / "client-key.pem").write_bytes(pair.key.read_bytes())
        (tmp_path / "ca-cert.pem").write_bytes((rig.host("host1").state_dir / "tls" / "ca.pem").read_bytes())
        creds = f"tls-creds-x509,id=t,dir={tmp_path},endpoint=client,verify-peer=on"
        image = f"driver=nbd,host={address},port={port},export=root,tls-creds=t,tls-hostname=stream.{target}"
        other = look_at_export(rig, source, image, "--object", creds)
        assert other.returncode != 0, other
        print(other.stderr)
    ended = rig.wait_end(source, begun.id, 60.0)
    assert ended.outcome is Outcome.COMPLETED, ended.reason
    rig.require_alive(guest, target)
    rig.require_clean()


def nbd_port(rig: Rig, source: str) -> int:
    """The port of the target's disks: while they are copied the source's QEMU is connected to nothing else."""
    listing = subprocess.run(
        ["ip", "netns", "exec", rig.host(source).namespace, "ss", "-Htnp"], capture_output=True, text=True, check=True
    ).stdout
    pids = rig.qemu_pids(source, "web")
    (line,) = [line for line in listing.splitlines() if any(f"pid={pid}," in line for pid in pids)]
    return int(line.split()[4].rpartition(":")[2])


def look_at_export(rig: Rig, place: str, image: str, *options: str) -> subprocess.CompletedProcess[str]:
    argv = ["ip", "netns", "exec", rig.host(place).namespace, "timeout", "10", "qemu-img", "info", *options]
    return subprocess.run([*argv, "--image-opts", image], capture_output=True, text=True, check=False)
