"""Looks before a migration: does a real frame get from one host's switch to the other's, and is the MAC in use?

For `migration/` (the check). It adds temporary ports of its own and takes them away again; nothing else changes.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Self

from vmferry.model.errors import Failed
from vmferry.model.names import require_mac
from vmferry.network.announce import rarp_frame
from vmferry.network.messages import (
    Neighbour,
    link_master,
    link_set,
    link_up,
    mac_bytes,
    observe_fdb,
    observe_link,
    observe_links,
    observe_neighbour_table,
)
from vmferry.network.netlink import KernelRefused, Netlink, aside
from vmferry.network.ports import require_bridge, silence
from vmferry.network.tap import SHORT_HEADER_BYTES, open_tap, read_frames

PROBE_PREFIX: Final = "vp"
# IEEE 802 local experimental ethertype 1 (IEEE 802-2014, 9.2.3): no host takes it for its own traffic.
PROBE_ETHERTYPE: Final = 0x88B5
SMALLEST_PAYLOAD_BYTES: Final = 46
_MAGIC: Final = b"vmferry\x01"
_HEAD: Final = struct.Struct("!8s16sI")
_NONCE_BYTES: Final = 16
_NO_OFFLOAD: Final = bytes(SHORT_HEADER_BYTES)


def new_nonce() -> bytes:
    return secrets.token_bytes(_NONCE_BYTES)


def probe_frame(source: str, destination: str, nonce: bytes, payload_bytes: int) -> bytes:
    """An Ethernet frame with that much payload (46 is the least, the MTU the most), filled with its own nonce."""
    head = _HEAD.pack(_MAGIC, nonce, payload_bytes)
    filler = (nonce * (payload_bytes // _NONCE_BYTES + 1))[: payload_bytes - len(head)]
    return mac_bytes(destination) + mac_bytes(source) + struct.pack("!H", PROBE_ETHERTYPE) + head + filler


def probe_payload_of(frame: bytes, nonce: bytes) -> int | None:
    """The payload size of an intact probe with that nonce; None for any other frame."""
    if len(frame) < 14 + _HEAD.size or frame[12:14] != struct.pack("!H", PROBE_ETHERTYPE):
        return None
    magic, found, payload_bytes = _HEAD.unpack_from(frame, 14)
    if magic != _MAGIC or found != nonce or len(frame) < 14 + payload_bytes:
        return None
    whole = probe_frame("00:00:00:00:00:00", "00:00:00:00:00:00", nonce, payload_bytes)
    return payload_bytes if frame[14 : 14 + payload_bytes] == whole[14:] else None


class _SparePort:
    """A temporary tap in a switch; goes with its descriptor."""

    def __init__(self, netlink: Netlink, switch: str, mtu: int) -> None:
        bridge = require_bridge(netlink, switch)
        name = PROBE_PREFIX + secrets.token_hex(6)
        self.mac = "02:" + ":".join(f"{octet:02x}" for octet in secrets.token_bytes(5))
        self.fd = open_tap(name, None)
        try:
            link = observe_link(netlink, name)
            if link is None:
                raise Failed("port-gone", f"Interface {name} has disappeared.")
            silence(name)
            netlink.run(
                link_set(name, link.index, mtu=mtu, mac="fe" + self.mac[2:]),
                link_master(name, link.index, bridge.index),
                link_up(name, link.index),
            )
        except BaseException:
            os.close(self.fd)
            raise

    def write(self, frame: bytes) -> None:
        try:
            os.write(self.fd, _NO_OFFLOAD + frame)
        except OSError as error:
            raise KernelRefused("send a probe", error.errno or 5, "") from error

    def close(self) -> None:
        os.close(self.fd)


class PathProbeListener:
    """A spare port on the target's switch that waits for probes. Use as `async with`; the port goes at its end."""

    def __init__(self, netlink: Netlink, switch: str, mtu: int) -> None:
        self._netlink = netlink
        self._switch = switch
        self._mtu = mtu
        self._port: _SparePort | None = None

    async def __aenter__(self) -> Self:
        port = await aside(_SparePort, self._netlink, self._switch, self._mtu, undo=_SparePort.close)
        self._port = port
        port.write(rarp_frame(port.mac))  # so that switches lead the probes here instead of flooding them
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._port is not None:
            port, self._port = self._port, None
            await aside(port.close)

    @property
    def mac(self) -> str:
        """Where to send the probes."""
        assert self._port is not None, "use `async with`"
        return self._port.mac

    async def wait(self, nonce: bytes, sizes: Collection[int], timeout_s: float) -> frozenset[int]:
        """The sizes of which an intact probe has come, as soon as all have, at the latest after `timeout_s`."""
        assert self._port is not None, "use `async with`"
        found: set[int] = set()
        arrived = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._port.fd, arrived.set)
        try:
            async with asyncio.timeout(timeout_s):
                while not found >= set(sizes):
                    await arrived.wait()
                    arrived.clear()
                    frames = read_frames(self._port.fd, 1000)
                    found |= {size for frame in frames if (size := probe_payload_of(frame[10:], nonce)) is not None}
        except TimeoutError:
            pass
        finally:
            loop.remove_reader(self._port.fd)
        return frozenset(found)


async def send_path_probe(
    netlink: Netlink, switch: str, destination: str, nonce: bytes, sizes: Collection[int]
) -> None:
    """Sends one probe of each payload size from a spare port of this host's switch. Raises NotFound, KernelRefused."""
    await aside(_send_path_probe, netlink, switch, require_mac(destination), nonce, tuple(sizes))


def _send_path_probe(netlink: Netlink, switch: str, destination: str, nonce: bytes, sizes: tuple[int, ...]) -> None:
    port = _SparePort(netlink, switch, max((*sizes, 68)))
    try:
        for size in sizes:
            port.write(probe_frame(port.mac, destination, nonce, size))
    finally:
        port.close()


@dataclass(frozen=True, slots=True)
class MacSighting:
    """Where a switch has seen a MAC: on a port of this host, or behind an uplink (then it may be the VM itself)."""

    port: str | None = None
    uplink: str | None = None


async def observe_mac_elsewhere(
    netlink: Netlink, switch: str, mac: str, uplinks: Collection[str], expected: Collection[str] = ()
) -> MacSighting:
    """Where the switch's table has the MAC, other than on the ports `expected`. Raises NotFound, KernelRefused."""
    return await aside(_observe_mac, netlink, switch, require_mac(mac), frozenset(uplinks), frozenset(expected))


def _observe_mac(
    netlink: Netlink, switch: str, mac: str, uplinks: frozenset[str], expected: frozenset[str]
) -> MacSighting:
    bridge = require_bridge(netlink, switch)
    names = {link.index: link.name for link in observe_links(netlink)}
    seen = {names.get(entry.port_index, "?") for entry in observe_fdb(netlink, bridge.index) if entry.mac == mac}
    if bridge.mac == mac:
        seen.add(switch)
    ports = sorted(seen - uplinks - expected)
    behind = sorted(seen & uplinks)
    return MacSighting(ports[0] if ports else None, behind[0] if behind else None)


async def observe_neighbours(netlink: Netlink, switch: str) -> tuple[Neighbour, ...]:
    """Addresses and MACs that this host itself knows on the switch. Raises NotFound, KernelRefused."""
    return await aside(_observe_neighbours, netlink, switch)


def _observe_neighbours(netlink: Netlink, switch: str) -> tuple[Neighbour, ...]:
    bridge = require_bridge(netlink, switch)
    table = observe_neighbour_table(netlink, 0)
    return tuple(neighbour for neighbour in table if neighbour.interface_index == bridge.index)
