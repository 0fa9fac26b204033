"""Digests without a disk: packed and unpacked, compared, updated in part; and rubbish that is refused."""

from __future__ import annotations

import base64
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.model.errors import Failed, WrongInput
from vmferry.storage.digest import (
    DiskDigests,
    chunk_bytes_for,
    compare,
    pack,
    pack_part,
    unpack,
    with_part,
)
from vmferry.storage.nbd import Extent

CHUNK = 4096
COUNT = 20
SIZE = CHUNK * COUNT - 700  # ends within a chunk


@st.composite
def some_digests(draw: st.DrawFn) -> DiskDigests:
    values = draw(st.lists(st.sampled_from([bytes(16), b"a" * 16, b"b" * 16]), min_size=COUNT, max_size=COUNT))
    return DiskDigests(SIZE, CHUNK, b"".join(values))


extents = st.lists(st.builds(Extent, st.integers(0, SIZE + CHUNK), st.integers(0, SIZE), st.just(1)), max_size=5)


@given(some_digests())
def test_packed_and_back(digests: DiskDigests) -> None:
    assert unpack(pack(digests)) == digests


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
    digests = DiskDigests(SIZE, CHUNK, bytes(16 * COUNT))
    sent = pack_part(digests, [Extent(0, 1, 1)])
    for touched, text in (([], sent), ([Extent(0, CHUNK + 1, 1)], sent), ([Extent(0, 1, 1)], "not base64")):
        with pytest.raises(WrongInput):
            with_part(digests, touched, text)


def test_sizes_must_be_equal() -> None:
    one = DiskDigests(SIZE, CHUNK, bytes(16 * COUNT))
    with pytest.raises(Failed) as caught:
        compare(one, DiskDigests(SIZE + 1, CHUNK, bytes(16 * COUNT)))
    assert caught.value.code == "size-differs"


def test_zeros_pack_small() -> None:
    assert len(pack(DiskDigests(1 << 36, 65536, bytes(16 << 20)))) < 128 << 10


def bomb() -> str:
    return base64.b64encode(zlib.compress(bytes(300 << 20), 9)).decode()


@pytest.mark.parametrize(
    "text", ["", "äöü", "AAAA", "eJwDAAAAAAE=", base64.b64encode(zlib.compress(b"VFD1" * 9)).decode()]
)
def test_rubbish_is_refused(text: str) -> None:
    with pytest.raises(WrongInput):
        unpack(text)


def test_a_small_text_cannot_become_a_huge_one() -> None:
    with pytest.raises(WrongInput):
        unpack(bomb())


@pytest.mark.parametrize(
    ("size", "chunk"), [(1, 65536), (1 << 36, 65536), ((1 << 36) + 1, 131072), (1 << 60, 16 << 20)]
)
def test_chunk_sizes(size: int, chunk: int) -> None:
    assert chunk_bytes_for(size) == chunk
