"""Whether a guest's process may take its memory after it has started to run (post-copy needs userfaultfd)."""

from __future__ import annotations

import stat
from pathlib import Path

from vmferry.qemu.process import GuestUser

_DEVICE = Path("/dev/userfaultfd")  # since Linux 6.1; QEMU tries it first
_SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")


def may_fault(user: GuestUser | None) -> bool:
    """Whether processes of this user may handle page faults of the kernel's accesses, too (userfaultfd(2))."""
    if user is None:
        return True
    if _SYSCTL.exists() and _SYSCTL.read_text().strip() == "1":
        return True
    if not _DEVICE.exists():
        return False
    found = _DEVICE.stat()
    if found.st_uid == user.uid:
        return bool(found.st_mode & stat.S_IRUSR)
    if found.st_gid in (user.gid, *user.extra_gids):
        return bool(found.st_mode & stat.S_IRGRP)
    return bool(found.st_mode & stat.S_IROTH)
