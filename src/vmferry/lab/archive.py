"""Writes an initramfs (cpio "newc", kernel: Documentation/driver-api/early-userspace/buffer-format.rst).

For lab/guest only. Deterministic (times are 0, owner is root), and it makes device nodes without being root.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in the archive; `mode` with the file type bits. `device` is (major, minor) for a character device."""

    path: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str) -> Entry:
    return Entry(path, stat.S_IFDIR | 0o755)


def program(path: str, content: bytes) -> Entry:
    return Entry(path, stat.S_IFREG | 0o755, content)


def character_device(path: str, major: int, minor: int) -> Entry:
    return Entry(path, stat.S_IFCHR | 0o600, device=(major, minor))


def pack_cpio(entries: Iterable[Entry]) -> bytes:
    """The whole archive, with its trailer."""
    parts = [_pack_one(number, entry) for number, entry in enumerate(entries, start=1)]
    parts.append(_pack_one(0, Entry("TRAILER!!!", 0)))
    return b"".join(parts)


def _pack_one(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    numbers = (inode, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
    head = b"070701" + b"".join(b"%08x" % number for number in numbers) + name
    return _padded(head) + _padded(entry.content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
