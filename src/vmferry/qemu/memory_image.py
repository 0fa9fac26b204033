"""The digest of a guest's RAM, read through the memfd that backs it, while the guest is stopped.

Only reads, and never makes the memfd larger: a page that was never touched stays a hole, and counts as zeros. The
digest of a chunk is xxh3_128 (a check against mistakes, not an attacker); that of the memory folds those of the chunks.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import xxhash

CHUNK_BYTES = 1 << 20
_DIGEST_BYTES = 16
_BATCH_CHUNKS = 16
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
    """A guest's memory, mapped ahead of the blackout."""

    def __init__(self, fd: int, size_bytes: int, threads: int | None = None) -> None:
        self._fd = os.dup(fd)
        self._size = size_bytes
        self._map = mmap.mmap(self._fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        self._view = memoryview(self._map)
        workers = threads or min(8, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="memory-digest")
        self._zero = xxhash.xxh3_128_digest(bytes(CHUNK_BYTES))

    def close(self) -> None:
        """Unmaps. The guest's memory is untouched."""
        self._pool.shutdown()
        self._view.release()
        self._map.close()
        os.close(self._fd)

    async def digest(self) -> MemoryDigest:
        """The digest of the memory as it is now. Only means something while the guest is stopped."""
        loop = asyncio.get_running_loop()
        batches = await asyncio.to_thread(self._batches)
        parts = await asyncio.gather(*(loop.run_in_executor(self._pool, self._digest_batch, *b) for b in batches))
        chunks = b"".join(parts)
        return MemoryDigest(xxhash.xxh3_128_hexdigest(chunks), self._size, chunks)

    def _batches(self) -> list[tuple[int, list[tuple[int, int]]]]:
        extents = list(_data_extents(self._fd, self._size))
        step = _BATCH_CHUNKS * CHUNK_BYTES
        batches = []
        for start in range(0, self._size, step):
            end = min(start + step, self._size)
            batches.append((start, [(max(a, start), min(b, end)) for a, b in extents if a < end and b > start]))
        return batches

    def _digest_batch(self, start: int, extents: list[tuple[int, int]]) -> bytes:
        end = min(start + _BATCH_CHUNKS * CHUNK_BYTES, self._size)
        return b"".join(
            self._digest_chunk(at, min(at + CHUNK_BYTES, end), extents) for at in range(start, end, CHUNK_BYTES)
        )

    def _digest_chunk(self, start: int, end: int, extents: list[tuple[int, int]]) -> bytes:
        inside = [(max(a, start), min(b, end)) for a, b in extents if a < end and b > start]
        if not inside:
            return self._zero if end - start == CHUNK_BYTES else xxhash.xxh3_128_digest(bytes(end - start))
        if inside == [(start, end)]:
            return xxhash.xxh3_128_digest(self._view[start:end])
        # Partly a hole: read(2) gives zeros for it, where touching the map would allocate pages.
        return xxhash.xxh3_128_digest(os.pread(self._fd, end - start, start))


async def digest_memory(fd: int, size_bytes: int, threads: int | None = None) -> MemoryDigest:
    """The digest of a memory file, in threads. For the blackout prepare a MemoryReader instead."""
    reader = MemoryReader(fd, size_bytes, threads)
    try:
        return await reader.digest()
    finally:
        await asyncio.to_thread(reader.close)


def _data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left (lseek(2))
            return
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, min(position, size)
