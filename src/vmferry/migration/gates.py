"""The gates of all of a VM's NICs as one: closed, drained, opened together. See `vmferry.network.gate`."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Coroutine, Iterable, Sequence

from vmferry.migration.host_parts import HostParts
from vmferry.model.errors import VmferryError
from vmferry.network.announce import Announcer, announce_rounds, announcement_frames
from vmferry.network.gate import GateCounters, SourceGate, TargetGate, TunnelSpec, remove_leftovers
from vmferry.network.ports import Port, plug
from vmferry.network.priming import prime_port

_QUIET_S = 0.25  # three rounds of announcements
_LOOK_EVERY_S = 0.05
_SETTLE_MS = 12.0


def gate_vni(migration_id: str) -> int:
    """The tunnel's network identifier of a migration (24 bits); NICs add their number. Both sides derive it."""
    return int.from_bytes(hashlib.sha256(migration_id.encode()).digest()[:3]) & 0xFFFFF0


def _specs(parts: HostParts, migration_id: str, mtus: Sequence[int], local: str, remote: str) -> list[TunnelSpec]:
    vni = gate_vni(migration_id)
    return [
        TunnelSpec(migration_id, index, local, remote, vni + index, parts.gate_port, mtu)
        for index, mtu in enumerate(mtus)
    ]


def _uplinks(parts: HostParts, device: str) -> tuple[str, ...]:
    return next((switch.uplinks for switch in parts.switches.values() if switch.device == device), ())


async def remove_gate_leftovers(parts: HostParts, alive: Sequence[str]) -> None:
    """Removes tunnels and redirects of migrations that are not in `alive`."""
    await remove_leftovers(parts.netlink, alive)


class SourceGates:
    """The source's gates of one migration."""

    def __init__(
        self, parts: HostParts, migration_id: str, ports: Sequence[Port], mtus: Sequence[int], local: str, remote: str
    ) -> None:
        self._gates = [
            SourceGate(parts.netlink, port, spec, _uplinks(parts, port.switch))
            for port, spec in zip(ports, _specs(parts, migration_id, mtus, local, remote), strict=True)
        ]

    @property
    def closed(self) -> bool:
        """Whether frames are led to the target."""
        return any(gate.closed for gate in self._gates)

    async def prepare(self) -> None:
        """Everything that `close` needs."""
        for gate in self._gates:
            await gate.prepare()

    def close(self) -> None:
        """From now on frames for the VM go to the target. No await."""
        for gate in self._gates:
            gate.close()

    async def settle(self) -> bool:
        """Gives the running guest a few milliseconds to empty its rings; whether they are empty."""
        return all([await gate.settle(_SETTLE_MS) for gate in self._gates])

    async def arm(self) -> None:
        """From now on what goes to the guest is kept, in case QEMU stops it before the gate is closed.

        To be called from time to time until then: what is old is forgotten.
        """
        for gate in self._gates:
            await gate.arm()

    def mark(self) -> None:
        """The guest is stopped: finds out, once QEMU has looked, which frames it has kept. See `SourceGate.mark`."""
        for gate in self._gates:
            gate.mark()

    def drain(self) -> int:
        """Sends on what the stopped guest has not got. See `SourceGate.drain`."""
        return sum(gate.drain() for gate in self._gates)

    def reclaim(self) -> None:
        """Rollback, first step."""
        for gate in self._gates:
            gate.reclaim()

    async def reopen(self, returned: int | None) -> None:
        """Rollback, last step: the ports get their frames again, first those that came back.

        Every gate, whatever happens to another; then the first error is raised.
        """
        await _each(gate.reopen(returned if len(self._gates) == 1 else None) for gate in self._gates)

    async def traffic(self) -> GateCounters:
        """What all gates have passed on so far."""
        counters = [await gate.traffic() for gate in self._gates]
        return GateCounters(
            frames=sum(c.frames for c in counters),
            bytes=sum(c.bytes for c in counters),
            others=sum(c.others for c in counters),
            dropped=sum(c.dropped for c in counters),
        )

    async def forward_until_quiet(self, limit_s: float, quiet: GateCounters | None = None) -> GateCounters:
        """Waits until no unicast frame for the VM came for a while, at most `limit_s`; the last counters.

        `quiet` are counters at which it was quiet: if none came since then it still is.
        """
        until = time.monotonic() + limit_s
        counters = await self.traffic()
        if quiet is not None and counters.bytes == quiet.bytes:
            return counters
        quiet_since = time.monotonic()
        while (now := time.monotonic()) < until and now - quiet_since < _QUIET_S:
            await asyncio.sleep(_LOOK_EVERY_S)
            fresh = await self.traffic()
            if fresh.bytes != counters.bytes:
                quiet_since = time.monotonic()
            counters = fresh
        return counters

    async def release(self, *, guest_stays: bool = False) -> None:
        """Ends it. Ports whose gate is closed leave their switches, unless the guest stays here."""
        await _each(gate.release(guest_stays=guest_stays) for gate in self._gates)


class TargetGates:
    """The target's gates of one migration."""

    def __init__(
        self, parts: HostParts, migration_id: str, ports: Sequence[Port], mtus: Sequence[int], remote: str
    ) -> None:
        self._gates = [
            TargetGate(parts.netlink, port, spec, _uplinks(parts, port.switch))
            for port, spec in zip(ports, _specs(parts, migration_id, mtus, parts.address, remote), strict=True)
        ]
        self._ports = tuple(ports)
        self._places = [(_uplinks(parts, port.switch), announcement_frames(port.mac)) for port in ports]
        self._announcers: list[Announcer] = []
        self._completing: list[asyncio.Task[int]] = []
        self._held = 0

    async def prepare(self) -> None:
        """Tunnel, deaf port, everything that `plug` needs. The guest's QEMU must have started."""
        for port in self._ports:
            await asyncio.to_thread(prime_port, port)
        for gate in self._gates:
            await gate.prepare()
        for uplinks, frames in self._places:
            self._announcers.append(Announcer(uplinks, frames))

    def plug(self) -> None:
        """The switch leads the VM's frames to the new port. No await."""
        for gate in self._gates:
            gate.plug()

    def listen(self) -> None:
        """The source's gate has been closed for a while, and the guest is about to run here. No await."""
        for gate in self._gates:
            gate.listen()

    def announce(self) -> None:
        """After RESUME: the port takes part in its switch; the network is told now and again later."""
        for gate in self._gates:
            self._held += gate.held()
            gate.announce()
            self._completing.append(asyncio.create_task(gate.complete()))
        announcers, self._announcers = self._announcers, []
        for announcer in announcers:
            _in_background(_announce_in_rounds(announcer))

    def announce_again(self) -> None:
        """Once more, at once."""
        for gate in self._gates:
            gate.announcer.send()

    async def counters(self) -> tuple[int, int]:
        """Frames that waited for the guest, and frames dropped on this host."""
        dropped = sum([(await gate.traffic()).dropped for gate in self._gates])
        return self._held, dropped

    async def return_frames(self) -> int:
        """Rollback: every frame that was put into the new ports goes back."""
        return sum([await gate.return_frames() for gate in self._gates])

    async def release(self) -> None:
        """Ends it. Announcements that are still to come are independent of it: the last is 0.8 s after the take."""
        for announcer in self._announcers:
            announcer.close()
        try:
            await _each(self._completing)
        finally:
            await _each(gate.release() for gate in self._gates)


async def open_ports(parts: HostParts, ports: Sequence[Port]) -> None:
    """The ports take part in their switches and the network is told: for a VM that was taken before a restart."""
    for port in ports:
        await plug(parts.netlink, port)
        with Announcer(_uplinks(parts, port.switch), announcement_frames(port.mac)) as announcer:
            await announce_rounds(announcer)


async def _each(works: Iterable[Awaitable[object]]) -> None:
    """One after the other, all of them; then raises the first error."""
    first: VmferryError | None = None
    for work in works:
        try:
            await work
        except VmferryError as error:
            first = first or error
    if first is not None:
        raise first


async def _announce_in_rounds(announcer: Announcer) -> None:
    with announcer:
        await announce_rounds(announcer)


_background: set[asyncio.Task[None]] = set()  # asyncio itself does not keep a task


def _in_background(work: Coroutine[None, None, None]) -> None:
    task = asyncio.create_task(work)
    _background.add(task)
    task.add_done_callback(_background.discard)
