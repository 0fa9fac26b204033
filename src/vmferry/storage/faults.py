"""What the kernel and qemu-img say went wrong, as errors of the model. For this room only."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmferry.model.errors import Conflict, Failed, NotFound, VmferryError

_KNOWN: dict[int, tuple[type[VmferryError], str, str, str]] = {
    errno.ENOSPC: (Failed, "no-space", "there is no room left", "Free some room, or use another pool."),
    errno.EDQUOT: (Failed, "no-space", "the quota is used up", "Raise the quota, or use another pool."),
    errno.EFBIG: (Failed, "too-large", "the file system takes no file of that size", "Use another pool."),
    errno.EROFS: (Failed, "read-only", "the file system is read-only", "See the kernel's log for why; mount it again."),
    errno.EIO: (Failed, "io-error", "the storage reports an input/output error", "See the kernel's log; check it."),
    errno.ESTALE: (Failed, "io-error", "the file server has lost the file", "Mount it again."),
    errno.ENOENT: (NotFound, "no-such-file", "it does not exist", "Check the path, and that the pool is mounted."),
    errno.ENOTDIR: (NotFound, "no-such-file", "a part of the path is not a directory", "Check the path."),
    errno.ELOOP: (Failed, "symbolic-link", "a part of the path is a symbolic link", "Images must be real files."),
    errno.EACCES: (Failed, "no-access", "access is denied", "Check owner and mode of the file and its directories."),
    errno.EPERM: (Failed, "no-access", "it is not permitted", "Check owner and attributes of the file."),
    errno.EEXIST: (Conflict, "exists", "it exists already", "Nothing was overwritten; remove it first."),
    errno.EISDIR: (Failed, "not-a-file", "it is a directory", "Name a file."),
}


def storage_error(code: int, act: str, path: Path | str, detail: str = "") -> VmferryError:
    """The error for errno `code`, met while doing `act` ("create", "read") to `path`."""
    if code not in _KNOWN:
        reason = detail or os.strerror(code)
        return Failed("storage-error", f"Cannot {act} {path}: {reason}.", "See the kernel's log and the daemon's.")
    kind, name, reason, fix = _KNOWN[code]
    return kind(name, f"Cannot {act} {path}: {reason}.", fix)


def error_of_qemu_img(stderr: str, act: str, path: Path | str) -> VmferryError:
    """The error behind what qemu-img printed.

    It gives no code, only strerror(3) at the end of its last line, which is looked up here (it runs with LC_ALL=C).
    """
    lines = [line for line in stderr.splitlines() if line.strip()] or ["it gave no reason"]
    for code in _KNOWN:
        if os.strerror(code) in lines[-1]:
            return storage_error(code, act, path)
    if "Failed to get" in stderr and "lock" in stderr:
        return Conflict("image-in-use", f"Cannot {act} {path}: a running guest uses it.", "Stop that VM first.")
    reason = lines[-1].removeprefix("qemu-img: ").strip()[:400]
    return Failed("image-error", f"Cannot {act} {path}: {reason.rstrip('.')}.", "Check the image with qemu-img check.")


@contextmanager
def translated(act: str, path: Path | str) -> Iterator[None]:
    """Lets an OSError leave as what `storage_error` makes of it."""
    try:
        yield
    except OSError as error:
        raise storage_error(error.errno or 0, act, path, str(error)) from error
