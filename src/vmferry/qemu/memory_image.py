"""The digest of a guest's RAM, read through the memfd that backs it, while the guest is stopped.

Only reads, and never makes the memfd larger: a page that was never touched stays a hole, and counts as zeros. The
digest of a chunk is xxh3_128 (a check against mistakes, not an attacker); that of the memory folds those of the chunks.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import xxhash

CHUNK_BYTES = 1 << 20
_DIGEST_BYTES = 16
_BATCH_BYTES = 16 * CHUNK_BYTES
_MADV_POPULATE_READ = 22  # madvise(2), Linux 5.14


@dataclass(frozen=True, slots=True)
class MemoryDigest:
    """`hex` is the digest of `size_bytes` of memory; `chunks` are those of each MiB, 16 bytes each."""

    hex: str
    size_bytes: int
    chunks: bytes = field(repr=False, default=b"")


def compare_digests(one: MemoryDigest, other: MemoryDigest) -> int | None:
    """The offset in bytes of the first MiB that differs; None if the memories are equal. Pure."""
    if one.hex == other.hex and one.size_bytes == other.size_bytes:
        return None
    for index in range(0, min(len(one.chunks), len(other.chunks)), _DIGEST_BYTES):
        if one.chunks[index : index + _DIGEST_BYTES] != other.chunks[index : index + _DIGEST_BYTES]:
            return index // _DIGEST_BYTES * CHUNK_BYTES
    return min(one.size_bytes, other.size_bytes)


class MemoryReader:
    """A guest's memory, mapped ahead of the blackout.

    Page faults cost more than hashing (512 MiB, one thread: 285 ms through a new mapping, 90 ms through one with its
    page tables filled, 140 ms with read(2)). So call `prepare` before the guest stops, on the target as late as it
    suits: what was there then is read through the mapping, the rest with read(2).
    """

    def __init__(self, fd: int, size_bytes: int, threads: int | None = None) -> None:
        self._fd = os.dup(fd)
        self._size = size_bytes
        self._map = mmap.mmap(self._fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        self._view = memoryview(self._map)
        workers = threads or min(8, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="memory-digest")
        self._mapped: set[int] = set()  # chunks whose page tables are filled
        self._zero = xxhash.xxh3_128_digest(bytes(CHUNK_BYTES))

    async def prepare(self) -> None:
        """Fills the page tables for what is there now. Makes no pages; may be called again; the guest may run."""
        await asyncio.to_thread(self._populate)

    def _populate(self) -> None:
        if len(self._mapped) == self._size // CHUNK_BYTES:
            return
        for start, end in _data_extents(self._fd, self._size):
            for chunk in range(-(-start // CHUNK_BYTES), end // CHUNK_BYTES):
                if chunk in self._mapped:
                    continue
                try:  # in small steps: Python holds its lock meanwhile
                    self._map.madvise(_MADV_POPULATE_READ, chunk * CHUNK_BYTES, CHUNK_BYTES)
                except OSError:  # an older kernel: read(2) will do
                    return
                self._mapped.add(chunk)

    def close(self) -> None:
        """Unmaps. The guest's memory is untouched."""
        self._pool.shutdown()
        self._view.release()
        self._map.close()
        os.close(self._fd)

    async def digest(self) -> MemoryDigest:
        """The digest of the memory as it is now. Only means something while the guest is stopped."""
        loop = asyncio.get_running_loop()
        starts = range(0, self._size, _BATCH_BYTES)
        parts = await asyncio.gather(*(loop.run_in_executor(self._pool, self._digest_batch, start) for start in starts))
        chunks = b"".join(parts)
        return MemoryDigest(xxhash.xxh3_128_hexdigest(chunks), self._size, chunks)

    def _digest_batch(self, start: int) -> bytes:
        digests = []
        data_at = -1  # where the next data is known to begin
        for at in range(start, min(start + _BATCH_BYTES, self._size), CHUNK_BYTES):
            end = min(at + CHUNK_BYTES, self._size)
            if at // CHUNK_BYTES in self._mapped:
                digests.append(xxhash.xxh3_128_digest(self._view[at:end]))
                continue
            if data_at < at:
                data_at = _next_data(self._fd, at, self._size)
            digests.append(self._digest_unmapped(at, end, data_at))
        return b"".join(digests)

    def _digest_unmapped(self, start: int, end: int, data_at: int) -> bytes:
        if data_at >= end:
            return self._zero if end - start == CHUNK_BYTES else xxhash.xxh3_128_digest(bytes(end - start))
        # read(2) gives zeros for a hole, where touching the map would make pages.
        return xxhash.xxh3_128_digest(os.pread(self._fd, end - start, start))


async def digest_memory(fd: int, size_bytes: int, threads: int | None = None) -> MemoryDigest:
    """The digest of a memory file, in threads. For the blackout prepare a MemoryReader instead."""
    reader = MemoryReader(fd, size_bytes, threads)
    try:
        return await reader.digest()
    finally:
        await asyncio.to_thread(reader.close)


def touch_holes(fd: int, size_bytes: int, stop: threading.Event) -> None:
    """Makes the pages of memory that was never used, of zeros, until done or told to stop. The guest may run.

    For a QEMU that is about to read all of it: it would make them, too, with a fault for each page in the thread that
    sends. Does nothing before Linux 5.14.
    """
    with mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        position = 0
        while (start := _next_hole(fd, position, size_bytes)) < size_bytes and not stop.is_set():
            position = min(start // CHUNK_BYTES * CHUNK_BYTES + CHUNK_BYTES, size_bytes)
            try:  # in small steps: Python holds its lock meanwhile
                mapped.madvise(_MADV_POPULATE_READ, start, position - start)
            except OSError:
                return


def _next_hole(fd: int, position: int, size: int) -> int:
    try:
        return os.lseek(fd, position, os.SEEK_HOLE)
    except OSError:  # ENXIO: the end
        return size


def _next_data(fd: int, position: int, size: int) -> int:
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError:  # ENXIO: only a hole is left (lseek(2))
        return size


def _data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    # The kernel looks at every page (0.25 us each): fine ahead of the blackout, too slow in it.
    position = 0
    while (start := _next_data(fd, position, size)) < size:
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, min(position, size)
