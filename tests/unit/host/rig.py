"""A host without QEMU and network: real journal, real directories; the other host is a link that says what a test says.

Guests are stand-ins: which process runs is not what these tests are about, but what is written, kept and removed.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from vmferry.host.creation import VmFiles
from vmferry.host.incoming import Incoming
from vmferry.host.journal import Journal
from vmferry.host.migration_views import MigrationViews
from vmferry.host.migrations import Migrations
from vmferry.host.peers import Peers
from vmferry.host.vms import Vms
from vmferry.migration import messages as m
from vmferry.migration.guest import RunningGuest
from vmferry.migration.host_parts import EngineLimits, HostParts
from vmferry.migration.link import PeerLink
from vmferry.migration.records import MigrationRecord, RecordState
from vmferry.model.errors import Failed, Unreachable, VmferryError
from vmferry.model.migration import MigrateOptions, Role
from vmferry.model.vm import FirmwareBoot, VmSpec
from vmferry.network.netlink import Netlink
from vmferry.qemu.features import QemuFeatures
from vmferry.storage.pool import DirectoryPool

SPEC = VmSpec("id-1", "web1", 1, 1 << 20, "pc-q35-10.0", "max", FirmwareBoot("bios"))
LIMITS = EngineLimits(
    request_s=1,
    prepare_s=5,
    start_s=5,
    qemu_silence_s=1,
    disk_stall_s=1,
    memory_stall_s=1,
    switchover_s=1,
    stopped_s=1,
    handoff_retry_s=0.001,
    forward_s=0.01,
    incoming=2,
    outgoing=2,
    memory_reserve_bytes=0,
    clock_difference_ms=1000,
    bandwidth_bps=0,
)


class _NoNetwork:
    """Whoever asks it for anything learns that there is none; what must work without does."""

    def __getattr__(self, name: str) -> Any:
        raise Failed("no-network", "There is no network in this test.")


@dataclass
class Process:
    """Stands for a guest's process and monitor. `executed` is what it was told."""

    run_dir: Path
    running: bool = True
    pid: int = 4711
    fails: bool = False
    executed: list[str] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    status: int = 0

    def listen(self, names: object, sink: object) -> Callable[[], None]:
        """No events come from it."""
        return lambda: None

    @property
    def monitor(self) -> Process:
        return self

    async def execute(self, command: str, *_: Any, **__: Any) -> Any:
        self.executed.append(command)
        if self.fails:
            raise Failed("qmp-lost", "QEMU does not answer.")
        return {"status": "running"}

    def expect(self, _event: str) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    async def exited(self) -> int:
        await self.ended.wait()
        return self.status

    def kill(self) -> None:
        self.running = False
        self.ended.set()

    def log_tail(self, _lines: int) -> list[str]:
        return []

    def set_priority(self, _nice: int) -> None:
        return

    async def close(self) -> None:
        return


def guest_of(process: Process, spec: VmSpec = SPEC) -> RunningGuest:
    """The stand-in as the host holds it."""
    return RunningGuest(spec, cast(Any, process))


class Link:
    """The connection to the other host; `says` answers each request, or raises."""

    def __init__(self, says: Callable[[m.Request], object], peer: str = "host2") -> None:
        self.peer = peer
        self.local_address = self.peer_address = "192.0.2.2"
        self.rtt_ms = 1.0
        self.closed = False
        self._says = says

    async def call(self, request: m.Request, reply: type[Any], timeout_s: float = 0) -> Any:
        await asyncio.sleep(0)
        answer = self._says(request)
        assert isinstance(answer, reply)
        return answer

    async def measure_rate(self) -> int:
        return 1 << 30

    async def wait_lost(self) -> VmferryError:
        await asyncio.Event().wait()
        raise AssertionError

    async def close(self) -> None:
        self.closed = True


def silent(_request: m.Request) -> object:
    """An other host that cannot be reached."""
    raise Unreachable("link-lost", "Nobody answers.")


@dataclass
class OtherHosts:
    """Stands for `Peers`: a new link each time, that says what `says` says at that time."""

    says: Callable[[m.Request], object] = silent

    async def connect(self, name: str) -> PeerLink:
        if self.says is silent:
            raise Unreachable("host-unreachable", f"{name} cannot be reached.")
        return Link(lambda request: self.says(request), name)

    def address_of(self, _name: str) -> str:
        return "192.0.2.2:7443"


@dataclass
class Host:
    """One life of a host's daemon, without its doors."""

    parts: HostParts
    journal: Journal
    views: MigrationViews
    vms: Vms
    others: OtherHosts
    incoming: Incoming
    migrations: Migrations

    async def until(self, state: RecordState, migration_id: str = "m-1") -> None:
        """Waits for what the journal says of a migration."""

        async def there() -> bool:
            return await self.state(migration_id) is state

        await eventually(there)

    async def state(self, migration_id: str = "m-1") -> RecordState:
        """What the journal says of a migration."""
        return next(r.state for r in await self.journal.list_migrations() if r.id == migration_id)

    async def owned(self) -> dict[str, bool]:
        """The VMs in the journal, and whether they are this host's."""
        return {row.spec.name: row.owned for row in await self.journal.list_vms()}


@asynccontextmanager
async def host_at(place: Path, name: str = "host1", **limits: Any) -> AsyncIterator[Host]:
    """A host whose state is in that directory; what an earlier life left there has been read."""
    journal = Journal(place / "journal.sqlite")
    await journal.open()
    (place / "pool").mkdir(exist_ok=True)
    parts = HostParts(
        name=name,
        address="192.0.2.1",
        binary=str(place / "no-qemu"),
        accel="tcg",
        features=QemuFeatures("no-qemu", "tcg", (10, 0), "", "", (), (), (), (), (), (), False, False, False),
        user=None,
        state_dir=place / "state",
        run_dir=place / "run",
        pools={"local": DirectoryPool("local", place / "pool")},
        switches={},
        netlink=cast(Netlink, _NoNetwork()),
        journal=journal,
        limits=replace(LIMITS, **limits),
        stream_dir=None,
        gate_port=4789,
        version="0",
    )
    others = OtherHosts()
    peers = cast(Peers, others)
    views = MigrationViews(journal, name)
    await views.load()
    vms = Vms(parts, journal, VmFiles(parts))
    await vms.load({r.vm_id: r.id for r in await journal.list_migrations() if r.state is not RecordState.ENDED})
    incoming = Incoming(parts, journal, vms, peers, views, place / "tls")
    migrations = Migrations(parts, journal, vms, peers, views, place / "tls")
    yield Host(parts, journal, views, vms, others, incoming, migrations)
    await migrations.close()
    await vms.close()
    await journal.close()


async def eventually(true: Callable[[], Awaitable[bool]]) -> None:
    """Waits for what goes on in the background, in threads too."""
    end = time.monotonic() + 10
    while not await true():
        assert time.monotonic() < end, "it did not happen within 10 s"
        await asyncio.sleep(0.002)


@contextmanager
def refusing_writes(place: Path, table: str = "migration") -> Iterator[None]:
    """The journal's file fails at every change of a row of that table, as a full or broken disk lets it."""
    with sqlite3.connect(place / "journal.sqlite") as db:
        db.execute(f"CREATE TRIGGER broken BEFORE UPDATE ON {table} BEGIN SELECT RAISE(FAIL, 'disk is full'); END")
    try:
        yield
    finally:
        with sqlite3.connect(place / "journal.sqlite") as db:
            db.execute("DROP TRIGGER broken")


def outgoing_record(state: RecordState = RecordState.ACTIVE) -> MigrationRecord:
    """The source's record of a migration of web1 to host2."""
    return MigrationRecord("m-1", Role.SOURCE, SPEC.id, SPEC.name, "host2", 2, state, SPEC)


def prepare_of(migration_id: str = "m-1", spec: VmSpec = SPEC) -> m.Prepare:
    """What a source asks first."""
    return m.Prepare(migration_id, spec, MigrateOptions(), "host2", "192.0.2.2", "192.0.2.2", spec.generation + 1, True)
