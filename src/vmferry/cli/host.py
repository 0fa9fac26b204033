"""`vmferry host`: hosts, what they can do, and how they come to trust each other."""

from __future__ import annotations

from pathlib import Path

import click

from vmferry.cli.command import Function, common, example, narrowed
from vmferry.cli.names import HostName
from vmferry.cli.session import Session
from vmferry.model.names import require_name

DEFAULT_DAEMON_CONFIG = Path("/etc/vmferry/vmferryd.toml")

_NEWCOMER = (
    click.option("--name", help="This host's name, instead of the daemon's setting."),
    click.option("--address", metavar="IP:PORT", help="Where the other hosts reach this one, instead of the setting."),
    click.option("--config-dir", type=click.Path(path_type=Path), help="Directory of the certificates, likewise."),
    click.option(
        "--daemon-config",
        type=click.Path(path_type=Path),
        default=DEFAULT_DAEMON_CONFIG,
        show_default=True,
        help="vmferryd's settings.",
    ),
)


def _newcomer(function: Function) -> Function:
    for option in reversed(_NEWCOMER):
        function = option(function)
    return function


@click.group("host")
def command() -> None:
    """Hosts: what they are and can do, and how they come to trust each other."""


@command.command("list", epilog=example("vmferry host list"))
@narrowed
def list_hosts(session: Session) -> None:
    """All configured hosts and the peers they know."""
    from vmferry.cli import display, fleet, host_view

    views = fleet.hosts(session)
    if session.as_json:
        display.document(views)
    else:
        host_view.show_hosts(views)


@command.command("show", epilog=example("vmferry host show host2"))
@click.argument("name", type=HostName())
@common
def show_host(session: Session, name: str) -> None:
    """One host with its pools and switches."""
    from vmferry.cli import display, fleet, host_view
    from vmferry.model.errors import NotFound

    require_name(name, "host")
    view = next((view for view in fleet.hosts(session) if view.name == name), None)
    if view is None:
        raise NotFound("unknown-host", f"No host “{name}” is known.", "vmferry host list shows those that are.")
    if session.as_json:
        display.document(view)
    else:
        host_view.show_host(view)


@command.command("probe", epilog=example("vmferry host probe", "vmferry host probe host2"))
@click.argument("name", type=HostName(), required=False)
@common
def probe_host(session: Session, name: str | None) -> None:
    """What a host can do: is KVM really usable, QEMU, CPU, pools, switches. It runs a tiny guest to know."""
    from vmferry.cli import display, fleet, host_view

    view = fleet.only_client(session, name).probe_host()
    if session.as_json:
        display.document(view)
    else:
        host_view.show_host(view)


@command.command("init", epilog=example("vmferry host init --name host1 --address 192.0.2.1:7443"))
@_newcomer
@common
def init_host(
    session: Session, name: str | None, address: str | None, config_dir: Path | None, daemon_config: Path
) -> None:
    """Makes the CA and this host's certificates, on the first host. The daemon need not run."""
    from vmferry.api import joining
    from vmferry.cli import display

    host = joining.read_newcomer(daemon_config, name, address, config_dir)
    joining.init(host)
    if session.as_json:
        display.document({"name": host.name, "address": host.address, "tls_dir": str(host.tls_dir)})
        return
    display.line(f"{host.name} has a CA and certificates in {host.tls_dir}", "bold")
    display.print_note("next: systemctl restart vmferryd; then, for each further host, vmferry host token")


@command.command("token", epilog=example("vmferry host token"))
@narrowed
def create_token(session: Session) -> None:
    """A one-time token with which one further host may join. Only the host with the CA makes them."""
    from vmferry.cli import display, fleet

    token, expires_at = fleet.only_client(session, session.host).create_token()
    if session.as_json:
        display.document({"token": token, "expires_at": expires_at})
        return
    display.line(token)
    display.print_note(f"valid once, until {expires_at}; on the new host: vmferry host join TOKEN")


@command.command("join", epilog=example("vmferry host join TOKEN", "vmferry host join TOKEN --name host2"))
@click.argument("token")
@_newcomer
@common
def join_host(
    session: Session, token: str, name: str | None, address: str | None, config_dir: Path | None, daemon_config: Path
) -> None:
    """Gets this host's certificates from the host that made the token. The daemon need not run."""
    from vmferry.api import joining
    from vmferry.cli import display

    host = joining.read_newcomer(daemon_config, name, address, config_dir)
    peers = joining.join(host, token)
    untold = _tell_daemon(host.socket, peers)
    if session.as_json:
        told = {"name": host.name, "address": host.address, "tls_dir": str(host.tls_dir), "peers": peers}
        display.document(told)
        return
    display.line(f"{host.name} has certificates in {host.tls_dir}; it knows {', '.join(sorted(peers)) or 'no host'}")
    display.print_note("next: systemctl restart vmferryd")
    for peer in untold:
        display.print_note(f"      vmferry host add {peer} {peers[peer]}")


def _tell_daemon(socket: Path, peers: dict[str, str]) -> list[str]:
    """Makes the peers known to this machine's daemon; gives those that it could not be told."""
    from vmferry.api.client import HostClient
    from vmferry.api.endpoints import LOCAL_NAME, Endpoint
    from vmferry.cli import display
    from vmferry.model.errors import Unreachable, VmferryError

    client, untold = HostClient(Endpoint(LOCAL_NAME, socket=socket)), []
    for name, address in sorted(peers.items()):
        try:
            client.put_peer(name, address)
        except Unreachable:
            untold.append(name)
        except VmferryError as error:
            display.print_warning(error.message)
            untold.append(name)
    return untold


@command.command("add", epilog=example("vmferry host add host2 192.0.2.2:7443"))
@click.argument("name", type=HostName())
@click.argument("address", metavar="HOST:PORT")
@narrowed
def add_host(session: Session, name: str, address: str) -> None:
    """Tells this host (or the one that --host names) where another host is."""
    from vmferry.api.endpoints import split_address
    from vmferry.cli import display, fleet

    split_address(address)
    fleet.only_client(session, session.host).put_peer(require_name(name, "host"), address)
    if session.as_json:
        display.document({"name": name, "address": address})
    else:
        display.line(f"{name} is known at {address}")


@command.command("remove", epilog=example("vmferry host remove host2"))
@click.argument("name", type=HostName())
@narrowed
def remove_host(session: Session, name: str) -> None:
    """Makes this host (or the one that --host names) forget another host."""
    from vmferry.cli import display, fleet

    fleet.only_client(session, session.host).delete_peer(require_name(name, "host"))
    if session.as_json:
        display.document({"name": name})
    else:
        display.line(f"{name} is no longer known")
