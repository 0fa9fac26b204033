"""VMs for people. For `cli.vm` only; shows, asks nobody."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vmferry.cli.display import facts, line, table, text
from vmferry.model.units import format_size
from vmferry.model.views import VmView
from vmferry.model.vm import DirectBoot, RunState

_STYLES = {RunState.RUNNING: "green", RunState.FAILED: "bold red", RunState.UNKNOWN: "bold red"}


def show_vms(views: Iterable[VmView]) -> None:
    """One line a VM; what is wrong with a VM stands below the table."""
    listed = list(views)
    columns = ("NAME", "STATE", "HOST", ">CPUS", ">MEMORY", ">DISKS", "SWITCHES", "MIGRATION")
    table(columns, (_row(view) for view in listed), "no VMs")
    for view in listed:
        if view.problem:
            line(f"{view.spec.name}: {view.problem}", "yellow")


def _row(view: VmView) -> tuple[object, ...]:
    spec = view.spec
    disks = format_size(sum(disk.size_bytes for disk in spec.disks)) if spec.disks else "-"
    switches = " ".join(nic.switch for nic in spec.nics)
    memory = format_size(spec.memory_bytes)
    return spec.name, _state(view), view.host, spec.cpus, memory, disks, switches, view.migration


def _state(view: VmView) -> object:
    return text(view.state.value, _STYLES.get(view.state, ""))


def show_vm(view: VmView) -> None:
    """A VM with its disks and network cards."""
    line(view.spec.name, "bold")
    facts(_facts(view))
    disks = [(disk.name, disk.pool, format_size(disk.size_bytes), disk.format, disk.path) for disk in view.spec.disks]
    table(("DISK", "POOL", ">SIZE", "FORMAT", "PATH"), disks, "no disks")
    table(("SWITCH", "MAC", ">MTU"), [(nic.switch, nic.mac, nic.mtu) for nic in view.spec.nics], "no network cards")


def _facts(view: VmView) -> Iterator[tuple[str, object]]:
    spec, boot = view.spec, view.spec.boot
    yield "state", _state(view)
    yield "problem", text(view.problem, "yellow") if view.problem else ""
    yield "host", view.host
    yield "migration", view.migration
    yield "cpus", f"{spec.cpus} of {spec.cpu}"
    yield "memory", format_size(spec.memory_bytes)
    yield "machine", spec.machine
    yield "boot", f"kernel {boot.kernel}, {boot.cmdline}" if isinstance(boot, DirectBoot) else boot.firmware
    yield "generation", spec.generation
    yield "id", spec.id
    yield "process", view.pid or ""
    yield "console", view.console
