"""A VM's guest on this host, put together from its parts: run directory, ports, QEMU; built, adopted, dismantled.

Used by the host (start, adoption) and by both sides of a migration (incoming guest, rehearsal twin).
"""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from vmferry.migration.host_parts import HostParts
from vmferry.migration.undoing import to_the_end
from vmferry.model.errors import Failed, Refused
from vmferry.model.vm import DirectBoot, FirmwareBoot, VmSpec
from vmferry.network.ports import Port, PortRequest, adopt_port, close_port, create_port, port_name, remove_port
from vmferry.network.switches import SwitchConfig
from vmferry.qemu.cpu import CpuFeatures
from vmferry.qemu.layout import FirmwareFiles, GuestLayout
from vmferry.qemu.memory_image import MemoryPlace, MemoryReader, locate_memory
from vmferry.qemu.monitor import Monitor
from vmferry.qemu.process import GuestProcess, ProcessIdentity, adopt_guest, start_guest

_OVMF = Path("/usr/share/OVMF")  # Debian's package ovmf
_OVMF_CODE = _OVMF / "OVMF_CODE_4M.fd"
_OVMF_VARIABLES = _OVMF / "OVMF_VARS_4M.fd"
_VARIABLES_FILE = "uefi-vars.fd"


@dataclass(slots=True)
class RunningGuest:
    """A guest's process with the ports that its NICs are plugged into (in the order of the spec)."""

    spec: VmSpec
    process: GuestProcess
    ports: list[Port] = field(default_factory=list)
    cpu: CpuFeatures | None = None

    @property
    def monitor(self) -> Monitor:
        """The monitor for all work."""
        return self.process.monitor


def switch_of(parts: HostParts, name: str) -> SwitchConfig:
    """Raises Refused `switch-missing`."""
    switch = parts.switches.get(name)
    if switch is None:
        known = ", ".join(sorted(parts.switches)) or "none"
        raise Refused(
            "switch-missing", f"{parts.name} has no switch {name!r} (it has: {known}).", "Map it: --network A=B."
        )
    return switch


async def create_ports(parts: HostParts, spec: VmSpec, *, plugged: bool) -> list[Port]:
    """One port a NIC; all or none. Raises as `create_port` and `switch_of` do."""
    ports: list[Port] = []
    try:
        for index, nic in enumerate(spec.nics):
            switch = switch_of(parts, nic.switch)
            request = PortRequest(
                vm_id=spec.id,
                index=index,
                mac=nic.mac,
                mtu=nic.mtu,
                owner_uid=parts.user.uid if parts.user else None,
                plugged=plugged,
                switch=switch.device,
            )
            ports.append(await create_port(parts.netlink, request))
    except BaseException:
        await remove_ports(parts, ports)
        raise
    return ports


async def remove_ports(parts: HostParts, ports: list[Port]) -> None:
    """Removes the ports; those that are gone already are fine."""
    # Taken off the list first: two clean-ups at once must not close the same descriptor number twice.
    while ports:
        port = ports.pop()
        close_port(port)
        await remove_port(parts.netlink, port.name)


async def build_guest(parts: HostParts, spec: VmSpec, ports: list[Port], *, incoming: bool) -> RunningGuest:
    """Starts QEMU for the VM, stopped (the caller continues it). Raises Failed `guest-start`; then nothing runs."""
    layout = await _layout(parts, spec, parts.guest_dir(spec.id), incoming=incoming, twin=False, ports=ports)
    process = await start_guest(layout, [port.fd for port in ports], parts.user, parts.limits.start_s)
    return RunningGuest(spec, process, ports)


async def build_twin(parts: HostParts, spec: VmSpec, nonce: str, *, incoming: bool) -> RunningGuest:
    """Starts an un-booted twin without images and ports, for a rehearsal. Raises Failed `guest-start`."""
    run_dir = parts.run_dir / "twins" / f"{nonce}-{'in' if incoming else 'out'}"
    try:
        layout = await _layout(parts, spec, run_dir, incoming=incoming, twin=True, ports=[])
        return RunningGuest(spec, await start_guest(layout, (), parts.user, parts.limits.start_s))
    except BaseException:
        await to_the_end(asyncio.to_thread(shutil.rmtree, run_dir, ignore_errors=True))
        raise


async def adopt(parts: HostParts, spec: VmSpec, identity: ProcessIdentity) -> RunningGuest | None:
    """A guest of an earlier life of the daemon, with its ports; None if it is gone. Raises as `adopt_guest` does."""
    process = await adopt_guest(identity, parts.guest_dir(spec.id))
    if process is None:
        return None
    guest = RunningGuest(spec, process)
    try:
        for index, nic in enumerate(spec.nics):
            name = port_name(spec.id, index)
            guest.ports.append(await adopt_port(parts.netlink, name, process.steal_tap(name), nic.mac))
    except BaseException:
        for port in guest.ports:
            close_port(port)
        await process.close()
        raise
    return guest


async def dismantle(parts: HostParts, guest: RunningGuest, *, kill: bool = True) -> None:
    """Ends the process (SIGKILL, or SIGTERM first so that it flushes), waits, removes ports and run directory."""
    if not kill:
        guest.process.terminate()
        try:
            async with asyncio.timeout(10):
                await guest.process.exited()
        except TimeoutError:
            guest.process.kill()
    else:
        guest.process.kill()
    await guest.process.exited()
    await let_go(parts, guest)


async def let_go(parts: HostParts, guest: RunningGuest) -> None:
    """After the process has ended: closes what we hold of it, removes ports and run directory. Idempotent."""
    await guest.process.close()
    await remove_ports(parts, guest.ports)
    await asyncio.to_thread(shutil.rmtree, guest.process.run_dir, ignore_errors=True)


async def _layout(
    parts: HostParts, spec: VmSpec, run_dir: Path, *, incoming: bool, twin: bool, ports: list[Port]
) -> GuestLayout:
    await asyncio.to_thread(_make_run_dir, parts, run_dir)
    firmware = None
    if isinstance(spec.boot, FirmwareBoot) and spec.boot.firmware == "uefi":
        firmware = await asyncio.to_thread(_firmware, parts, spec, twin=twin)
    return GuestLayout(
        spec=spec,
        run_dir=run_dir,
        boot_dir=parts.vm_dir(spec.id),
        accel=parts.accel,
        binary=parts.binary,
        tap_fds=tuple(port.fd for port in ports),
        incoming=incoming,
        twin=twin,
        paused=True,
        firmware=firmware,
        sandbox=parts.features.has_seccomp,
    )


def _make_run_dir(parts: HostParts, run_dir: Path) -> None:
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # QEMU opens its log and sockets through descriptors, but finds its own files by path.
        for directory in (run_dir, run_dir.parent):
            directory.chmod(0o711)
        if parts.user is not None:
            os.chown(run_dir, parts.user.uid, parts.user.gid)
    except OSError as error:
        raise Failed("run-dir", f"{run_dir} cannot be made: {error}.", "Is the run directory writable?") from error


def _firmware(parts: HostParts, spec: VmSpec, *, twin: bool) -> FirmwareFiles:
    if not _OVMF_CODE.exists():
        raise Refused(
            "firmware-missing", f"{parts.name} has no UEFI firmware ({_OVMF_CODE}).", "Install the package ovmf."
        )
    if twin:  # it needs their size only, and a check leaves nothing behind
        size = _OVMF_VARIABLES.stat().st_size
        return FirmwareFiles(_OVMF_CODE, _OVMF_CODE.stat().st_size, _OVMF_VARIABLES, size)
    variables = parts.vm_dir(spec.id) / _VARIABLES_FILE
    if not variables.exists():
        variables.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        shutil.copyfile(_OVMF_VARIABLES, variables)
    if parts.user is not None:
        os.chown(variables, parts.user.uid, parts.user.gid)
    return FirmwareFiles(_OVMF_CODE, _OVMF_CODE.stat().st_size, variables, variables.stat().st_size)


def boot_files(spec: VmSpec) -> tuple[str, ...]:
    """The VM's boot files that move with it (names in its directory; they carry their digest)."""
    if isinstance(spec.boot, DirectBoot):
        return tuple(name for name in (spec.boot.kernel, spec.boot.initrd) if name)
    return ()


async def locate(guest: RunningGuest) -> MemoryPlace:
    """Where the guest's memory is in its QEMU. Raises Failed `memory-not-found`."""
    return await locate_memory(guest.monitor, guest.process.pid, guest.spec.memory_bytes)


async def open_memory(guest: RunningGuest) -> MemoryReader:
    """The guest's memory, for digests. Raises Failed `memory-not-found`, `memory-not-readable`."""
    return await asyncio.to_thread(MemoryReader, await locate(guest))
