"""What the soak does: for each migration its route, options and load, all from one seed. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from vmferry.model.migration import MigrateOptions, Verify
from vmferry.model.units import format_rate

HOSTS = ("host1", "host2", "host3")
_BANDWIDTHS_BPS = (0, 0, 700_000_000, 500_000_000)
_POOLS = ("local", "fast")


class Load(StrEnum):
    """What the guest does meanwhile."""

    IDLE = "idle"
    DIRTY = "dirty"
    DISK = "disk"
    BOTH = "both"


# MB/s of memory dirtied, disk records/s (each with fsync)
_RATES = {Load.IDLE: (0, 0), Load.DIRTY: (30, 0), Load.DISK: (0, 80), Load.BOTH: (15, 40)}


@dataclass(frozen=True, slots=True)
class Trip:
    """One migration."""

    number: int
    source: str
    target: str
    load: Load
    options: MigrateOptions

    @property
    def rates(self) -> tuple[int, int]:
        """MB/s of memory dirtied, disk records/s."""
        return _RATES[self.load]

    @property
    def words(self) -> str:
        """For people."""
        limit = format_rate(self.options.bandwidth_bps) if self.options.bandwidth_bps else "no limit"
        pool = self.options.storage.get("", "same")
        return f"{self.load.value:5} verify {self.options.verify.value:5} {limit:10} pool {pool:5}"


def plan_trips(count: int, seed: int) -> Iterator[Trip]:
    """`count` migrations, each from where the one before ended to one of the two other hosts."""
    chance = random.Random(seed)
    here = HOSTS[0]
    for number in range(1, count + 1):
        target = chance.choice([host for host in HOSTS if host != here])
        options = MigrateOptions(
            verify=chance.choice((Verify.DISKS, Verify.ALL)),
            bandwidth_bps=chance.choice(_BANDWIDTHS_BPS),
            storage={"": chance.choice(_POOLS)},
        )
        yield Trip(number, here, target, chance.choice(list(Load)), options)
        here = target
