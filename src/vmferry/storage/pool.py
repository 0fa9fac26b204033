"""A directory as a pool of images: `<pool>/<vm-id>/<disk>-<8 hex>.<format>`.

The daemon's user owns the directories; the guests' user (`owner`) owns only its images, so a guest process that gets
out of QEMU can plant nothing here. No symbolic link below the pool is ever followed. Files appear under their name only
when they are complete, and nothing is overwritten. Who may use which image is not decided here.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from vmferry.model.errors import Refused, WrongInput
from vmferry.model.names import require_name
from vmferry.storage import aside, pool_files
from vmferry.storage.aside import AsideNote
from vmferry.storage.faults import translated
from vmferry.storage.formats import QEMU_FORMATS, observe_header
from vmferry.storage.image_info import ImageInfo, observe_image
from vmferry.storage.qemu_img import Call, run_qemu_img

__all__ = [
    "AsideNote",
    "DirectoryPool",
    "ImageInfo",
    "ImageRequest",
    "ImportRequest",
    "PoolImage",
    "PoolRoom",
    "observe_image",
]

T = TypeVar("T")
_FORMATS = ("qcow2", "raw")
_SECTOR = 512
_LARGEST_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class PoolRoom:
    """Room in bytes. `free_bytes` is what an ordinary user may still write."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """A new, empty image. `backing` is an absolute path of a base layer in `backing_format`."""

    vm_id: str
    disk: str
    size_bytes: int
    format: str = "qcow2"
    backing: Path | None = None
    backing_format: str = "qcow2"


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """An image to be copied in. `size_bytes` 0 keeps its size, more enlarges it.

    `follow` reads also what the image leans on (a backing chain): only for sources that the operator trusts.
    """

    vm_id: str
    disk: str
    source: Path
    size_bytes: int = 0
    format: str = "qcow2"
    follow: bool = False


@dataclass(frozen=True, slots=True)
class PoolImage:
    """A file found in the pool. `partial`: left behind by an act that did not finish."""

    path: Path
    vm_id: str
    allocated_bytes: int
    partial: bool
    aside: AsideNote | None = None


@dataclass(frozen=True, slots=True)
class DirectoryPool:
    """The pool `name` at `path`; `owner` is uid and gid of the guests' user, None for the daemon's own.

    All methods do their blocking work in threads and raise errors of the model: Failed `no-space`, `read-only`,
    `io-error`, `no-access`; NotFound `no-such-file`; Conflict `exists`.
    """

    name: str
    path: Path
    owner: tuple[int, int] | None = None

    async def ensure_pool(self, expected_uuid: str = "") -> str:
        """Makes the pool usable and returns its UUID, which it gets at the first call and keeps.

        Raises Refused `pool-changed` if its UUID is not the one expected (something else is mounted there, or
        nothing), and Refused `pool-unreachable` if the guests' user cannot get to it.
        """
        return await asyncio.to_thread(pool_files.ensure_pool, self.path, self.owner, expected_uuid)

    async def observe_room(self) -> PoolRoom:
        """How much room the file system has. Raises NotFound `no-such-file` if the pool is not there."""
        with translated("look at", self.path):
            room = await asyncio.to_thread(os.statvfs, self.path)
        return PoolRoom(room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize)

    def plan_path(self, vm_id: str, disk: str, format_name: str) -> Path:
        """A path for a new image, to be journalled before it is created. Nothing is touched."""
        require_name(vm_id, "VM id")
        require_name(disk, "disk")
        if format_name not in _FORMATS:
            raise WrongInput("bad-format", f"{format_name!r:.40} is not a format of disks.", "Use qcow2 or raw.")
        return self.path / vm_id / f"{disk}-{secrets.token_hex(4)}.{format_name}"

    async def create_image(self, request: ImageRequest, at: Path | None = None) -> Path:
        """An empty image of exactly that size, sparse; at `at` (from `plan_path`) or a path of its own."""
        if not 0 < request.size_bytes <= _LARGEST_BYTES or request.size_bytes % _SECTOR:
            raise WrongInput("bad-size", f"A disk cannot have {request.size_bytes} bytes.", "Use a multiple of 1MiB.")
        target = at or self.plan_path(request.vm_id, request.disk, request.format)
        arguments = ["create", "-q", "-f", request.format]
        if request.backing is not None:
            arguments += ["-b", str(_absolute(request.backing)), "-F", request.backing_format]
        async with self._new_file(target) as (fd, part):
            await run_qemu_img(Call([*arguments, part, str(request.size_bytes)], "create", target, (fd,)))
        return target

    async def import_image(self, request: ImportRequest, at: Path | None = None) -> Path:
        """A copy of `request.source` (qcow2, raw, vhdx, vhd, vmdk) in the pool; zeros are not copied.

        Raises Refused `leans-on-others` if the image would make QEMU read other files (and `follow` is not set),
        WrongInput `bad-size` if it is larger than the size asked for.
        """
        source = _absolute(request.source)
        target = at or self.plan_path(request.vm_id, request.disk, request.format)
        found = await asyncio.to_thread(_observe_source, source, request.follow)
        info = await observe_image(source, QEMU_FORMATS[found], chain=request.follow)
        if 0 < request.size_bytes < info.virtual_size:
            raise WrongInput("bad-size", f"{source} has {info.virtual_size} bytes, more than asked for.", "Ask more.")
        wanted = request.size_bytes or -(-info.virtual_size // _SECTOR) * _SECTOR
        async with self._new_file(target) as (fd, part):
            copy = ["convert", "-q", "-f", QEMU_FORMATS[found], "-O", request.format, str(source), part]
            await run_qemu_img(Call(copy, "import", source, (fd,)))
            if wanted != info.virtual_size:
                grow = ["resize", "-q", "-f", request.format, part, str(wanted)]
                await run_qemu_img(Call(grow, "enlarge", target, (fd,)))
        return target

    async def remove_image(self, path: Path) -> bool:
        """Removes an image (also one set aside, with its note) and the VM's directory if that is empty then.

        Returns False if it was not there. Raises Refused `not-in-pool` for anything but a file of this pool.
        """
        return await asyncio.to_thread(pool_files.remove_file, self.path, path)

    async def set_aside(self, path: Path, note: AsideNote) -> Path:
        """Renames an image that its VM has left behind, with a note beside it. Atomic, durable, idempotent."""
        return await asyncio.to_thread(aside.set_aside, self.path, path, note)

    async def restore_aside(self, path: Path) -> Path:
        """Undoes `set_aside`; `path` is what that returned. Atomic, durable, idempotent. Raises Conflict `exists`."""
        return await asyncio.to_thread(aside.restore_aside, self.path, path)

    async def list_images(self) -> tuple[PoolImage, ...]:
        """Every image file in the pool, also what was set aside and what was left half-made."""
        return await asyncio.to_thread(_list_images, self.path)

    @asynccontextmanager
    async def _new_file(self, target: Path) -> AsyncIterator[tuple[int, str]]:
        """A directory's descriptor and a path through it for qemu-img; what is there at the end becomes `target`."""
        draft = await _to_its_end(partial(pool_files.begin_file, self.path, target), pool_files.abandon_file)
        try:
            yield draft.directory_fd, draft.path
            await _to_its_end(
                partial(pool_files.finish_file, draft, self.owner), partial(pool_files.remove_file, self.path)
            )
        finally:
            await asyncio.shield(asyncio.to_thread(pool_files.abandon_file, draft))


async def _to_its_end(act: Callable[[], T], undo: Callable[[T], object]) -> T:
    """`act` in a thread. A cancelled caller waits for its end, because it uses descriptors, and then for `undo`."""
    task = asyncio.ensure_future(asyncio.to_thread(act))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if task.exception() is None:
            await asyncio.shield(asyncio.to_thread(undo, task.result()))
        raise


def _list_images(pool: Path) -> tuple[PoolImage, ...]:
    images = []
    for path, status in pool_files.list_files(pool):
        if not aside.is_note(path.name):
            partial = path.name.startswith(".")
            note = aside.observe_note(path)
            images.append(PoolImage(path, path.parent.name, status.st_blocks * _SECTOR, partial, note))
    return tuple(images)


def _observe_source(source: Path, follow: bool) -> str:
    """The source's format, after a look at whether it stands alone."""
    with translated("read", source):
        fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            kind = os.fstat(fd).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise WrongInput("not-a-file", f"{source} is neither a file nor a block device.", "Name an image.")
            header = observe_header(fd)
        finally:
            os.close(fd)
    if header.elsewhere and not follow:
        raise Refused(
            "leans-on-others",
            f"{source} does not stand alone: it names {header.elsewhere}.",
            "Flatten it with qemu-img convert, or say that what it names is to be read too.",
        )
    return header.format


def _absolute(path: Path) -> Path:
    """QEMU takes a name such as `nbd:...` or `json:...` for a protocol, but never one that begins with a slash."""
    if not path.is_absolute():
        raise WrongInput("bad-path", f"{str(path)[:200]!r} is not an absolute path.", "Begin it with a slash.")
    return path
