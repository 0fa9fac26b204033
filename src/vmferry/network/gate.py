"""The gate between a VM's old and new port, in one place: both sides, the tunnel, and what a crash leaves behind.

For `migration/` and `host/`. See `source_gate` and `target_gate` for the order of steps.
"""

from __future__ import annotations

from collections.abc import Collection

from vmferry.network.messages import link_delete, observe_links
from vmferry.network.netlink import Netlink, aside
from vmferry.network.ports import PORT_PREFIX
from vmferry.network.redirects import CLSACT_EGRESS, Redirect, observe_redirect_targets, redirect_delete
from vmferry.network.source_gate import GONE, GateCounters, SourceGate
from vmferry.network.target_gate import TargetGate
from vmferry.network.tunnel import TUNNEL_PREFIX, TunnelSpec, belongs_to, tunnel_name

__all__ = ["GateCounters", "SourceGate", "TargetGate", "TunnelSpec", "remove_leftovers", "tunnel_name"]


async def remove_leftovers(netlink: Netlink, alive: Collection[str]) -> tuple[str, ...]:
    """Removes tunnels of migrations that are not alive, and opens gates that led into them. Idempotent.

    A guest whose gate was closed gets its frames again. Gives back the names of what was removed. Raises KernelRefused.
    """
    return await aside(_remove_leftovers, netlink, alive)


def _remove_leftovers(netlink: Netlink, alive: Collection[str]) -> tuple[str, ...]:
    links = observe_links(netlink)
    tunnels = [link for link in links if link.kind == "vxlan" and link.name.startswith(TUNNEL_PREFIX)]
    kept = {link.index for link in tunnels if belongs_to(link.name, alive)}
    removed: list[str] = []
    for port in links:
        if port.kind != "tun" or not port.name.startswith(PORT_PREFIX):
            continue
        targets = observe_redirect_targets(netlink, port.index, CLSACT_EGRESS)
        dead = [priority for priority, to_index in targets.items() if to_index not in kept]
        for priority in dead:
            netlink.run(redirect_delete(Redirect(port.index, CLSACT_EGRESS, priority, (), 0)), accept=GONE)
        if dead:
            removed.append(f"{port.name} gate")
    for tunnel in tunnels:
        if tunnel.index not in kept:
            netlink.run(link_delete(tunnel.name, tunnel.index), accept=GONE)
            removed.append(tunnel.name)
    return tuple(removed)
