"""CPU models and features: what a guest is really given, what a host can give, and which model all hosts can run.

Two CPUs are compared by what QEMU has put into a realized vCPU (after filtering by accelerator and host), not by the
name of the model. The migration stream does not notice a target CPU with fewer features: this comparison does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmferry.model.errors import Failed, Refused
from vmferry.qemu.features import QemuFeatures
from vmferry.qemu.monitor import Monitor, QmpRefused
from vmferry.qemu.probe import probe_qemu

# Switches of QEMU's CPU object that are no features of the guest's CPU.
_NO_FEATURES = frozenset(
    (
        *("realized", "hotplugged", "hotpluggable", "start-powered-off", "memory", "check", "enforce", "migratable"),
        *("kvm", "host-cache-info", "host-phys-bits", "fill-mtrr-mask", "full-cpuid-auto-level", "cpuid-0xb"),
        *("tcg-cpuid", "vmware-cpuid-freq", "l3-cache", "lmce", "pmu", "kvm-no-smi-migration"),
        *("kvm-pv-enforce-cpuid", "xen-vapic", "expose-tcg", "static"),
    )
)
_NO_FEATURE_PREFIXES = ("x-", "hv-", "legacy-")
_NUMBERS = ("family", "model", "stepping", "vendor", "phys-bits", "tsc-frequency")
_TCG_MODEL = "Westmere-v1"  # the newest Intel model that TCG of QEMU 7.2 to 10.0 gives completely
_KVM_MODELS: Mapping[str, tuple[str, ...]] = {  # best first; versioned, so that a name means the same everywhere
    "GenuineIntel": (
        *("GraniteRapids-v1", "SapphireRapids-v2", "SapphireRapids-v1", "Icelake-Server-v6", "Icelake-Server-v4"),
        *("Icelake-Server-v2", "Cascadelake-Server-v4", "Cascadelake-Server-v3", "Skylake-Server-v4"),
        *("Skylake-Server-v3", "Skylake-Client-v3", "Broadwell-v4", "Broadwell-v2", "Haswell-v4", "Haswell-v2"),
        *("IvyBridge-v2", "IvyBridge-v1", "SandyBridge-v2", "SandyBridge-v1", "Westmere-v2", "Westmere-v1"),
        *("Nehalem-v2", "Nehalem-v1", "Penryn-v1", "Conroe-v1"),
    ),
    "AuthenticAMD": (
        *("EPYC-Genoa-v1", "EPYC-Milan-v2", "EPYC-Milan-v1", "EPYC-Rome-v4", "EPYC-Rome-v2", "EPYC-Rome-v1"),
        *("EPYC-v4", "EPYC-v3", "EPYC-v2", "EPYC-v1", "Opteron_G5-v1", "Opteron_G4-v1", "Opteron_G3-v1"),
        *("Opteron_G2-v1", "Opteron_G1-v1"),
    ),
}
_ANY_VENDOR_MODELS = ("qemu64-v1", "kvm64-v1")


@dataclass(frozen=True, slots=True)
class CpuFeatures:
    """What a vCPU has: the names of its features, and the values that must be equal on both sides."""

    model: str
    flags: tuple[str, ...]
    numbers: tuple[tuple[str, str], ...]


async def observe_cpu(binary: str, machine: str, accel: str, cpu: str) -> CpuFeatures:
    """What a guest with this -cpu would get here. Raises Failed `probe-failed` (with `enforce`: what is missing)."""
    arguments = ("-machine", machine, "-accel", accel, "-cpu", cpu, "-m", "16M")
    async with probe_qemu(binary, arguments) as monitor:
        return await observe_guest_cpu(monitor)


async def observe_guest_cpu(monitor: Monitor) -> CpuFeatures:
    """What this guest's first vCPU was given. A few hundred queries, 20 to 50 ms: not for the switchover."""
    path = await _cpu_path(monitor)
    listed = await monitor.execute("qom-list", path=path)
    names = [p["name"] for p in listed if p["type"] == "bool" and _is_feature(p["name"])]
    values = await asyncio.gather(*(_get(monitor, path, name) for name in names))
    flags = {
        name.replace("_", "-").replace(".", "-") for name, value in zip(names, values, strict=True) if value is True
    }
    numbers = [(name, await _get(monitor, path, name)) for name in _NUMBERS]
    model = next((str(p["type"]) for p in listed if p["name"] == "type"), "")
    model = str(await _get(monitor, path, "type")) if model else ""
    given = tuple((name, str(value)) for name, value in numbers if value is not None)
    return CpuFeatures(model.removesuffix("-x86_64-cpu"), tuple(sorted(flags)), given)


def compare_cpu(given: CpuFeatures, available: CpuFeatures) -> list[str]:
    """What a guest has that it would not find there, in words; empty: it can move. More features there do no harm."""
    missing = sorted(set(given.flags) - set(available.flags))
    there = dict(available.numbers)
    for name, value in given.numbers:
        if there.get(name, value) != value:
            missing.append(f"{name} {value} (there: {there[name]})")
    return missing


def choose_cpu_model(hosts: Sequence[QemuFeatures]) -> str:
    """A complete -cpu argument that all of these hosts can run, the best there is. All must have the same accelerator.

    Under TCG always the same model. Raises Refused `no-common-cpu`.
    """
    accelerators = {host.accel for host in hosts}
    if len(accelerators) != 1:
        found = " and ".join(sorted(accelerators)) or "nothing"
        raise Refused("no-common-cpu", f"The hosts run guests with {found}.", "Name hosts with one accelerator.")
    vendors = {host.vendor for host in hosts}
    candidates: tuple[str, ...] = _KVM_MODELS.get(next(iter(vendors)), ()) if len(vendors) == 1 else ()
    if accelerators == {"tcg"}:
        candidates = (_TCG_MODEL,)
    for name in (*candidates, *_ANY_VENDOR_MODELS):
        if all(_can_run(host, name) for host in hosts):
            return f"{name},enforce"
    raise Refused("no-common-cpu", "No CPU model runs on all of these hosts.", "Give cpu_model, or name fewer hosts.")


def _can_run(host: QemuFeatures, name: str) -> bool:
    return any(model.name == name and model.migration_safe and not model.unavailable for model in host.cpu_models)


def _is_feature(name: str) -> bool:
    return name not in _NO_FEATURES and not name.startswith(_NO_FEATURE_PREFIXES)


async def _cpu_path(monitor: Monitor) -> str:
    cpus: list[dict[str, Any]] = await monitor.execute("query-cpus-fast")
    if not cpus:
        raise Failed("no-cpu", "The guest has no CPU that could be looked at.")
    return str(cpus[0]["qom-path"])


async def _get(monitor: Monitor, path: str, name: str) -> Any:
    try:
        return await monitor.execute("qom-get", path=path, property=name)
    except QmpRefused:
        return None  # a property without a getter, or one that this version lacks
