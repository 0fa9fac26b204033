"""The host's switches: Linux bridges. Makes a missing one, checks an existing one, never changes what others set.

For `migration/` and `host/`. Other kinds of switches (overlay, NAT) are added here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from vmferry.model.errors import Conflict, NotFound, WrongInput
from vmferry.network.messages import (
    Link,
    bridge_new,
    link_master,
    link_up,
    observe_links,
)
from vmferry.network.netlink import Netlink, aside

_BR_FORWARD_DELAY, _BR_STP_STATE, _BR_VLAN_FILTERING = 1, 5, 7


@dataclass(frozen=True, slots=True)
class SwitchConfig:
    """A switch as the host's configuration has it. `mtu` is the largest frame payload in bytes."""

    name: str
    device: str
    uplinks: tuple[str, ...] = ()
    mtu: int = 1500
    kind: str = "bridge"
    vlan_filtering: bool = False


@dataclass(frozen=True, slots=True)
class UplinkState:
    """A device that leads out of the switch."""

    name: str
    exists: bool
    enslaved: bool
    up: bool
    carrier: bool
    mtu: int


@dataclass(frozen=True, slots=True)
class SwitchState:
    """A switch as the kernel has it. `ports` are the names of all devices in the bridge that are not uplinks.

    With `stp` a new port passes no frame for twice `forward_delay_ms`; for a migration that is an outage.
    """

    exists: bool
    up: bool = False
    index: int = 0
    mtu: int = 0
    mac: str = ""
    uplinks: tuple[UplinkState, ...] = ()
    stp: bool = False
    forward_delay_ms: int = 0
    vlan_filtering: bool = False
    ports: tuple[str, ...] = ()


def supports_vlan_filtering() -> bool:
    """Whether this kernel's bridges can filter VLANs (CONFIG_BRIDGE_VLAN_FILTERING)."""
    return any(Path("/sys/class/net").glob("*/bridge/vlan_filtering"))


async def observe_switch(netlink: Netlink, config: SwitchConfig) -> SwitchState:
    """What is there now. Raises KernelRefused, and Conflict `switch-not-a-bridge`."""
    return await aside(_observe, netlink, config)


def _observe(netlink: Netlink, config: SwitchConfig) -> SwitchState:
    links = {link.name: link for link in observe_links(netlink)}
    bridge = links.get(config.device)
    if bridge is None:
        return SwitchState(exists=False, uplinks=tuple(_uplink_state(name, links, -1) for name in config.uplinks))
    if bridge.kind != "bridge":
        raise Conflict(
            "switch-not-a-bridge",
            f"Switch {config.name}: {config.device} exists and is not a bridge.",
            f"Name another `device` for switch {config.name}.",
        )
    members = [link.name for link in links.values() if link.master == bridge.index]
    return SwitchState(
        exists=True,
        up=bridge.up,
        index=bridge.index,
        mtu=bridge.mtu,
        mac=bridge.mac,
        uplinks=tuple(_uplink_state(name, links, bridge.index) for name in config.uplinks),
        stp=_number(bridge, _BR_STP_STATE) != 0,
        forward_delay_ms=_number(bridge, _BR_FORWARD_DELAY) * 10,
        vlan_filtering=_number(bridge, _BR_VLAN_FILTERING) != 0,
        ports=tuple(name for name in members if name not in config.uplinks),
    )


def _number(bridge: Link, kind: int) -> int:
    raw = bridge.details.get(kind, b"\0")
    return int(struct.unpack("=I", raw)[0]) if len(raw) == 4 else raw[0]


def _uplink_state(name: str, links: dict[str, Link], bridge_index: int) -> UplinkState:
    link = links.get(name)
    if link is None:
        return UplinkState(name, exists=False, enslaved=False, up=False, carrier=False, mtu=0)
    return UplinkState(name, True, link.master == bridge_index, link.up, link.carrier, link.mtu)


async def ensure_switch(netlink: Netlink, config: SwitchConfig) -> SwitchState:
    """The switch is there and as configured afterwards. Idempotent.

    A missing bridge is made, with its uplinks in it. An existing bridge that differs is an error naming the key and
    the fix; it is never changed. Raises WrongInput, NotFound, Conflict, KernelRefused.
    """
    _require_supported(config)
    return await aside(_ensure, netlink, config)


def _ensure(netlink: Netlink, config: SwitchConfig) -> SwitchState:
    state = _observe(netlink, config)
    for uplink in state.uplinks:
        _require_uplink(config, uplink)
    if not state.exists:
        _make(netlink, config)
        state = _observe(netlink, config)
    _require_as_configured(config, state)
    return state


def _make(netlink: Netlink, config: SwitchConfig) -> None:
    links = {link.name: link for link in observe_links(netlink)}
    for name in config.uplinks:
        if links[name].master:
            raise Conflict(
                "switch-uplink-taken",
                f"Switch {config.name}: uplink {name} belongs to another bridge already.",
                f"Take {name} out of it (`ip link set dev {name} nomaster`) or name that bridge as `device`.",
            )
    netlink.run(bridge_new(config.device, config.mtu))
    bridge = next(link for link in observe_links(netlink) if link.name == config.device)
    for name in config.uplinks:
        index = links[name].index
        netlink.run(link_master(name, index, bridge.index), link_up(name, index))


def _require_supported(config: SwitchConfig) -> None:
    if config.kind != "bridge":
        raise WrongInput(
            "switch-kind", f"Switch {config.name}: kind {config.kind!r} is unknown.", 'Use kind = "bridge".'
        )
    if not 0 < len(config.device) <= 15 or "/" in config.device:
        raise WrongInput(
            "switch-device", f"Switch {config.name}: {config.device!r} is no device name.", "Use 1 to 15 characters."
        )
    if config.vlan_filtering:
        # Ports are put into no VLAN yet, so a filtering bridge would pass their frames untagged only.
        reason = "" if supports_vlan_filtering() else " and this kernel has no bridge VLAN filtering"
        raise WrongInput(
            "switch-vlan-filtering",
            f"Switch {config.name}: VLAN filtering is not supported by this version{reason}.",
            "Remove `vlan_filtering`, or make one bridge for each VLAN.",
        )


def _require_uplink(config: SwitchConfig, uplink: UplinkState) -> None:
    if not uplink.exists:
        raise NotFound(
            "switch-uplink-missing",
            f"Switch {config.name}: uplink {uplink.name} does not exist.",
            f"Correct `uplinks` of switch {config.name}, or make {uplink.name}.",
        )
    if uplink.mtu < config.mtu:
        raise Conflict(
            "switch-uplink-mtu",
            f"Switch {config.name}: uplink {uplink.name} has MTU {uplink.mtu}, less than the switch's {config.mtu}.",
            f"Set `mtu = {uplink.mtu}` for switch {config.name}, or `ip link set dev {uplink.name} mtu {config.mtu}`.",
        )


def _require_as_configured(config: SwitchConfig, state: SwitchState) -> None:
    if state.mtu < config.mtu:
        raise Conflict(
            "switch-mtu",
            f"Switch {config.name}: bridge {config.device} has MTU {state.mtu}, the configuration wants {config.mtu}.",
            f"Set `mtu = {state.mtu}`, or `ip link set dev {config.device} mtu {config.mtu}`.",
        )
    if not state.up:
        raise Conflict(
            "switch-down",
            f"Switch {config.name}: bridge {config.device} is down.",
            f"Bring it up: `ip link set dev {config.device} up`.",
        )
    for uplink in state.uplinks:
        if not uplink.enslaved:
            raise Conflict(
                "switch-uplink-not-in-bridge",
                f"Switch {config.name}: uplink {uplink.name} is not in bridge {config.device}.",
                f"`ip link set dev {uplink.name} master {config.device}`, or remove it from `uplinks`.",
            )
