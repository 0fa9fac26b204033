"""The TLS contexts of a host, and in plain words why a handshake failed.

For `api.pki`, which is what others import. TLS 1.3 only; trusted is our CA alone, never the system's.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from vmferry.api import certificates as certs
from vmferry.api.identity import certificate_expiry, finish_installation, no_identity
from vmferry.model.errors import Refused, Unreachable, VmferryError, WrongInput

# X509_V_ERR_* of OpenSSL's x509_vfy.h
_VERIFY_REASONS = {
    9: ("tls-not-yet-valid", "its certificate is not valid yet", "Compare the clocks of both hosts."),
    10: ("tls-expired", "its certificate has expired", "Renew it there, or check this host's clock."),
    18: ("tls-other-ca", "its certificate is of another CA", "Both hosts must have joined the same CA."),
    19: ("tls-other-ca", "its certificate is of another CA", "Both hosts must have joined the same CA."),
    20: ("tls-other-ca", "its certificate is of another CA", "Both hosts must have joined the same CA."),
    62: ("tls-wrong-name", "its certificate is for another host", "Check the address that is set for this host."),
    64: ("tls-wrong-name", "its certificate is for another address", "Check the address that is set for this host."),
}
_ALERT_REASONS = {
    "CERTIFICATE_REQUIRED": ("tls-no-certificate", "it wants a certificate and got none", "Let this host join."),
    "CERTIFICATE_EXPIRED": ("tls-own-expired", "it says that our certificate has expired", "Renew it; check clocks."),
    "UNKNOWN_CA": ("tls-own-other-ca", "it does not know the CA of our certificate", "Both must join the same CA."),
    "BAD_CERTIFICATE": ("tls-own-bad", "it does not take our certificate", "Renew it; compare the clocks."),
    "UNSUPPORTED_CERTIFICATE": ("tls-own-bad", "it does not take our kind of certificate", "Join again."),
    "PROTOCOL_VERSION": ("tls-version", "it does not speak TLS 1.3", "Does vmferryd answer there?"),
    "WRONG_VERSION_NUMBER": ("tls-version", "it does not speak TLS", "Does vmferryd answer there?"),
}


class _SpokenRefusal(ssl.SSLObject):
    """A server's side of a connection under asyncio whose refusal reaches the other side.

    asyncio ends a connection at the first error of its handshake and drops the alert that OpenSSL has made for it
    (CPython, Lib/asyncio/sslproto.py, `_on_handshake_complete`), so that a client could not tell a refused certificate
    from a daemon that died. What is to be sent goes out when a handshake only waits for bytes: that is what it is told
    first, and the error at the next bytes. A client that has been refused hangs up; one that does not is cut off by
    asyncio's limit for handshakes, as is one that never says a word.
    """

    outgoing: ssl.MemoryBIO
    _refusal: ssl.SSLError | None = None

    def do_handshake(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            if not self.outgoing.pending:  # no alert: it spoke no TLS at all
                raise
            self._refusal = error
            raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "the alert is to be sent") from error


class _ServerContext(ssl.SSLContext):
    """Makes connections of that kind where asyncio asks for one; `wrap_socket` sends its alerts by itself."""

    sslobject_class = _SpokenRefusal

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        connection = super().wrap_bio(incoming, outgoing, *args, **kwargs)
        assert isinstance(connection, _SpokenRefusal)
        connection.outgoing = outgoing
        return connection


def server_context(directory: Path, *, joining: bool = False) -> ssl.SSLContext:
    """For the API's listener: TLS 1.3, client certificates of our CA only; who is refused is told why, by an alert.

    With `joining` a client without a certificate gets through too (one with a wrong certificate does not): then every
    request but those for joining must call `peer_host_name`. Raises NotFound `no-identity`, Refused `expired`.
    """
    context = _ServerContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_OPTIONAL if joining else ssl.CERT_REQUIRED
    _harden(context)
    _trust(context, directory)
    reload_identity(context, directory)
    return context


def client_context(directory: Path) -> ssl.SSLContext:
    """For requests to other hosts; pass the peer's name as `server_hostname` (an address may be another host's later).

    Raises NotFound `no-identity`, Refused `expired`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context)
    _trust(context, directory)
    reload_identity(context, directory)
    return context


def joiner_context(pem: str) -> ssl.SSLContext:
    """For a host that joins: trusts the CA `pem` (after `pin_ca`), has no certificate of its own yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context)
    context.load_verify_locations(cadata=pem)
    return context


def bootstrap_context() -> ssl.SSLContext:
    """Trusts anybody: only to fetch the CA's certificate, which `pin_ca` then checks. Send no secret through it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def reload_identity(context: ssl.SSLContext, directory: Path) -> None:
    """Lets a context in use show the certificate that is in `directory` now (renewed), from the next connection on."""
    finish_installation(directory)
    for name in ("host.pem", "host.key"):
        if not (directory / name).exists():
            raise no_identity(directory / name)
    expiry = certificate_expiry(directory)
    if expiry <= certs.utc_now():
        raise Refused(
            "expired", f"This host's certificate ended on {expiry:%Y-%m-%d %H:%M} UTC.", "Renew it, or check the clock."
        )
    try:
        context.load_cert_chain(directory / "host.pem", directory / "host.key")
    except (ssl.SSLError, OSError) as error:
        raise WrongInput(
            "bad-identity", f"host.pem and host.key in {directory} do not belong together or cannot be read: {error}."
        ) from error


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT


def _trust(context: ssl.SSLContext, directory: Path) -> None:
    try:
        context.load_verify_locations(cafile=directory / "ca.pem")
    except FileNotFoundError as error:
        raise no_identity(directory / "ca.pem") from error
    except (ssl.SSLError, OSError) as error:
        raise WrongInput("bad-certificate", f"{directory / 'ca.pem'} cannot be used: {error}.") from error


def tls_problem(error: BaseException, peer: str) -> VmferryError | None:
    """Why no trust came about with `peer`, if that is what `error` (or what caused it) tells; else None.

    With TLS 1.3 the server judges our certificate after the client's handshake is done, so this may come from a later
    read; the request was then not carried out either.
    """
    cause = _ssl_error(error)
    if cause is None:
        return None
    found = _VERIFY_REASONS.get(getattr(cause, "verify_code", 0))
    if found is None:
        text = f"{cause.reason or ''} {cause}".upper()
        found = next((reason for alert, reason in _ALERT_REASONS.items() if alert in text), None)
    code, why, fix = found or ("tls-refused", str(cause), "Both hosts must have joined the same CA.")
    return Unreachable(code, f"No trust with {peer}: {why}.", fix)


def _ssl_error(error: BaseException | None) -> ssl.SSLError | None:
    """aiohttp keeps the SSL error in attributes of its own; elsewhere it is the cause or the context."""
    for _ in range(8):
        # Asked first: aiohttp's own are of the ssl module's class, too, but hold nothing of what such an error says.
        inner = getattr(error, "certificate_error", None) or getattr(error, "os_error", None)
        if error is None or (isinstance(error, ssl.SSLError) and inner is None):
            return error
        error = inner or error.__cause__ or error.__context__
    return None
