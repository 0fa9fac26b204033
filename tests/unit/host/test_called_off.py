"""A source that calls its migration off while this host still starts the guest: nothing is left of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import Host, Process, guest_of, host_at, prepare_of

from vmferry.migration import messages as m
from vmferry.migration import target as module
from vmferry.migration.guest import RunningGuest
from vmferry.migration.records import RecordState
from vmferry.model.errors import Conflict
from vmferry.network.ports import Port

_PORT = Port("vf0", 1, -1, "52:54:00:00:00:01", "br0")


class Starting:
    """The steps of a guest's start; it comes as far as `until`, and stands still there."""

    def __init__(self, process: Process, until: str) -> None:
        self.process, self.until = process, until
        self.reached = asyncio.Event()
        self.ports_removed: list[Port] = []

    async def step(self, name: str) -> None:
        if name == self.until:
            self.reached.set()
            await asyncio.Event().wait()

    async def create_ports(self, *_: Any, **__: Any) -> list[Port]:
        return [_PORT]

    async def remove_ports(self, _parts: object, ports: list[Port]) -> None:
        while ports:
            self.ports_removed.append(ports.pop())

    async def build_guest(self, _parts: object, _spec: object, ports: list[Port], **_: Any) -> RunningGuest:
        await self.step("build")
        guest = guest_of(self.process)
        guest.ports = ports
        return guest

    async def dismantle(self, parts: object, guest: RunningGuest) -> None:
        self.process.kill()
        await self.remove_ports(parts, guest.ports)

    async def add_target_tls(self, *_: Any) -> None:
        await self.step("tls")


@pytest.fixture
def starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Starting]:
    def put_in_place(until: str) -> Starting:
        found = Starting(Process(tmp_path / "guest"), until)
        found.process.identity = type("Identity", (), {"pid": 4711, "start_time_ticks": 1})  # type: ignore[attr-defined]
        for name in ("create_ports", "remove_ports", "build_guest", "dismantle", "add_target_tls"):
            monkeypatch.setattr(module, name, getattr(found, name))
        return found

    return put_in_place


async def begun(host: Host, starting: Starting) -> tuple[Any, asyncio.Task[object]]:
    session = host.incoming.session("host2")
    await session.handle(prepare_of())
    task = asyncio.create_task(session.handle(m.StartGuest("m-1")))
    await asyncio.wait_for(starting.reached.wait(), 10)
    return session, task


@pytest.mark.parametrize("until", ["build", "tls"])
async def test_a_start_is_ended_before_the_refusal_is_answered(
    tmp_path: Path, starting: Callable[[str], Starting], until: str
) -> None:
    """Else its ports, or its whole QEMU, belong to nobody, and the VM can never come here again."""
    async with host_at(tmp_path) as host:
        steps = starting(until)
        session, task = await begun(host, steps)
        await session.handle(m.Abort("m-1", "the check found something"))
        assert steps.ports_removed == [_PORT]
        assert steps.process.running is (until == "build")  # that one never was
        assert await host.state() is RecordState.ENDED and not host.incoming.busy
        with pytest.raises(Conflict) as caught:
            await asyncio.wait_for(task, 10)
        assert caught.value.code == "refused"
        await session.handle(prepare_of("m-2"))


async def test_a_source_that_hangs_up_ends_the_start(tmp_path: Path, starting: Callable[[str], Starting]) -> None:
    async with host_at(tmp_path) as host:
        steps = starting("tls")
        _, task = await begun(host, steps)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)
        assert steps.ports_removed == [_PORT] and not steps.process.running
        assert await host.state() is RecordState.ENDED


async def test_a_guest_is_started_once(tmp_path: Path, starting: Callable[[str], Starting]) -> None:
    async with host_at(tmp_path) as host:
        session, task = await begun(host, starting("build"))
        with pytest.raises(Conflict) as caught:
            await session.handle(m.StartGuest("m-1"))
        assert caught.value.code == "already-started" and not task.done()
        await session.handle(m.Abort("m-1", "enough"))
        await asyncio.wait([task], timeout=10)


async def test_no_guest_is_started_after_the_refusal(tmp_path: Path, starting: Callable[[str], Starting]) -> None:
    async with host_at(tmp_path) as host:
        steps = starting("build")
        await host.incoming.session("host2").handle(prepare_of())
        migration = host.incoming.get("m-1", "host2")
        await migration.refuse()
        with pytest.raises(Conflict) as caught:
            await asyncio.wait_for(migration.start(), 10)
        assert caught.value.code == "refused" and not steps.reached.is_set()
