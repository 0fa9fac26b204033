"""What two hosts' facts mean for a migration: pure functions from facts to findings, each with its code and fix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vmferry.model.findings import Finding, Severity
from vmferry.model.units import format_size
from vmferry.model.vm import VmSpec
from vmferry.qemu.cpu import CpuFeatures, compare_cpu

# QEMU before 9.0 loses dirty pages under TCG (facts.md, "QEMU versions").
_TCG_SAFE_SINCE = (9, 0)


def error(code: str, message: str, fix: str, host: str) -> Finding:
    """An obstacle."""
    return Finding(code, Severity.ERROR, message, fix, host)


def ok(code: str, message: str, host: str) -> Finding:
    """Something that was proven."""
    return Finding(code, Severity.OK, message, "", host)


def parse_version(text: str) -> tuple[int, ...]:
    """`10.0.2` as numbers; what is no number counts as 0."""
    return tuple(int(part) if part.isdecimal() else 0 for part in text.split("."))


def find_accelerators(source: str, source_accel: str, target: str, target_accel: str) -> list[Finding]:
    """KVM and TCG guests differ in more than speed."""
    if source_accel == target_accel:
        return []
    message = f"The guest runs under {source_accel} on {source}, {target} runs guests under {target_accel}."
    return [error("accelerator-differs", message, "Choose a host with the same; see `vmferry host probe`.", target)]


def find_qemu(host: str, version: str, accel: str) -> list[Finding]:
    """Versions that are known to damage a guest."""
    if accel == "tcg" and parse_version(version) < _TCG_SAFE_SINCE:
        message = f"QEMU {version} without KVM loses memory writes during a live migration (fixed in 9.0)."
        return [error("qemu-corrupts-tcg", message, "Install QEMU 9.0 or later there.", host)]
    return []


def find_versions(source: str, source_version: str, target: str, target_version: str) -> list[Finding]:
    """An older QEMU on the target works for the same machine type, but is less tried."""
    if parse_version(target_version)[:2] < parse_version(source_version)[:2]:
        message = f"{target} has an older QEMU ({target_version}) than {source} ({source_version})."
        return [Finding("qemu-older", Severity.WARNING, message, "The rehearsal shows whether it goes.", target)]
    return []


def find_blockers(host: str, reasons: Iterable[str]) -> list[Finding]:
    """QEMU's own list of what cannot be migrated."""
    return [
        error("qemu-blocker", f"QEMU cannot migrate this guest: {reason}.", "Remove that device.", host)
        for reason in reasons
    ]


def find_machine(spec: VmSpec, host: str, machines: Iterable[str]) -> list[Finding]:
    """The exact machine type must be there."""
    if spec.machine in machines:
        return []
    message = f"QEMU on {host} has no machine type {spec.machine}."
    return [error("machine-missing", message, "Install a QEMU that still has it.", host)]


def find_cpu(host: str, given: CpuFeatures, available: CpuFeatures) -> list[Finding]:
    """What the guest was given must be what the target can give."""
    missing = compare_cpu(given, available)
    if not missing:
        return [ok("cpu", "The target gives the guest the CPU that it has.", host)]
    message = f"The guest uses CPU features that {host} cannot give: {', '.join(missing[:12])}."
    return [error("cpu-features", message, "Choose another host, or a smaller cpu_model for this VM.", host)]


def find_memory(host: str, wanted_bytes: int, free_bytes: int) -> list[Finding]:
    """Room for the guest's memory beyond the host's reserve."""
    if wanted_bytes <= free_bytes:
        return []
    message = f"The guest has {format_size(wanted_bytes)} of memory, {host} can give {format_size(max(0, free_bytes))}."
    return [error("memory-room", message, "Free memory there, or lower [limits] memory_reserve.", host)]


def find_room(host: str, wanted: Mapping[str, int], free: Mapping[str, int]) -> list[Finding]:
    """Room in each pool for what is allocated now."""
    return [
        error(
            "pool-room",
            f"Pool {pool} on {host} has {format_size(free[pool])} free, the disks need {format_size(size)}.",
            "Free room there, or choose another pool: --storage POOL.",
            host,
        )
        for pool, size in wanted.items()
        if pool in free and size > free[pool]
    ]


def find_clock(host: str, difference_ms: float, limit_ms: int) -> list[Finding]:
    """Clocks that differ make logs, certificates and the guest's time wrong."""
    if abs(difference_ms) <= limit_ms:
        return []
    message = f"The clock of {host} is {difference_ms / 1000:+.1f} s off."
    return [error("clock-differs", message, "Run a time service (chrony) on both hosts.", host)]


def find_mtu(switches: Sequence[tuple[str, int, str, int]], host: str) -> list[Finding]:
    """(source switch, what its guests were told, target switch, its MTU): the target's must be as large."""
    return [
        error(
            "mtu-smaller",
            f"The guest was told MTU {mtu} on {source}, switch {target} on {host} has {target_mtu}.",
            "Raise the MTU there, or map another switch: --network A=B.",
            host,
        )
        for source, mtu, target, target_mtu in switches
        if target_mtu < mtu
    ]


def find_protocol(host: str, theirs: int, ours: int) -> list[Finding]:
    """Both daemons must speak the same messages."""
    if theirs == ours:
        return []
    message = f"vmferryd on {host} speaks protocol {theirs}, this one {ours}."
    return [error("protocol-differs", message, "Install the same version of vmferry on both.", host)]
