"""Join tokens: what was put in comes out, a slip in copying is noticed, each is good for once and for a while."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.api.tokens import create_token, parse_token, verify_token
from vmferry.model.errors import Refused, WrongInput

NOW = datetime(2026, 11, 23, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
PRINT = bytes(range(32))


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1", "host1.example"])
def test_text_and_back(address: str) -> None:
    text, stored = create_token(address, 7443, PRINT, LATER)
    token = parse_token(f"  {text[:20]}\n {text[20:]}\n")
    assert (token.address, token.port, token.fingerprint) == (address, 7443, PRINT)
    assert verify_token([stored], token.secret, "host2", NOW) is stored
    assert token.secret not in repr(stored)


@given(st.integers(0, 200), st.characters(codec="ascii", categories=("L", "N")))
def test_a_changed_character_is_noticed(position: int, character: str) -> None:
    text, _ = create_token("192.0.2.1", 7443, PRINT, LATER)
    position %= len(text)
    changed = text[:position] + character + text[position + 1 :]
    try:
        parsed = parse_token(changed)
    except WrongInput as error:
        assert error.code == "bad-token"
    else:
        assert parsed == parse_token(text)


@pytest.mark.parametrize("text", ["", "vmferry1-", "vmferry1-AAAA", "x" * 5000, "vmferry1-äöü", "vmferry1-====="])
def test_rubbish_is_no_token(text: str) -> None:
    with pytest.raises(WrongInput):
        parse_token(text)


def test_refusals() -> None:
    text, stored = create_token("192.0.2.1", 7443, PRINT, LATER, host="host2")
    secret = parse_token(text).secret
    for tokens, host, now, code in (
        ([], "host2", NOW, "token-unknown"),
        ([create_token("a", 1, PRINT, LATER)[1]], "host2", NOW, "token-unknown"),
        ([stored], "host2", LATER, "token-expired"),
        ([stored], "host3", NOW, "token-other-host"),
    ):
        with pytest.raises(Refused) as caught:
            verify_token(tokens, secret, host, now)
        assert caught.value.code == code
