"""A VM's port on a switch: a tap made by us, whose descriptor QEMU gets and of which we keep a duplicate.

For `migration/` and `host/`. A port lives as long as somebody holds its descriptor: nothing can be left over.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from vmferry.model.errors import Conflict, Failed, NotFound
from vmferry.model.names import require_mac
from vmferry.network.messages import (
    Link,
    bridge_port_floods,
    fdb_replace,
    link_delete,
    link_down,
    link_master,
    link_set,
    link_up,
    observe_link,
    observe_links,
)
from vmferry.network.netlink import Netlink, aside
from vmferry.network.redirects import clsact_new
from vmferry.network.tap import name_of_tap, open_tap

PORT_PREFIX: Final = "vf"


@dataclass(frozen=True, slots=True)
class PortRequest:
    """What a port shall be. `switch` is the bridge's device name.

    `salt` tells two ports of one NIC apart while both are in one host (a migration within a host).
    """

    vm_id: str
    index: int
    mac: str
    switch: str
    mtu: int = 1500
    owner_uid: int | None = None
    plugged: bool = True
    txqueuelen: int = 10_000
    salt: str = ""


@dataclass(frozen=True, slots=True)
class Port:
    """A port. `fd` is ours: QEMU gets a duplicate of it; `close_port` gives it up. `mac` is the guest's."""

    name: str
    ifindex: int
    fd: int
    mac: str
    switch: str


def port_name(vm_id: str, index: int, salt: str = "") -> str:
    """The interface name of a VM's NIC on its host: always the same, 13 or 14 characters."""
    return f"{PORT_PREFIX}{hashlib.sha256(f'{vm_id}/{salt}'.encode()).hexdigest()[:10]}{index}"


def host_side_mac(guest_mac: str) -> str:
    """The tap's own MAC: the guest's with another first octet, high so that no bridge takes it for its own."""
    return ("fa" if guest_mac.startswith("fe") else "fe") + guest_mac[2:]


async def create_port(netlink: Netlink, request: PortRequest) -> Port:
    """Makes the port, up, and in its switch if `plugged`. On failure nothing is left.

    Raises Conflict `port-exists`, NotFound `switch-missing`, KernelRefused.
    """
    return await aside(_create, netlink, request, undo=close_port)


def _create(netlink: Netlink, request: PortRequest) -> Port:
    mac = require_mac(request.mac)
    name = port_name(request.vm_id, request.index, request.salt)
    require_bridge(netlink, request.switch)
    if observe_link(netlink, name) is not None:
        raise Conflict("port-exists", f"Port {name} of this VM exists already.", "The VM's QEMU still runs: stop it.")
    fd = open_tap(name, request.owner_uid)
    try:
        link = _require_link(netlink, name)
        silence(name)
        configure = link_set(name, link.index, mtu=request.mtu, mac=host_side_mac(mac), txqueuelen=request.txqueuelen)
        # The gate's hook is put there now: adding it to a device that is up resets its queue, and frames are lost.
        netlink.run(configure, clsact_new(name, link.index), link_up(name, link.index))
        port = Port(name, link.index, fd, mac, request.switch)
        if request.plugged:
            _plug(netlink, port)
    except BaseException:
        os.close(fd)
        raise
    return port


def require_bridge(netlink: Netlink, device: str) -> Link:
    """The bridge. Raises NotFound `switch-missing`."""
    bridge = observe_link(netlink, device)
    if bridge is None or bridge.kind != "bridge":
        raise NotFound("switch-missing", f"There is no bridge {device}.", "Restart vmferryd, which makes its switches.")
    return bridge


def _require_link(netlink: Netlink, name: str) -> Link:
    link = observe_link(netlink, name)
    if link is None:
        raise Failed("port-gone", f"Interface {name} has disappeared.")
    return link


def silence(name: str) -> None:
    """The host itself says nothing on this device (no IPv6 router solicitations, no multicast reports)."""
    path = Path("/proc/sys/net/ipv6/conf") / name / "disable_ipv6"
    if path.exists():
        try:
            path.write_text("1")
        except OSError as error:
            raise Failed("port-ipv6", f"IPv6 cannot be switched off on {name} ({error.strerror}).") from error


async def plug(netlink: Netlink, port: Port) -> None:
    """The port is in its switch and takes part in everything there. Idempotent. Raises NotFound, KernelRefused."""
    await aside(_plug, netlink, port)


def _plug(netlink: Netlink, port: Port) -> None:
    bridge = require_bridge(netlink, port.switch)
    netlink.run(
        link_master(port.name, port.ifindex, bridge.index),
        bridge_port_floods(port.name, port.ifindex, floods=True),
        fdb_replace(port.ifindex, port.mac, sticky=False),
    )


async def unplug(netlink: Netlink, port: Port) -> None:
    """The port is in no switch. Idempotent (also if it is gone). May take 50 ms. Raises KernelRefused."""
    await aside(_unplug, netlink, port)


def _unplug(netlink: Netlink, port: Port) -> None:
    if observe_link(netlink, port.name) is not None:
        netlink.run(link_master(port.name, port.ifindex, 0))


def enslave_quietly(netlink: Netlink, port: Port) -> None:
    """Puts an unused port into its switch so that no frame comes through it: no flooding, no entry for its MAC.

    The port is down meanwhile, so that no broadcast slips in before its flags are set. Blocks.
    """
    bridge = require_bridge(netlink, port.switch)
    if _require_link(netlink, port.name).master == bridge.index:
        return
    netlink.run(
        link_down(port.name, port.ifindex),
        link_master(port.name, port.ifindex, bridge.index),
        bridge_port_floods(port.name, port.ifindex, floods=False),
        link_up(port.name, port.ifindex),
    )


async def adopt_port(netlink: Netlink, name: str, fd: int, mac: str) -> Port:
    """A port again from a descriptor got back from a running QEMU; `fd` becomes the port's.

    Raises Failed `port-not-a-tap`, `port-gone`, and Conflict `port-other` if the descriptor is of another interface.
    """
    return await aside(_adopt, netlink, name, fd, mac)


def _adopt(netlink: Netlink, name: str, fd: int, mac: str) -> Port:
    actual = name_of_tap(fd)
    if actual != name:
        raise Conflict("port-other", f"The descriptor belongs to {actual}, not to {name}.")
    links = {link.index: link for link in observe_links(netlink)}
    link = next((link for link in links.values() if link.name == name), None)
    if link is None:
        raise Failed("port-gone", f"Interface {name} has disappeared.")
    switch = links[link.master].name if link.master in links else ""
    return Port(name, link.index, fd, require_mac(mac), switch)


async def list_ports(netlink: Netlink) -> tuple[str, ...]:
    """The names of all our ports in this host, whoever holds their descriptors."""
    links = await aside(observe_links, netlink)
    return tuple(link.name for link in links if link.name.startswith(PORT_PREFIX) and link.kind == "tun")


def close_port(port: Port) -> Port:
    """Gives up our descriptor; the port goes when QEMU's goes too. Idempotent on the port it returns."""
    if port.fd >= 0:
        os.close(port.fd)
    return replace(port, fd=-1)


async def remove_port(netlink: Netlink, name: str) -> None:
    """The interface is gone, whoever holds a descriptor of it. Idempotent. Raises KernelRefused."""
    await aside(_remove, netlink, name)


def _remove(netlink: Netlink, name: str) -> None:
    link = observe_link(netlink, name)
    if link is not None:
        netlink.run(link_delete(name, link.index))
