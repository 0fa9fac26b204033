"""One real guest (TCG) on a lab's host1, with its memory and disk as files that a test can damage."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from vmferry.lab.guest import build_guest
from vmferry.lab.layout import LabLayout
from vmferry.lab.namespaces import exec_prefix

ADDRESS = "10.77.0.50"
MAC = "52:54:00:77:00:50"


@dataclass(frozen=True, slots=True)
class RunningGuest:
    """A guest with its memory and its disk as files that a test can damage."""

    process: subprocess.Popen[bytes]
    memory: Path
    disk: Path
    console: Path
    monitor: Path

    def wait_for_line(self, words: str, within_s: float = 60.0) -> str:
        deadline = time.monotonic() + within_s
        while True:
            for line in self._said().splitlines():
                if words in line:
                    return line
            assert self.process.poll() is None, f"the guest ended: {self._said()[-500:]}"
            assert time.monotonic() < deadline, f"no “{words}” on the console"
            time.sleep(0.05)

    def _said(self) -> str:
        return self.console.read_text(errors="replace") if self.console.exists() else ""


def start_guest(lab: LabLayout, directory: Path, cmdline: str, memory_mib: int = 128) -> RunningGuest:
    """QEMU in host1's namespace, its NIC in host1's bridge. The caller ends it."""
    namespace, tap = lab.hosts[0].namespace, "tapg"
    images = build_guest()
    memory, disk, console = directory / "memory", directory / "disk.raw", directory / "console"
    monitor = directory / "qmp"
    if not disk.exists():
        with disk.open("wb") as made:
            made.truncate(64 << 20)
    subprocess.run(["ip", "-n", namespace, "tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr"], check=True)
    subprocess.run(["ip", "-n", namespace, "link", "set", "dev", tap, "master", "br-lan", "up"], check=True)
    backend = f"memory-backend-file,id=ram,size={memory_mib}M,mem-path={memory},share=on"
    argv = [*exec_prefix(namespace), "qemu-system-x86_64", "-accel", "tcg", "-m", str(memory_mib), "-nodefaults"]
    argv += ["-M", "q35,memory-backend=ram", "-object", backend, "-display", "none", "-no-reboot"]
    argv += ["-kernel", str(images.kernel), "-initrd", str(images.initrd), "-append", cmdline]
    argv += ["-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"]
    argv += ["-drive", f"file={disk},if=none,id=disk,format=raw", "-device", "virtio-blk-pci,drive=disk"]
    argv += ["-netdev", f"tap,id=net,ifname={tap},script=no,downscript=no"]
    argv += ["-device", f"virtio-net-pci,netdev=net,mac={MAC}"]
    argv += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    return RunningGuest(subprocess.Popen(argv, stdin=subprocess.DEVNULL), memory, disk, console, monitor)


def end_guest(lab: LabLayout, guest: RunningGuest) -> None:
    guest.process.kill()
    guest.process.wait()
    subprocess.run(
        ["ip", "-n", lab.hosts[0].namespace, "link", "delete", "dev", "tapg"], stderr=subprocess.DEVNULL, check=False
    )


def press_power_button(guest: RunningGuest) -> None:
    """What QMP's system_powerdown does: the ACPI button."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as monitor, monitor.makefile("rw") as lines:
        monitor.connect(str(guest.monitor))
        lines.readline()
        for command in ("qmp_capabilities", "system_powerdown"):
            lines.write(json.dumps({"execute": command}) + "\n")
            lines.flush()
            while "return" not in json.loads(lines.readline()):
                pass  # an event
