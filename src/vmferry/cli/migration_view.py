"""Migrations for people, as a list and one by one. For `cli.migration` only; shows, asks nobody."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.text import Text

from vmferry.cli.check_view import format_range
from vmferry.cli.display import console, facts, line, mark, show, table, text
from vmferry.cli.live import Frame, draw, elapsed_ms
from vmferry.model.migration import MigrationView, Outcome
from vmferry.model.units import format_ms

_STYLES = {
    Outcome.RUNNING: "bold cyan",
    Outcome.COMPLETED: "green",
    Outcome.FAILED: "bold red",
    Outcome.CANCELLED: "yellow",
    Outcome.UNKNOWN: "bold red",
}


def show_migrations(views: Iterable[MigrationView]) -> None:
    """One line a migration."""
    columns = ("ID", "VM", "FROM", "TO", "OUTCOME", "PHASE", "STARTED", ">TOTAL", ">BLACKOUT")
    table(columns, (_row(view) for view in views), "no migrations")


def _row(view: MigrationView) -> tuple[object, ...]:
    phase = view.phase.value if view.outcome is not Outcome.COMPLETED else ""
    started = view.started_at[:19].replace("T", " ")
    times = _ms(view.total_ms), _ms(view.blackout_ms)
    return view.id, view.vm, view.source, view.target, _outcome(view), phase, started, *times


def _ms(value: float | None) -> str:
    return "-" if value is None else format_ms(value)


def _outcome(view: MigrationView) -> Text:
    known = view.reason is not None and view.reason.code != view.outcome.value
    why = f" ({view.reason.code})" if view.reason and known else ""
    return text(view.outcome.value + why, _STYLES[view.outcome])


def show_migration(view: MigrationView) -> None:
    """A migration as it stands now."""
    if view.outcome is Outcome.RUNNING:
        show(draw(Frame(view, elapsed_ms(view.started_at)), console().width))
    else:
        line(f"{view.vm}: {view.source} {mark('→', '->')} {view.target}", "bold")
    facts(_facts(view))


def _facts(view: MigrationView) -> Iterator[tuple[str, object]]:
    yield "outcome", _outcome(view)
    if view.reason:
        yield "reason", view.reason.message
        yield "fix", view.reason.fix
    yield "id", view.id
    yield "phase", view.phase.value
    yield "started", view.started_at
    yield "ended", view.ended_at
    yield "total", _ms(view.total_ms) if view.total_ms is not None else ""
    yield "blackout", _ms(view.blackout_ms) if view.blackout_ms is not None else ""
    yield "predicted", f"blackout {format_range(view.prediction.blackout_ms)}" if view.prediction else ""
    yield "generation", view.generation
