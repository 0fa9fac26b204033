"""The NBD client and the digests against QEMU's own servers."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from nbd_servers import qemu_io, qemu_nbd, storage_daemon

from vmferry.model.errors import Failed, NotFound, Unreachable, VmferryError
from vmferry.storage.digest import (
    DiskDigests,
    blank_digests,
    compare,
    pack_part,
    put_part,
    redigest,
)
from vmferry.storage.nbd import (
    ALLOCATION,
    Extent,
    NbdAddress,
    NbdClient,
    bitmap_context,
    dirty_extents,
    zero_extents,
)

MIB = 1 << 20
SIZE = 64 * MIB
ODD = SIZE + 3 * 512  # a disk that ends within a chunk


def make_raw(path: Path, pieces: dict[int, bytes], size: int = SIZE) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in pieces.items():
            file.seek(offset)
            file.write(data)
    return path


@pytest.fixture
def pieces() -> dict[int, bytes]:
    maker = random.Random(7)
    return {
        0: maker.randbytes(100_000),
        5 * MIB: maker.randbytes(3 * MIB),
        20 * MIB: bytes(2 * MIB),
        40 * MIB + 512: maker.randbytes(4096),
        ODD - 512: maker.randbytes(512),
    }


@pytest.fixture
def image(tmp_path: Path, pieces: dict[int, bytes]) -> Path:
    return make_raw(tmp_path / "a.raw", pieces, ODD)


def connect(sock: Path, *contexts: str, export: str = "disk") -> NbdClient:
    return NbdClient.connect(NbdAddress(sock, export, contexts or (ALLOCATION,)))


def digest_all(client: NbdClient) -> DiskDigests:
    """All of a disk, as the proof of a migration begins: nothing is known, and every byte is to be read."""
    return redigested(client, blank_digests(client.size_bytes), [Extent(0, client.size_bytes, 1)])


def redigested(client: NbdClient, digests: DiskDigests, extents: Iterable[Extent]) -> DiskDigests:
    found = replace(digests, chunks=bytearray(digests.chunks))
    redigest(client, found, extents)
    return found


def with_part(digests: DiskDigests, extents: Iterable[Extent], text: str) -> DiskDigests:
    found = replace(digests, chunks=bytearray(digests.chunks))
    put_part(found, extents, text)
    return found


def at_each_piece(patch: pytest.MonkeyPatch, client: NbdClient, act: Callable[[int], object]) -> None:
    """`act` is told the length of each piece that was read, before the next one is asked for."""
    stream = client.stream

    def told(*arguments: Any) -> Iterator[tuple[int, memoryview]]:
        for offset, view in stream(*arguments):
            yield offset, view
            act(len(view))

    patch.setattr(client, "stream", told)


def test_reads_what_is_there(image: Path) -> None:
    content = image.read_bytes()
    with qemu_nbd(image, "raw") as sock, connect(sock) as client:
        assert client.size_bytes == ODD and client.read_only
        for offset, length in ((0, 1), (99_999, 5), (5 * MIB - 1, 3 * MIB + 2), (ODD - 700, 700), (0, ODD)):
            got = bytearray(length)
            for at, view in client.stream([(offset, length)]):
                got[at - offset : at - offset + len(view)] = view
            assert got == content[offset : offset + length]
        assert client.read(40 * MIB, 8192) == content[40 * MIB : 40 * MIB + 8192]


def test_fragmented_answers_are_put_together(image: Path) -> None:
    """Without "don't fragment" QEMU answers a read over holes in pieces of data and of nothing."""
    content = image.read_bytes()
    with qemu_nbd(image, "raw") as sock, connect(sock) as client:
        client._request_flags = 0
        got = bytearray(b"x" * ODD)
        for at, view in client.stream([(0, ODD)], 8 * MIB):
            got[at : at + len(view)] = view
        assert got == content


def test_zeros_are_known(image: Path) -> None:
    with qemu_nbd(image, "raw") as sock, connect(sock) as client:
        extents = list(zero_extents(client))
        assert extents[0].offset == 0 and sum(extent.length for extent in extents) == ODD
        assert all(a.offset + a.length == b.offset for a, b in pairwise(extents))
        read = sum(extent.length for extent in extents if not extent.flags)
        assert read < 8 * MIB
        part = list(zero_extents(client, 6 * MIB, MIB))
        assert part == [Extent(6 * MIB, MIB, 0)]


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_equal_content_has_equal_digests_whatever_the_file(
    image: Path, tmp_path: Path, pieces: dict[int, bytes], image_format: str
) -> None:
    other = tmp_path / f"b.{image_format}"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", image_format, "-S", "0", image, other], check=True)
    with ExitStack() as stack:
        one = stack.enter_context(connect(stack.enter_context(qemu_nbd(image, "raw"))))
        two = stack.enter_context(connect(stack.enter_context(qemu_nbd(other, image_format))))
        first, second = digest_all(one), digest_all(two)
        assert compare(first, second) == ()
        assert first == second and first.whole == second.whole
        everything = [Extent(0, ODD, 1)]
        assert with_part(blank_digests(ODD), everything, pack_part(first, everything)) == first
        zero = first.chunks[: 16 * 2][16:]
        assert first.chunks.count(bytes(16)) > 0 and zero != bytes(16)


def test_one_changed_bit_is_found(tmp_path: Path, pieces: dict[int, bytes]) -> None:
    first = make_raw(tmp_path / "a.raw", pieces, ODD)
    pieces[30 * MIB + 4096] = b"\x01"
    pieces[ODD - 1] = b"\x55"
    second = make_raw(tmp_path / "b.raw", pieces, ODD)
    with ExitStack() as stack:
        one = stack.enter_context(connect(stack.enter_context(qemu_nbd(first, "raw"))))
        two = stack.enter_context(connect(stack.enter_context(qemu_nbd(second, "raw"))))
        a, b = digest_all(one), digest_all(two)
        assert compare(a, b) == (30 * MIB, SIZE)
        assert compare(a, b, limit=1) == (30 * MIB,)
        assert a.whole != b.whole
        again = redigested(two, a, [Extent(ODD - 1, 1, 1), Extent(30 * MIB + 4096, 1, 1)])
        assert again == b


def test_written_chunks_alone_are_read_again(image: Path, tmp_path: Path) -> None:
    """As in a migration: a bitmap while the guest writes, frozen at the stop, then only its chunks are read again."""
    with storage_daemon(image, "raw") as (qmp, sock):
        qmp.call("block-dirty-bitmap-add", node="d0", name="written")
        qmp.call("block-export-add", type="nbd", id="r", **{"node-name": "d0"}, name="disk", writable=False)
        qmp.call("block-export-add", type="nbd", id="w", **{"node-name": "d0"}, name="guest", writable=True)
        with connect(sock) as client:
            before = digest_all(client)
        qemu_io(
            f"nbd+unix:///guest?socket={sock}",
            "write -P 0x11 10M 4k",
            "write -P 0x12 63M 1M",
            "discard 5M 2M",
            "write -z 0 64k",
        )
        qmp.call("block-dirty-bitmap-disable", node="d0", name="written")
        qmp.call(
            "block-export-add",
            type="nbd",
            id="b",
            **{"node-name": "d0"},
            name="bitmap",
            writable=False,
            bitmaps=["written"],
        )
        with connect(sock, ALLOCATION, bitmap_context("written"), export="bitmap") as client:
            dirty = dirty_extents(client, "written")
            assert sum(extent.length for extent in dirty) < 4 * MIB
            after = redigested(client, before, dirty)
            assert after == digest_all(client)
            assert after != before
        sent = pack_part(after, dirty)
        assert with_part(before, dirty, sent) == after
        assert with_part(before, reversed(dirty), sent) == after


def test_a_bitmap_that_still_records_can_be_watched(image: Path) -> None:
    """QEMU refuses an enabled bitmap of a writable node by name only, but takes it as {node, name}.

    So export and connection can be there before the guest stops, and the stop costs one request.
    """
    with storage_daemon(image, "raw") as (qmp, sock):
        node = {"node-name": "d0"}
        qmp.call("block-export-add", type="nbd", id="w", **node, name="guest", writable=True)
        qmp.call("block-dirty-bitmap-add", node="d0", name="live")
        with pytest.raises(RuntimeError, match="incompatible with readonly export"):
            qmp.call("block-export-add", type="nbd", id="r", **node, name="disk", writable=False, bitmaps=["live"])
        bitmaps = [{"node": "d0", "name": "live"}]
        qmp.call("block-export-add", type="nbd", id="r", **node, name="disk", writable=False, bitmaps=bitmaps)
        with connect(sock, ALLOCATION, bitmap_context("live")) as client:
            before = digest_all(client)
            assert dirty_extents(client, "live") == ()
            qemu_io(f"nbd+unix:///guest?socket={sock}", "write -P 7 10M 64k")
            assert dirty_extents(client, "live") == (Extent(10 * MIB, 65536, 1),)
            assert redigested(client, before, dirty_extents(client, "live")) == digest_all(client)


def test_large_dirty_areas_of_zeros_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_raw(tmp_path / "z.raw", {}, 256 * MIB)
    read: list[int] = []
    with qemu_nbd(image, "raw") as sock, connect(sock) as client:
        at_each_piece(monkeypatch, client, read.append)
        digests = digest_all(client)
        again = redigested(client, digests, [Extent(0, 256 * MIB, 1)])
    assert again == digests and read == []


def test_dirty_bitmap_kept_in_qcow2(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", path, "b0"], check=True)
    qemu_io(str(path), "write -P 1 3M 64k", "write -P 1 60M 1k", image_format="qcow2")
    with (
        qemu_nbd(path, "qcow2", "-B", "b0") as sock,
        connect(sock, bitmap_context("b0"), bitmap_context("none")) as client,
    ):
        assert client.contexts == {bitmap_context("b0")}
        assert [(e.offset, e.length) for e in dirty_extents(client, "b0")] == [(3 * MIB, 65536), (60 * MIB, 65536)]
        with pytest.raises(Failed) as caught:
            list(zero_extents(client))
        assert caught.value.code == "nbd-no-context"


def test_no_server_no_export(image: Path, tmp_path: Path) -> None:
    with pytest.raises(Unreachable):
        connect(tmp_path / "none.sock")
    with qemu_nbd(image, "raw") as sock, pytest.raises(NotFound) as caught:
        connect(sock, export="other")
    assert caught.value.code == "nbd-no-export"


def test_abort_ends_it_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(MIB)
    image = make_raw(tmp_path / "a.raw", {n * MIB: data for n in range(64)})
    with qemu_nbd(image, "raw") as sock, connect(sock) as client:
        at_each_piece(monkeypatch, client, lambda _: client.abort())
        with pytest.raises(Failed) as caught:
            digest_all(client)
        assert caught.value.code == "nbd-lost"


def test_a_server_that_dies_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(MIB)
    image = make_raw(tmp_path / "a.raw", {n * MIB: data for n in range(64)})
    with ExitStack() as stack:
        sock = stack.enter_context(qemu_nbd(image, "raw"))
        client = stack.enter_context(connect(sock))
        at_each_piece(monkeypatch, client, lambda _: stack.close())
        with pytest.raises(Failed) as caught:
            digest_all(client)
        assert caught.value.code == "nbd-lost"


@pytest.fixture
def silent_server(tmp_path: Path) -> Iterator[tuple[Path, list[bytes]]]:
    """A server that sends what the test puts into the list, then nothing."""
    path, script = tmp_path / "silent.sock", list[bytes]()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    opened: list[socket.socket] = []

    def serve() -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        opened.append(connection)
        connection.sendall(b"".join(script))

    thread = threading.Thread(target=serve)
    thread.start()
    yield path, script
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)
    for connection in opened:
        connection.close()


def test_a_silent_server_is_given_up(silent_server: tuple[Path, list[bytes]]) -> None:
    started = time.monotonic()
    with pytest.raises(Failed) as caught:
        NbdClient.connect(NbdAddress(silent_server[0], "disk", timeout_s=0.2))
    assert caught.value.code == "nbd-lost" and time.monotonic() - started < 20


@pytest.mark.parametrize("hello", [b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(18), b"NBDMAGICIHAVEOPT\0\1" + bytes(20)])
def test_what_is_no_nbd_server_is_refused(silent_server: tuple[Path, list[bytes]], hello: bytes) -> None:
    silent_server[1].append(hello)
    with pytest.raises(VmferryError) as caught:
        NbdClient.connect(NbdAddress(silent_server[0], "disk", timeout_s=5))
    assert caught.value.code in ("nbd-refused", "nbd-broken")


def test_a_read_error_is_told(tmp_path: Path) -> None:
    """QEMU's blkdebug driver lets every read of a sector fail."""
    image = make_raw(tmp_path / "a.raw", {0: b"x" * MIB})
    options = f"json:{{'driver':'raw','file':{{'driver':'blkdebug','image':{{'driver':'file','filename':'{image}'}},"
    options += "'inject-error':[{'event':'read_aio','errno':5,'sector':64}]}}"
    sock = tmp_path / "e.sock"
    process = subprocess.Popen(["qemu-nbd", "-r", "-k", str(sock), "-x", "disk", "-t", options.replace("'", '"')])
    try:
        from nbd_servers import wait_for

        wait_for(sock, process)
        with connect(sock) as client, pytest.raises(Failed) as caught:
            client.read(0, MIB)
        assert caught.value.code == "nbd-read-error"
    finally:
        process.kill()
        process.wait(30)
