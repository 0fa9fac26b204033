"""Following a migration until its outcome is known: as a live picture, as plain lines, or as JSON lines.

For the nouns `vm` and `migration`. Following never changes the migration: Ctrl-C, a closed terminal or a lost daemon
only end the watching.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from vmferry.api.client import HostClient
from vmferry.api.codec import problem
from vmferry.cli.display import console, interactive, json_line, line, mark, print_error, print_note, print_warning
from vmferry.cli.session import Session
from vmferry.model.errors import Failed, OutcomeUnknown, Refused, Unreachable, VmferryError
from vmferry.model.migration import MigrationView, Outcome
from vmferry.model.units import format_ms

if TYPE_CHECKING:
    from rich.console import RenderableType

CONTACT_LIMIT_S = 30.0  # a daemon that is being restarted is back within this
_RETRY_S = 0.5
_FRAMES_PER_S = 8
_REMEMBERED_RATES = 20
INTERRUPTED = 130


class _Screen(Protocol):
    def show(self, view: MigrationView) -> None:
        """The migration as it is now."""

    def notice(self, message: str) -> None:
        """Something about the watching itself; empty when it is over."""


def follow(session: Session, client: HostClient, first: MigrationView) -> int:
    """Watches a migration to its end, shows the end, and gives the exit status (interface.md)."""
    try:
        with _screen(session, first) as screen:
            last = first
            for last in until_known(client, first, screen.notice):
                screen.show(last)
    except KeyboardInterrupt:
        _say_detached(first.id)
        return INTERRUPTED
    return conclude(session, client, last)


def _say_detached(migration_id: str) -> None:
    print_note(f"the migration goes on; to see it: vmferry migration watch {migration_id}")
    print_note(f"                       to end it: vmferry migration cancel {migration_id}")


def until_known(
    client: HostClient, first: MigrationView, notice: Callable[[str], None], limit_s: float = CONTACT_LIMIT_S
) -> Iterator[MigrationView]:
    """Every view until the outcome is known, over quiet times and restarts of the daemon.

    Raises OutcomeUnknown: `contact-lost` when the host has not answered for `limit_s`, `watch-failed` when its answers
    make no sense. Both say nothing about the migration.
    """
    yield first
    last, lost_at = first, None
    while last.outcome is Outcome.RUNNING:
        try:
            for last in _events(client, first.id):
                lost_at = None
                notice("")
                yield last
        except Unreachable as error:
            now = time.monotonic()
            lost_at = now if lost_at is None else lost_at
            if now - lost_at > limit_s:
                raise _contact_lost(client, first.id) from error
            notice(f"{client.endpoint.name} does not answer; trying again")
        except VmferryError as error:
            raise _watch_failed(first.id, error) from error
        if last.outcome is Outcome.RUNNING:
            time.sleep(_RETRY_S)


def _events(client: HostClient, migration_id: str) -> Iterator[MigrationView]:
    """The state now, then every change. A stream that breaks off just ends: the next state tells whether it matters."""
    yield client.migration(migration_id)
    try:
        yield from client.events(migration_id)
    except Unreachable:
        return


def _watch_failed(migration_id: str, error: VmferryError) -> OutcomeUnknown:
    message = f"The migration {migration_id} cannot be watched any more: {error.message}"
    return OutcomeUnknown("watch-failed", message, f"See vmferry migration show {migration_id}.")


def _contact_lost(client: HostClient, migration_id: str) -> OutcomeUnknown:
    return OutcomeUnknown(
        "contact-lost",
        f"{client.endpoint.name} no longer answers; the migration {migration_id} may go on or have ended.",
        f"vmferry migration watch {migration_id}, or once the host is back: vmferry migration recover {migration_id}",
    )


def _screen(session: Session, first: MigrationView) -> AbstractContextManager[_Screen]:
    if session.as_json:
        return nullcontext(_JsonLines())
    return _Picture(first) if interactive() else nullcontext(_PlainLines())


class _JsonLines:
    def show(self, view: MigrationView) -> None:
        json_line(view)

    def notice(self, message: str) -> None:
        if message:
            print_warning(message)


class _PlainLines:
    """One line for every phase, for logs and pipes; also for phases that were over before they could be seen."""

    def __init__(self) -> None:
        self._shown = 0
        self._notice = ""

    def show(self, view: MigrationView) -> None:
        for phase in view.phases[self._shown :]:
            move = f"{view.source} {mark('→', '->')} {view.target}"
            line(f"{phase.started_at} {view.id} {view.vm} {move} {phase.name.value}")
        self._shown = len(view.phases)

    def notice(self, message: str) -> None:
        if message and message != self._notice:
            print_warning(message)
        self._notice = message


class _Picture:
    """The live picture. Drawn by rich's own thread eight times a second, so that the elapsed time runs."""

    def __init__(self, first: MigrationView) -> None:
        from rich.live import Live

        from vmferry.cli.live import elapsed_ms

        self._view = first
        self._notice = ""
        self._disk_rates: deque[int] = deque(maxlen=_REMEMBERED_RATES)
        self._memory_rates: deque[int] = deque(maxlen=_REMEMBERED_RATES)
        self._behind_ms = elapsed_ms(first.started_at)
        self._began = time.monotonic()
        self._live = Live(
            get_renderable=self._draw, console=console(), refresh_per_second=_FRAMES_PER_S, redirect_stdout=False
        )

    def __enter__(self) -> _Picture:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, view: MigrationView) -> None:
        self._view = view
        if view.progress.disk_rate:
            self._disk_rates.append(view.progress.disk_rate)
        if view.progress.memory_rate:
            self._memory_rates.append(view.progress.memory_rate)

    def notice(self, message: str) -> None:
        self._notice = message

    def _draw(self) -> RenderableType:
        from vmferry.cli.live import Frame, draw

        view = self._view
        elapsed = self._behind_ms + (time.monotonic() - self._began) * 1000
        if view.total_ms is not None:
            elapsed = view.total_ms
        rates = tuple(self._disk_rates), tuple(self._memory_rates)
        return draw(Frame(view, elapsed, *rates, self._notice), console().width)


def conclude(session: Session, client: HostClient, view: MigrationView) -> int:
    """Shows how a migration ended: the receipt in short, or the error. Gives the exit status; raises nothing for it."""
    if view.outcome is Outcome.COMPLETED:
        if not session.as_json:
            _show_receipt(client, view)
        return 0
    if view.outcome is Outcome.RUNNING:
        return 0
    error = error_of(view)
    if isinstance(error, Refused):
        return _refuse(session, client, view, error)
    return _fail(session, error)


def error_of(view: MigrationView) -> VmferryError:
    """The error that stands for a migration which ended otherwise than completed."""
    reason = view.reason
    code = reason.code if reason else view.outcome.value
    message = reason.message if reason else f"The migration of {view.vm} to {view.target} ended: {view.outcome.value}."
    fix = reason.fix if reason else ""
    if view.outcome is Outcome.UNKNOWN:
        return OutcomeUnknown(code, message, fix or f"vmferry migration recover {view.id}")
    if code == "refused":
        return Refused(code, message, fix)
    return Failed(code, message, fix)


def _refuse(session: Session, client: HostClient, view: MigrationView, error: Refused) -> int:
    try:
        check = client.migration_check(view.id)
    except VmferryError as missing:
        print_warning(f"what the check found cannot be shown: {missing.message}")
        return _fail(session, error)
    if not session.as_json:
        from vmferry.cli.check_view import show_check

        show_check(check)
        error = Refused(error.code, f"{view.vm} stays on {view.source}: see above what is in the way.")
    return _fail(session, error, {"check": check})


def _fail(session: Session, error: VmferryError, more: Mapping[str, object] = {}) -> int:
    print_error(error)
    if session.as_json:
        json_line({"error": problem(error) | dict(more)})
    return error.exit_status


def _show_receipt(client: HostClient, view: MigrationView) -> None:
    from vmferry.cli.receipt_view import show_short_receipt

    try:
        show_short_receipt(client.receipt(view.id))
    except VmferryError as error:
        took = f" in {format_ms(view.total_ms)}" if view.total_ms is not None else ""
        line(f"{view.vm} runs on {view.target}{took}")
        print_warning(f"the receipt cannot be shown: {error.message}")
