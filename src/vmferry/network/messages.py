"""The rtnetlink requests this package sends and the links it reads: pure encoding and decoding, no socket.

For the other modules of `network/` only. Numbers are from include/uapi/linux/{rtnetlink,if_link,if_bridge,neighbour}.h.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import dataclass, field

from vmferry.network.netlink import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Answer,
    Netlink,
    Request,
    attribute,
    attributes_of,
    nest,
    text,
    u8,
    u16be,
    u32,
)

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30

_AF_BRIDGE = 7
_IFF_UP = 0x1
_IFF_LOWER_UP = 0x10000
_NLA_F_NESTED = 0x8000
_LINK = struct.Struct("=BxHiII")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_NUD_REACHABLE, _NUD_NOARP, _NUD_PERMANENT = 0x02, 0x40, 0x80
_NTF_SELF, _NTF_MASTER, _NTF_STICKY = 0x02, 0x04, 0x40


@dataclass(frozen=True, slots=True)
class Link:
    """A network device as the kernel shows it."""

    name: str
    index: int
    up: bool
    carrier: bool
    mtu: int
    mac: str
    kind: str = ""
    master: int = 0
    details: dict[int, bytes] = field(default_factory=dict)
    stats: tuple[int, ...] = ()

    def stat(self, name: str) -> int:
        """A counter of struct rtnl_link_stats64; 0 where the kernel gave none."""
        return self.stats[_STATS.index(name)] if self.stats else 0


_STATS = (
    "rx_packets", "tx_packets", "rx_bytes", "tx_bytes", "rx_errors", "tx_errors", "rx_dropped", "tx_dropped",
)  # fmt: skip


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def mac_text(mac: bytes) -> str:
    return mac.hex(":")


def _link_body(index: int, flags: int, change: int, *attributes: bytes, family: int = 0) -> bytes:
    return _LINK.pack(family, 0, index, flags, change) + b"".join(attributes)


def _parse_link(body: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(body)
    found = attributes_of(body, _LINK.size)
    info = attributes_of(found.get(18, b""))
    stats = found.get(23, b"")
    return Link(
        name=found[3].rstrip(b"\0").decode(),
        index=index,
        up=bool(flags & _IFF_UP),
        carrier=bool(flags & _IFF_LOWER_UP),
        mtu=struct.unpack("=I", found[4])[0] if 4 in found else 0,
        mac=mac_text(found.get(1, b"")),
        kind=info.get(1, b"").rstrip(b"\0").decode(),
        master=struct.unpack("=I", found[10])[0] if 10 in found else 0,
        details=attributes_of(info.get(2, b"")),
        stats=struct.unpack_from("=8Q", stats) if len(stats) >= 64 else (),
    )


def observe_link(netlink: Netlink, name: str) -> Link | None:
    """The device of that name, or None. Raises KernelRefused."""
    found = [link for link in observe_links(netlink) if link.name == name]
    return found[0] if found else None


def observe_link_by_index(netlink: Netlink, index: int) -> Link:
    """The device of that index, with fresh counters. Raises KernelRefused (ENODEV)."""
    answers = netlink.dump(Request(RTM_GETLINK, 0, _link_body(index, 0, 0), f"show interface {index}"))
    return _parse_link(answers[0].body)


def observe_links(netlink: Netlink) -> list[Link]:
    answers = netlink.dump(Request(RTM_GETLINK, NLM_F_DUMP, _link_body(0, 0, 0), "list the interfaces"))
    return [_parse_link(answer.body) for answer in answers if answer.kind == RTM_NEWLINK]


def link_up(name: str, index: int) -> Request:
    return Request(RTM_NEWLINK, 0, _link_body(index, _IFF_UP, _IFF_UP), f"bring {name} up")


def link_down(name: str, index: int) -> Request:
    return Request(RTM_NEWLINK, 0, _link_body(index, 0, _IFF_UP), f"take {name} down")


def link_set(name: str, index: int, *, mtu: int = 0, mac: str = "", txqueuelen: int = 0) -> Request:
    """Sets what is not zero or empty."""
    attributes = [u32(4, mtu)] if mtu else []
    attributes += [attribute(1, mac_bytes(mac))] if mac else []
    attributes += [u32(13, txqueuelen)] if txqueuelen else []
    return Request(RTM_NEWLINK, 0, _link_body(index, 0, 0, *attributes), f"configure {name}")


def link_master(name: str, index: int, master: int) -> Request:
    """Puts a device into a bridge, or out of any (`master` 0)."""
    what = f"plug {name} into its bridge" if master else f"unplug {name}"
    return Request(RTM_NEWLINK, 0, _link_body(index, 0, 0, u32(10, master)), what)


def link_delete(name: str, index: int) -> Request:
    return Request(RTM_DELLINK, 0, _link_body(index, 0, 0), f"delete {name}")


def bridge_new(name: str, mtu: int) -> Request:
    info = nest(18, text(1, "bridge"), nest(2, u32(5, 0), u32(1, 0)))  # no STP, no forward delay
    body = _link_body(0, _IFF_UP, _IFF_UP, text(3, name), u32(4, mtu), info)
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"make the bridge {name}")


def bridge_port_floods(name: str, index: int, floods: bool) -> Request:
    """Whether broadcasts, multicasts and unicasts to unknown MACs go to this port of a bridge."""
    flags = b"".join(u8(kind, int(floods)) for kind in (9, 27, 30))
    protinfo = attribute(12 | _NLA_F_NESTED, flags)
    return Request(RTM_SETLINK, 0, _link_body(index, 0, 0, protinfo, family=_AF_BRIDGE), f"set the flooding of {name}")


@dataclass(frozen=True, slots=True)
class VxlanSpec:
    """A point-to-point VXLAN device: what it is called and where it leads."""

    name: str
    vni: int
    local: str
    remote: str
    dstport: int
    mtu: int


def vxlan_new(spec: VxlanSpec) -> Request:
    """No learning, one remote, no lower device named (so that the MTU may exceed it and the outer is fragmented)."""
    local, remote = ipaddress.ip_address(spec.local), ipaddress.ip_address(spec.remote)
    group_kind, local_kind = (2, 4) if remote.version == 4 else (16, 17)
    data = nest(
        2,
        u32(1, spec.vni),
        attribute(group_kind, remote.packed),
        attribute(local_kind, local.packed),
        u8(5, 64),
        u8(7, 0),
        u16be(15, spec.dstport),
        u8(18, 1),
    )
    body = _link_body(0, 0, 0, text(3, spec.name), u32(4, spec.mtu), nest(18, text(1, "vxlan"), data))
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"make the tunnel {spec.name}")


def fdb_replace(port_index: int, mac: str, *, sticky: bool) -> Request:
    """The bridge's table leads `mac` to this port. Sticky: frames seen elsewhere with that source do not move it."""
    flags = _NTF_MASTER | (_NTF_STICKY if sticky else 0)
    head = _NEIGHBOUR.pack(_AF_BRIDGE, port_index, _NUD_REACHABLE, flags, 0)
    body = head + attribute(2, mac_bytes(mac))
    return Request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body, f"lead {mac} to its port")


def fdb_delete(port_index: int, mac: str) -> Request:
    body = _NEIGHBOUR.pack(_AF_BRIDGE, port_index, 0, _NTF_MASTER, 0) + attribute(2, mac_bytes(mac))
    return Request(RTM_DELNEIGH, 0, body, f"forget {mac}")


@dataclass(frozen=True, slots=True)
class FdbEntry:
    """A line of a bridge's table: behind which port (interface index) a MAC was seen."""

    mac: str
    port_index: int
    permanent: bool


def observe_fdb(netlink: Netlink, bridge_index: int) -> list[FdbEntry]:
    body = _NEIGHBOUR.pack(_AF_BRIDGE, 0, 0, 0, 0) + u32(9, bridge_index)
    answers = netlink.dump(Request(RTM_GETNEIGH, NLM_F_DUMP, body, "read the bridge's table"))
    return [_parse_fdb(answer) for answer in answers if answer.kind == RTM_NEWNEIGH]


def _parse_fdb(answer: Answer) -> FdbEntry:
    _, index, state, _, _ = _NEIGHBOUR.unpack_from(answer.body)
    mac = attributes_of(answer.body, _NEIGHBOUR.size).get(2, b"")
    return FdbEntry(mac_text(mac), index, bool(state & _NUD_PERMANENT))


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A line of the host's own neighbour table (ARP, ND)."""

    address: str
    mac: str
    interface_index: int
    permanent: bool


def observe_neighbour_table(netlink: Netlink, family: int) -> list[Neighbour]:
    body = _NEIGHBOUR.pack(family, 0, 0, 0, 0)
    found = []
    for answer in netlink.dump(Request(RTM_GETNEIGH, NLM_F_DUMP, body, "read the neighbour table")):
        head_family, index, state, _, _ = _NEIGHBOUR.unpack_from(answer.body)
        attributes = attributes_of(answer.body, _NEIGHBOUR.size)
        if state & _NUD_NOARP:  # multicast and broadcast mappings
            continue
        if head_family in (socket.AF_INET, socket.AF_INET6) and 1 in attributes and 2 in attributes:
            address = str(ipaddress.ip_address(attributes[1]))
            found.append(Neighbour(address, mac_text(attributes[2]), index, bool(state & _NUD_PERMANENT)))
    return found
