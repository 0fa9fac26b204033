"""The VMs of this host: defined, created, started, stopped, watched, deleted; guests found again after a restart.

A VM that a migration holds (`claim`) is left alone: every act on it is refused with the way to cancel.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from vmferry.host import log
from vmferry.host.creation import VmFiles
from vmferry.host.definition import VmDefinition
from vmferry.host.journal import Journal, VmRow
from vmferry.host.strays import end_processes_of
from vmferry.migration.guest import RunningGuest, adopt, build_guest, create_ports, dismantle, let_go, remove_ports
from vmferry.migration.host_parts import HostParts
from vmferry.model.errors import Conflict, Failed, NotFound, VmferryError
from vmferry.model.views import VmView
from vmferry.model.vm import RunState, VmSpec
from vmferry.network.ports import plug
from vmferry.qemu.cpu import observe_guest_cpu
from vmferry.qemu.monitor import QmpEvent
from vmferry.qemu.process import ProcessIdentity

_POWERDOWN_AGAIN_S = 3.0
_PEACE_S = 1.0  # after its start or arrival a guest's QEMU and this daemon have other things to do


@dataclass(slots=True)
class Vm:
    """One VM in memory. `guest` is None while no process runs; `claimed_by` is the migration that holds it."""

    spec: VmSpec
    owned: bool
    wanted: str
    state: RunState = RunState.STOPPED
    guest: RunningGuest | None = None
    claimed_by: str = ""
    problem: str = ""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    powered_off: bool = False  # the guest said so itself


class Vms:
    """The registry. Its journal rows are written before the acts they announce."""

    def __init__(self, parts: HostParts, journal: Journal, files: VmFiles) -> None:
        self._parts = parts
        self._journal = journal
        self._files = files
        self._vms: dict[str, Vm] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._learning = asyncio.Lock()

    # -- what is there -----------------------------------------------------------------------------------------------

    def list_views(self) -> list[VmView]:
        """Every VM of this host, by name."""
        return [self._view(vm) for _, vm in sorted(self._vms.items())]

    def view(self, name: str) -> VmView:
        """Raises NotFound `no-such-vm`."""
        return self._view(self.get(name))

    def get(self, name: str) -> Vm:
        """Raises NotFound `no-such-vm`."""
        vm = self._vms.get(name)
        if vm is None:
            raise NotFound("no-such-vm", f"{self._parts.name} has no VM named {name}.", "See `vmferry vm list`.")
        return vm

    def all(self) -> list[Vm]:
        """Every VM of this host."""
        return list(self._vms.values())

    def by_id(self, vm_id: str) -> Vm | None:
        """The VM with this identity, if it is here."""
        return next((vm for vm in self._vms.values() if vm.spec.id == vm_id), None)

    def memory_in_use(self) -> int:
        """Bytes that running guests were given."""
        return sum(vm.spec.memory_bytes for vm in self._vms.values() if vm.guest is not None)

    def _view(self, vm: Vm) -> VmView:
        guest = vm.guest
        return VmView(
            spec=vm.spec,
            host=self._parts.name,
            state=vm.state,
            pid=guest.process.pid if guest else 0,
            console=str(guest.process.run_dir / "console.sock") if guest else "",
            migration=vm.claimed_by,
            problem=vm.problem,
        )

    # -- the daemon's start and end ----------------------------------------------------------------------------------

    async def load(self, in_flight: dict[str, str]) -> None:
        """Reads the journal and adopts the guests that are still running. `in_flight`: VM id to migration id.

        A guest is never started here, and one that a migration held is adopted as it is: recovery decides.
        """
        for row in await self._journal.list_vms():
            vm = Vm(spec=row.spec, owned=row.owned, wanted=row.wanted, claimed_by=in_flight.get(row.spec.id, ""))
            self._vms[row.spec.name] = vm
            try:
                await self._adopt(vm, row)
            except VmferryError as error:
                # One VM that cannot be looked at must not keep the others from being managed.
                vm.state, vm.problem = RunState.UNKNOWN, f"{error.message} {error.fix}".strip()
                log.alarm("vm-not-loaded", vm=row.spec.name, problem=error.message)

    async def _adopt(self, vm: Vm, row: VmRow) -> None:
        if not row.pid:
            # One that was started and not yet written down has never run: it is let run only after that.
            await end_processes_of(str(self._parts.guest_dir(row.spec.id)))
            return
        identity = ProcessIdentity(row.pid, row.start_ticks)
        try:
            guest = await adopt(self._parts, row.spec, identity)
        except VmferryError as error:
            vm.state, vm.problem = RunState.UNKNOWN, f"{error.message} {error.fix}"
            log.alarm("guest-not-adopted", vm=row.spec.name, problem=error.message)
            return
        if guest is None:
            await self._journal.set_process(row.spec.id, 0, 0)
            await end_processes_of(str(self._parts.guest_dir(row.spec.id)))
            if row.wanted != "stopped":
                vm.state, vm.problem = RunState.FAILED, "Its process ended while vmferryd was not there."
            return
        self._attach(vm, guest)
        await self.refresh(vm)
        if vm.owned and not vm.claimed_by and vm.wanted == "running" and vm.state is RunState.PAUSED and not vm.problem:
            # An earlier life took it back from a migration, wrote so, and ended before it let the guest run.
            await guest.monitor.execute("cont")
            await self.refresh(vm)
        log.event("guest-adopted", vm=row.spec.name, pid=row.pid, state=vm.state)

    async def close(self) -> None:
        """Lets go of all guests without touching them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for vm in self._vms.values():
            if vm.guest is not None:
                await vm.guest.process.close()

    # -- acts --------------------------------------------------------------------------------------------------------

    async def create(self, definition: VmDefinition) -> VmView:
        """Defines a VM with its images. Raises Conflict `vm-exists` and what the images' making raises; then nothing
        is left.
        """
        if definition.name in self._vms:
            raise Conflict("vm-exists", f"{self._parts.name} has a VM named {definition.name}.", "Choose another name.")
        in_use = frozenset(nic.mac for vm in self._vms.values() for nic in vm.spec.nics)
        spec = await self._files.create(definition, in_use)
        try:
            await self._journal.add_vm(spec)
        except BaseException:
            await asyncio.shield(self._files.remove(spec))
            raise
        self._vms[spec.name] = Vm(spec=spec, owned=True, wanted="stopped")
        log.event("vm-created", vm=spec.name, id=spec.id)
        return self.view(spec.name)

    async def delete(self, name: str) -> None:
        """Forgets a stopped VM and removes its images. Raises Conflict `vm-running`."""
        async with self._act(name) as vm:
            if vm.guest is not None:
                raise Conflict("vm-running", f"{name} is running.", f"Stop it first: vmferry vm stop {name}.")
            await self._journal.remove_vm(vm.spec.id)
            del self._vms[name]
            await self._files.remove(vm.spec)
            log.event("vm-deleted", vm=name, id=vm.spec.id)

    async def start(self, name: str) -> None:
        """Starts the guest. Nothing happens when it runs; a paused one stays paused."""
        async with self._act(name) as vm:
            if vm.guest is not None:
                return
            vm.state, vm.problem = RunState.STARTING, ""
            await self._journal.set_wanted(vm.spec.id, "running")
            try:
                await self._start(vm)
            except BaseException as error:
                vm.state = RunState.STOPPED
                vm.problem = error.message if isinstance(error, VmferryError) else vm.problem
                raise
            vm.wanted, vm.state = "running", RunState.RUNNING
            log.event("guest-started", vm=name, pid=vm.guest.process.pid if vm.guest else 0)

    async def _start(self, vm: Vm) -> None:
        self._require_memory(vm.spec)
        ports = await create_ports(self._parts, vm.spec, plugged=True)
        try:
            guest = await build_guest(self._parts, vm.spec, ports, incoming=False)
        except BaseException:
            await asyncio.shield(remove_ports(self._parts, ports))
            raise
        try:
            identity = guest.process.identity
            await self._journal.set_process(vm.spec.id, identity.pid, identity.start_time_ticks)
            await guest.monitor.execute("cont")
        except BaseException:
            await asyncio.shield(dismantle(self._parts, guest))
            raise
        self._attach(vm, guest)

    def _require_memory(self, spec: VmSpec) -> None:
        free = observe_free_memory() - self._parts.limits.memory_reserve_bytes
        if spec.memory_bytes > free:
            raise Failed(
                "no-memory",
                f"{spec.name} needs {spec.memory_bytes >> 20} MiB, this host has {max(0, free) >> 20} MiB to give.",
                "Stop another VM, or lower [limits] memory_reserve.",
            )

    async def stop(self, name: str, timeout_s: float) -> None:
        """Asks the guest to shut down and waits. Raises Failed `not-stopped` when it did not in time: it runs on."""
        async with self._act(name) as vm:
            if vm.guest is None:
                return
            await self._journal.set_wanted(vm.spec.id, "stopped")
            vm.wanted = "stopped"
            if await self._power_down(vm, timeout_s):
                return
            await self._journal.set_wanted(vm.spec.id, "running")
            vm.wanted = "running"
            raise Failed(
                "not-stopped",
                f"{name} did not shut down within {timeout_s:g} s; it runs on.",
                f"Its system may not listen to the power button: vmferry vm kill {name}.",
            )

    async def _power_down(self, vm: Vm, timeout_s: float) -> bool:
        until = asyncio.get_running_loop().time() + timeout_s
        while (left := until - asyncio.get_running_loop().time()) > 0:
            if vm.guest is None:
                return True
            # Pressed again and again: a system that is still booting does not listen yet.
            await vm.guest.monitor.execute("system_powerdown")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(vm.ended.wait(), min(_POWERDOWN_AGAIN_S, left))
        return vm.guest is None

    async def kill(self, name: str) -> None:
        """Ends the guest at once, as pulling the plug does."""
        async with self._act(name) as vm:
            await self._journal.set_wanted(vm.spec.id, "stopped")
            vm.wanted = "stopped"
            if vm.guest is not None:
                vm.guest.process.kill()
                await vm.ended.wait()

    async def pause(self, name: str) -> None:
        """Stops the guest's vCPUs. Raises Conflict `vm-not-running`."""
        await self._switch(name, "stop", "paused", RunState.PAUSED)

    async def resume(self, name: str) -> None:
        """Lets a paused guest run. Raises Conflict `vm-not-running`."""
        await self._switch(name, "cont", "running", RunState.RUNNING)

    async def _switch(self, name: str, command: str, wanted: str, state: RunState) -> None:
        async with self._act(name) as vm:
            if vm.guest is None:
                raise Conflict("vm-not-running", f"{name} is not running.", f"Start it: vmferry vm start {name}.")
            await self._journal.set_wanted(vm.spec.id, wanted)
            await vm.guest.monitor.execute(command)
            vm.wanted, vm.state = wanted, state

    @contextlib.asynccontextmanager
    async def _act(self, name: str) -> AsyncIterator[Vm]:
        """One act at a time on a VM that is ours and that no migration holds."""
        vm = self.get(name)
        async with vm.lock:
            if vm.claimed_by:
                raise Conflict(
                    "vm-migrating",
                    f"{name} is being migrated ({vm.claimed_by}).",
                    f"Wait for its end, or cancel it: vmferry migration cancel {vm.claimed_by}.",
                )
            if not vm.owned or self._vms.get(name) is not vm:
                raise NotFound("no-such-vm", f"{name} is not this host's any more.", "See `vmferry vm list`.")
            yield vm

    # -- what migrations need ----------------------------------------------------------------------------------------

    async def claim(self, name: str, migration_id: str) -> Vm:
        """Holds a running VM for a migration. Raises Conflict `vm-migrating`, `vm-not-running`, `vm-busy`."""
        if self.get(name).lock.locked():
            raise Conflict("vm-busy", f"{name} is being started, stopped or deleted.", "Wait for that, then try again.")
        async with self._act(name) as vm:
            if vm.guest is None:
                raise Conflict(
                    "vm-not-running",
                    f"{name} is {vm.state}; only a running VM can move live.",
                    f"Start it first: vmferry vm start {name}.",
                )
            vm.claimed_by = migration_id
            return vm

    async def release(self, vm: Vm) -> None:
        """Ends the hold of a VM that has stayed here, or was taken back, and looks at the guest anew."""
        vm.claimed_by, vm.owned = "", True
        await self.refresh(vm)

    async def plug_ports(self, vm: Vm) -> None:
        """A running guest that is ours takes part in its switches, whatever a migration cut short has left there."""
        if vm.guest is None or not vm.owned:
            return
        for nic, port in zip(vm.spec.nics, vm.guest.ports, strict=True):
            switch = self._parts.switches.get(nic.switch)
            if switch is None:
                log.alarm("switch-missing", vm=vm.spec.name, switch=nic.switch)
                continue
            await plug(self._parts.netlink, replace(port, switch=switch.device))

    def give_away(self, vm: Vm) -> None:
        """The VM belongs to another host now: forgotten here. Its guest is the caller's to end."""
        vm.owned = False
        if self._vms.get(vm.spec.name) is vm:
            del self._vms[vm.spec.name]

    def receive(self, spec: VmSpec, guest: RunningGuest | None, state: RunState, claimed_by: str) -> Vm:
        """A VM that arrived; its guest is watched from now on."""
        wanted = "paused" if state is RunState.PAUSED else "running"
        vm = Vm(spec=spec, owned=True, wanted=wanted, state=state, claimed_by=claimed_by)
        self._vms[spec.name] = vm
        if guest is not None:
            self._attach(vm, guest)
        return vm

    async def refresh(self, vm: Vm) -> None:
        """Asks QEMU in which state the guest is."""
        if vm.guest is None:
            return
        try:
            status = (await vm.guest.monitor.execute("query-status", timeout_s=5))["status"]
        except VmferryError as error:
            vm.state, vm.problem = RunState.UNKNOWN, error.message
            return
        vm.state = RunState.RUNNING if status == "running" else RunState.PAUSED
        vm.problem = "" if status in _PLAIN_STATES else f"QEMU says {status}."

    # -- watching ----------------------------------------------------------------------------------------------------

    def _attach(self, vm: Vm, guest: RunningGuest) -> None:
        vm.guest = guest
        vm.powered_off = False
        guest.monitor.listen(("SHUTDOWN",), lambda event: _note_shutdown(vm, event))
        vm.ended.clear()
        for work in (self._watch(vm, guest), self._learn_cpu(guest)):
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _learn_cpu(self, guest: RunningGuest) -> None:
        """What the guest's CPU has, for the check of a migration: asked in peace, one guest after the other."""
        async with self._learning:
            await asyncio.sleep(_PEACE_S)
            with contextlib.suppress(VmferryError):  # the check asks itself then
                guest.cpu = guest.cpu or await observe_guest_cpu(guest.monitor)

    async def _watch(self, vm: Vm, guest: RunningGuest) -> None:
        status = await guest.process.exited()
        if vm.guest is not guest or self._vms.get(vm.spec.name) is not vm:
            return  # one that was given away: its ports forward frames for a while yet
        tail = guest.process.log_tail(3)
        vm.guest = None
        # After that it has nothing more to lose: QEMU was seen to crash when it ended in the middle of a migration.
        asked = vm.wanted == "stopped" or status == 0 or vm.powered_off
        vm.state = RunState.STOPPED if asked else RunState.FAILED
        vm.problem = "" if asked else f"QEMU ended by itself (status {status}): {' / '.join(tail)}"
        try:
            await let_go(self._parts, guest)
            await self._journal.set_process(vm.spec.id, 0, 0)
        except VmferryError as error:
            # The next start of the daemon sees by itself that the process is gone.
            log.alarm("guest-end-not-tidied", vm=vm.spec.name, problem=error.message)
        finally:
            vm.ended.set()
        log.event("guest-ended", vm=vm.spec.name, status=status, asked=asked)


def _note_shutdown(vm: Vm, event: QmpEvent) -> None:
    vm.powered_off = vm.powered_off or event.data.get("reason") == "guest-shutdown"


_PLAIN_STATES = frozenset({"running", "paused", "prelaunch", "postmigrate", "finish-migrate", "inmigrate"})


def observe_free_memory() -> int:
    """Bytes that can be given to guests without swapping (MemAvailable of proc(5))."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise Failed("no-meminfo", "The kernel does not say how much memory is free.", "Is /proc mounted?")
