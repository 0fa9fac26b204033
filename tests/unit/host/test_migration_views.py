"""What is shown of migrations: kept, changed in one place, watched by many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_journal import OTHER, moved, overwrite, record_of, view_of

from vmferry.host.journal import Journal, JournalBroken, ViewRow
from vmferry.host.migration_views import MigrationViews, close_phase, now_text, restore_views
from vmferry.migration.records import RecordState
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
    views = MigrationViews(journal, "host1")
    views.put(view_of())
    for phase in (Phase.COPY, Phase.SWITCHOVER, Phase.SWITCHOVER, Phase.FINISH):
        views.enter("m-1", phase)
    phases = views.get("m-1").phases
    assert [phase.name for phase in phases] == [Phase.COPY, Phase.SWITCHOVER, Phase.FINISH]
    assert [bool(phase.ended_at) for phase in phases] == [True, True, False]
    assert phases[0].ended_at == phases[1].started_at


async def test_the_end_is_saved_and_comes_back(journal: Journal) -> None:
    views = MigrationViews(journal, "host1")
    views.put(view_of())
    reason = Reason("code", "Message.", "Fix.")
    ended = await views.end("m-1", Outcome.FAILED, reason, blackout_ms=12.5)
    assert (ended.outcome, ended.reason, ended.blackout_ms) == (Outcome.FAILED, reason, 12.5)
    assert ended.ended_at and all(phase.ended_at for phase in ended.phases)
    again = MigrationViews(journal, "host1")
    await again.load()
    assert again.all() == [ended]


async def test_newest_first_also_after_a_restart(journal: Journal) -> None:
    views = MigrationViews(journal, "host1")
    await views.load()
    for second in (1, 3, 2):
        views.put(replace(view_of(f"m-{second}x"), started_at=f"2026-01-01T00:00:0{second}.000+00:00"))
    assert [view.id for view in views.all()] == ["m-3x", "m-2x", "m-1x", "m-1"]


async def test_an_unknown_one_is_named(journal: Journal) -> None:
    views = MigrationViews(journal, "host1")
    for act in (views.get, lambda name: views.change(name, note=1), lambda name: views.enter(name, Phase.COPY)):
        with pytest.raises(NotFound) as caught:
            act("m-9\x1b" * 1000)
        assert caught.value.code == "no-such-migration"
        assert len(caught.value.message) < 300 and "\x1b" not in caught.value.message


async def test_all_watchers_see_a_change_and_none_sees_it_twice(journal: Journal) -> None:
    views = MigrationViews(journal, "host1")
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
    views = MigrationViews(journal, "host1")
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


# -- after a restart -------------------------------------------------------------------------------------------------


async def restarted(journal: Journal) -> MigrationViews:
    views = MigrationViews(journal, "host1")
    await views.load()
    return views


@pytest.mark.parametrize("phase", [Phase.PREPARE, Phase.COPY])
async def test_a_phase_is_there_after_a_restart(journal: Journal, phase: Phase) -> None:
    first = (PhaseTime(Phase.CHECK, now_text()),)
    views = MigrationViews(journal, "host1")
    views.put(replace(view_of(), phase=Phase.CHECK, phases=first))
    views.enter("m-1", phase)
    await asyncio.sleep(0)  # saved behind the migration's back
    found = (await restarted(journal)).get("m-1")
    assert (found.phase, [each.name for each in found.phases]) == (phase, [Phase.CHECK, phase])


async def test_no_view_is_saved_beside_the_handoff(journal: Journal) -> None:
    """Its fsync would be in front of the handoff's, on the same thread, while the guest stands still."""
    views = MigrationViews(journal, "host1")
    views.put(view_of())
    before = await journal.list_views()
    for phase in (Phase.SWITCHOVER, Phase.HANDOFF, Phase.FINISH):
        views.enter("m-1", phase)
        await asyncio.sleep(0)
    assert await journal.list_views() == before


@pytest.mark.parametrize(
    ("states", "phase"),
    [
        ((), Phase.COPY),
        ((RecordState.HANDED_OVER,), Phase.HANDOFF),
        ((RecordState.HANDED_OVER, RecordState.TAKEN), Phase.FINISH),
        ((RecordState.ENDED,), Phase.COPY),
    ],
)
async def test_the_record_tells_the_phases_that_were_not_saved(
    journal: Journal, states: tuple[RecordState, ...], phase: Phase
) -> None:
    await moved(journal, record_of(Role.SOURCE), *states)
    assert (await restarted(journal)).get("m-1").phase is phase


async def test_a_phase_that_cannot_be_saved_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    closed = Journal(tmp_path / "other.sqlite")
    await closed.open()
    await closed.close()
    views = MigrationViews(closed, "host1")
    views.put(replace(view_of(), phases=()))
    views.enter("m-1", Phase.COPY)
    await asyncio.sleep(0)
    assert "view-not-saved" in caplog.text and "m-1" in caplog.text


@pytest.mark.parametrize("role", list(Role))
async def test_a_damaged_view_of_an_unfinished_migration_is_made_anew(
    tmp_path: Path, role: Role, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise resuming it would end in "no such migration": its guest would stay as the crash has left it."""
    journal = Journal(tmp_path / "journal.sqlite")
    await journal.open()
    await journal.begin_migration(record_of(role), view_of(role=role))
    overwrite(tmp_path, "view", b"{")
    views = await restarted(journal)
    found = views.get("m-1")
    assert (found.vm, found.vm_id, found.role, found.outcome) == ("web1", "id-1", role, Outcome.RUNNING)
    sides = ("host1", "host2") if role is Role.SOURCE else ("host2", "host1")
    assert (found.source, found.target) == sides
    assert found.started_at and found.phases[0].started_at == found.started_at
    (alarm,) = caplog.records
    assert alarm.levelname == "WARNING" and "view-damaged" in alarm.message and "m-1" in alarm.message
    ended = await views.end("m-1", Outcome.FAILED, None)  # it can be ended and saved as any other
    await journal.close()
    again = Journal(tmp_path / "journal.sqlite")
    await again.open()
    assert [row.view for row in await again.list_views()] == [ended]
    await again.close()


async def test_a_damaged_view_of_an_ended_migration_is_left_out(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await journal.begin_migration(record_of(Role.SOURCE, "m-2", OTHER), view_of("m-2"))
    await moved(journal, record_of(Role.SOURCE), RecordState.ENDED)
    overwrite(tmp_path, "view", b"\xff\xfe")
    assert [view.id for view in (await restarted(journal)).all()] == ["m-2"]
    assert "view-damaged" in caplog.text


async def test_a_damaged_record_is_no_small_matter(journal: Journal, tmp_path: Path) -> None:
    overwrite(tmp_path, "record", b"{")
    with pytest.raises(JournalBroken):
        await restarted(journal)


def test_an_unfinished_migration_is_shown_however_old() -> None:
    """Its outcome may have been unknown for months: it must be there to be settled."""
    ended = [ViewRow(f"m-{n}", "source", "", view_of(f"m-{n}")) for n in range(1000)]
    oldest = ViewRow("m-old", "source", "", view_of("m-old"))
    record = replace(record_of(Role.SOURCE, "m-old"), state=RecordState.HANDED_OVER)
    shown = restore_views([*ended, oldest], [record], "host1")
    assert len(shown) == 1001 and shown[0].id == "m-old"
    assert len(restore_views([*ended, oldest], [], "host1")) == 1000
