"""What is shown of migrations: kept, changed in one place, watched by many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_journal import record_of, view_of

from vmferry.host.journal import Journal
from vmferry.host.migration_views import MigrationViews, close_phase, now_text
from vmferry.model.errors import NotFound
from vmferry.model.migration import MigrationView, Outcome, Phase, PhaseTime, Progress, Reason, Role


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    found = Journal(tmp_path / "journal.sqlite")
    await found.open()
    await found.begin_migration(record_of(Role.SOURCE), view_of())
    yield found
    await found.close()


async def test_phases_follow_each_other(journal: Journal) -> None:
    views = MigrationViews(journal)
    views.put(view_of())
    for phase in (Phase.COPY, Phase.SWITCHOVER, Phase.SWITCHOVER, Phase.FINISH):
        views.enter("m-1", phase)
    phases = views.get("m-1").phases
    assert [phase.name for phase in phases] == [Phase.COPY, Phase.SWITCHOVER, Phase.FINISH]
    assert [bool(phase.ended_at) for phase in phases] == [True, True, False]
    assert phases[0].ended_at == phases[1].started_at


async def test_the_end_is_saved_and_comes_back(journal: Journal) -> None:
    views = MigrationViews(journal)
    views.put(view_of())
    reason = Reason("code", "Message.", "Fix.")
    ended = await views.end("m-1", Outcome.FAILED, reason, blackout_ms=12.5)
    assert (ended.outcome, ended.reason, ended.blackout_ms) == (Outcome.FAILED, reason, 12.5)
    assert ended.ended_at and all(phase.ended_at for phase in ended.phases)
    again = MigrationViews(journal)
    await again.load()
    assert again.all() == [ended]


async def test_newest_first_also_after_a_restart(journal: Journal) -> None:
    views = MigrationViews(journal)
    await views.load()
    for second in (1, 3, 2):
        views.put(replace(view_of(f"m-{second}x"), started_at=f"2026-01-01T00:00:0{second}.000+00:00"))
    assert [view.id for view in views.all()] == ["m-3x", "m-2x", "m-1x", "m-1"]


async def test_an_unknown_one_is_named(journal: Journal) -> None:
    views = MigrationViews(journal)
    for act in (views.get, lambda name: views.change(name, note=1), lambda name: views.enter(name, Phase.COPY)):
        with pytest.raises(NotFound) as caught:
            act("m-9\x1b" * 1000)
        assert caught.value.code == "no-such-migration"
        assert len(caught.value.message) < 300 and "\x1b" not in caught.value.message


async def test_all_watchers_see_a_change_and_none_sees_it_twice(journal: Journal) -> None:
    views = MigrationViews(journal)
    views.put(view_of())
    first = views.get("m-1")
    watchers = [asyncio.create_task(views.changed("m-1", first)) for _ in range(3)]
    await asyncio.sleep(0)
    second = views.change("m-1", progress=Progress(rounds=9))
    assert await asyncio.gather(*watchers) == [second] * 3
    late = asyncio.create_task(views.changed("m-1", second))
    await asyncio.sleep(0)
    assert not late.done()
    views.put(view_of("m-2"))  # another one's change wakes nobody
    await asyncio.sleep(0)
    assert not late.done()
    third = views.change("m-1", outcome=Outcome.COMPLETED)
    assert await late is third
    assert await views.changed("m-1", second) is third  # it has changed already


async def test_waiting_for_an_outcome(journal: Journal) -> None:
    views = MigrationViews(journal)
    views.put(view_of())

    def has_ended(view: MigrationView) -> bool:
        return view.outcome is not Outcome.RUNNING

    waiting = asyncio.create_task(views.wait_for("m-1", has_ended))
    for rounds in range(5):
        views.change("m-1", progress=Progress(rounds=rounds))
        await asyncio.sleep(0)
    await views.end("m-1", Outcome.CANCELLED, None)
    assert (await waiting).outcome is Outcome.CANCELLED
    assert (await views.wait_for("m-1", has_ended)).outcome is Outcome.CANCELLED


def test_only_an_open_phase_is_closed() -> None:
    closed = (PhaseTime(Phase.COPY, "a", "b"),)
    assert close_phase((), "c") == ()
    assert close_phase(closed, "c") == closed
    assert close_phase((*closed, PhaseTime(Phase.FINISH, "b")), "c")[-1].ended_at == "c"
    assert now_text().endswith("+00:00")
