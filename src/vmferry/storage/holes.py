"""Where a raw image has data: what is between is holes, which cost nothing to copy.

For `migration/`. As the file system says (SEEK_DATA of lseek(2)); one that does not know says that all is data.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from vmferry.model.errors import Failed

_MOST_EXTENTS = 200_000  # of one image; what comes after them counts as data


class DataMap:
    """The extents with data (start and end, in order), to be asked how much there is below an offset."""

    def __init__(self, extents: Sequence[tuple[int, int]]) -> None:
        self._starts = [start for start, _ in extents]
        self._ends = [end for _, end in extents]
        self._before = [0]
        for start, end in extents:
            self._before.append(self._before[-1] + end - start)

    @property
    def total_bytes(self) -> int:
        """All data."""
        return self._before[-1]

    def below(self, offset: int) -> int:
        """Bytes of data below the offset."""
        at = bisect_right(self._starts, offset)
        if at == 0:
            return 0
        return self._before[at - 1] + min(offset, self._ends[at - 1]) - self._starts[at - 1]


def observe_data(path: Path) -> DataMap:
    """The map of a file as it is now. Blocks. Raises Failed `image-not-readable`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return DataMap(_extents(fd))
        finally:
            os.close(fd)
    except OSError as error:
        raise Failed("image-not-readable", f"{path} cannot be read ({error.strerror}).") from error


def _extents(fd: int) -> list[tuple[int, int]]:
    size = os.fstat(fd).st_size
    found: list[tuple[int, int]] = []
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                break
            raise
        at = size if len(found) == _MOST_EXTENTS else os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, at))
    return found
