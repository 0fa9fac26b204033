"""The gate's hooks and redirects (traffic control: clsact, u32, mirred) as rtnetlink requests, and their counters.

For the gate and `ports` only. Pure encoding and decoding. Numbers are from include/uapi/linux/{rtnetlink,pkt_sched,
pkt_cls,gen_stats}.h and tc_act/tc_mirred.h.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Final

from vmferry.network.messages import mac_bytes
from vmferry.network.netlink import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    Netlink,
    Request,
    attribute,
    attributes_of,
    nest,
    text,
)

RTM_NEWQDISC = 36
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46
CLSACT_INGRESS: Final = 0xFFFFFFF2
CLSACT_EGRESS: Final = 0xFFFFFFF3
_TRAFFIC = struct.Struct("=BxxxiIII")


def clsact_new(name: str, index: int) -> Request:
    body = _TRAFFIC.pack(0, index, 0xFFFF0000, 0xFFFFFFF1, 0) + text(1, "clsact")
    return Request(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, body, f"put the gate's hook on {name}")


@dataclass(frozen=True, slots=True)
class Redirect:
    """A classifier at a clsact hook that redirects what matches to another device's egress.

    `keys` are (value, mask, offset) on four-byte words, offsets relative to the network header.
    """

    index: int
    hook: int
    priority: int
    keys: tuple[tuple[int, int, int], ...]
    to_index: int


ANY_FRAME: Final = ((0, 0, 0),)
# The first address octet's group bit; the destination MAC begins 14 octets before the network header.
GROUP_FRAME: Final = ((0x0000_0100, 0x0000_0100, -16),)
UNICAST_FRAME: Final = ((0x0000_0000, 0x0000_0100, -16),)


def frames_to(mac: str) -> tuple[tuple[int, int, int], ...]:
    """The keys that match a destination MAC."""
    raw = mac_bytes(mac)
    return (
        (int.from_bytes(raw[:2], "big"), 0xFFFF, -16),
        (int.from_bytes(raw[2:], "big"), 0xFFFFFFFF, -12),
    )


def _filter_head(index: int, hook: int, priority: int) -> bytes:
    return _TRAFFIC.pack(0, index, 0, hook, priority << 16 | socket.htons(0x0003))


def redirect_new(redirect: Redirect) -> Request:
    """Adds a u32 classifier with action mirred (works where flower, matchall and gact are missing)."""
    selector = struct.pack("=BBBxHHhhI", 1, 0, len(redirect.keys), 0, 0, 0, 0, 0)
    for value, mask, offset in redirect.keys:
        selector += struct.pack("!II", mask, value) + struct.pack("=ii", offset, 0)
    mirred = struct.pack("=IIiii", 0, 0, 4, 0, 0) + struct.pack("=iI", 1, redirect.to_index)  # stolen, egress redirect
    action = nest(1, text(1, "mirred"), nest(2, attribute(2, mirred)))
    options = nest(2, attribute(5, selector), nest(7, action))
    body = _filter_head(redirect.index, redirect.hook, redirect.priority) + text(1, "u32") + options
    return Request(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, body, "redirect the VM's frames")


def redirect_delete(redirect: Redirect) -> Request:
    body = _filter_head(redirect.index, redirect.hook, redirect.priority)
    return Request(RTM_DELTFILTER, 0, body, "end the redirection of the VM's frames")


@dataclass(frozen=True, slots=True)
class RedirectCount:
    """What a redirect has passed on. GSO frames count as the segments they stand for."""

    frames: int = 0
    bytes: int = 0
    dropped: int = 0


def _observe_actions(netlink: Netlink, index: int, hook: int) -> list[tuple[int, dict[int, bytes]]]:
    """Priority and first action of every classifier at a hook."""
    body = _TRAFFIC.pack(0, index, 0, hook, 0)
    found = []
    for answer in netlink.dump(Request(RTM_GETTFILTER, NLM_F_DUMP, body, "read the gate's counters")):
        priority = _TRAFFIC.unpack_from(answer.body)[4] >> 16
        options = attributes_of(attributes_of(answer.body, _TRAFFIC.size).get(2, b""))
        action = attributes_of(attributes_of(options.get(7, b"")).get(1, b""))
        if action:
            found.append((priority, action))
    return found


def observe_redirects(netlink: Netlink, index: int, hook: int) -> dict[int, RedirectCount]:
    """Counters of the redirects at a hook by priority; empty if there are none."""
    actions = _observe_actions(netlink, index, hook)
    return {priority: _parse_count(attributes_of(action.get(4, b""))) for priority, action in actions}


def observe_redirect_targets(netlink: Netlink, index: int, hook: int) -> dict[int, int]:
    """The interface index that each redirect at a hook leads to, by priority (0: that device is gone)."""
    targets = {}
    for priority, action in _observe_actions(netlink, index, hook):
        parameters = attributes_of(action.get(2, b"")).get(2, b"")
        if len(parameters) >= 28:
            targets[priority] = int(struct.unpack_from("=I", parameters, 24)[0])
    return targets


def _parse_count(stats: dict[int, bytes]) -> RedirectCount:
    total_bytes, packets = struct.unpack_from("=QI", stats[1]) if 1 in stats else (0, 0)
    if 8 in stats:
        packets = struct.unpack_from("=Q", stats[8])[0]
    drops = struct.unpack_from("=IIIII", stats[3])[2] if 3 in stats else 0
    return RedirectCount(packets, total_bytes, drops)
