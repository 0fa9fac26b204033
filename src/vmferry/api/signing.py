"""Signatures of hosts over documents: made with the host's key, checked with its certificate and the CA.

The signature's text holds the certificate, so that a document can be checked wherever the CA is known.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from vmferry.api import certificates as certs
from vmferry.api.identity import read
from vmferry.model.errors import VmferryError

_ALGORITHM = ec.ECDSA(hashes.SHA256())


def canonical(document: dict[str, Any]) -> bytes:
    """The bytes that are signed: everything but the signature, keys sorted, no blanks, 12.0 written as 12.

    The last because 12 and 12.0 are one number in JSON: who reads and writes the document again may change that.
    """
    unsigned = {key: _plain(value) for key, value in document.items() if key != "signature"}
    return json.dumps(unsigned, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def sign_document(directory: Path, document: dict[str, Any]) -> str:
    """The signature's text: `<signature>.<certificate>`, both base64 (DER). Raises NotFound `no-identity`."""
    key = certs.key_from_pem(read(directory / "host.key"), str(directory / "host.key"))
    certificate = certs.certificate_from_pem(read(directory / "host.pem"), str(directory / "host.pem"))
    signature = key.sign(canonical(document), _ALGORITHM)
    der = certificate.public_bytes(serialization.Encoding.DER)
    return f"{base64.b64encode(signature).decode()}.{base64.b64encode(der).decode()}"


def check_document(directory: Path, document: dict[str, Any], signer: str) -> str:
    """Why the document's signature is not `signer`'s, or "" if it is. The certificate may have expired since."""
    try:
        signature, der = (base64.b64decode(part, validate=True) for part in str(document.get("signature")).split("."))
        certificate = x509.load_der_x509_certificate(der)
        name = certs.host_in(der)
    except (ValueError, binascii.Error, VmferryError) as error:
        return f"the signature cannot be read ({error})"
    ca = certs.certificate_from_pem(read(directory / "ca.pem"), str(directory / "ca.pem"))
    if not certs.is_signed_by(certificate, ca):
        return "the signer's certificate is not of this CA"
    if name != signer:
        return f"it was signed by {name}, not by {signer}"
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return "the signer's key is of another kind"
    try:
        key.verify(signature, canonical(document), _ALGORITHM)
    except InvalidSignature:
        return "the contents were changed after it was signed"
    return ""
