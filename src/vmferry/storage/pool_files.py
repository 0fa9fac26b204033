"""The files and directories of a directory pool, touched through descriptors so that no symbolic link is followed.

For this room only. Everything blocks: call it in a thread.
"""

from __future__ import annotations

import os
import secrets
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vmferry.model.errors import Conflict, Failed, NotFound, Refused
from vmferry.model.names import require_name
from vmferry.storage.faults import translated

IDENTITY_FILE = ".vmferry-pool"
_OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-.")

Owner = tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Draft:
    """A file that is being made: `path` leads to it through the open directory, also for a child process."""

    directory_fd: int
    part: str
    path: str
    target: Path


def ensure_pool(pool: Path, owner: Owner, expected_uuid: str) -> str:
    """See DirectoryPool.ensure_pool."""
    with translated("make the pool", pool):
        if not expected_uuid:
            pool.mkdir(mode=0o711, parents=True, exist_ok=True)
        if not pool.is_dir():
            raise NotFound("no-such-file", f"The pool {pool} is not a directory.", "Create it, or mount it.")
    found = _identity(pool, create=not expected_uuid)
    if expected_uuid and found != expected_uuid:
        raise Refused(
            "pool-changed",
            f"{pool} is not the pool it was: another file system is mounted there, or none.",
            f"Mount the right one (its {IDENTITY_FILE} says {expected_uuid}).",
        )
    with translated("write to", pool):
        probe = pool / f".probe-{secrets.token_hex(4)}"
        try:
            probe.touch(mode=0o600, exist_ok=False)
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
    if owner is not None:
        _require_reachable(pool, owner)
    return found


def _identity(pool: Path, *, create: bool) -> str:
    path = pool / IDENTITY_FILE
    with translated("read", path):
        with suppress(FileNotFoundError):
            text = path.read_text(encoding="ascii", errors="replace").strip()
            try:
                return str(uuid.UUID(text))
            except ValueError as error:
                raise Failed("bad-pool-identity", f"{path} holds no UUID.", "Restore or remove that file.") from error
        if not create:
            return ""
        text = str(uuid.uuid4())
        part = path.with_name(f"{IDENTITY_FILE}-{secrets.token_hex(4)}")
        try:
            part.write_text(text + "\n", encoding="ascii")
            sync(part)
            with suppress(FileExistsError):
                os.link(part, path)
        finally:
            part.unlink(missing_ok=True)
    sync(pool)
    return _identity(pool, create=False)


def _require_reachable(pool: Path, owner: tuple[int, int]) -> None:
    """QEMU opens an image as the guests' user, which must be able to search every directory on the way."""
    uid, gid = owner
    for directory in (pool, *pool.parents):
        status = directory.stat()
        bit = stat.S_IXUSR if status.st_uid == uid else stat.S_IXGRP if status.st_gid == gid else stat.S_IXOTH
        if uid != 0 and not status.st_mode & bit:
            raise Refused(
                "pool-unreachable",
                f"The guests' user may not enter {directory}, so it cannot use the pool {pool}.",
                f"chmod o+x {directory}, or choose another directory for the pool.",
            )


def split_path(pool: Path, path: Path) -> tuple[str, str]:
    """VM id and file name of an image of this pool. Raises Refused `not-in-pool`. Pure."""
    plain = path.name and set(path.name) <= _NAME_CHARS and path.name != IDENTITY_FILE
    if path.parent.parent != pool or ".." in path.parts or not plain:
        raise Refused("not-in-pool", f"{str(path)[:300]!r} is not an image of the pool {pool}.", "Nothing was touched.")
    return require_name(path.parent.name, "VM id"), path.name


@contextmanager
def open_vm_dir(pool: Path, vm_id: str) -> Iterator[int]:
    """A descriptor of the VM's directory. Raises OSError, also where it is a symbolic link."""
    pool_fd = os.open(pool, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = os.open(vm_id, _OPEN_DIR, dir_fd=pool_fd)
    finally:
        os.close(pool_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def begin_file(pool: Path, target: Path) -> Draft:
    """Makes the VM's directory and reserves a hidden name in it. Raises Conflict `exists` if there is a target."""
    vm_id, name = split_path(pool, target)
    with translated("create", target):
        directory = pool / vm_id
        with suppress(FileExistsError):
            directory.mkdir(mode=0o711)
        with open_vm_dir(pool, vm_id) as opened:
            if os.fstat(opened).st_uid == os.geteuid():
                os.fchmod(opened, 0o711)
            fd = os.dup(opened)
        try:
            if _exists(fd, name):
                raise Conflict("exists", f"{target} exists already.", "Nothing was overwritten; remove it first.")
        except BaseException:
            os.close(fd)
            raise
    part = f".{name}.{secrets.token_hex(4)}.part"
    return Draft(fd, part, f"/proc/self/fd/{fd}/{part}", target)


def finish_file(draft: Draft, owner: Owner) -> Path:
    """Gives the file its owner and its name, durably; its path. Raises Conflict `exists`."""
    with translated("create", draft.target):
        fd = os.open(draft.part, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=draft.directory_fd)
        try:
            os.fchmod(fd, 0o600)
            if owner is not None and os.geteuid() == 0:
                os.fchown(fd, *owner)
            os.fsync(fd)
        finally:
            os.close(fd)
        # link(2), unlike rename(2), overwrites nothing
        os.link(
            draft.part, draft.target.name, src_dir_fd=draft.directory_fd, dst_dir_fd=draft.directory_fd,
            follow_symlinks=False,
        )  # fmt: skip
        os.unlink(draft.part, dir_fd=draft.directory_fd)
        os.fsync(draft.directory_fd)
    return draft.target


def abandon_file(draft: Draft) -> None:
    """Removes what is left of a draft and closes its directory; harmless after `finish_file`."""
    with suppress(OSError):
        os.unlink(draft.part, dir_fd=draft.directory_fd)
    os.close(draft.directory_fd)


def remove_file(pool: Path, path: Path) -> bool:
    """See DirectoryPool.remove_image. The note of an image set aside goes after the image."""
    vm_id, name = split_path(pool, path)
    with translated("remove", path):
        try:
            with open_vm_dir(pool, vm_id) as fd:
                removed = _unlink_regular(fd, name, path)
                _unlink_regular(fd, name + NOTE_SUFFIX, path)
                os.fsync(fd)
        except FileNotFoundError:
            return False
        with suppress(OSError):  # not empty, or gone already
            (pool / vm_id).rmdir()
    return removed


NOTE_SUFFIX = ".json"


def _unlink_regular(fd: int, name: str, path: Path) -> bool:
    try:
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(status.st_mode):
        raise Refused("not-in-pool", f"{path} is not a regular file.", "Nothing was touched; look at it yourself.")
    os.unlink(name, dir_fd=fd)
    return True


def list_files(pool: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every regular file in the VMs' directories, in order of their names; symbolic links are passed over."""
    with translated("list", pool):
        directories = sorted(entry.name for entry in os.scandir(pool) if entry.is_dir(follow_symlinks=False))
        for vm_id in directories:
            for entry in sorted(os.scandir(pool / vm_id), key=lambda found: found.name):
                if entry.is_file(follow_symlinks=False):
                    yield pool / vm_id / entry.name, entry.stat(follow_symlinks=False)


def sync(path: Path) -> None:
    """fsync of a file or directory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exists(fd: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
