"""The daemon's own memory: what a migration needed for a while goes back to the system afterwards.

glibc keeps freed memory in an arena per thread; a daemon that is idle for days should not (mallopt(3), malloc_trim(3)).
On another C library nothing happens.
"""

from __future__ import annotations

import ctypes
import gc

_M_ARENA_MAX = -8
_M_MMAP_THRESHOLD = -3
_MOST_ARENAS = 2
_MAPPED_FROM_BYTES = 256 << 10


def keep_heap_small() -> None:
    """At the start: few arenas, and large blocks always mapped on their own, so that freed memory can go back."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, _MOST_ARENAS)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)


def give_memory_back() -> None:
    """After a migration. Takes some milliseconds: never in a blackout."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
