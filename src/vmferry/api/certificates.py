"""X.509 as vmferry uses it: keys, requests, certificates of a small CA. The only door to the cryptography library.

For `api.pki`, which knows the files. Nothing here touches a file or a socket. Keys are EC P-256, which OpenSSL and
QEMU's GnuTLS both take. Which names a certificate holds is decided by who signs, never by what a request asks for.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vmferry.model.errors import Refused, WrongInput
from vmferry.model.names import require_name, stream_name

VALIDITY = timedelta(days=730)
CA_VALIDITY = timedelta(days=3650)
CLOCK_TOLERANCE = timedelta(hours=1)  # a joining host's clock may be behind the CA's
_ORGANIZATION = "vmferry"

Key = ec.EllipticCurvePrivateKey


def create_key() -> Key:
    """A fresh private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: Key) -> bytes:
    """PKCS 8, not encrypted: the file's mode is what protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_from_pem(pem: bytes, what: str) -> Key:
    """The key in `pem`. Raises WrongInput `bad-key` naming `what`."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise WrongInput("bad-key", f"{what} is not a private key.", "Create the identity anew.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise WrongInput("bad-key", f"{what} is not an elliptic-curve key.", "Create the identity anew.")
    return key


def certificate_from_pem(pem: bytes, what: str) -> x509.Certificate:
    """The first certificate in `pem`. Raises WrongInput `bad-certificate` naming `what`."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise WrongInput("bad-certificate", f"{what} is not a certificate.", "Create the identity anew.") from error


def certificate_to_pem(certificate: x509.Certificate) -> bytes:
    """PEM of a certificate."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def fingerprint(certificate: x509.Certificate) -> bytes:
    """SHA-256 over the whole certificate (DER), 32 bytes."""
    return certificate.fingerprint(hashes.SHA256())


def host_in(certificate_der: bytes) -> str:
    """The host that a certificate names; TLS has already checked who signed it and until when it is valid.

    Raises Refused `not-a-host` if it is a guest process's (stream) or anything else but a host's.
    """
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        name = require_name(str(names[0].value), "host")
    except (ValueError, IndexError, x509.ExtensionNotFound, WrongInput) as error:
        raise Refused(
            "not-a-host",
            "The certificate shown is not that of a host (a guest process may not use the API).",
            "Use the certificate host.pem which host init or host join made.",
        ) from error
    if name not in alternatives.value.get_values_for_type(x509.DNSName):
        raise Refused("not-a-host", f"The certificate shown names host {name} without standing for it.", "Join anew.")
    return name


def create_ca_certificate(key: Key, name: str, now: datetime) -> x509.Certificate:
    """A self-signed CA certificate, valid for ten years, that may sign no other CA."""
    subject = _subject(name)
    builder = _builder(subject, subject, key.public_key(), now, CA_VALIDITY)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(ca=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return builder.sign(key, hashes.SHA256())


def create_request(key: Key, host: str) -> str:
    """A signing request (PEM) which proves that the sender has the key. The name in it is for people only."""
    request = x509.CertificateSigningRequestBuilder().subject_name(_subject(host)).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def public_key_of(request_pem: str) -> ec.EllipticCurvePublicKey:
    """The P-256 key of a request whose signature is right. Raises WrongInput `bad-request`."""
    try:
        request = x509.load_pem_x509_csr(request_pem.encode())
        valid = request.is_signature_valid
        key = request.public_key()
    except (ValueError, TypeError, InvalidSignature) as error:
        raise WrongInput("bad-request", "The signing request cannot be read.", "Join anew.") from error
    if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise WrongInput("bad-request", "The signing request is not one of a P-256 key of its sender.", "Join anew.")
    return key


def sign_host(
    ca: x509.Certificate, ca_key: Key, request_pem: str, host: str, addresses: Sequence[str], now: datetime
) -> x509.Certificate:
    """The certificate of a host: its name and addresses, both sides of TLS."""
    names: list[x509.GeneralName] = [x509.DNSName(require_name(host, "host"))]
    names += [x509.IPAddress(_address(text)) for text in addresses]
    return _sign(ca, ca_key, public_key_of(request_pem), host, names, now)


def sign_stream(ca: x509.Certificate, ca_key: Key, request_pem: str, host: str, now: datetime) -> x509.Certificate:
    """The certificate of a host's guest processes.

    It holds no address: whoever has it can pass for no host, not even with a client that goes by address.
    """
    name = stream_name(require_name(host, "host"))
    return _sign(ca, ca_key, public_key_of(request_pem), name, [x509.DNSName(name)], now)


def _sign(
    ca: x509.Certificate,
    ca_key: Key,
    key: ec.EllipticCurvePublicKey,
    name: str,
    names: list[x509.GeneralName],
    now: datetime,
) -> x509.Certificate:
    validity = min(VALIDITY, ca.not_valid_after_utc - now)
    builder = _builder(_subject(name), ca.subject, key, now, validity)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    # Not critical: QEMU wants key encipherment of a critical usage, which an EC key must not have (RFC 8813).
    builder = builder.add_extension(_usage(ca=False), critical=False)
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    ca_id = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id)
    return builder.add_extension(authority, critical=False).sign(ca_key, hashes.SHA256())


def _subject(name: str) -> x509.Name:
    """In the order that `stream_identity` promises."""
    common_name = x509.NameAttribute(NameOID.COMMON_NAME, name)
    return x509.Name([common_name, x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANIZATION)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, validity: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(now + validity)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise WrongInput("bad-address", f"{text[:60]!r} is not an IP address.", "Write it like 192.0.2.1.") from error


def is_signed_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether `ca` signed `certificate`."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def utc_now() -> datetime:
    """Now, as certificates count time."""
    return datetime.now(UTC)
