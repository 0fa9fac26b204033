"""What this host shows of its migrations: kept in memory and in the journal, changed in one place, watched by many.

Nothing is decided by it: what was saved may be old or unreadable, and the records (`migration.records`) then say how
far a migration is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from vmferry.host import log
from vmferry.host.journal import Journal, JournalBroken, ViewRow
from vmferry.migration.records import MigrationRecord, RecordState
from vmferry.model.errors import NotFound
from vmferry.model.migration import (
    MigrateOptions,
    MigrationView,
    Mode,
    Outcome,
    Phase,
    PhaseTime,
    Progress,
    Reason,
    Role,
)

_KEPT = 1000
# The later ones are told by the record's state, and an fsync of theirs would be in the way of the handoff's.
_SAVED_PHASES = frozenset({Phase.PREPARE, Phase.COPY})
_BY_STATE = {RecordState.HANDED_OVER: Phase.HANDOFF, RecordState.TAKEN: Phase.FINISH}


def now_text() -> str:
    """The present time, RFC 3339 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class MigrationViews:
    """All migrations that this host knows, newest first."""

    def __init__(self, journal: Journal, host: str) -> None:
        self._journal = journal
        self._host = host
        self._views: dict[str, MigrationView] = {}
        self._changed: dict[str, asyncio.Event] = {}
        self._saving: set[asyncio.Task[None]] = set()

    async def load(self) -> None:
        """Reads what earlier lives of the daemon saved. Raises JournalBroken.

        A view that is damaged is an alarm in the log and no error: an unfinished migration is then shown, and can be
        settled, as far as its record knows it.
        """
        rows = await self._journal.list_views()
        for row in rows:
            if row.problem:
                log.alarm("view-damaged", id=row.id, role=row.role, problem=row.problem)
        for view in restore_views(rows, await self._journal.list_migrations(), self._host):
            self._views[view.id] = view

    def all(self) -> list[MigrationView]:
        """Newest first."""
        return sorted(self._views.values(), key=lambda view: view.started_at, reverse=True)

    def get(self, migration_id: str) -> MigrationView:
        """Raises NotFound `no-such-migration`."""
        view = self._views.get(migration_id)
        if view is None:
            raise NotFound(
                "no-such-migration",
                f"There is no migration {migration_id[:80]!r} here.",
                "See `vmferry migration list`.",
            )
        return view

    def put(self, view: MigrationView) -> None:
        """Adds or replaces one and wakes those who watch it."""
        self._views[view.id] = view
        event = self._changed.pop(view.id, None)
        if event is not None:
            event.set()

    def change(self, migration_id: str, **changes: Any) -> MigrationView:
        """Changes fields of one."""
        view = replace(self.get(migration_id), **changes)
        self.put(view)
        return view

    def enter(self, migration_id: str, phase: Phase) -> None:
        """A phase begins, and the one before ends."""
        view = self.get(migration_id)
        if view.phases and view.phases[-1].name is phase:
            return
        at = now_text()
        self.change(migration_id, phase=phase, phases=(*close_phase(view.phases, at), PhaseTime(phase, at)))
        if phase in _SAVED_PHASES:
            task = asyncio.create_task(self._save_quietly(migration_id))
            self._saving.add(task)
            task.add_done_callback(self._saving.discard)

    async def _save_quietly(self, migration_id: str) -> None:
        """The migration does not wait for it, and does not fail with it."""
        try:
            await self.save(migration_id)
        except JournalBroken as broken:
            log.alarm("view-not-saved", id=migration_id, problem=broken.message)

    async def end(self, migration_id: str, outcome: Outcome, reason: Reason | None, **changes: Any) -> MigrationView:
        """The migration has ended; saved."""
        view, at = self.get(migration_id), now_text()
        view = self.change(
            migration_id, outcome=outcome, reason=reason, ended_at=at, phases=close_phase(view.phases, at), **changes
        )
        await self._journal.save_view(view)
        return view

    async def save(self, migration_id: str) -> None:
        """Saves it as it is."""
        await self._journal.save_view(self.get(migration_id))

    async def changed(self, migration_id: str, seen: MigrationView) -> MigrationView:
        """The view once it is another one than `seen`."""
        while (view := self.get(migration_id)) is seen:
            await self._changed.setdefault(migration_id, asyncio.Event()).wait()
        return view

    async def wait_for(self, migration_id: str, wanted: Callable[[MigrationView], bool]) -> MigrationView:
        """The view once it is as wanted."""
        view = self.get(migration_id)
        while not wanted(view):
            view = await self.changed(migration_id, view)
        return view


def restore_views(rows: Sequence[ViewRow], records: Sequence[MigrationRecord], host: str) -> tuple[MigrationView, ...]:
    """What is shown after a restart, oldest first: the newest that were saved, and every unfinished migration.

    One that has ended and whose view is lost is not shown: its record does not say how it ended.
    """
    unfinished = {(r.id, str(r.role)): r for r in records if r.state is not RecordState.ENDED}
    shown: list[MigrationView] = []
    for number, row in enumerate(rows):
        record = unfinished.get((row.id, row.role))
        if record is not None:
            view = row.view or _view_of_record(record, host, row.began_at)
            shown.append(replace(view, phase=_BY_STATE.get(record.state, view.phase)))
        elif row.view is not None and number < _KEPT:
            shown.append(row.view)
    return tuple(reversed(shown))


def _view_of_record(record: MigrationRecord, host: str, began_at: str) -> MigrationView:
    source, target = (host, record.peer) if record.role is Role.SOURCE else (record.peer, host)
    first = Phase.CHECK if record.role is Role.SOURCE else Phase.PREPARE
    return MigrationView(
        id=record.id,
        vm=record.vm_name,
        vm_id=record.vm_id,
        role=record.role,
        source=source,
        target=target,
        mode=Mode.LIVE,
        phase=first,
        outcome=Outcome.RUNNING,
        generation=record.generation,
        started_at=began_at,
        ended_at="",
        phases=(PhaseTime(first, began_at),),
        progress=Progress(),
        options=MigrateOptions(keep_source=record.keep_source),
    )


def close_phase(phases: tuple[PhaseTime, ...], at: str) -> tuple[PhaseTime, ...]:
    """The last phase ends now, if it had not."""
    if not phases or phases[-1].ended_at:
        return phases
    return (*phases[:-1], replace(phases[-1], ended_at=at))
