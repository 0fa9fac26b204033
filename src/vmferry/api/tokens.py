"""One-time tokens with which a host joins the CA. Pure; who stores them and hands them out is `host/`.

A token's text carries where the CA host answers, the fingerprint by which the joiner knows its CA, and a secret. The
CA host keeps a `StoredToken` only, from which the secret cannot be found.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from vmferry.model.errors import Refused, WrongInput

_PREFIX = "vmferry1-"
_FINGERPRINT_BYTES = 32
_SECRET_BYTES = 20
_FIXED_BYTES = _FINGERPRINT_BYTES + _SECRET_BYTES + 2
_LONGEST = 1024


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What a token's text says. `address` and `port` are those of the CA host's API."""

    address: str
    port: int
    fingerprint: bytes
    secret: str


@dataclass(frozen=True, slots=True)
class StoredToken:
    """What the CA host keeps. `host` "" lets any name join; `expires_at` is RFC 3339 in UTC."""

    secret_hash: str
    expires_at: str
    host: str = ""


def create_token(
    address: str, port: int, fingerprint: bytes, expires_at: datetime, host: str = ""
) -> tuple[str, StoredToken]:
    """A new token's text, to be shown once, and what is to be stored. `expires_at` must have a time zone."""
    if len(fingerprint) != _FINGERPRINT_BYTES or expires_at.tzinfo is None:
        raise ValueError("a SHA-256 and a time with its zone are needed")
    secret = secrets.token_bytes(_SECRET_BYTES)
    body = fingerprint + secret + port.to_bytes(2, "big") + address.encode()
    body += zlib.crc32(body).to_bytes(4, "big")
    text = _PREFIX + base64.urlsafe_b64encode(body).decode().rstrip("=")
    return text, StoredToken(_hash(secret.hex()), expires_at.isoformat(), host)


def parse_token(text: str) -> JoinToken:
    """What the joiner reads from a token. Raises WrongInput `bad-token` (a checksum finds slips of copying)."""
    text = "".join(text.split())
    try:
        if not text.startswith(_PREFIX) or len(text) > _LONGEST:
            raise ValueError("not a token")
        encoded = text.removeprefix(_PREFIX)
        body = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        content, checksum = body[:-4], body[-4:]
        if len(content) <= _FIXED_BYTES or zlib.crc32(content).to_bytes(4, "big") != checksum:
            raise ValueError("checksum")
        address = content[_FIXED_BYTES:].decode()
    except (ValueError, binascii.Error) as error:
        raise WrongInput(
            "bad-token", "This is not a whole join token.", "Copy all of what the CA host showed."
        ) from error
    secret = content[_FINGERPRINT_BYTES : _FINGERPRINT_BYTES + _SECRET_BYTES].hex()
    port = int.from_bytes(content[_FIXED_BYTES - 2 : _FIXED_BYTES], "big")
    return JoinToken(address, port, content[:_FINGERPRINT_BYTES], secret)


def verify_token(stored: Iterable[StoredToken], secret: str, host: str, now: datetime) -> StoredToken:
    """The stored token that `secret` belongs to, which the caller then deletes before it signs anything.

    Raises Refused `token-unknown`, `token-expired`, `token-other-host`.
    """
    wanted = _hash(secret)
    found = None
    for token in stored:  # all of them, so that the time taken does not tell which one
        if hmac.compare_digest(token.secret_hash, wanted):
            found = token
    if found is None:
        raise Refused("token-unknown", "This join token is not known, or was used.", "Make a new one on the CA's host.")
    if now >= datetime.fromisoformat(found.expires_at):
        raise Refused("token-expired", "This join token has expired.", "Make a new one on the CA's host.")
    if found.host not in ("", host):
        raise Refused("token-other-host", f"This join token is for {found.host}, not for {host}.", "Use its own token.")
    return found


def _hash(secret: str) -> str:
    """Plain SHA-256 is enough for 160 random bits."""
    return hashlib.sha256(secret.encode()).hexdigest()
