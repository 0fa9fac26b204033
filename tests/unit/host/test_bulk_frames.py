"""What goes with a request as it is: one binary frame for both."""

from __future__ import annotations

import pytest

from vmferry.host.peering import _split, _with_data


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 1000])
def test_a_frame_holds_both(data: bytes) -> None:
    text = '{"n": 1, "call": "PutBootFile", "body": {"name": "ä"}}'
    assert _split(_with_data(text, data)) == (text.encode(), data)


@pytest.mark.parametrize("frame", [b"", b"\0", b"\0\0\0"])
def test_what_is_too_short_has_no_data(frame: bytes) -> None:
    assert _split(frame) == (frame, b"")


def test_a_length_beyond_the_end_takes_what_is_there() -> None:
    """The JSON is cut off then, and refused as such."""
    assert _split(b"\xff\xff\xff\xff{}") == (b"{}", b"")


def test_a_sample_has_no_request() -> None:
    assert _split(bytes(4) + b"sample") == (b"", b"sample")
