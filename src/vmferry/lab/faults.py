"""Breaks and mends the lab's links: cut in one direction or both, slowed, unplugged.

For tests and the demo. Every function is idempotent and takes the lab's layout; nothing outside its namespaces is
touched, so `lab_down` removes every fault.
"""

from __future__ import annotations

from enum import StrEnum

from vmferry.lab.layout import HostLayout
from vmferry.lab.wiring import ip_batch, run_tool, shape


class Link(StrEnum):
    """A host's two links to the switch."""

    MIGRATION = "migration"
    LAN = "lan"


class Direction(StrEnum):
    """As seen from the host."""

    OUT = "out"
    IN = "in"
    BOTH = "both"


_TABLE = "vmferry_lab_faults"
# On the switch's port the host's outgoing frames arrive, its incoming ones leave.
_HOOKS = {"ingress": (Direction.OUT, Direction.BOTH), "egress": (Direction.IN, Direction.BOTH)}


def cut_link(host: HostLayout, link: Link = Link.MIGRATION, direction: Direction = Direction.BOTH) -> None:
    """Drops every frame silently from now on: no carrier change, no error to anybody (a pulled cable far away)."""
    hooks = [hook for hook, ways in _HOOKS.items() if direction in ways]
    _nft(host, [f"add table netdev {_TABLE}", *(_add_chain(_switch_port(host, link), hook) for hook in hooks)])


def restore_link(host: HostLayout, link: Link = Link.MIGRATION) -> None:
    """Undoes `cut_link`, in both directions, and `unplug`."""
    device = _switch_port(host, link)
    commands = [f"add table netdev {_TABLE}"]
    for hook in _HOOKS:
        # Adding it first makes deleting it right also when it is not there; all of it is one transaction.
        commands += [_add_chain(device, hook), f"delete chain netdev {_TABLE} {_chain(device, hook)}"]
    _nft(host, commands)
    ip_batch(host.lab.switch_namespace, [f"link set dev {device} up"])


def unplug(host: HostLayout, link: Link = Link.MIGRATION) -> None:
    """Takes the carrier away on both sides."""
    ip_batch(host.lab.switch_namespace, [f"link set dev {_switch_port(host, link)} down"])


def slow_link(host: HostLayout, rate_bps: int) -> None:
    """Shapes the migration link to another rate in both directions; `slow_link(host, host.lab.link_bps)` undoes it."""
    shape(host.namespace, "mig0", rate_bps)
    shape(host.lab.switch_namespace, host.migration_port, rate_bps)


def _switch_port(host: HostLayout, link: Link) -> str:
    return host.migration_port if link is Link.MIGRATION else host.lan_port


def _chain(device: str, hook: str) -> str:
    return f"{device}-{hook}".replace("-", "_")


def _add_chain(device: str, hook: str) -> str:
    head = f'type filter hook {hook} device "{device}" priority 0; policy drop;'
    return f"add chain netdev {_TABLE} {_chain(device, hook)} {{ {head} }}"


def _nft(host: HostLayout, commands: list[str]) -> None:
    argv = ["ip", "netns", "exec", host.lab.switch_namespace, "nft", "-f", "-"]
    run_tool(argv, "\n".join(commands) + "\n")
