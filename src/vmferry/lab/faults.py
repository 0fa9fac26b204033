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


def cut_link(host: HostLayout, link: Link = Link.MIGRATION, direction: Direction = Direction.BOTH) -> None:
    """Drops every frame silently from now on: no carrier change, no error to anybody (a pulled cable far away)."""
    device = _switch_port(host, link)
    rules = []
    # On the switch's port the host's outgoing frames arrive (ingress), its incoming ones leave (egress).
    if direction in (Direction.OUT, Direction.BOTH):
        rules.append(("out", "ingress"))
    if direction in (Direction.IN, Direction.BOTH):
        rules.append(("in", "egress"))
    script = [f"table netdev {_TABLE}"]
    for way, hook in rules:
        chain = f"chain {device}_{way}".replace("-", "_")
        head = f'type filter hook {hook} device "{device}" priority 0; policy drop;'
        script.append(f"table netdev {_TABLE} {{ {chain} {{ {head} }} }}")
    run_tool(["ip", "netns", "exec", host.lab.switch_namespace, "nft", "-f", "-"], "\n".join(script) + "\n")


def restore_link(host: HostLayout, link: Link = Link.MIGRATION) -> None:
    """Undoes `cut_link`, in both directions, and `unplug`."""
    device = _switch_port(host, link)
    script = [f"table netdev {_TABLE}"]
    for way, hook in (("out", "ingress"), ("in", "egress")):
        chain = f"{device}_{way}".replace("-", "_")
        # Adding it first makes deleting it right also when it is not there, all in one transaction.
        head = f'type filter hook {hook} device "{device}" priority 0;'
        script.append(f"table netdev {_TABLE} {{ chain {chain} {{ {head} }} }}")
        script.append(f"delete chain netdev {_TABLE} {chain}")
    run_tool(["ip", "netns", "exec", host.lab.switch_namespace, "nft", "-f", "-"], "\n".join(script) + "\n")
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
