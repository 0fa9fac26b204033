"""Kernels and initramfs of VMs, kept beside the VM's definition under the digest of their content.

The name says what is in the file, so that a copy is found again, and a file that came from another host can be checked.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import stat
from pathlib import Path

from vmferry.model.errors import Failed, Refused, WrongInput
from vmferry.storage.faults import translated

LARGEST_BOOT_FILE = 2 << 30
_DIGEST_CHARS = 32
_AGAIN = "Migrate again."


async def store_boot_file(vm_dir: Path, source: Path) -> str:
    """Copies `source` into `vm_dir` and returns its name there. Atomic and idempotent.

    Raises WrongInput `not-a-file` unless it is a regular file of at most 2 GiB, and errors of storage.
    """
    return await asyncio.to_thread(_store, vm_dir, source)


async def accept_boot_file(part: Path, target: Path) -> None:
    """Makes what another host sent, and what is in `part` now, the boot file `target`, durably; `part` is gone then.

    Raises Refused `digest-differs` if that is not the content that the name stands for, and errors of storage.
    """
    await asyncio.to_thread(_accept, part, target)


def _accept(part: Path, target: Path) -> None:
    try:
        with translated("write", target), part.open("rb") as file:
            if _name(hashlib.file_digest(file, "sha256").hexdigest()) != target.name:
                raise Refused("digest-differs", f"What arrived as {target.name!r:.60} is not that file.", _AGAIN)
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
            part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def boot_file_name(data: bytes) -> str:
    """The name under which this content is stored."""
    return _name(hashlib.sha256(data).hexdigest())


def _name(digest: str) -> str:
    return "boot-" + digest[:_DIGEST_CHARS]


def _store(vm_dir: Path, source: Path) -> str:
    with translated("read", source):
        fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_BOOT_FILE:
                raise WrongInput("not-a-file", f"{source} is no file of at most 2 GiB.", "Name a kernel or initramfs.")
            data = file.read(LARGEST_BOOT_FILE + 1)
    if not data:
        raise WrongInput("not-a-file", f"{source} is empty.", "Name a kernel or initramfs.")
    name = boot_file_name(data)
    _write(vm_dir, name, data)
    return name


def _write(vm_dir: Path, name: str, data: bytes) -> None:
    target = vm_dir / name
    if target.is_file() and target.read_bytes() == data:
        return
    part = vm_dir / f".{name}.{secrets.token_hex(4)}.part"
    with translated("write", target):
        vm_dir.mkdir(parents=True, exist_ok=True)
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            with os.fdopen(fd, "wb") as file:
                os.fchmod(fd, 0o644)
                if file.write(data) != len(data):
                    raise Failed("storage-error", f"Cannot write {target}.")
                file.flush()
                os.fsync(fd)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
