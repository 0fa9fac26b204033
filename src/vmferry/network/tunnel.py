"""The tunnel of one migration and NIC: a point-to-point VXLAN device over the migration network.

For the gate only. It must never be put into a bridge: with both hosts on one segment that is a loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from vmferry.network.messages import Link, VxlanSpec, link_delete, link_up, observe_link, vxlan_new
from vmferry.network.netlink import Netlink
from vmferry.network.ports import silence

TUNNEL_PREFIX: Final = "vg"
_VLAN_TAG_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class TunnelSpec:
    """Where the tunnel leads. `vni` (24 bits) and `dstport` are equal on both sides; `mtu` is the port's.

    The outer packets are larger than `mtu` by 50 bytes (IPv4) and are fragmented if the migration network needs it.
    """

    migration_id: str
    index: int
    local: str
    remote: str
    vni: int
    dstport: int = 4799
    mtu: int = 1500


def tunnel_name(migration_id: str, index: int) -> str:
    """The device's name: found again from the migration's id alone."""
    return f"{_stem(migration_id)}{index}"


def _stem(migration_id: str) -> str:
    return TUNNEL_PREFIX + hashlib.sha256(migration_id.encode()).hexdigest()[:10]


def belongs_to(name: str, migration_ids: Iterable[str]) -> bool:
    """Whether a device is a tunnel of one of these migrations."""
    return any(name[:12] == _stem(migration_id) for migration_id in migration_ids)


def make_tunnel(netlink: Netlink, spec: TunnelSpec) -> Link:
    """A fresh tunnel, up; one of the same name from an earlier attempt is replaced. Blocks. Raises KernelRefused."""
    name = tunnel_name(spec.migration_id, spec.index)
    delete_tunnel(netlink, name)
    mtu = spec.mtu + _VLAN_TAG_BYTES
    netlink.run(vxlan_new(VxlanSpec(name, spec.vni, spec.local, spec.remote, spec.dstport, mtu)))
    silence(name)
    link = observe_link(netlink, name)
    assert link is not None
    netlink.run(link_up(name, link.index))
    return link


def delete_tunnel(netlink: Netlink, name: str) -> None:
    """Idempotent. Takes up to 50 ms. Raises KernelRefused."""
    link = observe_link(netlink, name)
    if link is not None:
        netlink.run(link_delete(name, link.index))
