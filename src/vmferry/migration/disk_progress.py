"""How far the copying of disks has got, of what has to be sent: holes are no work, and are not counted as any.

For `disks`. Pure but for `observe_holes`; the caller has the clock.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmferry.model.vm import VmSpec
from vmferry.qemu.blocks import MirrorSample
from vmferry.storage.holes import DataMap, observe_data

_WINDOW_S = 5.0
_SHORTEST_S = 0.25


@dataclass(frozen=True, slots=True)
class DiskProgress:
    """All mirrors together, in bytes that have to be sent."""

    total_bytes: int
    done_bytes: int
    rate: int = 0  # bytes a second, lately


@dataclass(frozen=True, slots=True)
class Holes:
    """Where a raw image of this size has data."""

    size_bytes: int
    data: DataMap


async def observe_holes(spec: VmSpec, job_ids: Sequence[str]) -> dict[str, Holes]:
    """For the mirrors of raw images, by job: in what they copy QEMU counts holes, for other formats it does not.

    (A mirror begins with what is allocated, and in a raw image everything is: mirror_dirty_init in block/mirror.c.)
    Raises Failed `image-not-readable`.
    """
    found = {}
    for disk, job_id in zip(spec.disks, job_ids, strict=True):
        if disk.format == "raw":
            found[job_id] = Holes(disk.size_bytes, await asyncio.to_thread(observe_data, Path(disk.path)))
    return found


class DiskMeter:
    """Turns what QEMU says of the mirrors into progress."""

    def __init__(self, holes: Mapping[str, Holes]) -> None:
        self._holes = holes
        self._rate = Rate()

    def read(self, samples: Sequence[MirrorSample], now_s: float) -> DiskProgress:
        """The progress at that time."""
        parts = [work_of(sample, self._holes.get(sample.job_id)) for sample in samples]
        done = sum(part for part, _ in parts)
        return DiskProgress(sum(total for _, total in parts), done, self._rate.update(done, now_s))


def work_of(sample: MirrorSample, holes: Holes | None) -> tuple[int, int]:
    """How much of how much a mirror has sent. A mirror goes from the image's beginning to its end."""
    if holes is None:
        return min(sample.offset, sample.length), sample.length
    again = max(0, sample.length - holes.size_bytes)  # what the guest has written meanwhile
    total = holes.data.total_bytes + again
    if sample.ready:
        return max(0, total - (sample.length - sample.offset)), total
    done = holes.data.below(min(sample.offset, holes.size_bytes)) + max(0, sample.offset - holes.size_bytes)
    return min(done, total), total


class Rate:
    """Bytes a second, lately. Never more than were sent: under a limit QEMU sends in bursts, 16 MiB at a time.

    So it is measured from the end of a burst on; that one itself does not count.
    """

    def __init__(self) -> None:
        self._changes: deque[tuple[float, int]] = deque()

    def update(self, done_bytes: int, now_s: float) -> int:
        """The rate, with so much done at that time; 0 until there is one."""
        changes = self._changes
        if done_bytes > (changes[-1][1] if changes else 0):
            changes.append((now_s, done_bytes))
        while len(changes) > 1 and now_s - changes[1][0] >= _WINDOW_S:
            changes.popleft()
        if not changes or now_s - changes[0][0] < _SHORTEST_S:
            return 0
        since_s, before = changes[0]
        return int((done_bytes - before) / (now_s - since_s)) if done_bytes > before else 0
