"""What this host shows of its migrations: kept in memory and in the journal, changed in one place, watched by many."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from vmferry.host.journal import Journal
from vmferry.model.errors import NotFound
from vmferry.model.migration import MigrationView, Outcome, Phase, PhaseTime, Reason

_KEPT = 1000


def now_text() -> str:
    """The present time, RFC 3339 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class MigrationViews:
    """All migrations that this host knows, newest first."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._views: dict[str, MigrationView] = {}
        self._changed: dict[str, asyncio.Event] = {}

    async def load(self) -> None:
        """Reads what earlier lives of the daemon saved."""
        for view in reversed((await self._journal.list_views())[:_KEPT]):
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


def close_phase(phases: tuple[PhaseTime, ...], at: str) -> tuple[PhaseTime, ...]:
    """The last phase ends now, if it had not."""
    if not phases or phases[-1].ended_at:
        return phases
    return (*phases[:-1], replace(phases[-1], ended_at=at))
