"""What a QEMU binary can do with an accelerator: asked of QEMU itself, never concluded from its version.

The results are frozen, made of strings, numbers and tuples only (dataclasses.asdict gives JSON). The caller caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmferry.model.errors import Refused
from vmferry.qemu.monitor import Monitor
from vmferry.qemu.probe import probe_qemu

_COMMANDS_WITH_ARGUMENTS = ("migrate", "migrate-incoming", "blockdev-mirror", "block-job-change", "block-export-add")


@dataclass(frozen=True, slots=True)
class MachineType:
    """A machine type; `alias` is the short name that stands for it in this QEMU ("" if none)."""

    name: str
    alias: str
    deprecated: bool
    max_cpus: int


@dataclass(frozen=True, slots=True)
class CpuModel:
    """A CPU model. `unavailable`: the features that this host with this accelerator cannot give to it."""

    name: str
    alias_of: str
    migration_safe: bool
    unavailable: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QemuFeatures:
    """What a binary offers. `arguments` has "command.argument" for those commands where it differs between versions."""

    binary: str
    accel: str
    version: tuple[int, ...]
    package: str
    vendor: str  # the host CPU's vendor_id
    machines: tuple[MachineType, ...]
    capabilities: tuple[str, ...]
    parameters: tuple[str, ...]
    commands: tuple[str, ...]
    arguments: tuple[str, ...]
    cpu_models: tuple[CpuModel, ...]
    has_seccomp: bool
    has_io_uring: bool
    has_tls: bool

    def has_argument(self, command: str, argument: str) -> bool:
        """Whether the command knows the argument (for the commands that are recorded)."""
        return f"{command}.{argument}" in self.arguments


async def observe_features(binary: str, accel: str) -> QemuFeatures:
    """Asks a QEMU without a machine (under 0.3 s). Raises Failed `probe-failed`."""
    async with probe_qemu(binary, ("-machine", "none", "-accel", accel)) as monitor:
        version = await monitor.execute("query-version")
        schema = _Schema(await monitor.execute("query-qmp-schema"))
        options = await monitor.execute("query-command-line-options")
        return QemuFeatures(
            binary=binary,
            accel=accel,
            version=tuple(int(version["qemu"][part]) for part in ("major", "minor", "micro")),
            package=str(version["package"]),
            vendor=_host_vendor(),
            machines=_machines(await monitor.execute("query-machines")),
            capabilities=await observe_capabilities(monitor),
            parameters=tuple(sorted(await monitor.execute("query-migrate-parameters"))),
            commands=schema.commands(),
            arguments=tuple(f"{c}.{a}" for c in _COMMANDS_WITH_ARGUMENTS for a in schema.arguments(c)),
            cpu_models=_cpu_models(await monitor.execute("query-cpu-definitions")),
            has_seccomp=any(option["option"] == "sandbox" for option in options),
            has_io_uring=schema.enum_has("io_uring", beside=("threads", "native")),
            has_tls=schema.enum_has("tls-creds-x509", beside=("tls-creds-psk",)),
        )


async def observe_capabilities(monitor: Monitor) -> tuple[str, ...]:
    """The migration capabilities that a QEMU knows."""
    return tuple(sorted(c["capability"] for c in await monitor.execute("query-migrate-capabilities")))


def resolve_machine(features: QemuFeatures, name: str) -> str:
    """The concrete machine type of a name or alias: an alias means another machine in each QEMU version.

    Raises Refused `machine-unknown`.
    """
    for machine in features.machines:
        if name and name in (machine.name, machine.alias):
            return machine.name
    newest = ", ".join(m.alias for m in features.machines if m.alias)
    raise Refused("machine-unknown", f"QEMU here has no machine {name!r}.", f"Its newest ones are called {newest}.")


class _Schema:
    """The answer to query-qmp-schema: types have numbers for names, commands refer to them."""

    def __init__(self, entries: Iterable[Mapping[str, Any]]) -> None:
        self._entries = {entry["name"]: entry for entry in entries}

    def commands(self) -> tuple[str, ...]:
        return tuple(sorted(name for name, entry in self._entries.items() if entry["meta-type"] == "command"))

    def arguments(self, command: str) -> list[str]:
        entry = self._entries.get(command)
        if entry is None or entry["meta-type"] != "command":
            return []
        arguments = self._entries[entry["arg-type"]]
        return sorted(member["name"] for member in arguments.get("members", ()))

    def enum_has(self, value: str, beside: tuple[str, ...]) -> bool:
        wanted = {value, *beside}
        return any(wanted <= set(e["values"]) for e in self._entries.values() if e["meta-type"] == "enum")


def _machines(answer: Iterable[Mapping[str, Any]]) -> tuple[MachineType, ...]:
    found = (
        MachineType(str(m["name"]), str(m.get("alias", "")), bool(m.get("deprecated")), int(m["cpu-max"]))
        for m in answer
    )
    return tuple(sorted(found, key=lambda machine: machine.name))


def _cpu_models(answer: Iterable[Mapping[str, Any]]) -> tuple[CpuModel, ...]:
    found = (
        CpuModel(
            str(model["name"]),
            str(model.get("alias-of", "")),
            bool(model.get("migration-safe")),
            tuple(model.get("unavailable-features", ())),
        )
        for model in answer
    )
    return tuple(sorted(found, key=lambda model: model.name))


def _host_vendor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("vendor_id"):
            return line.partition(":")[2].strip()
    return ""
