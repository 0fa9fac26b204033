"""Kernels and initramfs of VMs, kept beside the VM's definition under the digest of their content.

The name says what is in the file, so that a copy is found again, and a file that came from another host can be checked.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import stat
from pathlib import Path

from vmferry.model.errors import Failed, Refused, WrongInput
from vmferry.storage.faults import translated

_LARGEST = 2 << 30
_DIGEST_CHARS = 32
_PREFIX = "boot-"
_NAME = re.compile(rf"{_PREFIX}[0-9a-f]{{{_DIGEST_CHARS}}}\Z")


async def store_boot_file(vm_dir: Path, source: Path) -> str:
    """Copies `source` into `vm_dir` and returns its name there. Atomic and idempotent.

    Raises WrongInput `not-a-file` unless it is a regular file of at most 2 GiB, and errors of storage.
    """
    return await asyncio.to_thread(_store, vm_dir, source)


def has_boot_file(vm_dir: Path, name: str) -> bool:
    """Whether `vm_dir` holds that file; it is complete then. One stat(2)."""
    return _NAME.match(name) is not None and (vm_dir / name).is_file()


def finish_boot_file(vm_dir: Path, name: str) -> None:
    """Puts `<name>.part`, which came from another host, in place once its content is what its name says. Blocking.

    Raises Refused `digest-differs` (the part is removed then), WrongInput `bad-boot-file` for an impossible name.
    """
    if not _NAME.match(name):
        raise WrongInput("bad-boot-file", f"{name[:80]!r} is not the name of a boot file.", "Migrate again.")
    part = vm_dir / f"{name}.part"
    with translated("store", part):
        with part.open("rb") as file:
            same = _PREFIX + hashlib.file_digest(file, "sha256").hexdigest()[:_DIGEST_CHARS] == name
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        if same:
            part.replace(vm_dir / name)
            return
        part.unlink()
    raise Refused("digest-differs", f"What arrived as {name} is not that file.", "Migrate again.")


def boot_file_name(data: bytes) -> str:
    """The name under which this content is stored."""
    return _PREFIX + hashlib.sha256(data).hexdigest()[:_DIGEST_CHARS]


def _store(vm_dir: Path, source: Path) -> str:
    with translated("read", source):
        fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
                raise WrongInput("not-a-file", f"{source} is no file of at most 2 GiB.", "Name a kernel or initramfs.")
            data = file.read(_LARGEST + 1)
    if not data:
        raise WrongInput("not-a-file", f"{source} is empty.", "Name a kernel or initramfs.")
    name = boot_file_name(data)
    _write(vm_dir, name, data)
    return name


def _write(vm_dir: Path, name: str, data: bytes) -> None:
    target = vm_dir / name
    if target.exists() and target.stat().st_size == len(data):
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
