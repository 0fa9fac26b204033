"""A VM in a lab for demo, soak and system tests: what it is, creating it with the real command, asking its owner.

Everything blocks; call it through a thread from asyncio. Talks to the lab's daemons through their Unix sockets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmferry.api.client import HostClient
from vmferry.api.endpoints import Endpoint
from vmferry.lab.guest import GuestImages, build_guest, guest_cmdline
from vmferry.lab.guest_client import GuestClient, GuestStatus
from vmferry.lab.layout import HostLayout, LabLayout
from vmferry.model.errors import Failed, NotFound, VmferryError
from vmferry.model.views import VmView

UDP_PORT = 7
STREAM_PORT = 9


@dataclass(frozen=True, slots=True)
class TrialVm:
    """What the VM is and does. `fill_mib` of the disk are written once by the guest; rates as `guest_cmdline` has it.

    A memory workload needs `wss_mib`, so that its rate can be raised later; 0 for none. Likewise `disk_area_mib`.
    """

    name: str = "demo"
    address: str = "10.77.0.50"
    memory_mib: int = 256
    disk_gib: int = 2
    pool: str = "local"
    wss_mib: int = 64
    dirty_mb: int = 20
    disk_area_mib: int = 16
    disk_rate: int = 20
    fill_mib: int = 300
    beat_ms: int = 500

    def cmdline(self) -> str:
        """The guest's kernel command line."""
        options: dict[str, str | int] = {
            "ip": f"{self.address}/24",
            "udp": UDP_PORT,
            "tcp": UDP_PORT,
            "stream": STREAM_PORT,
            "beat": self.beat_ms,
        }
        if self.wss_mib:
            options |= {"wss": self.wss_mib, "dirty": self.dirty_mb}
        if self.disk_area_mib:
            options |= {"disk": 1, "diskarea": self.disk_area_mib, "diskrate": self.disk_rate, "fill": self.fill_mib}
        return guest_cmdline(**options)

    def spec(self, images: GuestImages) -> str:
        """The TOML for `vmferry vm create`."""
        return (
            f'name = "{self.name}"\ncpus = 1\nmemory = "{self.memory_mib}MiB"\n'
            f'[boot]\nkernel = "{images.kernel}"\ninitrd = "{images.initrd}"\ncmdline = "{self.cmdline()}"\n'
            f'[[disk]]\nname = "root"\npool = "{self.pool}"\nsize = "{self.disk_gib}GiB"\nformat = "qcow2"\n'
            '[[nic]]\nswitch = "lan"\n'
        )


class LabCommand:
    """The real `vmferry` command, against one lab."""

    def __init__(self, layout: LabLayout) -> None:
        self._environment = {**os.environ, "VMFERRY_CONFIG": str(layout.client_config)}
        self.path = Path(sys.executable).parent / "vmferry"

    def show(self, *arguments: str, limit_s: float = 300.0) -> int:
        """Runs it on this terminal and gives its exit status. Raises Failed `command-stuck`."""
        sys.stdout.flush()
        try:
            return subprocess.run([self.path, *arguments], env=self._environment, timeout=limit_s).returncode
        except subprocess.TimeoutExpired as error:
            raise _stuck(arguments, limit_s) from error

    def ask(self, *arguments: str, limit_s: float = 300.0) -> Any:
        """What it prints with --json. Raises Failed `command-failed` with its words, or `command-stuck`."""
        argv = [str(self.path), *arguments, "--json"]
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, env=self._environment, timeout=limit_s
            )
        except subprocess.TimeoutExpired as error:
            raise _stuck(arguments, limit_s) from error
        if done.returncode != 0:
            words = done.stderr.decode(errors="replace").strip() or "no message"
            raise Failed("command-failed", f"vmferry {' '.join(arguments)}: {words}", "See the daemons' logs.")
        return json.loads(done.stdout)


def _stuck(arguments: Sequence[str], limit_s: float) -> Failed:
    text = f"vmferry {' '.join(arguments)} did not end within {limit_s:.0f} s."
    return Failed("command-stuck", text, "See the daemons' logs.")


def create_and_start(command: LabCommand, vm: TrialVm, host: HostLayout) -> None:
    """Builds the guest if needed, defines the VM on the host and starts it; it has not booted yet. Raises Failed."""
    images = build_guest()
    with tempfile.TemporaryDirectory(prefix="vmferry-spec-") as directory:
        spec = Path(directory) / f"{vm.name}.toml"
        spec.write_text(vm.spec(images), encoding="utf-8")
        command.ask("vm", "create", "-f", str(spec), "--host", host.name)
    command.ask("vm", "start", vm.name)


def wait_until_ready(guest: GuestClient, vm: TrialVm, within_s: float = 240.0) -> GuestStatus:
    """Returns once the guest has booted and its workloads run: the fill is written, all memory is in use.

    Raises Unreachable `guest-silent`, Failed `guest-not-ready`.
    """
    deadline = time.monotonic() + within_s
    while True:
        status = guest.status(max(1.0, deadline - time.monotonic()))
        if _is_ready(status, vm):
            return status
        if status.disk.state == "failed" or time.monotonic() > deadline:
            text = f"The guest's workload is not ready: its disk is {status.disk.state}, {status.disk.fill_bytes} bytes"
            raise Failed("guest-not-ready", f"{text} written.", "See its console.")
        time.sleep(0.1)


def _is_ready(status: GuestStatus, vm: TrialVm) -> bool:
    """The processes of a guest start one after the other: what is not there yet shows as none."""
    disk_ready = not vm.disk_area_mib or status.disk.state == "writing"
    return disk_ready and (not vm.wss_mib or status.memory.wss_bytes > 0)


def host_client(host: HostLayout) -> HostClient:
    """The host's daemon, through its socket."""
    return HostClient(Endpoint(host.name, socket=host.socket))


def find_owner(layout: LabLayout, name: str) -> VmView:
    """The VM as its owner shows it. Raises NotFound `no-such-vm`, and Failed `two-owners` if two hosts claim it."""
    found = []
    for host in layout.hosts:
        try:
            found += [view for view in host_client(host).vms() if view.spec.name == name]
        except VmferryError:  # a host that is down shows nothing; whoever asked will miss the VM
            continue
    if len(found) > 1:
        raise Failed("two-owners", f"{name} is owned by {', '.join(view.host for view in found)}.", "A defect: report.")
    if not found:
        raise NotFound("no-such-vm", f"No host that answers has {name}.", "Is a daemon down?")
    return found[0]
