"""The files of a host's identity: where they are, how new ones are put in place, how long they are valid.

For `api.pki` and `api.tls` only. Everything here blocks on files. Keys are never readable by others, not even for a
moment, and a crash while new certificates are installed is completed by the next use.

    <dir>/ca.pem, host.pem, host.key         the host's own; host.pem and ca.pem are public
    <dir>/ca/ca.key                          only on the host that has the CA
    <dir>/stream/{ca-cert,server-cert,server-key,client-cert,client-key}.pem     QEMU's names (tls-creds-x509)
    <dir>/stream/dh-params.pem               the same for everybody, see `_DH_PARAMETERS`
    <dir>/pending/, <dir>/ready/             keys that wait for a certificate; an installation that is not finished
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from vmferry.api import certificates as certs
from vmferry.model.errors import NotFound, Refused, VmferryError, WrongInput

RENEW_AFTER = 2 / 3
STREAM_FILES = ("ca-cert.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem")
_DH_FILE = "dh-params.pem"
# ffdhe2048 of RFC 7919. Without the file QEMU (10.0; crypto/tlscreds.c) searches for a prime of its own whenever server
# credentials are loaded: 0.1 to 0.7 s, twice a migration, for a key exchange that TLS 1.3 hardly ever uses.
_DH_PARAMETERS = b"""\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""


@dataclass(frozen=True, slots=True)
class HostRequests:
    """The signing requests (PEM) of a host: for itself and for its guests' processes."""

    host: str
    host_csr: str
    stream_csr: str


@dataclass(frozen=True, slots=True)
class HostCertificates:
    """What the CA answers to `HostRequests`: three certificates (PEM). Public."""

    host_pem: str
    stream_pem: str
    ca_pem: str


def install_certificates(directory: Path, issued: HostCertificates, stream_gid: int | None = None) -> None:
    """Puts new certificates and their pending keys in place. A crash in between is completed by the next use.

    `stream_gid` is the group of the guests' user, which may then read the stream's keys and not change them.
    Raises Refused `other-ca`, `wrong-key` if they are not of the CA in `directory`, or not for the pending keys.
    """
    ready, pending = directory / "ready", directory / "pending"
    finish_installation(directory)
    host_key, stream_key = read(pending / "host.key"), read(pending / "stream.key")
    _require_match(directory, issued, host_key, stream_key)
    make_dir(pending / "stream", 0o700 if stream_gid is None else 0o750)
    ca, stream = issued.ca_pem.encode(), issued.stream_pem.encode()
    for name, content in zip(STREAM_FILES, (ca, stream, stream_key, stream, stream_key), strict=True):
        write(pending / "stream" / name, content, 0o600 if stream_gid is None else 0o640, stream_gid)
    if stream_gid is not None:
        os.chown(pending / "stream", -1, stream_gid)
    write(pending / "host.pem", issued.host_pem.encode(), 0o644)
    write(pending / "ca.pem", ca, 0o644)
    (pending / "stream.key").unlink()
    pending.rename(ready)
    sync_dir(directory)
    finish_installation(directory)


def _require_match(directory: Path, issued: HostCertificates, host_key: bytes, stream_key: bytes) -> None:
    ca = certs.certificate_from_pem(issued.ca_pem.encode(), "the CA's certificate")
    known = directory / "ca.pem"
    if known.exists() and certs.certificate_from_pem(read(known), "ca.pem") != ca:
        raise Refused("other-ca", f"{known} is of another CA.", "Remove the directory to leave that CA for good.")
    for what, pem, key in (("host", issued.host_pem, host_key), ("stream", issued.stream_pem, stream_key)):
        certificate = certs.certificate_from_pem(pem.encode(), f"the {what} certificate")
        if certificate.public_key() != certs.key_from_pem(key, f"{what}.key").public_key():
            raise Refused("wrong-key", f"The {what} certificate is for another key.", "Join anew.")
        if not certs.is_signed_by(certificate, ca):
            raise Refused("other-ca", f"The {what} certificate is of another CA.", "Join anew.")


def finish_installation(directory: Path) -> None:
    """Moves what is in `ready/` into place; may be interrupted and called again at any point."""
    ready = directory / "ready"
    if not ready.is_dir():
        return
    staged = ready / "stream"
    if staged.is_dir():
        make_dir(directory / "stream", staged.stat().st_mode & 0o777)
        os.chown(directory / "stream", -1, staged.stat().st_gid)
        for name in STREAM_FILES:
            _move(staged / name, directory / "stream" / name)
        staged.rmdir()
    for name in ("ca.pem", "host.key", "host.pem"):
        _move(ready / name, directory / name)
    ready.rmdir()
    sync_dir(directory)


def _move(source: Path, target: Path) -> None:
    if source.exists():
        source.replace(target)


def ca_pem(directory: Path) -> str:
    """The CA's certificate; public."""
    return read(directory / "ca.pem").decode()


def identity_name(directory: Path) -> str:
    """The host name in this host's own certificate."""
    return certs.host_in(_pem_to_der(read(directory / "host.pem")))


def certificate_expiry(directory: Path) -> datetime:
    """When this host's certificate ends (UTC); the stream's ends at the same time."""
    return certs.certificate_from_pem(read(directory / "host.pem"), "host.pem").not_valid_after_utc


def renewal_due(directory: Path, now: datetime) -> bool:
    """Whether two thirds of the certificate's time are over."""
    certificate = certs.certificate_from_pem(read(directory / "host.pem"), "host.pem")
    whole = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return now >= certificate.not_valid_before_utc + whole * RENEW_AFTER


def stream_dir(directory: Path) -> Path:
    """What QEMU's tls-creds-x509 gets as `dir`. Raises NotFound `no-identity` if it is not complete."""
    finish_installation(directory)
    for name in STREAM_FILES:
        if not (directory / "stream" / name).exists():
            raise no_identity(directory / "stream" / name)
    if not (directory / "stream" / _DH_FILE).exists():
        write(directory / "stream" / _DH_FILE, _DH_PARAMETERS, 0o644)
    return directory / "stream"


def no_identity(path: Path) -> VmferryError:
    return NotFound(
        "no-identity", f"This host has no identity yet: {path} is missing.", "Run vmferry host init or host join."
    )


def _pem_to_der(pem: bytes) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.decode())


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise no_identity(path) from error
    except OSError as error:
        raise WrongInput(
            "unreadable", f"{path} cannot be read: {error.strerror}.", "Check its owner and mode."
        ) from error


def make_dir(path: Path, mode: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(mode)


def write(path: Path, content: bytes, mode: int, gid: int | None = None) -> None:
    """Replaces a file as a whole; a key is never readable by others, not even for a moment."""
    part = path.with_name(f".{path.name}.new")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        if gid is not None:
            os.fchown(descriptor, -1, gid)
        os.fchmod(descriptor, mode)
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    part.replace(path)


def sync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
