"""virsh as a contender: `migrate --live --copy-storage-all`, with the default limit or one set before."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from bench.libvirtd import Libvirtd
from bench.plan import CPU_MODEL, DISK_GIB, MAC, MEMORY_MIB, GuestPlan
from vmferry.lab.layout import LAN_BRIDGE
from vmferry.lab.wiring import run_tool
from vmferry.model.errors import Failed

_DOMAIN = "bench"
_IMAGE = "disk.qcow2"
_XML = """
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>{cpu}</model></cpu>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='/var/lib/libvirt/images/{image}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='bridge'>
      <mac address='{mac}'/><source bridge='{bridge}'/><model type='virtio'/><driver name='qemu'/><rom enabled='no'/>
    </interface>
    <serial type='null'/>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""


class Virsh:
    """One way to call it. The daemons are shared and belong to whoever started them."""

    def __init__(self, source: Libvirtd, target: Libvirtd, target_address: str, emulator: Path, limit_ms: int) -> None:
        self._source, self._target = source, target
        self._migration_uri = f"tcp://{target_address}"
        self._emulator = emulator
        self._limit_ms = limit_ms

    def warm_up(self) -> None:
        """Lets both daemons ask QEMU what it can do, so that no run pays for it."""
        for daemon in (self._source, self._target):
            _run(daemon, "domcapabilities", "--emulatorbin", str(self._emulator), "--virttype", "qemu")

    def start(self, plan: GuestPlan) -> None:
        shutil.copyfile(plan.template, self._source.images / _IMAGE)
        empty = str(self._target.images / _IMAGE)  # libvirt wants it to be there
        run_tool(["qemu-img", "create", "-q", "-f", "qcow2", empty, f"{DISK_GIB}G"])
        definition = self._source.images / "bench.xml"
        definition.write_text(self._xml(plan))
        _run(self._source, "create", str(definition))
        if self._limit_ms:
            _run(self._source, "migrate-setmaxdowntime", _DOMAIN, str(self._limit_ms))

    def migrate(self) -> dict[str, Any]:
        options = ["--live", "--copy-storage-all", "--migrateuri", self._migration_uri]
        _run(self._source, "migrate", *options, _DOMAIN, self._target.uri)
        return {}

    def details(self) -> dict[str, Any]:
        shown = _run(self._target, "domjobinfo", "--completed", "--keep-completed", _DOMAIN)
        pairs = (line.partition(":") for line in shown.splitlines() if ":" in line)
        return {name.strip(): " ".join(value.split()) for name, _, value in pairs}

    def clear(self) -> None:
        for daemon in (self._source, self._target):
            if _DOMAIN in _run(daemon, "list", "--all", "--name").split():
                _run(daemon, "destroy", _DOMAIN)
            (daemon.images / _IMAGE).unlink(missing_ok=True)

    def _xml(self, plan: GuestPlan) -> str:
        return _XML.format(
            name=_DOMAIN,
            memory=MEMORY_MIB,
            kernel=plan.kernel,
            initrd=plan.initrd,
            cmdline=escape(plan.load.cmdline),
            cpu=CPU_MODEL,
            emulator=self._emulator,
            image=_IMAGE,
            mac=MAC,
            bridge=LAN_BRIDGE,
        )


def _run(daemon: Libvirtd, *words: str) -> str:
    done = subprocess.run(
        ["virsh", "-q", "-c", daemon.uri, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        told = " / ".join(done.stderr.strip().splitlines()) or "no message"
        raise Failed("bench-virsh", f"virsh {words[0]} failed: {told} ({daemon.last_words()})", "")
    return done.stdout
