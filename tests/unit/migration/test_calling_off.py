"""A check that ends a migration: what was prepared ahead goes, and what happened is told as what it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmferry.migration.guest import RunningGuest
from vmferry.migration.link import PeerLink
from vmferry.migration.source import SourceMigration
from vmferry.model.errors import Failed, Refused, Unreachable, VmferryError
from vmferry.model.migration import MigrateOptions
from vmferry.qemu.monitor import QmpLost

_REFUSED = Refused("refused", "The check found something.")


class Process:
    """A guest's process that ends, or not, while somebody waits for it."""

    def __init__(self, ends: bool) -> None:
        self.running = True
        self._ends = ends

    async def exited(self) -> int:
        await (asyncio.sleep(0) if self._ends else asyncio.Event().wait())
        self.running = False
        return -9


@pytest.fixture
def undone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The engine's longer works, noted only."""
    found: list[str] = []

    async def prepare(_self: SourceMigration) -> None:
        found.append("prepared")
        await asyncio.Event().wait()

    async def undo(self: SourceMigration) -> None:
        found.append("undone")
        if not self.guest.process.running:
            self.problems.append("QEMU does not answer.")

    monkeypatch.setattr(SourceMigration, "_prepare", prepare)
    monkeypatch.setattr(SourceMigration, "_undo", undo)
    return found


def engine_of(process: Process) -> SourceMigration:
    nobody = cast(Any, SimpleNamespace())
    guest = cast(RunningGuest, SimpleNamespace(process=process))
    return SourceMigration(
        nobody, guest, cast(PeerLink, nobody), nobody, MigrateOptions(), nobody, cast(Callable[[], Any], None)
    )


async def test_what_was_prepared_ahead_is_undone(undone: list[str]) -> None:
    engine = engine_of(Process(ends=False))
    engine.prepare_ahead()
    await asyncio.sleep(0)
    await engine.call_off(_REFUSED)
    assert undone == ["prepared", "undone"]


async def test_nothing_is_prepared_any_more(undone: list[str]) -> None:
    """The check's last word may come late."""
    engine = engine_of(Process(ends=False))
    await engine.call_off(_REFUSED)
    engine.prepare_ahead()
    await asyncio.sleep(0)
    assert undone == []


@pytest.mark.parametrize("ahead", [False, True])
async def test_a_guest_that_ends_in_the_check_is_told_as_that(undone: list[str], ahead: bool) -> None:
    """Its monitor breaks off before its process is seen to have ended."""
    engine = engine_of(Process(ends=True))
    if ahead:
        engine.prepare_ahead()
    with pytest.raises(Failed) as caught:
        await engine.call_off(QmpLost("closed"))
    assert caught.value.code == "guest-ended" and engine.problems == []


@pytest.mark.parametrize("error", [QmpLost("closed"), _REFUSED, Unreachable("link-lost", "It is gone.")])
async def test_a_guest_that_is_there_has_not_ended(
    undone: list[str], monkeypatch: pytest.MonkeyPatch, error: VmferryError
) -> None:
    monkeypatch.setattr("vmferry.migration.source._QMP_PATIENCE_S", 0.01)
    await engine_of(Process(ends=False)).call_off(error)


async def test_a_user_who_cancels_is_not_told_of_the_guest(undone: list[str]) -> None:
    await engine_of(Process(ends=True)).call_off(asyncio.CancelledError())
