"""Who is who between hosts: the files of a host's identity, and the TLS contexts made from them.

For the daemon and the CLI's `host` commands. Private keys never leave the host that made them. A host has two
identities: its own (API) and a weaker one for its guests' QEMU processes (memory and disk streams), so that a guest
which breaks out of QEMU does not speak for the host. Everything here blocks on files; call it through a thread.

"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vmferry.api import certificates as certs
from vmferry.api.identity import (
    HostCertificates,
    HostRequests,
    ca_pem,
    certificate_expiry,
    identity_name,
    install_certificates,
    make_dir,
    read,
    renewal_due,
    stream_dir,
    write,
)
from vmferry.api.tls import (
    bootstrap_context,
    client_context,
    joiner_context,
    reload_identity,
    server_context,
    tls_problem,
)
from vmferry.model.errors import Conflict, NotFound, Refused
from vmferry.model.names import require_name, stream_identity, stream_name

__all__ = [
    "HostCertificates",
    "HostRequests",
    "bootstrap_context",
    "ca_fingerprint",
    "ca_pem",
    "certificate_expiry",
    "client_context",
    "create_ca",
    "has_ca",
    "identity_name",
    "install_certificates",
    "issue_host",
    "joiner_context",
    "make_csr",
    "peer_host_name",
    "pin_ca",
    "reload_identity",
    "renewal_due",
    "server_context",
    "sign_csr",
    "stream_dir",
    "stream_identity",
    "stream_name",
    "tls_problem",
]


def create_ca(directory: Path, name: str) -> None:
    """Makes the CA called `name` in `directory`. Raises Conflict `ca-exists` if there is a CA or an identity."""
    if (directory / "ca.pem").exists():
        raise Conflict("ca-exists", f"{directory} already holds an identity.", "Use it, or remove the directory.")
    key = certs.create_key()
    certificate = certs.create_ca_certificate(key, name, certs.utc_now())
    make_dir(directory, 0o711)
    make_dir(directory / "ca", 0o700)
    write(directory / "ca" / "ca.key", certs.key_to_pem(key), 0o600)
    write(directory / "ca.pem", certs.certificate_to_pem(certificate), 0o644)


def has_ca(directory: Path) -> bool:
    """Whether this host has the CA's key and so can let others join."""
    return (directory / "ca" / "ca.key").exists()


def issue_host(directory: Path, host: str, addresses: Sequence[str], stream_gid: int | None = None) -> None:
    """Gives the CA's own host its identity, or renews it. Errors as the three steps it is made of."""
    requests = make_csr(directory, host)
    install_certificates(directory, sign_csr(directory, requests, addresses), stream_gid)


def make_csr(directory: Path, host: str) -> HostRequests:
    """Makes two new keys, keeps them in `pending/`, and returns the requests for them. A later call replaces them."""
    require_name(host, "host")
    host_key, stream_key = certs.create_key(), certs.create_key()
    make_dir(directory, 0o711)
    make_dir(directory / "pending", 0o700)
    write(directory / "pending" / "host.key", certs.key_to_pem(host_key), 0o600)
    write(directory / "pending" / "stream.key", certs.key_to_pem(stream_key), 0o600)
    stream = certs.create_request(stream_key, stream_name(host))
    return HostRequests(host, certs.create_request(host_key, host), stream)


def sign_csr(directory: Path, requests: HostRequests, addresses: Sequence[str]) -> HostCertificates:
    """Signs as the CA in `directory`. The caller has made sure that the sender may be `requests.host`.

    Raises NotFound `no-ca`, WrongInput for a request that is no good.
    """
    if not has_ca(directory):
        raise NotFound("no-ca", "This host has no CA.", "Ask the host on which host init was run.")
    key = certs.key_from_pem(read(directory / "ca" / "ca.key"), "ca/ca.key")
    ca = certs.certificate_from_pem(read(directory / "ca.pem"), "ca.pem")
    now = certs.utc_now()
    host = certs.sign_host(ca, key, requests.host_csr, requests.host, addresses, now)
    stream = certs.sign_stream(ca, key, requests.stream_csr, requests.host, now)
    return HostCertificates(*(certs.certificate_to_pem(item).decode() for item in (host, stream, ca)))


def ca_fingerprint(directory: Path) -> bytes:
    """SHA-256 of the CA's certificate, 32 bytes; what a join token carries."""
    return certs.fingerprint(certs.certificate_from_pem(read(directory / "ca.pem"), "ca.pem"))


def pin_ca(pem: str, fingerprint: bytes) -> None:
    """Raises Refused `other-ca` unless `pem` is the CA with that fingerprint."""
    if certs.fingerprint(certs.certificate_from_pem(pem.encode(), "the CA's certificate")) != fingerprint:
        raise Refused(
            "other-ca", "The host that answered is not the one that made this token.", "Check address and token."
        )


def peer_host_name(certificate_der: bytes | None) -> str:
    """The host on the other side of a TLS connection (`getpeercert(True)`).

    Raises Refused `no-certificate` for None, `not-a-host` for a guest process's certificate.
    """
    if not certificate_der:
        raise Refused("no-certificate", "This needs the certificate of a host.", "Let the host join first.")
    return certs.host_in(certificate_der)
