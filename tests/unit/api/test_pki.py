"""Identities: hosts of one CA trust each other; everybody else is refused with a reason on both sides."""

from __future__ import annotations

import base64
import decimal
import os
import socket
import ssl
import stat
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest

from vmferry.api import certificates as certs
from vmferry.api import pki
from vmferry.model.errors import Conflict, NotFound, Refused, VmferryError, WrongInput


def join(ca: Path, directory: Path, host: str, addresses: tuple[str, ...] = ("127.0.0.1",)) -> Path:
    requests = pki.make_csr(directory, host)
    pki.install_certificates(directory, pki.sign_csr(ca, requests, addresses))
    return directory


@pytest.fixture
def host1(tmp_path: Path) -> Path:
    pki.create_ca(tmp_path / "host1", "test CA")
    pki.issue_host(tmp_path / "host1", "host1", ["127.0.0.1", "::1"])
    return tmp_path / "host1"


@pytest.fixture
def host2(tmp_path: Path, host1: Path) -> Path:
    return join(host1, tmp_path / "host2", "host2")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def shake(
    server: ssl.SSLContext, client: ssl.SSLContext, name: str
) -> tuple[bytes | BaseException | None, bytes | BaseException | None]:
    """What each side sees of the other: its certificate (DER) or the error."""
    ours, theirs = socket.socketpair()
    seen: list[bytes | BaseException | None] = []

    def serve() -> None:
        theirs.settimeout(10)
        try:
            with server.wrap_socket(theirs, server_side=True) as wrapped:
                seen.append(wrapped.getpeercert(True))
                wrapped.sendall(b"x")
        except OSError as error:
            seen.append(error)
        finally:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    ours.settimeout(10)
    result: bytes | BaseException | None
    try:
        with client.wrap_socket(ours, server_hostname=name) as wrapped:
            result = wrapped.getpeercert(True)
            if wrapped.recv(1) != b"x":
                result = ssl.SSLError("closed")
    except OSError as error:
        result = error
    with suppress(OSError):
        ours.close()
    thread.join(10)
    assert len(seen) == 1
    return seen[0], result


def code_of(result: object) -> str:
    assert isinstance(result, BaseException), result
    problem = pki.tls_problem(result, "host2")
    assert problem is not None
    return problem.code


def test_two_hosts_of_a_ca_trust_each_other(host1: Path, host2: Path) -> None:
    at_server, at_client = shake(pki.server_context(host1), pki.client_context(host2), "host1")
    assert isinstance(at_server, bytes) and isinstance(at_client, bytes)
    assert pki.peer_host_name(at_server) == "host2"
    assert pki.peer_host_name(at_client) == "host1"
    assert pki.identity_name(host2) == "host2"


def test_an_address_in_the_certificate_is_a_name_too(host1: Path, host2: Path) -> None:
    assert isinstance(shake(pki.server_context(host1), pki.client_context(host2), "127.0.0.1")[1], bytes)


def test_wrong_name_is_refused(host1: Path, host2: Path) -> None:
    _, at_client = shake(pki.server_context(host1), pki.client_context(host2), "host3")
    assert code_of(at_client) == "tls-wrong-name"
    _, at_client = shake(pki.server_context(host1), pki.client_context(host2), "192.0.2.9")
    assert code_of(at_client) == "tls-wrong-name"


def test_another_ca_is_refused_by_both_sides(host1: Path, tmp_path: Path) -> None:
    pki.create_ca(tmp_path / "foreign", "other CA")
    pki.issue_host(tmp_path / "foreign", "host2", [])
    at_server, at_client = shake(pki.server_context(host1), pki.client_context(tmp_path / "foreign"), "host1")
    assert code_of(at_client) == "tls-other-ca"
    assert code_of(at_server) == "tls-own-other-ca"
    trusting = pki.bootstrap_context()
    trusting.load_cert_chain(tmp_path / "foreign" / "host.pem", tmp_path / "foreign" / "host.key")
    at_server, at_client = shake(pki.server_context(host1), trusting, "host1")
    assert code_of(at_server) == "tls-other-ca"
    assert code_of(at_client) == "tls-own-other-ca"


def test_no_certificate_is_refused(host1: Path) -> None:
    at_server, at_client = shake(pki.server_context(host1), pki.joiner_context(pki.ca_pem(host1)), "host1")
    assert isinstance(at_server, ssl.SSLError)
    assert code_of(at_client) == "tls-no-certificate"


def test_a_joining_host_gets_through_without_a_certificate_but_is_nobody(host1: Path) -> None:
    context = pki.server_context(host1, joining=True)
    at_server, at_client = shake(context, pki.joiner_context(pki.ca_pem(host1)), "host1")
    assert at_server is None and isinstance(at_client, bytes)
    with pytest.raises(Refused, match="needs the certificate"):
        pki.peer_host_name(at_server)


def test_a_guest_process_does_not_pass_for_its_host(host1: Path, host2: Path) -> None:
    stream = pki.stream_dir(host2)
    client = pki.joiner_context(pki.ca_pem(host1))
    client.load_cert_chain(stream / "client-cert.pem", stream / "client-key.pem")
    at_server, _ = shake(pki.server_context(host1), client, "host1")
    assert isinstance(at_server, bytes)
    with pytest.raises(Refused) as caught:
        pki.peer_host_name(at_server)
    assert caught.value.code == "not-a-host"
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(stream / "server-cert.pem", stream / "server-key.pem")
    for name in ("host2", "127.0.0.1"):
        assert code_of(shake(server, pki.client_context(host1), name)[1]) == "tls-wrong-name"


@pytest.mark.parametrize("shift_days", [-800, 800])
def test_expired_or_early_certificates_are_refused(
    host1: Path, host2: Path, shift_days: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = datetime.now(UTC) + timedelta(days=shift_days)
    requests = pki.make_csr(host2, "host2")
    with monkeypatch.context() as patch:
        patch.setattr(certs, "utc_now", lambda: moved)
        issued = pki.sign_csr(host1, requests, [])
    pki.install_certificates(host2, issued)
    client = pki.joiner_context(pki.ca_pem(host1))
    client.load_cert_chain(host2 / "host.pem", host2 / "host.key")
    at_server, at_client = shake(pki.server_context(host1), client, "host1")
    assert code_of(at_server) == ("tls-expired" if shift_days < 0 else "tls-not-yet-valid")
    assert code_of(at_client) in ("tls-own-expired", "tls-own-bad")
    if shift_days < 0:
        with pytest.raises(Refused, match="ended on"):
            pki.client_context(host2)


def test_the_ca_decides_about_names(host1: Path, tmp_path: Path) -> None:
    requests = pki.make_csr(tmp_path / "x", "host1")
    issued = pki.sign_csr(host1, pki.HostRequests("host9", requests.host_csr, requests.stream_csr), [])
    pki.install_certificates(tmp_path / "x", issued)
    assert pki.identity_name(tmp_path / "x") == "host9"


def test_requests_that_are_no_good(host1: Path, tmp_path: Path) -> None:
    good = pki.make_csr(tmp_path / "x", "host9")
    swapped = good.host_csr.splitlines()
    swapped[-3] = swapped[-3][::-1]
    for name, csr in (("host9", "rubbish"), ("host9", "\n".join(swapped)), ("Host9", good.host_csr), ("stream.x", "")):
        with pytest.raises(WrongInput):
            pki.sign_csr(host1, pki.HostRequests(name, csr, good.stream_csr), [])
    with pytest.raises(WrongInput):
        pki.sign_csr(host1, good, ["not-an-address"])
    with pytest.raises(NotFound, match="no CA"):
        pki.sign_csr(tmp_path / "x", good, [])


def test_only_what_belongs_together_is_installed(host1: Path, tmp_path: Path) -> None:
    first = pki.make_csr(tmp_path / "x", "host9")
    issued = pki.sign_csr(host1, first, [])
    pki.make_csr(tmp_path / "x", "host9")
    with pytest.raises(Refused, match="another key"):
        pki.install_certificates(tmp_path / "x", issued)
    pki.create_ca(tmp_path / "foreign", "other CA")
    pki.issue_host(tmp_path / "foreign", "host8", [])
    requests = pki.make_csr(tmp_path / "foreign", "host8")
    with pytest.raises(Refused, match="another CA"):
        pki.install_certificates(tmp_path / "foreign", pki.sign_csr(host1, requests, []))


def test_keys_are_for_their_owner_only(host1: Path, host2: Path) -> None:
    for path in (host1 / "ca" / "ca.key", host1 / "host.key", host2 / "host.key", host2 / "stream" / "client-key.pem"):
        assert mode_of(path) == 0o600, path
    assert not pki.has_ca(host2) and pki.has_ca(host1)
    pki.issue_host(host1, "host1", [], stream_gid=12345)
    assert mode_of(host1 / "stream" / "server-key.pem") == 0o640
    assert (host1 / "stream" / "server-key.pem").stat().st_gid == 12345
    assert (mode_of(host1 / "stream"), (host1 / "stream").stat().st_gid) == (0o750, 12345)
    leftovers = [path for path in host1.rglob("*") if path.name.startswith(".") or path.name in ("ready", "pending")]
    assert leftovers == []


def test_qemu_need_not_make_dh_parameters(host1: Path) -> None:
    written = pki.stream_dir(host1) / "dh-params.pem"
    assert mode_of(written) == 0o644
    body = base64.b64decode("".join(written.read_text().splitlines()[1:-1]))
    # DER (PKCS #3): a sequence of two integers, the prime and the generator 2.
    assert body[:4] == bytes([0x30, 0x82]) + (len(body) - 4).to_bytes(2) and body[4:8] == b"\x02\x82\x01\x01"
    prime = int.from_bytes(body[8 : 8 + 257])
    assert body[8 + 257 :] == b"\x02\x01\x02"
    # RFC 7919, A.1: 2^2048 - 2^1984 + {[2^1918 * e] + 560316} * 2^64 - 1. A safe prime: its half is one, too.
    with decimal.localcontext(prec=700):
        e = decimal.Decimal(1).exp()
        assert prime == 2**2048 - 2**1984 + (int(e * 2**1918) + 560316) * 2**64 - 1


def test_renewal(host1: Path, host2: Path) -> None:
    now = datetime.now(UTC)
    assert not pki.renewal_due(host1, now)
    assert pki.renewal_due(host1, now + timedelta(days=600))
    assert timedelta(days=729) < pki.certificate_expiry(host1) - now < timedelta(days=731)
    context = pki.server_context(host1)
    before = (host1 / "host.pem").read_bytes()
    pki.issue_host(host1, "host1", [])
    assert (host1 / "host.pem").read_bytes() != before
    pki.reload_identity(context, host1)
    _, at_client = shake(context, pki.client_context(host2), "host1")
    assert at_client == ssl.PEM_cert_to_DER_cert((host1 / "host.pem").read_text())


def test_an_installation_cut_off_anywhere_is_completed(
    host1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crash after each step of moving new files into place; keys and certificates belong together afterwards."""

    class Crash(BaseException):
        pass

    for limit in range(12):
        requests = pki.make_csr(host1, "host1")
        issued = pki.sign_csr(host1, requests, [])
        with monkeypatch.context() as patch:
            left = [limit]
            real = Path.replace

            def replace(source: Path, target: Path, left: list[int] = left, real=real) -> Path:  # type: ignore[no-untyped-def]
                if source.parent.name == "ready" or source.parent.parent.name == "ready":
                    if left[0] == 0:
                        raise Crash
                    left[0] -= 1
                return real(source, target)

            patch.setattr(Path, "replace", replace)
            with suppress(Crash):
                pki.install_certificates(host1, issued)
        pki.server_context(host1)
        stream = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        stream.load_cert_chain(pki.stream_dir(host1) / "server-cert.pem", pki.stream_dir(host1) / "server-key.pem")
        assert (host1 / "host.pem").read_text() == issued.host_pem
        assert not (host1 / "ready").exists()


def test_what_is_missing_is_named(tmp_path: Path, host1: Path) -> None:
    for act in (pki.server_context, pki.client_context, pki.certificate_expiry, pki.stream_dir, pki.identity_name):
        with pytest.raises(NotFound) as caught:
            act(tmp_path / "none")
        assert caught.value.code == "no-identity" and "none" in caught.value.message
    (host1 / "host.key").write_bytes(pki.make_csr(tmp_path / "x", "x").host_csr.encode())
    with pytest.raises(VmferryError):
        pki.server_context(host1)
    (host1 / "host.pem").write_text("rubbish")
    with pytest.raises(WrongInput):
        pki.server_context(host1)
    with pytest.raises(Conflict):
        pki.create_ca(host1, "again")


def test_the_joiner_knows_its_ca_by_the_fingerprint(host1: Path, tmp_path: Path) -> None:
    pki.pin_ca(pki.ca_pem(host1), pki.ca_fingerprint(host1))
    with pytest.raises(Refused, match="not the one"):
        pki.pin_ca(pki.ca_pem(host1), bytes(32))
    with pytest.raises(WrongInput):
        pki.pin_ca("rubbish", bytes(32))


def test_a_planted_link_does_not_lead_a_key_elsewhere(host1: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    os.symlink(victim, host1 / ".ca.pem.new")
    pki.issue_host(host1, "host1", [])
    assert victim.read_text() == "untouched"


def test_what_aiohttp_wraps_is_found() -> None:
    """Its own errors are of the ssl module's class, but hold none of what such an error says."""
    inner = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
    inner.verify_code, inner.verify_message = 10, "certificate has expired"
    wrapped = aiohttp.ClientConnectorCertificateError(None, inner)
    assert isinstance(wrapped, ssl.SSLError)
    problem, plain = pki.tls_problem(wrapped, "host2"), pki.tls_problem(inner, "host2")
    assert problem is not None and plain is not None
    assert (problem.code, problem.message) == (plain.code, plain.message) and "expired" in problem.message
    assert pki.tls_problem(aiohttp.ClientConnectorError(None, OSError(111, "refused")), "host2") is None  # type: ignore[arg-type]
