"""The yardstick: a QMP script that does only what cannot be left out.

Mirror, wait until it is ready, pre-copy with pause-before-switchover, block-job-cancel, migrate-continue, cont. Taps
are in their bridges from the start and QEMU announces. No check, gate, verification, encryption or recovery.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.plan import CPU_MODEL, DISK_GIB, MAC, MEMORY_MIB, GuestPlan
from bench.qmp import Qmp
from vmferry.lab.layout import LAN_BRIDGE, HostLayout
from vmferry.lab.namespaces import exec_prefix
from vmferry.lab.wiring import ip_batch, run_tool
from vmferry.model.errors import Failed

_TAP = "benchtap"
_CAPABILITIES = ("events", "return-path")
_MIGRATION_PORT, _NBD_PORT = 7901, 7902


class BareGuest:
    """One QEMU on one host, with a tap in the host's bridge."""

    def __init__(self, host: HostLayout, directory: Path, emulator: Path) -> None:
        self._host = host
        self._socket = directory / f"bare-{host.name}.qmp"
        self._log = directory / f"bare-{host.name}.log"
        self._emulator = emulator
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: Qmp | None = None

    @property
    def qmp(self) -> Qmp:
        if self._qmp is None:
            raise Failed("bench-bare", "The guest does not run.", "")
        return self._qmp

    def start(self, plan: GuestPlan, disk: Path, incoming: bool = False) -> None:
        """Returns when its monitor answers."""
        ip_batch(
            self._host.namespace,
            [f"tuntap add dev {_TAP} mode tap vnet_hdr", f"link set dev {_TAP} master {LAN_BRIDGE} up"],
        )
        self._socket.unlink(missing_ok=True)
        command = [*exec_prefix(self._host.namespace), str(self._emulator), *_arguments(plan, disk, self._socket)]
        if incoming:
            command += ["-incoming", "defer", "-S"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._qmp = Qmp.connect(self._socket)

    def wait(self, within_s: float) -> None:
        """Until the process has ended."""
        if self._process is not None:
            self._process.wait(within_s)

    def close(self) -> None:
        """The process and the tap are gone. Idempotent."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            with contextlib.suppress(Failed):
                ip_batch(self._host.namespace, [f"link delete dev {_TAP}"])


def _arguments(plan: GuestPlan, disk: Path, socket: Path) -> list[str]:
    file = {"driver": "file", "filename": str(disk), "discard": "unmap"}
    image = {"driver": "qcow2", "node-name": "disk0", "discard": "unmap", "file": file}
    memory = {"qom-type": "memory-backend-ram", "id": "pc.ram", "size": MEMORY_MIB << 20}
    return [
        *("-name", "guest=bare", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-object", json.dumps(memory), "-machine", "q35,usb=off,memory-backend=pc.ram"),
        *("-accel", "tcg,thread=multi", "-cpu", CPU_MODEL, "-m", str(MEMORY_MIB), "-smp", "1"),
        *("-kernel", str(plan.kernel), "-initrd", str(plan.initrd), "-append", plan.load.cmdline),
        *("-qmp", f"unix:{socket},server=on,wait=off", "-serial", "null"),
        *("-blockdev", json.dumps(image)),
        *("-device", "virtio-blk-pci,drive=disk0,addr=0x3,num-queues=1"),
        *("-netdev", f"tap,id=net0,ifname={_TAP},script=no,downscript=no,vhost=off"),
        *("-device", f"virtio-net-pci,netdev=net0,mac={MAC},addr=0x10,romfile="),
    ]


class Bare:
    """The script as a contender."""

    def __init__(self, hosts: Sequence[HostLayout], home: Path, emulator: Path, limit_ms: int) -> None:
        source, target = hosts
        self._address = target.migration_address
        self._limit_ms = limit_ms
        self._places = [home / f"bare-{host.name}" for host in hosts]
        for place in self._places:
            place.mkdir(parents=True, exist_ok=True)
        self._source = BareGuest(source, self._places[0], emulator)
        self._target = BareGuest(target, self._places[1], emulator)
        self._plan: GuestPlan | None = None

    def start(self, plan: GuestPlan) -> None:
        self._plan = plan
        disk = self._places[0] / "disk.qcow2"
        shutil.copyfile(plan.template, disk)
        self._source.start(plan, disk)

    def migrate(self) -> dict[str, Any]:
        self._prepare_target()
        self._mirror()
        self._move_memory()
        self._source.close()
        return {}

    def details(self) -> dict[str, Any]:
        return {}

    def clear(self) -> None:
        self._source.close()
        self._target.close()
        for place in self._places:
            (place / "disk.qcow2").unlink(missing_ok=True)

    def _prepare_target(self) -> None:
        assert self._plan is not None
        disk = self._places[1] / "disk.qcow2"
        run_tool(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), f"{DISK_GIB}G"])
        self._target.start(self._plan, disk, incoming=True)
        qmp = self._target.qmp
        _set_capabilities(qmp, _CAPABILITIES)
        place = {"type": "inet", "data": {"host": self._address, "port": str(_NBD_PORT)}}
        qmp.execute("nbd-server-start", addr=place)
        qmp.execute("block-export-add", type="nbd", id="disk0", node_name="disk0", name="disk0", writable=True)
        qmp.execute("migrate-incoming", uri=f"tcp:{self._address}:{_MIGRATION_PORT}")

    def _mirror(self) -> None:
        qmp = self._source.qmp
        server = {"type": "inet", "host": self._address, "port": str(_NBD_PORT)}
        options = {"driver": "nbd", "node-name": "copy0", "server": server, "export": "disk0", "discard": "unmap"}
        qmp.execute("blockdev-add", **options)
        qmp.execute("blockdev-mirror", job_id="mirror0", device="disk0", target="copy0", sync="full")
        qmp.wait_event("BLOCK_JOB_READY", lambda data: data["device"] == "mirror0", 300)

    def _move_memory(self) -> None:
        source, target = self._source.qmp, self._target.qmp
        _set_capabilities(source, (*_CAPABILITIES, "pause-before-switchover"))
        source.execute("migrate-set-parameters", downtime_limit=self._limit_ms, max_bandwidth=0)
        source.execute("migrate", uri=f"tcp:{self._address}:{_MIGRATION_PORT}")
        source.wait_event("MIGRATION", lambda data: data["status"] == "pre-switchover", 120)
        source.execute("block-job-cancel", device="mirror0")
        source.wait_event("BLOCK_JOB_COMPLETED", lambda data: data["device"] == "mirror0")
        source.execute("migrate-continue", state="pre-switchover")
        target.wait_event("MIGRATION", lambda data: data["status"] == "completed")
        target.execute("nbd-server-stop")
        target.execute("cont")


def _set_capabilities(qmp: Qmp, names: tuple[str, ...]) -> None:
    states = [{"capability": name, "state": True} for name in names]
    qmp.execute("migrate-set-capabilities", capabilities=states)
