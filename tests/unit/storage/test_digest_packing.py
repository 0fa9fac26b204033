"""Digests without a disk: sent in parts, compared, put together; and rubbish that is refused."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.model.errors import Failed, WrongInput
from vmferry.storage.digest import (
    DiskDigests,
    blank_digests,
    chunk_bytes_for,
    compare,
    pack_part,
    put_part,
)
from vmferry.storage.nbd import Extent

CHUNK = 4096
COUNT = 20
SIZE = CHUNK * COUNT - 700  # ends within a chunk


@st.composite
def some_digests(draw: st.DrawFn) -> DiskDigests:
    values = draw(st.lists(st.sampled_from([bytes(16), b"a" * 16, b"b" * 16]), min_size=COUNT, max_size=COUNT))
    return DiskDigests(SIZE, CHUNK, bytearray(b"".join(values)))


extents = st.lists(st.builds(Extent, st.integers(0, SIZE + CHUNK), st.integers(0, SIZE), st.just(1)), max_size=5)


def blank() -> DiskDigests:
    return DiskDigests(SIZE, CHUNK, bytearray(16 * COUNT))


def with_part(digests: DiskDigests, touched: list[Extent], text: str) -> DiskDigests:
    merged = replace(digests, chunks=bytearray(digests.chunks))
    put_part(merged, touched, text)
    return merged


EVERYTHING = [Extent(0, SIZE, 1)]


@given(some_digests())
def test_sent_and_back(digests: DiskDigests) -> None:
    assert with_part(blank(), EVERYTHING, pack_part(digests, EVERYTHING)) == digests


@given(some_digests(), st.integers(1, COUNT))
def test_sent_piece_by_piece(digests: DiskDigests, count: int) -> None:
    """As the proof of a disk does it: from blank digests, one extent after another."""
    found, length = blank(), count * CHUNK
    for offset in range(0, SIZE, length):
        piece = [Extent(offset, length, 1)]
        found = with_part(found, piece, pack_part(digests, piece))
    assert found == digests


@given(some_digests(), some_digests())
def test_compare_finds_the_first_chunks_that_differ(one: DiskDigests, other: DiskDigests) -> None:
    differing = [n for n in range(COUNT) if one.chunks[16 * n : 16 * n + 16] != other.chunks[16 * n : 16 * n + 16]]
    assert compare(one, other, limit=COUNT) == tuple(n * CHUNK for n in differing)
    assert compare(one, other, limit=3) == tuple(n * CHUNK for n in differing[:3])
    assert (one.whole == other.whole) == (not differing)


@given(some_digests(), some_digests(), extents)
def test_a_part_is_put_in_where_it_belongs(one: DiskDigests, other: DiskDigests, touched: list[Extent]) -> None:
    merged = with_part(one, touched, pack_part(other, touched))
    for n in range(COUNT):
        begin, end = n * CHUNK, min(SIZE, (n + 1) * CHUNK)
        hit = any(e.length and e.offset < end and e.offset + e.length > begin and e.offset < SIZE for e in touched)
        expected = other if hit else one
        assert merged.chunks[16 * n : 16 * n + 16] == expected.chunks[16 * n : 16 * n + 16]


def test_a_part_of_other_chunks_is_refused() -> None:
    digests = DiskDigests(SIZE, CHUNK, bytearray(16 * COUNT))
    sent = pack_part(digests, [Extent(0, 1, 1)])
    for touched, text in (([], sent), ([Extent(0, CHUNK + 1, 1)], sent), ([Extent(0, 1, 1)], "not base64")):
        with pytest.raises(WrongInput):
            put_part(digests, touched, text)
        assert digests == blank()


def test_sizes_must_be_equal() -> None:
    one = DiskDigests(SIZE, CHUNK, bytearray(16 * COUNT))
    with pytest.raises(Failed) as caught:
        compare(one, DiskDigests(SIZE + 1, CHUNK, bytearray(16 * COUNT)))
    assert caught.value.code == "size-differs"


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "text", ["", "äöü", "AAAA", encoded(bytes(15)), encoded(bytes(17)), encoded(bytes(32)), encoded(bytes(1 << 20))]
)
def test_rubbish_is_refused(text: str) -> None:
    """One chunk was asked for: whatever else comes from the other host is its error and nothing worse."""
    with pytest.raises(WrongInput) as caught:
        with_part(blank(), [Extent(0, 1, 1)], text)
    assert caught.value.code == "bad-digests"


@pytest.mark.parametrize("size", [1, 65536, 65537, (1 << 36) + 512])
def test_blank_digests_are_those_of_zeros(size: int) -> None:
    digests = blank_digests(size)
    assert (digests.size_bytes, digests.chunk_bytes) == (size, chunk_bytes_for(size))
    assert digests.chunks == bytes(16 * -(-size // digests.chunk_bytes))


@pytest.mark.parametrize(("size", "chunk"), [(1, 16384), (1 << 34, 16384), ((1 << 34) + 1, 32768), (1 << 60, 16 << 20)])
def test_chunk_sizes(size: int, chunk: int) -> None:
    assert chunk_bytes_for(size) == chunk
