"""Hosts for people. For `cli.host` only; shows, asks nobody."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vmferry.cli.display import facts, line, table, text
from vmferry.model.units import format_size
from vmferry.model.views import HostView, PoolView, SwitchView


def show_hosts(views: Iterable[HostView]) -> None:
    """One line a host; what is wrong with a host stands below the table."""
    listed = list(views)
    columns = ("NAME", "ADDRESS", "STATE", "ACCEL", "QEMU", ">CPUS", ">MEMORY FREE", ">VMS")
    table(columns, (_row(view) for view in listed), "no hosts")
    for view in listed:
        if view.problem:
            line(f"{view.name}: {view.problem}", "yellow")


def _row(view: HostView) -> tuple[object, ...]:
    if not view.reachable:
        return view.name, view.address, text("unreachable", "bold red")
    memory = f"{format_size(view.memory_free_bytes)} of {format_size(view.memory_total_bytes)}"
    state = text("problem", "yellow") if view.problem else text("up", "green")
    return view.name, view.address, state, view.accel, view.qemu_version, view.cpus, memory, view.vms


def show_host(view: HostView) -> None:
    """A host with its pools and switches."""
    line(view.name, "bold")
    facts(_facts(view))
    if not view.reachable:
        return
    table(("POOL", "KIND", ">FREE", ">TOTAL", "PATH", "PROBLEM"), map(_pool, view.pools), "no pools")
    table(
        ("SWITCH", "KIND", "DEVICE", ">MTU", ">PORTS", "UPLINKS", "PROBLEM"), map(_switch, view.switches), "no switches"
    )


def _facts(view: HostView) -> Iterator[tuple[str, object]]:
    yield "address", view.address
    yield "state", text("up", "green") if view.reachable else text("unreachable", "bold red")
    yield "problem", view.problem
    if not view.reachable:
        return
    yield "vmferry", view.version
    yield "qemu", view.qemu_version
    yield "kernel", view.kernel
    yield "acceleration", f"{view.accel}: {view.accel_reason}" if view.accel_reason else view.accel
    yield "cpus", view.cpus
    yield "memory", f"{format_size(view.memory_free_bytes)} free of {format_size(view.memory_total_bytes)}"
    yield "vms", view.vms
    yield "certificate", f"until {view.certificate_expires_at}" if view.certificate_expires_at else "none"


def _pool(pool: PoolView) -> tuple[object, ...]:
    problem = text(pool.problem, "yellow")
    return pool.name, pool.kind, format_size(pool.free_bytes), format_size(pool.total_bytes), pool.path, problem


def _switch(switch: SwitchView) -> tuple[object, ...]:
    problem, uplinks = text(switch.problem, "yellow"), " ".join(switch.uplinks)
    return switch.name, switch.kind, switch.device, switch.mtu, switch.ports, uplinks, problem
