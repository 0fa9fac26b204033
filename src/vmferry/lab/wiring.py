"""Makes the lab's namespaces, bridges, links and their shaping with `ip` and `tc`.

For `lab.namespaces` and `lab.faults`. Everything is inside the lab's own namespaces: the machine's network is never
touched, and deleting the namespaces removes all of it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from vmferry.lab.layout import CLIENT_ADDRESS, LAN_BRIDGE, MIGRATION_BRIDGE, HostLayout, LabLayout
from vmferry.model.errors import Failed

_FIX = "Are you root, and are iproute2 and the kernel's veth, bridge and tbf there? Then try vmferry lab down."
# STP would hold frames back for seconds; snooping would drop multicast for a guest that has just moved.
_BRIDGE = "type bridge stp_state 0 mcast_snooping 0 forward_delay 0"


def run_tool(argv: Sequence[str], script: str | None = None) -> str:
    """Runs a tool, gives its standard output. Raises Failed `lab-tool-failed` with the tool's last words."""
    try:
        # close_fds=False: it inherits what is meant for it, the lab's lock (lab.namespaces), and nothing else
        done = subprocess.run(argv, input=script, capture_output=True, text=True, check=False, close_fds=False)
    except FileNotFoundError as missing:
        raise Failed("lab-tool-failed", f"The program {argv[0]} is not installed.", "Run ./dev setup.") from missing
    if done.returncode != 0:
        words = (done.stderr.strip() or "no message").splitlines()
        raise Failed("lab-tool-failed", f"“{' '.join(argv)}” failed: {words[0]}", _FIX)
    return done.stdout


def ip_batch(namespace: str, lines: Sequence[str]) -> None:
    """Runs `ip` commands in a namespace, in one process, up to the first that fails."""
    run_tool(["ip", "-n", namespace, "-batch", "-"], "\n".join(lines) + "\n")


def build_network(layout: LabLayout) -> None:
    """Makes everything; nothing of it may be there. Raises Failed `lab-tool-failed`."""
    for namespace in layout.namespaces:
        run_tool(["ip", "netns", "add", namespace])
        _quiet(namespace)
    ip_batch(
        layout.switch_namespace, [f"link add dev {LAN_BRIDGE} {_BRIDGE}", f"link add dev {MIGRATION_BRIDGE} {_BRIDGE}"]
    )
    _build_client(layout)
    for host in layout.hosts:
        _build_host(host)
    ip_batch(layout.switch_namespace, [f"link set dev {bridge} up" for bridge in (LAN_BRIDGE, MIGRATION_BRIDGE)])


def shape(namespace: str, device: str, rate_bps: int) -> None:
    """Limits what leaves the device. Replaces an earlier limit without dropping the link."""
    burst = max(256 << 10, rate_bps // 8 // 1000)  # at least what passes in a millisecond
    rate = f"root tbf rate {rate_bps}bit burst {burst}b latency 50ms"
    run_tool(["tc", "-n", namespace, "qdisc", "replace", "dev", device, *rate.split()])


def _quiet(namespace: str) -> None:
    """No IPv6 of the kernel's own and no netfilter between bridge ports, so that only wanted frames are seen."""
    settings = ["net.ipv6.conf.all.disable_ipv6", "net.ipv6.conf.default.disable_ipv6"]
    settings = [f"{name}=1" for name in settings if Path("/proc/sys", name.replace(".", "/")).exists()]
    for family in ("iptables", "ip6tables", "arptables"):
        if Path(f"/proc/sys/net/bridge/bridge-nf-call-{family}").exists():
            settings.append(f"net.bridge.bridge-nf-call-{family}=0")
    ip_batch(namespace, ["link set dev lo up"])
    if settings:
        run_tool(["ip", "netns", "exec", namespace, "sysctl", "-q", "-w", *settings])


def _build_client(layout: LabLayout) -> None:
    ip_batch(
        layout.client_namespace,
        [
            f"link add dev lan0 type veth peer name lan-client netns {layout.switch_namespace}",
            f"address add {CLIENT_ADDRESS}/24 dev lan0",
            "link set dev lan0 up",
        ],
    )
    ip_batch(layout.switch_namespace, [f"link set dev lan-client master {LAN_BRIDGE} up"])


def _build_host(host: HostLayout) -> None:
    switch = host.lab.switch_namespace
    ip_batch(
        host.namespace,
        [
            f"link add dev {LAN_BRIDGE} {_BRIDGE}",
            f"link add dev lan0 type veth peer name {host.lan_port} netns {switch}",
            f"link set dev lan0 master {LAN_BRIDGE} up",
            f"link set dev {LAN_BRIDGE} up",
            f"link add dev mig0 type veth peer name {host.migration_port} netns {switch}",
            f"address add {host.migration_address}/24 dev mig0",
            "link set dev mig0 up",
            # The machine's default may be bbr, which paces against the shaper in a way of its own.
            f"route replace 10.78.0.0/24 dev mig0 proto kernel scope link src {host.migration_address} congctl cubic",
        ],
    )
    ip_batch(
        switch,
        [
            f"link set dev {host.lan_port} master {LAN_BRIDGE} up",
            f"link set dev {host.migration_port} master {MIGRATION_BRIDGE} up",
        ],
    )
    shape(host.namespace, "mig0", host.lab.link_bps)
    shape(switch, host.migration_port, host.lab.link_bps)
