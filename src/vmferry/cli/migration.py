"""`vmferry migration`: watch, cancel and recover migrations, and their receipts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vmferry.cli.command import example, narrowed
from vmferry.cli.names import HostName, MigrationId
from vmferry.cli.session import Session

if TYPE_CHECKING:
    from vmferry.cli.fleet import Record
    from vmferry.model.errors import NotFound
    from vmferry.model.migration import MigrationView
    from vmferry.model.receipt import Receipt

_id = click.argument("migration_id", metavar="ID", type=MigrationId())


@click.group("migration")
def command() -> None:
    """Migrations: watch, cancel, recover, receipts."""


@command.command("list", epilog=example("vmferry migration list"))
@narrowed
def list_migrations(session: Session) -> None:
    """All migrations that the hosts remember, newest first."""
    from vmferry.cli import display, fleet, migration_view

    views = fleet.migrations(session)
    if session.as_json:
        display.document(views)
    else:
        migration_view.show_migrations(views)


@command.command("show", epilog=example("vmferry migration show m-0123456789ab"))
@_id
@narrowed
def show(session: Session, migration_id: str) -> None:
    """One migration as it stands now."""
    from vmferry.cli import fleet

    _show(session, fleet.records(session, migration_id)[0].view)


@command.command("watch", epilog=example("vmferry migration watch m-0123456789ab"))
@_id
@narrowed
def watch(session: Session, migration_id: str) -> int:
    """Follows a migration to its end; the exit status is the migration's. Ctrl-C ends only the watching."""
    from vmferry.cli import fleet
    from vmferry.cli.follow import follow

    record = fleet.records(session, migration_id)[0]
    return follow(session, record.client, record.view)


@command.command("cancel", epilog=example("vmferry migration cancel m-0123456789ab"))
@_id
@narrowed
def cancel(session: Session, migration_id: str) -> None:
    """Ends a migration before the handoff; returns once the guest is known to run on the source."""
    from vmferry.cli import display, fleet

    view = fleet.records(session, migration_id)[0].client.cancel(migration_id)
    if session.as_json:
        display.document(view)
    else:
        display.line(f"{view.id} is {view.outcome.value}; {view.vm} runs on {view.source}")


@command.command(
    "recover",
    epilog=example(
        "vmferry migration recover m-0123456789ab",
        "vmferry migration recover m-0123456789ab --host-is-dead host2",
    ),
)
@_id
@click.option(
    "--host-is-dead",
    type=HostName(),
    metavar="HOST",
    help="Your word that this host is off and stays off. If it is not, two guests may run.",
)
@narrowed
def recover(session: Session, migration_id: str, host_is_dead: str | None) -> int:
    """Settles a migration whose outcome is unknown, by asking both hosts.

    Exit status: 0 it is completed or goes on; 1 the VM runs where it ran before; 4 still unknown.
    """
    from vmferry.cli import fleet

    found = fleet.records(session, migration_id)
    settled = [_recover(record, migration_id, host_is_dead) for record in fleet.unsettled(found)]
    view = settled[0] if settled else found[0].view
    _show(session, view)
    return _status(view)


def _recover(record: Record, migration_id: str, host_is_dead: str | None) -> MigrationView:
    return record.client.recover(migration_id, host_is_dead)


def _status(view: MigrationView) -> int:
    from vmferry.model.errors import Failed, OutcomeUnknown
    from vmferry.model.migration import Outcome

    if view.outcome in (Outcome.COMPLETED, Outcome.RUNNING):
        return 0
    return OutcomeUnknown.exit_status if view.outcome is Outcome.UNKNOWN else Failed.exit_status


@command.command("receipt", epilog=example("vmferry migration receipt m-0123456789ab"))
@_id
@narrowed
def receipt(session: Session, migration_id: str) -> int:
    """The signed record of a finished migration, and whether its signature is valid (if not: status 1)."""
    from vmferry.cli import display, fleet
    from vmferry.model.errors import Failed

    record, found = _receipt(fleet.records(session, migration_id), migration_id)
    signature = record.client.check_receipt(migration_id)
    if session.as_json:
        display.document(found)
        if not signature[0]:
            display.print_warning(f"the signature is not valid: {signature[1]}")
    else:
        from vmferry.cli.receipt_view import show_receipt

        show_receipt(found, signature)
    return 0 if signature[0] else Failed.exit_status


def _receipt(records: list[Record], migration_id: str) -> tuple[Record, Receipt]:
    """From the source, else from the target."""
    from vmferry.model.errors import NotFound

    for record in records[:-1]:
        try:
            return record, record.client.receipt(migration_id)
        except NotFound:
            continue
    try:
        return records[-1], records[-1].client.receipt(migration_id)
    except NotFound as error:
        raise _no_receipt(records[0].view) from error


def _no_receipt(view: MigrationView) -> NotFound:
    from vmferry.model.errors import NotFound
    from vmferry.model.migration import Outcome

    only = "Only a completed migration has a receipt."
    match view.outcome:
        case Outcome.RUNNING:
            why, fix = f"is under way ({view.phase.value}). {only}", "Follow it: vmferry migration watch"
        case Outcome.UNKNOWN:
            why, fix = f"has not ended: its outcome is unknown. {only}", "Settle it: vmferry migration recover"
        case Outcome.COMPLETED:
            # One whose daemon ended, or whose tidying up failed, after the handoff; or its other host did not answer.
            why = "is completed, but no host that answered has a receipt: its last phase was cut short."
            fix = "What happened: vmferry migration show"
        case Outcome.FAILED | Outcome.CANCELLED:
            why, fix = f"ended otherwise: {view.outcome.value}. {only}", "Why: vmferry migration show"
    return NotFound("no-receipt", f"{view.id} {why}", f"{fix} {view.id}.")


def _show(session: Session, view: MigrationView) -> None:
    from vmferry.cli import display, migration_view

    if session.as_json:
        display.document(view)
    else:
        migration_view.show_migration(view)
