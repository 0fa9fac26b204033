"""Receipts: signed by a host, checked wherever the CA is known; whatever is changed is found."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from vmferry.api import certificates as certs
from vmferry.api import pki
from vmferry.api.codec import decode, encode
from vmferry.api.signing import canonical, check_document, sign_document
from vmferry.model.errors import VmferryError
from vmferry.model.migration import MigrateOptions, Mode, Outcome, Phase, PhaseTime, Range
from vmferry.model.receipt import (
    Bytes,
    DiskDigests,
    Frames,
    MemoryDigests,
    NetworkProof,
    PredictedTimes,
    Receipt,
    Step,
    Verified,
)

RECEIPT = Receipt(
    id="m-1",
    vm="web1",
    kind=Mode.LIVE,
    source="host1",
    target="host2",
    outcome=Outcome.COMPLETED,
    started_at="2026-01-01T00:00:00.000+00:00",
    phases=(PhaseTime(Phase.COPY, "2026-01-01T00:00:00.000+00:00", "2026-01-01T00:00:02.000+00:00"),),
    total_ms=2345.6,
    blackout_ms=12.0,
    predicted=PredictedTimes(Range(1.0, 2.5), Range(3, 4)),
    rounds=4,
    bytes=Bytes(1 << 40, 2, 3),
    frames=Frames(1, 2, 0),
    verified=Verified(MemoryDigests("ab", "ab", True), (DiskDigests("root", "top", "cd", "cd", True),)),
    network=NetworkProof(True, None),
    options=MigrateOptions(storage={"": "fast", "root": "local"}),
    versions={"vmferry": "0.1.0", "qemu": "10.0.2"},
    generation=2,
    switchover=(Step("guest stopped", 0.0), Step("target runs – “ü”", 12.0)),
)


@pytest.fixture(scope="module")
def host1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("host1")
    pki.create_ca(directory, "test CA")
    pki.issue_host(directory, "host1", ["127.0.0.1"])
    return directory


@pytest.fixture(scope="module")
def host2(tmp_path_factory: pytest.TempPathFactory, host1: Path) -> Path:
    directory = tmp_path_factory.mktemp("host2")
    requests = pki.make_csr(directory, "host2")
    pki.install_certificates(directory, pki.sign_csr(host1, requests, ["127.0.0.2"]))
    return directory


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host of the same name, of another CA of the same name."""
    directory = tmp_path_factory.mktemp("stranger")
    pki.create_ca(directory, "test CA")
    pki.issue_host(directory, "host1", ["127.0.0.1"])
    return directory


@pytest.fixture(scope="module")
def signed(host1: Path) -> Any:
    document = encode(RECEIPT)
    document["signature"] = sign_document(host1, document)
    return document


def test_a_receipt_is_its_source_s_on_every_host_of_the_ca(signed: Any, host1: Path, host2: Path) -> None:
    for directory in (host1, host2):
        assert check_document(directory, signed, "host1") == ""


def test_it_stays_valid_on_its_way_through_wire_model_and_order_of_keys(signed: Any, host2: Path) -> None:
    wired = json.loads(json.dumps(signed, indent=2))
    assert check_document(host2, wired, "host1") == ""
    assert check_document(host2, encode(decode(Receipt, wired)), "host1") == ""
    assert check_document(host2, dict(reversed(list(signed.items()))), "host1") == ""
    assert decode(Receipt, wired) == replace(RECEIPT, signature=signed["signature"])


def changed_everywhere(value: Any) -> list[Any]:
    """The document with one leaf changed, or one key removed or added, for each of them."""
    if isinstance(value, dict):
        found = [{**value, key: other} for key, inner in value.items() for other in changed_everywhere(inner)]
        found += [{other: value[other] for other in value if other != key} for key in value]
        return [*found, {**value, "extra": 1}]
    if isinstance(value, list):
        found = [
            [*value[:i], other, *value[i + 1 :]] for i, inner in enumerate(value) for other in changed_everywhere(inner)
        ]
        return [*found, [*value, value[-1] if value else 0]]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, str(value)]
    return [f"{value}x"] if isinstance(value, str) else [0]


def test_each_change_is_found(signed: Any, host2: Path) -> None:
    unsigned = {key: value for key, value in signed.items() if key != "signature"}
    variants = changed_everywhere(unsigned)
    assert len(variants) > 120
    for variant in variants:
        variant["signature"] = signed["signature"]
        assert check_document(host2, variant, "host1") == "the contents were changed after it was signed", variant


def test_another_host_s_signature_is_not_the_source_s(host1: Path, host2: Path) -> None:
    document = encode(RECEIPT)
    document["signature"] = sign_document(host2, document)
    assert check_document(host1, document, "host1") == "it was signed by host2, not by host1"
    assert check_document(host1, document, "host2") == ""


def test_another_ca_s_host_of_the_same_name(host2: Path, stranger: Path) -> None:
    document = encode(RECEIPT)
    document["signature"] = sign_document(stranger, document)
    assert check_document(stranger, document, "host1") == ""
    assert check_document(host2, document, "host1") == "the signer's certificate is not of this CA"


def test_a_borrowed_certificate_does_not_help(signed: Any, host1: Path, stranger: Path) -> None:
    """The stranger's signature beside the certificate of the real host."""
    document = encode(RECEIPT)
    theirs = sign_document(stranger, document).split(".")[0]
    document["signature"] = f"{theirs}.{signed['signature'].split('.')[1]}"
    assert check_document(host1, document, "host1") == "the contents were changed after it was signed"


def test_a_guest_process_s_certificate_signs_nothing(signed: Any, host1: Path) -> None:
    key = certs.create_key()
    ca = certs.certificate_from_pem((host1 / "ca.pem").read_bytes(), "ca")
    ca_key = certs.key_from_pem((host1 / "ca" / "ca.key").read_bytes(), "ca key")
    now = certs.utc_now() - timedelta(days=1)
    stream = certs.sign_stream(ca, ca_key, certs.create_request(key, "host1"), "host1", now)
    der = base64.b64encode(certs_der(stream)).decode()
    document = {**encode(RECEIPT), "signature": f"{signed['signature'].split('.')[0]}.{der}"}
    assert check_document(host1, document, "host1").startswith("the signature cannot be read")


def certs_der(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    found: bytes = certificate.public_bytes(Encoding.DER)
    return found


@pytest.mark.parametrize("signature", [None, 5, "", ".", "a.b", "a.b.c", "é.é", "AAAA.AAAA", "AAAA", "x" * 10_000])
def test_rubbish_is_no_signature(signed: Any, host1: Path, signature: object) -> None:
    assert check_document(host1, {**signed, "signature": signature}, "host1").startswith("the signature cannot be read")


def test_a_document_without_signature(signed: Any, host1: Path) -> None:
    unsigned = {key: value for key, value in signed.items() if key != "signature"}
    assert check_document(host1, unsigned, "host1").startswith("the signature cannot be read")
    assert canonical(unsigned) == canonical(signed)


def test_without_an_identity_nothing_is_signed(tmp_path: Path) -> None:
    with pytest.raises(VmferryError):
        sign_document(tmp_path, encode(RECEIPT))
