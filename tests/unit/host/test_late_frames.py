"""Frames that still come to the source after the take: watched until the gate goes, and all of them counted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rig import Process, guest_of, host_at

from vmferry.host import outcome
from vmferry.migration import gates as module
from vmferry.migration.finish import give_up_guest
from vmferry.migration.gates import SourceGates
from vmferry.migration.messages import RunningSeen
from vmferry.network.gate import GateCounters


class Gate:
    """Stands for a `SourceGate`; `comes` is how many looks each still find new frames."""

    def __init__(self, comes: int = 0) -> None:
        self.comes, self.frames, self.looks, self.released = comes, 0, 0, False

    async def traffic(self) -> GateCounters:
        assert not self.released
        self.looks += 1
        if self.comes:
            self.comes -= 1
            self.frames += 1
        return GateCounters(frames=self.frames, bytes=self.frames * 60)

    async def release(self, *, guest_stays: bool) -> None:
        assert not guest_stays
        self.released = True


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUIET_S", 0.02)
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.002)


def gates_of(gate: Gate) -> SourceGates:
    gates = SourceGates(cast(Any, None), "m-1", (), (), "192.0.2.1", "192.0.2.2")
    gates._gates = cast(Any, [gate])
    return gates


async def test_what_comes_while_the_guest_is_being_seen_is_watched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    async def see_it_late(_engine: object) -> RunningSeen:
        await asyncio.sleep(0.1)  # it has long been quiet
        gate.comes = 5  # and is no more
        return RunningSeen(True, 0, 0, None)

    monkeypatch.setattr(outcome, "_see_it_through", see_it_late)
    parts = SimpleNamespace(limits=SimpleNamespace(forward_s=5))
    engine = SimpleNamespace(parts=parts, gates=gates_of(gate))
    assert (await outcome._see_and_forward(cast(Any, engine))).running
    assert gate.frames == 5 and gate.comes == 0


async def test_nothing_is_waited_for_when_it_has_stayed_quiet() -> None:
    gate = Gate(comes=3)
    gates = gates_of(gate)
    quiet = await gates.forward_until_quiet(5)
    assert quiet.frames == 3
    looks = gate.looks
    assert await gates.forward_until_quiet(5, quiet) == quiet
    assert gate.looks == looks + 1


async def test_the_receipt_has_the_frames_of_the_last_moment(tmp_path: Path) -> None:
    gate = Gate()
    gates = gates_of(gate)
    await gates.forward_until_quiet(5)
    gate.comes = 1
    async with host_at(tmp_path) as host:
        process = Process(tmp_path / "guest")
        assert (await give_up_guest(host.parts, guest_of(process), gates)).frames == 1
    assert gate.released and not process.running
