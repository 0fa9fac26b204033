"""The target's side of a disk's way: an NBD server inside the guest's QEMU, and what it offers.

A QEMU has one NBD server. All exports are on it, writable ones for the mirrors and read-only ones for verification, and
are told apart by name. `stop_exports` strictly before `cont`: a writable export left in place takes the device's
permissions away (qemu-notes 0.12).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmferry.model.errors import Failed
from vmferry.qemu.monitor import Monitor, QmpRefused

_LISTENER = "nbd-listener"


@dataclass(frozen=True, slots=True)
class NbdTls:
    """Ids of a tls-creds object (endpoint server) and, unless "", of an authz object."""

    creds: str
    authz: str = ""


async def start_nbd_server(
    monitor: Monitor, host: str, tls: NbdTls | None = None, port: int = 0, max_connections: int = 0
) -> int:
    """Starts the server on an address of ours and gives the port (0: a free one). 0 connections: any number.

    We bind and QEMU inherits: nobody else can take the port in between, and we know its number. Raises Failed
    `nbd-listen`, QmpRefused (it runs already).
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(64)
        except OSError as error:
            raise Failed("nbd-listen", f"{host} port {port} cannot be listened on: {error}.") from error
        await _start(monitor, listener, tls, max_connections)
        return int(listener.getsockname()[1])


async def start_local_nbd_server(monitor: Monitor, path: Path) -> None:
    """Starts the server on a Unix socket, without TLS, for readers on this host. Raises as `start_nbd_server`."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            listener.bind(f"/proc/self/fd/{directory}/{path.name}")
            path.chmod(0o600)
            listener.listen(16)
            await _start(monitor, listener, None, 0)
    except OSError as error:
        raise Failed("nbd-listen", f"{path} cannot be listened on: {error}.") from error
    finally:
        os.close(directory)


async def _start(monitor: Monitor, listener: socket.socket, tls: NbdTls | None, max_connections: int) -> None:
    await monitor.pass_fd(listener.fileno(), _LISTENER)
    arguments: dict[str, object] = {"addr": {"type": "fd", "data": {"str": _LISTENER}}}
    arguments["max-connections"] = max_connections
    if tls is not None:
        arguments["tls-creds"] = tls.creds
        if tls.authz:
            arguments["tls-authz"] = tls.authz
    try:
        await monitor.execute("nbd-server-start", arguments=arguments)
    except QmpRefused:
        with contextlib.suppress(QmpRefused):
            await monitor.execute("closefd", fdname=_LISTENER)
        raise


async def export_disk(
    monitor: Monitor, node: str, name: str, writable: bool, bitmaps: Sequence[str] = (), iothread: str = ""
) -> str:
    """Offers a node under a name; gives the export's id. Bitmaps are offered as `qemu:dirty-bitmap:NAME`.

    Raises QmpRefused.
    """
    export_id = f"nbd.{name}"
    arguments: dict[str, object] = {"type": "nbd", "id": export_id, "node-name": node, "name": name}
    arguments["writable"] = writable
    if bitmaps:
        arguments["bitmaps"] = [{"node": node, "name": bitmap} for bitmap in bitmaps]
    if iothread:
        arguments["iothread"] = iothread
    await monitor.execute("block-export-add", arguments=arguments)
    return export_id


async def export_readonly(monitor: Monitor, node: str, name: str, bitmaps: Sequence[str] = ()) -> str:
    """Offers a node for reading (verification), beside a mirror or a writable export of it.

    Its bitmaps must be frozen (`blocks.freeze_bitmap`). Raises QmpRefused.
    """
    return await export_disk(monitor, node, name, writable=False, bitmaps=bitmaps)


async def remove_export(monitor: Monitor, export_id: str) -> None:
    """Takes an export away, also from under its clients, and waits until it is gone. Raises QmpRefused."""
    gone = monitor.expect("BLOCK_EXPORT_DELETED", lambda event: event.data.get("id") == export_id)
    try:
        await monitor.execute("block-export-del", id=export_id, mode="hard")
        await gone
    finally:
        gone.cancel()


async def stop_exports(monitor: Monitor) -> None:
    """Stops the server; all its exports and connections are gone when it returns. One command. Raises QmpRefused."""
    await monitor.execute("nbd-server-stop")
