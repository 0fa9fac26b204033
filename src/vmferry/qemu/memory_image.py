"""A guest's RAM inside its QEMU: where it is, how much of it is used, and its digest while the guest is stopped.

The memory is private to QEMU, so that the kernel gives it huge pages and pages never used cost nothing, also not when
a migration reads them all. It is read through /proc/PID/mem (proc(5)), as fast as through a mapping of our own: 4 to
6 GB/s a thread were measured. That needs CAP_SYS_PTRACE. Reading makes no pages: what was never used counts as zeros.

The digest of a chunk is xxh3_128 (a check against mistakes, not an attacker); that of the memory folds those of the
chunks.
"""

from __future__ import annotations

import asyncio
import os
import re
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from vmferry.model.errors import Failed
from vmferry.qemu.monitor import Monitor, QmpRefused

CHUNK_BYTES = 1 << 20
_DIGEST_BYTES = 16
_BATCH_BYTES = 16 * CHUNK_BYTES
_ABOVE_BIOS = 0x100000  # always RAM, in every machine type
_HOST_ADDRESS = re.compile(r"Host virtual address for 0x[0-9a-f]+ \(.*\) is 0x([0-9a-f]+)")
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) [0-9a-f]+ \S+ (\d+)")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_ENTRY_BYTES = 8  # of /proc/PID/pagemap, one a page; bit 63 present, 62 swapped, 55 written since it was last cleared
_ENTRIES_BYTES = CHUNK_BYTES // _PAGE_BYTES * _ENTRY_BYTES
_NEVER_USED = frozenset(
    entry.to_bytes(_ENTRY_BYTES, "little") * (_ENTRIES_BYTES // _ENTRY_BYTES) for entry in (0, 1 << 55)
)


@dataclass(frozen=True, slots=True)
class MemoryPlace:
    """Where a guest's RAM is: the process, its address there, its size. `private`: pages never used are zeros."""

    pid: int
    address: int
    size_bytes: int
    private: bool


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


async def locate_memory(monitor: Monitor, pid: int, size_bytes: int) -> MemoryPlace:
    """Finds the RAM of the QEMU behind this monitor. It stays there for the process's life. Raises Failed
    `memory-not-found`.
    """
    try:
        told = str(await monitor.execute("human-monitor-command", command_line=f"gpa2hva {_ABOVE_BIOS:#x}"))
    except QmpRefused as error:
        raise _not_found(error.desc) from error
    found = _HOST_ADDRESS.search(told)
    if found is None:
        raise _not_found(told.strip())
    return await asyncio.to_thread(find_place, pid, int(found[1], 16) - _ABOVE_BIOS, size_bytes)


def find_place(pid: int, address: int, size_bytes: int) -> MemoryPlace:
    """The memory at this address of a process. Raises Failed `memory-not-found` unless all of it is mapped."""
    covered, private = address, True
    for start, end, permissions, inode in _regions(Path(f"/proc/{pid}/maps")):
        if end <= covered or start > covered:
            continue
        covered, private = end, private and permissions[3] == "p" and inode == 0
        if covered >= address + size_bytes:
            return MemoryPlace(pid, address, size_bytes, private)
    raise _not_found(f"process {pid} has no {size_bytes} bytes at {address:#x}")


def observe_used_bytes(place: MemoryPlace) -> int:
    """How much of the memory is in use: about what a migration has to send. Blocks; the kernel looks at every page."""
    used, inside = 0, False
    try:
        with Path(f"/proc/{place.pid}/smaps").open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                if found := _REGION.match(line):
                    start, end = int(found[1], 16), int(found[2], 16)
                    if start >= place.address + place.size_bytes:
                        break
                    inside = end > place.address
                elif inside and line.startswith(("Rss:", "Swap:")):
                    used += int(line.split()[1]) * 1024
    except OSError as error:
        raise _not_found(str(error)) from error
    return min(used, place.size_bytes)


class MemoryReader:
    """Reads a guest's memory for digests. Open it ahead of the blackout; nothing else needs to be prepared."""

    def __init__(self, place: MemoryPlace, threads: int | None = None) -> None:
        self._place = place
        try:
            self._memory = os.open(f"/proc/{place.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._pages = os.open(f"/proc/{place.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            except BaseException:
                os.close(self._memory)
                raise
        except OSError as error:
            raise Failed(
                "memory-not-readable",
                f"The guest's memory cannot be read ({error.strerror}).",
                "vmferryd needs CAP_SYS_PTRACE, and kernel.yama.ptrace_scope below 3; or leave --verify all out.",
            ) from error
        # One that nobody got hold of (a cancelled wait for the thread that opens it) is closed with its last reference.
        self._close = weakref.finalize(self, _close_all, (self._memory, self._pages))
        workers = threads or min(8, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="memory-digest")
        self._zero = xxhash.xxh3_128_digest(bytes(CHUNK_BYTES))

    def close(self) -> None:
        """Lets go. The guest's memory is untouched."""
        self._pool.shutdown()
        self._close()

    async def digest(self) -> MemoryDigest:
        """The digest of the memory as it is now. Only means something while the guest is stopped.

        Raises Failed `memory-not-readable`, as when the process has ended.
        """
        loop = asyncio.get_running_loop()
        starts = range(0, self._place.size_bytes, _BATCH_BYTES)
        parts = await asyncio.gather(*(loop.run_in_executor(self._pool, self._digest_batch, start) for start in starts))
        chunks = b"".join(parts)
        return MemoryDigest(xxhash.xxh3_128_hexdigest(chunks), self._place.size_bytes, chunks)

    def _digest_batch(self, start: int) -> bytes:
        end = min(start + _BATCH_BYTES, self._place.size_bytes)
        buffer = memoryview(bytearray(CHUNK_BYTES))
        entries = self._entries(start, end)
        digests = []
        for at in range(start, end, CHUNK_BYTES):
            first = (at - start) // _PAGE_BYTES * _ENTRY_BYTES
            if entries[first : first + _ENTRIES_BYTES] in _NEVER_USED:
                digests.append(self._zero)
            else:
                digests.append(xxhash.xxh3_128_digest(self._read(at, buffer[: min(CHUNK_BYTES, end - at)])))
        return b"".join(digests)

    def _entries(self, start: int, end: int) -> bytes:
        """What the kernel says of the pages, so that those never used need not be read."""
        if not self._place.private:
            return b""
        length = (end - start) // _PAGE_BYTES * _ENTRY_BYTES
        try:
            return os.pread(self._pages, length, (self._place.address + start) // _PAGE_BYTES * _ENTRY_BYTES)
        except OSError:
            return b""  # then they are read

    def _read(self, at: int, buffer: memoryview) -> memoryview:
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._memory, [buffer[done:]], self._place.address + at + done)
            except OSError as error:
                raise _unreadable(error.strerror or "") from error
            if got == 0:
                raise _unreadable("its process has ended")
            done += got
        return buffer


async def digest_memory(place: MemoryPlace, threads: int | None = None) -> MemoryDigest:
    """The digest of a guest's memory, in threads. For the blackout open a MemoryReader ahead instead."""
    reader = await asyncio.to_thread(MemoryReader, place, threads)
    try:
        return await reader.digest()
    finally:
        await asyncio.to_thread(reader.close)


def _close_all(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)


def _regions(maps: Path) -> Iterator[tuple[int, int, str, int]]:
    try:
        text = maps.read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise _not_found(str(error)) from error
    for line in text.splitlines():
        if found := _REGION.match(line):
            yield int(found[1], 16), int(found[2], 16), found[3], int(found[4])


def _not_found(why: str) -> Failed:
    return Failed("memory-not-found", f"The guest's memory was not found in its process: {why}.", "Report this.")


def _unreadable(why: str) -> Failed:
    return Failed("memory-not-readable", f"The guest's memory cannot be read: {why}.", "Look at the guest's qemu.log.")
