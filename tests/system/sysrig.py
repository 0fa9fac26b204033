"""A lab with real daemons and guests for the system tests: one for all of them, guests kept running between tests.

A test that fails may have broken anything: the lab is then built anew before the next one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmferry.api.client import HostClient
from vmferry.lab import faults
from vmferry.lab.guest import build_guest, guest_cmdline
from vmferry.lab.guest_client import GuestClient, GuestStatus
from vmferry.lab.health import judge_status, wait_until_beating
from vmferry.lab.layout import HostLayout, LabLayout
from vmferry.lab.leftovers import find_leftovers, wait_until_clean
from vmferry.lab.namespaces import lab_down, lab_status, lab_up, resume_daemon, stop_daemon
from vmferry.lab.probes.launch import RunningProbe, start_probe
from vmferry.lab.trial_vm import host_client
from vmferry.model.errors import NotFound, VmferryError
from vmferry.model.migration import MigrateOptions, MigrationView, Outcome, Phase, Role, Verify
from vmferry.model.vm import RunState

PREFIX = os.environ.get("VMFERRY_TEST_LAB", "vfsys")
MOST_BLACKOUT_MS = 2000
CANCEL_WITHIN_S = 2.0
# Shorter than the defaults, so that the tests are: nothing here may depend on how long they are.
LIMITS = 'memory_stall = "5s"\ndisk_stall = "5s"\nforward_limit = "3s"\n'
QUICK = MigrateOptions(max_blackout_ms=2000, verify=Verify.NONE)
SLOW = MigrateOptions(max_blackout_ms=2000, verify=Verify.NONE, bandwidth_bps=100_000_000)


def wait_for(what: str, ready: Callable[[], Any], within_s: float = 30.0, every_s: float = 0.02) -> Any:
    """What `ready` gives as soon as it is true."""
    deadline = time.monotonic() + within_s
    while True:
        found = ready()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(every_s)


@dataclass(slots=True)
class Guest:
    """A VM of these tests and how to reach its guest."""

    name: str
    address: str
    client: GuestClient
    since: GuestStatus | None = None


@dataclass(slots=True)
class Rig:
    """The lab. `pools` are tmpfs of a few MiB on host2, by name, beside the lab's own pools."""

    layout: LabLayout
    guests: dict[str, Guest] = field(default_factory=dict)

    # -- hosts -------------------------------------------------------------------------------------------------------

    def host(self, name: str) -> HostLayout:
        return self.layout.host(name)

    def on(self, name: str) -> HostClient:
        return host_client(self.host(name))

    def other(self, name: str) -> str:
        return "host2" if name == "host1" else "host1"

    def daemon_pid(self, name: str) -> int:
        return lab_status(self.layout.prefix).daemons[name].pid

    def kill_daemon(self, name: str, number: int = signal.SIGKILL) -> None:
        stop_daemon(self.layout.prefix, name, number)

    def start_daemon(self, name: str) -> None:
        resume_daemon(self.layout.prefix, name)

    @contextlib.contextmanager
    def frozen(self, *pids: int) -> Iterator[None]:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def qemu_pids(self, host: str, vm_name: str = "") -> list[int]:
        """The guests' processes on a host (twins of rehearsals left out), of one VM or all."""
        wanted = f"{self.host(host).run_dir}/guests/"
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                named = not vm_name or any(word.startswith(f"guest={vm_name},") or word == vm_name for word in words)
                if state not in "ZX" and "qemu" in words[0] and any(wanted in word for word in words) and named:
                    found.append(int(entry.name))
        return found

    def owners(self, vm_name: str) -> list[tuple[str, RunState]]:
        """Every host that claims the VM, with the state it shows."""
        found = []
        for host in self.layout.hosts:
            with contextlib.suppress(VmferryError):
                found += [(host.name, v.state) for v in self.on(host.name).vms() if v.spec.name == vm_name]
        return found

    def place(self, vm_name: str) -> tuple[str, str]:
        """Where the VM is, and the other host."""
        owners = self.owners(vm_name)
        assert len(owners) == 1, owners
        return owners[0][0], self.other(owners[0][0])

    @contextlib.contextmanager
    def journal_held(self, host: str) -> Iterator[sqlite3.Connection]:
        """Nobody else can write that host's journal meanwhile (as if its disk stood still, at most 5 s)."""
        held = sqlite3.connect(self.host(host).state_dir / "journal.sqlite", isolation_level=None, timeout=5)
        try:
            held.execute("BEGIN IMMEDIATE")
            yield held
        finally:
            with contextlib.suppress(sqlite3.Error):
                held.execute("ROLLBACK")
            held.close()

    def journal_state(self, host: str, migration_id: str, role: Role) -> str:
        """A migration's state in the host's journal."""
        path = f"file:{self.host(host).state_dir / 'journal.sqlite'}?mode=ro"
        with contextlib.closing(sqlite3.connect(path, uri=True, timeout=5)) as db:
            row = db.execute("SELECT state FROM migration WHERE id=? AND role=?", (migration_id, role)).fetchone()
        return row[0] if row else ""

    # -- guests ------------------------------------------------------------------------------------------------------

    def spec(self, name: str, address: str, **changes: Any) -> dict[str, Any]:
        """A VM of 128 MiB with a disk of 256 MiB, 32 MiB of it written; memory and disk workloads."""
        images = build_guest()
        load: dict[str, str | int] = {
            "ip": f"{address}/24", "udp": 7, "tcp": 7, "stream": 9, "beat": 200, "wss": 24, "dirty": 2,
            "disk": 1, "diskarea": 8, "diskrate": 10, "fill": 32,
        }  # fmt: skip
        load |= changes.pop("load", {})
        return {
            "name": name,
            "cpus": 1,
            "memory": "128MiB",
            "boot": {"kernel": str(images.kernel), "initrd": str(images.initrd), "cmdline": guest_cmdline(**load)},
            "disk": [{"name": "root", "pool": "local", "size": "256MiB", "format": "qcow2"}],
            "nic": [{"switch": "lan"}],
        } | changes

    def ensure_guest(self, name: str, address: str, **changes: Any) -> Guest:
        """The guest, running and answering, on whatever host it is; made on host1 if it is not there."""
        if name not in self.guests:
            self.on("host1").create_vm(self.spec(name, address, **changes))
            self.guests[name] = Guest(name, address, GuestClient(address, self.layout.client_namespace))
        guest = self.guests[name]
        host, _ = self.place(name)
        if self.on(host).vm(name).state is not RunState.RUNNING:
            self.on(host).start_vm(name)
        status = guest.client.status(60.0)
        wait_for("the disk is filled", lambda: guest.client.status(60.0).disk.state in ("none", "writing"), 90.0, 0.1)
        guest.since = status
        return guest

    def forget_guest(self, name: str) -> None:
        """Ends and deletes the VM."""
        guest = self.guests.pop(name, None)
        if guest is not None:
            guest.client.close()
        for host, _ in self.owners(name):
            self.on(host).kill_vm(name)
            self.on(host).delete_vm(name)

    # -- migrations --------------------------------------------------------------------------------------------------

    def begin(self, vm_name: str, options: MigrateOptions = QUICK) -> tuple[MigrationView, str, str]:
        """Starts a migration to the other host; its view, source and target."""
        source, target = self.place(vm_name)
        return self.on(source).migrate(vm_name, target, options), source, target

    def wait_until(
        self, host: str, migration_id: str, reached: Callable[[MigrationView], bool], within_s: float = 60.0
    ) -> MigrationView:
        """The first view that has got there, or that has ended."""
        client = self.on(host)

        def look() -> MigrationView | None:
            view = client.migration(migration_id)
            return view if reached(view) or view.outcome in ENDED else None

        view: MigrationView = wait_for("the migration gets there", look, within_s, 0.003)
        return view

    def wait_end(self, host: str, migration_id: str, within_s: float = 60.0) -> MigrationView:
        return self.wait_until(host, migration_id, lambda view: view.outcome in ENDED, within_s)

    def migrate(self, vm_name: str, options: MigrateOptions = QUICK) -> MigrationView:
        """A whole migration to the other host, which must succeed."""
        view, source, _ = self.begin(vm_name, options)
        ended = self.wait_end(source, view.id)
        assert ended.outcome is Outcome.COMPLETED, ended.reason
        return ended

    # -- what must be true -------------------------------------------------------------------------------------------

    def watch(self, guest: Guest) -> Watched:
        return Watched(self, guest)

    def require_clean(self, within_s: float = 20.0) -> None:
        """Nothing is on any host that belongs to no VM there."""
        found = wait_until_clean(self.layout, within_s)
        assert not found, "\n".join(str(item) for item in found)

    def require_alive(self, guest: Guest, host: str) -> None:
        """The guest runs there, once, unharmed: same boot, counters go on, and it answers through the network."""
        assert self.owners(guest.name) == [(host, RunState.RUNNING)]
        assert guest.since is not None
        status = wait_until_beating(guest.client, guest.client.status(20.0), 20.0)
        wrong = judge_status(guest.since, status)
        assert not wrong, (wrong, guest.since, status)
        guest.since = status
        self.require_running_at_most_once(guest)

    def require_running_at_most_once(self, guest: Guest) -> None:
        """Of the processes of this VM on all hosts at most one has vCPUs that run."""
        running = [pid for host in ("host1", "host2") for pid in self.qemu_pids(host, guest.name) if vcpus_advance(pid)]
        assert len(running) <= 1, f"two guests run: {running}"

    def require_running_once(self, guest: Guest) -> None:
        """The guest goes on, whatever becomes of the daemons."""
        self.require_running_at_most_once(guest)
        guest.client.status(10.0)

    def require_unharmed(self, guest: Guest) -> None:
        """The guest's own checks of its memory and its disk find nothing."""
        memory, disk = guest.client.check_memory(60.0), guest.client.verify_disk(60.0)
        assert (memory.errors, disk.errors) == (0, 0), (memory, disk)


_PF_EXITING, _PF_SIGNALED = 0x4, 0x400  # include/linux/sched.h


def vcpus_advance(pid: int, within_s: float = 0.5) -> bool:
    """Whether the process's vCPU threads use CPU time (idle guests do too: their timers tick)."""

    def used() -> int:
        total = 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                if "CPU" in (task / "comm").read_text():
                    spent = int((task / "schedstat").read_text().split()[0])
                    flags = int((task / "stat").read_text().rpartition(")")[2].split()[6])
                    # A thread that is being ended spends time, too: it takes down the memory of all of them.
                    total += 0 if flags & (_PF_EXITING | _PF_SIGNALED) else spent
        return total

    with contextlib.suppress(FileNotFoundError):
        before, deadline = used(), time.monotonic() + within_s
        while time.monotonic() < deadline:
            time.sleep(0.02)
            if used() > before + 200_000:  # ns; more than being woken up to see that there is nothing to do
                return True
    return False


ENDED = (Outcome.COMPLETED, Outcome.FAILED, Outcome.CANCELLED)


class Watched:
    """Probes the guest from the client 200 times a second while the block runs; `gap_ms` afterwards."""

    def __init__(self, rig: Rig, guest: Guest) -> None:
        self._rig, self._guest = rig, guest
        self._probe: RunningProbe | None = None
        self.report: Mapping[str, Any] = {}

    def __enter__(self) -> Watched:
        options = ("--target", self._guest.address, "--port", "7", "--rate", "200")
        self._probe = start_probe(self._rig.layout.client_namespace, "udp", *options)
        self._probe.wait_until_received()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        assert self._probe is not None
        if kind is None:
            # The guest answers again before we look: a silence that has not ended has no length yet.
            received = self._probe.progress().get("received", 0)
            with contextlib.suppress(AssertionError):
                wait_for("answers", lambda: self._probe.progress().get("received", 0) > received + 20, 5.0)  # type: ignore[union-attr]
            self.report = self._probe.stop()
        self._probe.__exit__(None, None, None)

    @property
    def gap_ms(self) -> float:
        """The longest silence, that at the end included."""
        return max(self.report["longest_gap_ms"] or 0, self.report["silent_at_end_ms"] or 0)


def copying_disks(view: MigrationView) -> bool:
    return view.phase is Phase.COPY and view.progress.disk_done_bytes > 0 and not copying_memory(view)


def copying_memory(view: MigrationView) -> bool:
    return view.phase is Phase.COPY and view.progress.memory_sent_bytes > 0


def in_phase(phase: Phase) -> Callable[[MigrationView], bool]:
    order = list(Phase)
    return lambda view: order.index(view.phase) >= order.index(phase)


# -- making and ending it ----------------------------------------------------------------------------------------------


def tiny_pool(layout: LabLayout) -> Path:
    """Where host2 has its pool `tiny`, a tmpfs."""
    return layout.host("host2").directory / "pools" / "tiny"


def build_rig() -> Rig:
    lab_down(PREFIX)
    layout = lab_up(2, prefix=PREFIX, with_daemons=False, accel="tcg").layout
    for host in layout.hosts:
        text = host.config.read_text().replace("[limits]\n", f"[limits]\n{LIMITS}")
        if host.name == "host2":
            path = tiny_pool(layout)
            path.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m,mode=755", "tmpfs", str(path)], check=True)
            text += f'[[pool]]\nname = "tiny"\nkind = "directory"\npath = "{path}"\n'
        host.config.write_text(text)
    lab_up(2, prefix=PREFIX, accel="tcg")
    return Rig(layout)


def end_rig(rig: Rig) -> None:
    for guest in rig.guests.values():
        guest.client.close()
    path = tiny_pool(rig.layout)
    for host in rig.layout.hosts:
        with contextlib.suppress(VmferryError, NotFound):
            faults.restore_link(host)
        with contextlib.suppress(VmferryError, NotFound, KeyError, ProcessLookupError):
            os.kill(rig.daemon_pid(host.name), signal.SIGCONT)
    subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)
    lab_down(PREFIX)


def leftovers_now(rig: Rig) -> str:
    return "\n".join(str(item) for item in find_leftovers(rig.layout))
