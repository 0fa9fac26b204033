"""`vmferry vm`: create, run, look at, check and migrate VMs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmferry.cli.command import common, example, narrowed
from vmferry.cli.names import HostName, VmName
from vmferry.cli.options import migrate_options, read_options
from vmferry.cli.session import Session

if TYPE_CHECKING:
    from vmferry.model.migration import CheckResult
    from vmferry.model.views import VmView

_name = click.argument("name", type=VmName())


@click.group("vm")
def command() -> None:
    """VMs: create, run, look at, check, migrate."""


@command.command("create", epilog=example("vmferry vm create -f web1.toml --host host1"))
@click.option("-f", "--file", type=click.Path(path_type=Path), required=True, help="The VM's specification (TOML).")
@click.option("--host", required=True, type=HostName(), metavar="HOST", help="Where the VM begins.")
@common
def create(session: Session, file: Path) -> None:
    """Defines a VM and makes or imports its images; it is not started."""
    from vmferry.cli import fleet
    from vmferry.cli.spec import read_spec

    assert session.host is not None
    spec = read_spec(file)
    _show_act(session, fleet.host_client(session, session.host).create_vm(spec), "defined")


@command.command("start", epilog=example("vmferry vm start web1"))
@_name
@narrowed
def start(session: Session, name: str) -> None:
    """Starts a VM on the host that has it."""
    from vmferry.cli import fleet

    _show_act(session, fleet.owner(session, name)[0].start_vm(name), "started")


@command.command("stop", epilog=example("vmferry vm stop web1 --timeout 2m"))
@_name
@click.option("--timeout", metavar="TIME", default="60s", show_default=True, help="How long the guest may take.")
@narrowed
def stop(session: Session, name: str, timeout: str) -> None:
    """Asks the guest to shut down; fails if it does not in time."""
    from vmferry.cli import fleet
    from vmferry.model.units import parse_duration_ms

    timeout_ms = parse_duration_ms(timeout)
    _show_act(session, fleet.owner(session, name)[0].stop_vm(name, timeout_ms), "stopped")


@command.command("kill", epilog=example("vmferry vm kill web1"))
@_name
@narrowed
def kill(session: Session, name: str) -> None:
    """Ends the guest at once, as pulling the plug does."""
    from vmferry.cli import fleet

    _show_act(session, fleet.owner(session, name)[0].kill_vm(name), "killed")


@command.command("pause", epilog=example("vmferry vm pause web1"))
@_name
@narrowed
def pause(session: Session, name: str) -> None:
    """Halts the guest's CPUs; vm resume lets them go on."""
    from vmferry.cli import fleet

    _show_act(session, fleet.owner(session, name)[0].pause_vm(name), "paused")


@command.command("resume", epilog=example("vmferry vm resume web1"))
@_name
@narrowed
def resume(session: Session, name: str) -> None:
    """Lets a paused guest go on."""
    from vmferry.cli import fleet

    _show_act(session, fleet.owner(session, name)[0].resume_vm(name), "resumed")


@command.command("delete", epilog=example("vmferry vm delete web1", "vmferry vm delete web1 --yes"))
@_name
@click.option("--yes", is_flag=True, help="Do not ask (on a terminal it is asked).")
@narrowed
def delete(session: Session, name: str, yes: bool) -> None:
    """Deletes a stopped VM and its images."""
    from vmferry.cli import display, fleet

    client, view = fleet.owner(session, name)
    if not yes and not session.as_json and display.interactive() and sys.stdin.isatty():
        disks = ", ".join(disk.name for disk in view.spec.disks) or "no disk"
        click.confirm(display.safe(f"Delete {name} on {view.host} with its images ({disks})?"), abort=True)
    client.delete_vm(name)
    if session.as_json:
        display.document({})
    else:
        display.line(f"{name} is deleted")


@command.command("list", epilog=example("vmferry vm list", "vmferry vm list --host host1 --json"))
@narrowed
def list_vms(session: Session) -> None:
    """All VMs of all hosts."""
    from vmferry.cli import display, fleet, vm_view

    views = fleet.newest(fleet.gather(session, lambda client: client.vms()))
    views.sort(key=lambda view: (view.spec.name, view.host))
    if session.as_json:
        display.document(views)
    else:
        vm_view.show_vms(views)


@command.command("show", epilog=example("vmferry vm show web1"))
@_name
@narrowed
def show_one(session: Session, name: str) -> None:
    """One VM with its disks and network cards."""
    from vmferry.cli import display, fleet, vm_view

    view = fleet.owner(session, name)[1]
    if session.as_json:
        display.document(view)
    else:
        vm_view.show_vm(view)


@command.command("console", epilog=example("vmferry vm console web1"))
@_name
@narrowed
def console(session: Session, name: str) -> None:
    """The guest's serial console. Ctrl-] leaves it. With --json only its socket's path is printed."""
    from vmferry.cli import display, fleet
    from vmferry.cli.console import attach, require_console

    client, view = fleet.owner(session, name)
    path = require_console(client, view)
    if session.as_json:
        display.document({"vm": name, "host": view.host, "console": str(path)})
    else:
        attach(path)


@command.command("check", epilog=example("vmferry vm check web1 --to host2", "vmferry vm check web1 --to host2 --json"))
@_name
@migrate_options
@narrowed
def check(session: Session, name: str, to: str, **options: Any) -> int:
    """What stands in the way of a migration: all of it at once, with fixes. Nothing changes. Status 3: refused."""
    from vmferry.cli import fleet

    wanted = read_options(options)
    client, _ = fleet.owner(session, name)
    return _show_check(session, client.check(name, to, wanted))


@command.command(
    "migrate",
    epilog=example(
        "vmferry vm migrate web1 --to host2",
        "vmferry vm migrate web1 --to host2 --storage fast --max-blackout 100ms --verify all",
        "vmferry vm migrate web1 --to host2 --dry-run",
    ),
)
@_name
@migrate_options
@click.option("--dry-run", is_flag=True, help="The check and the prediction only; nothing moves.")
@click.option("--detach", is_flag=True, help="Begin, print the migration's id, do not watch.")
@narrowed
def migrate(session: Session, name: str, to: str, dry_run: bool, detach: bool, **options: Any) -> int:
    """Moves a running VM to another host. Ctrl-C ends only the watching, never the migration.

    With --json a line of JSON at every change; if the exit status is not 0, the last line has the error.
    """
    from vmferry.cli import display, fleet
    from vmferry.cli.follow import follow

    wanted = read_options(options)
    client, _ = fleet.owner(session, name)
    if dry_run:
        return _show_check(session, client.check(name, to, wanted))
    try:
        view = client.migrate(name, to, wanted)
    except KeyboardInterrupt:
        display.print_note("whether the migration has begun is not known: vmferry migration list")
        raise
    if not detach:
        return follow(session, client, view)
    if session.as_json:
        display.document(view)
    else:
        display.line(view.id)
        display.print_note(f"vmferry migration watch {view.id} shows it")
    return 0


def _show_check(session: Session, result: CheckResult) -> int:
    from vmferry.model.errors import Refused

    if session.as_json:
        from vmferry.cli import display

        display.document(result)
    else:
        from vmferry.cli.check_view import show_check

        show_check(result)
    return 0 if result.ok else Refused.exit_status


def _show_act(session: Session, view: VmView, done: str) -> None:
    from vmferry.cli import display

    if session.as_json:
        display.document(view)
        return
    display.line(f"{view.spec.name} is {done} on {view.host} (now {view.state.value})")
    if view.problem:
        display.print_warning(view.problem)
