"""Images that their VM has left behind: renamed within their directory, with a note that says whose they were.

For this room only (`DirectoryPool` is the way in). The note is written before the image is renamed and goes after it
is renamed back, so that an image set aside always has its note. Everything blocks: call it in a thread.
"""

from __future__ import annotations

import json
import os
import re
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vmferry.model.errors import Conflict, NotFound, Refused, WrongInput
from vmferry.storage.faults import translated
from vmferry.storage.pool_files import NOTE_SUFFIX, open_vm_dir, split_path

_ASIDE = re.compile(r"(?P<name>.+)\.aside-(?P<migration>[a-z0-9-]{1,64})\Z")
_MIGRATION = re.compile(r"[a-z0-9-]{1,64}\Z")


@dataclass(frozen=True, slots=True)
class AsideNote:
    """Which VM's image it was, which migration set it aside and with which generation, and when (RFC 3339)."""

    vm_id: str
    vm: str
    migration_id: str
    generation: int
    at: str


def is_note(name: str) -> bool:
    """Whether a file of this name is a note."""
    return name.endswith(NOTE_SUFFIX) and bool(_ASIDE.match(name.removesuffix(NOTE_SUFFIX)))


def observe_note(path: Path) -> AsideNote | None:
    """The note of an image set aside, None for any other image. Raises OSError."""
    if not _ASIDE.match(path.name):
        return None
    with suppress(FileNotFoundError, ValueError, TypeError):
        return AsideNote(**json.loads(path.with_name(path.name + NOTE_SUFFIX).read_bytes()))
    return AsideNote(path.parent.name, "", "", 0, "")


def set_aside(pool: Path, path: Path, note: AsideNote) -> Path:
    """See DirectoryPool.set_aside."""
    vm_id, name = split_path(pool, path)
    if not _MIGRATION.match(note.migration_id):
        raise WrongInput("bad-migration-id", f"{note.migration_id!r:.80} is not the id of a migration.", "")
    if _ASIDE.match(name):
        return path
    renamed = f"{name}.aside-{note.migration_id}"
    with translated("set aside", path), open_vm_dir(pool, vm_id) as fd:
        if not _exists(fd, renamed):
            _require_file(fd, name, path)
            _write_note(fd, renamed + NOTE_SUFFIX, note)
            os.rename(name, renamed, src_dir_fd=fd, dst_dir_fd=fd)
        os.fsync(fd)
    return path.with_name(renamed)


def restore_aside(pool: Path, path: Path) -> Path:
    """See DirectoryPool.restore_aside."""
    vm_id, name = split_path(pool, path)
    match = _ASIDE.match(name)
    if match is None:
        return path
    original = path.with_name(match["name"])
    with translated("restore", path), open_vm_dir(pool, vm_id) as fd:
        if _exists(fd, name):
            if _exists(fd, original.name):
                raise Conflict("exists", f"{original} exists already.", "Nothing was overwritten; look at both files.")
            os.rename(name, original.name, src_dir_fd=fd, dst_dir_fd=fd)
        else:
            _require_file(fd, original.name, path)
        with suppress(FileNotFoundError):
            os.unlink(name + NOTE_SUFFIX, dir_fd=fd)
        os.fsync(fd)
    return original


def _write_note(fd: int, name: str, note: AsideNote) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=fd)
    opened = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=fd)
    with os.fdopen(opened, "wb") as file:
        file.write(json.dumps(asdict(note)).encode())
        file.flush()
        os.fsync(opened)


def _require_file(fd: int, name: str, path: Path) -> None:
    try:
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError as error:
        raise NotFound("no-such-file", f"{path} does not exist.", "It may have been removed or moved.") from error
    if not stat.S_ISREG(status.st_mode):
        raise Refused("not-in-pool", f"{path} is not a regular file.", "Nothing was touched; look at it yourself.")


def _exists(fd: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
