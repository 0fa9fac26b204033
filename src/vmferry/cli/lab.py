"""`vmferry lab`: hosts in network namespaces on this machine. Beside the tests nothing else sees `vmferry.lab`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmferry.cli.command import common, example
from vmferry.cli.session import Session

if TYPE_CHECKING:
    from vmferry.lab.namespaces import LabState

_prefix = click.option("--prefix", default="vmferry", show_default=True, help="The lab's name; several can be up.")


@click.group("lab")
def command() -> None:
    """Hosts in network namespaces on this machine, each with the real vmferryd; a switch; a client."""


@command.command("up", epilog=example("vmferry lab up", "vmferry lab up --hosts 2 --link 500mbit --json"))
@click.option("--hosts", type=int, default=3, show_default=True, help="How many hosts.")
@click.option("--link", metavar="RATE", default="1gbit", show_default=True, help="Speed of the migration network.")
@click.option(
    "--accel", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", show_default=True, help="Of guests."
)
@_prefix
@common
def up(session: Session, hosts: int, link: str, accel: str, prefix: str) -> None:
    """Brings the lab up, or completes it; in it the commands work without further options."""
    from vmferry.cli import display
    from vmferry.lab.namespaces import lab_up
    from vmferry.model.units import parse_rate_bps

    state = lab_up(hosts, parse_rate_bps(link), prefix, accel=accel)
    if session.as_json:
        display.document(state.document())
    else:
        _show(state)


def _show(state: LabState) -> None:
    from vmferry.cli import display

    rows = [
        (host.name, host.namespace, host.migration_address, state.daemons[host.name].pid, str(host.directory))
        for host in state.layout.hosts
        if host.name in state.daemons
    ]
    display.table(("HOST", "NAMESPACE", "MIGRATION", ">VMFERRYD", "DIRECTORY"), rows, "no hosts")
    display.print_note("try: vmferry host list; vmferry lab exec client -- ip address; vmferry lab down")
    if state.layout.prefix != "vmferry":
        display.print_note(f"for this lab: export VMFERRY_CONFIG={state.layout.client_config}")


@command.command("down", epilog=example("vmferry lab down"))
@_prefix
@common
def down(session: Session, prefix: str) -> None:
    """Stops and removes all of the lab, whatever state it is in."""
    from vmferry.cli import display
    from vmferry.lab.namespaces import lab_down

    lab_down(prefix)
    if session.as_json:
        display.document({})
    else:
        display.line("the lab is down")


@command.command("exec", epilog=example("vmferry lab exec client -- ping -c 3 10.77.0.50"))
@click.argument("name")
@click.argument("argv", nargs=-1, required=True, metavar="-- COMMAND ...", type=click.UNPROCESSED)
@_prefix
@common
def execute(session: Session, name: str, argv: tuple[str, ...], prefix: str) -> int:
    """Runs a command in a namespace of the lab (host1, ..., client, switch); its exit status is this command's.

    With --json the command's output goes to stderr.
    """
    from vmferry.cli import display
    from vmferry.lab.namespaces import lab_exec

    if not session.as_json:
        return lab_exec(prefix, name, argv)
    with _stdout_to_stderr():
        status = lab_exec(prefix, name, argv)
    display.document({"name": name, "command": argv, "exit_status": status})
    return status


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@command.command("guest", epilog=example("vmferry lab guest", "vmferry lab guest --output /tmp/guest"))
@click.option("--output", type=click.Path(path_type=Path), help="Copy them into this directory.")
@common
def guest(session: Session, output: Path | None) -> None:
    """Builds the small guest, if it is not built yet, and prints the paths of its kernel and initramfs."""
    from vmferry.cli import display
    from vmferry.lab.guest import build_guest

    images = build_guest(output)
    if session.as_json:
        display.document(images)
    else:
        display.line(images.kernel)
        display.line(images.initrd)
