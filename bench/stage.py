"""Where it all happens: a lab of two hosts of its own, a wrapper around QEMU, and the guest's disk.

Everything is made below the lab's directories and in its namespaces, so that taking the lab down removes it all, also
what a killed bench has left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.bare import BareGuest
from bench.plan import ADDRESS, DISK_GIB, FILL_MIB, LINK_BPS, GuestPlan, Load
from vmferry.lab.guest import GuestImages, build_guest
from vmferry.lab.guest_client import GuestClient
from vmferry.lab.layout import RUN_ROOT, STATE_ROOT, HostLayout, LabLayout
from vmferry.lab.namespaces import lab_down, lab_up
from vmferry.lab.wiring import run_tool
from vmferry.model.errors import Conflict, Failed

_QEMU = "qemu-system-x86_64"


@dataclass(frozen=True, slots=True)
class Stage:
    """`emulator` is the wrapper; `monitors` the directory of the sockets it adds, one for each guest's process.

    `home` is for the files of the bench itself; `template` the disk that every guest begins with.
    """

    layout: LabLayout
    images: GuestImages
    home: Path
    emulator: Path
    monitors: Path
    template: Path

    @property
    def source(self) -> HostLayout:
        return self.layout.hosts[0]

    @property
    def target(self) -> HostLayout:
        return self.layout.hosts[1]

    def plan(self, load: Load) -> GuestPlan:
        return GuestPlan(self.images.kernel, self.images.initrd, self.template, load)

    def guest_client(self) -> GuestClient:
        return GuestClient(ADDRESS, self.layout.client_namespace)

    def forget_monitors(self) -> None:
        """Removes the sockets of guests that have ended."""
        for path in self.monitors.glob("*.sock"):
            path.unlink(missing_ok=True)

    def wire_bytes(self, host: HostLayout) -> int:
        """What the host has sent on its migration link. From its shaper: veth counts segmented packets short."""
        shown = json.loads(run_tool(["tc", "-n", host.namespace, "-s", "-j", "qdisc", "show", "dev", "mig0"]))
        return sum(int(qdisc["bytes"]) for qdisc in shown if qdisc["kind"] == "tbf")


@contextlib.contextmanager
def open_stage(prefix: str, link_bps: int = LINK_BPS) -> Iterator[Stage]:
    """The stage, taken down again at the end, whatever happens. Raises Conflict if another bench uses this prefix."""
    RUN_ROOT.mkdir(parents=True, exist_ok=True)
    with (RUN_ROOT / f"{prefix}.bench-lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict("bench-running", "A bench is running already.", "Wait for it, or give --prefix.") from error
        images = build_guest()
        home = STATE_ROOT / f"{prefix}-bench"
        _clear(prefix, home)
        try:
            yield _build(LabLayout(prefix, 2, link_bps, "tcg"), images, home)
        finally:
            with _undisturbed():
                _clear(prefix, home)
                Path(lock.name).unlink()


def _clear(prefix: str, home: Path) -> None:
    """Ends everything that runs in the lab's namespaces (also libvirt and its guests), and removes what is left."""
    lab_down(prefix)
    if home.exists():
        shutil.rmtree(home)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not interrupt the clearing away."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    former = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, former, strict=True):
            signal.signal(number, handler)


def _build(layout: LabLayout, images: GuestImages, home: Path) -> Stage:
    emulator, monitors = _wrap_qemu(home)
    os.environ["PATH"] = f"{emulator.parent}:{os.environ.get('PATH', os.defpath)}"  # for the daemons, started now
    lab_up(2, layout.link_bps, layout.prefix, accel=layout.accel)
    stage = Stage(layout, images, home, emulator, monitors, home / "template.qcow2")
    _fill(stage)
    return stage


def _wrap_qemu(home: Path) -> tuple[Path, Path]:
    """Only guests get the additional monitor, not QEMUs that are asked for their features: guests have a name."""
    qemu = shutil.which(_QEMU)
    if qemu is None:
        raise Failed("bench-no-qemu", f"{_QEMU} is not installed.", "Run ./dev setup.")
    monitors, wrapper = home / "monitors", home / "bin" / _QEMU
    monitors.mkdir(parents=True)
    monitors.chmod(0o1777)  # guests of vmferry do not run as root
    wrapper.parent.mkdir()
    monitor = f'-qmp "unix:{monitors}/$$.sock,server=on,wait=off"'
    wrapper.write_text(f'#!/bin/sh\ncase " $* " in *" -name "*) set -- "$@" {monitor};; esac\nexec {qemu} "$@"\n')
    wrapper.chmod(0o755)
    return wrapper, monitors


def _fill(stage: Stage) -> None:
    """A guest writes the data once; every run begins with a copy of its disk."""
    run_tool(["qemu-img", "create", "-q", "-f", "qcow2", str(stage.template), f"{DISK_GIB}G"])
    load = Load("fill", "fill", {"fill": FILL_MIB, "disk": 1, "diskrate": 1})
    guest = BareGuest(stage.source, stage.home, stage.emulator)
    with contextlib.closing(guest), stage.guest_client() as client:
        guest.start(stage.plan(load), stage.template)
        deadline = time.monotonic() + 180
        while not client.status(60).disk.fill_done:
            if time.monotonic() > deadline:
                raise Failed("bench-fill", "The guest does not fill its disk.", "Is the machine overloaded?")
            time.sleep(0.5)
        client.power_off()
        guest.wait(30)
    stage.forget_monitors()
