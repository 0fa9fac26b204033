"""Names, addresses of cards, options: what is let in, and what errors carry."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.model import errors
from vmferry.model.errors import VmferryError, WrongInput
from vmferry.model.findings import Finding, Severity, blocking
from vmferry.model.migration import MigrateOptions, PostCopy, Verify
from vmferry.model.names import require_mac, require_name, stream_identity, stream_name


@pytest.mark.parametrize("name", ["a", "0", "web1", "a-b", "a" * 63, "0-0"])
def test_a_name(name: str) -> None:
    assert require_name(name, "VM") == name


HOSTILE = ["", "-a", "a-", "A", "a_b", "a.b", "a/b", "..", "a b", "a\n", "\na", "a\0", "é", "a" * 64, "x" * 10_000, "١"]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(WrongInput) as caught:
        require_name(name, "VM")
    assert caught.value.code == "bad-name"
    assert len(caught.value.message) < 200 and caught.value.message.isprintable()


@given(st.text(max_size=70))
def test_a_name_is_always_safe_as_a_file_and_a_label(name: str) -> None:
    try:
        require_name(name, "VM")
    except WrongInput:
        return
    assert re.fullmatch(r"[a-z0-9-]{1,63}", name) and name[0] != "-" != name[-1]


@pytest.mark.parametrize("mac", ["52:54:00:12:34:56", "52:54:00:AB:CD:EF", "02:00:00:00:00:00"])
def test_a_mac(mac: str) -> None:
    assert require_mac(mac) == mac.lower()


@pytest.mark.parametrize(
    "mac",
    ["", "52:54:00:12:34", "52-54-00-12-34-56", "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "00:00:00:00:00:00",
     "52:54:00:12:34:56\n", "52:54:00:12:34:5g", "x" * 10_000, "525400123456"],
)  # fmt: skip
def test_what_is_no_mac(mac: str) -> None:
    with pytest.raises(WrongInput) as caught:
        require_mac(mac)
    assert caught.value.code == "bad-mac"
    assert len(caught.value.message) < 200 and caught.value.message.isprintable()


def test_no_host_can_be_taken_for_a_stream() -> None:
    with pytest.raises(WrongInput):
        require_name(stream_name("host1"), "host")
    assert stream_identity("host1") == "CN=stream.host1,O=vmferry"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"max_blackout_ms": 0}, "bad-max-blackout"),
        ({"max_blackout_ms": 60_001}, "bad-max-blackout"),
        ({"deadline_ms": -1}, "bad-limit"),
        ({"bandwidth_bps": -1}, "bad-limit"),
        ({"bandwidth_bps": 999_999}, "bad-limit"),
        ({"max_slowdown_percent": -1}, "bad-max-slowdown"),
        ({"max_slowdown_percent": 100}, "bad-max-slowdown"),
        ({"verify": Verify.ALL, "post_copy": PostCopy.ALLOW}, "no-proof-of-post-copy"),
    ],
)
def test_options_out_of_range(changes: dict[str, int], code: str) -> None:
    with pytest.raises(WrongInput) as caught:
        MigrateOptions(**changes)  # type: ignore[arg-type]
    assert caught.value.code == code and caught.value.fix


def test_options_at_the_edge() -> None:
    MigrateOptions(max_blackout_ms=1, bandwidth_bps=1_000_000, max_slowdown_percent=0)
    MigrateOptions(max_blackout_ms=60_000, max_slowdown_percent=99)


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VmferryError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_carries_code_message_and_fix(kind: type[VmferryError]) -> None:
    error = kind("some-code", "It happened.", "Do this.")
    assert (error.code, error.message, error.fix, str(error)) == (
        "some-code", "It happened.", "Do this.", "It happened. Do this.",
    )  # fmt: skip
    assert str(kind("c", "It happened.")) == "It happened."
    assert error.exit_status in (1, 2, 3, 4) and 400 <= error.http_status < 600


def test_only_errors_stop() -> None:
    findings = tuple(Finding(severity, severity, "") for severity in Severity)
    assert [finding.code for finding in blocking(findings)] == ["error"]
