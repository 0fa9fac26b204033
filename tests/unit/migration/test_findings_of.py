"""Facts of two hosts, and what they mean for a migration."""

from __future__ import annotations

import pytest

from vmferry.migration import findings_of as f
from vmferry.model.findings import Finding, Severity, blocking
from vmferry.model.vm import FirmwareBoot, VmSpec
from vmferry.qemu.cpu import CpuFeatures

GIB = 1 << 30
SPEC = VmSpec("id", "web1", 1, GIB, "pc-q35-10.0", "max", FirmwareBoot("bios"))


def cpu(*flags: str, **numbers: str) -> CpuFeatures:
    return CpuFeatures("model", flags, tuple(numbers.items()))


CASES = [
    (f.find_accelerators("a", "kvm", "b", "kvm"), None),
    (f.find_accelerators("a", "kvm", "b", "tcg"), "accelerator-differs"),
    (f.find_qemu("b", "7.2.17", "tcg"), "qemu-corrupts-tcg"),
    (f.find_qemu("b", "8.2.9", "tcg"), "qemu-corrupts-tcg"),
    (f.find_qemu("b", "9.0", "tcg"), None),
    (f.find_qemu("b", "10.0.2", "tcg"), None),
    (f.find_qemu("b", "7.2.17", "kvm"), None),
    (f.find_blockers("a", ["vhost-user", "a \x07 bell"]), "qemu-blocker"),
    (f.find_blockers("a", []), None),
    (f.find_machine(SPEC, "b", ["pc-q35-9.2", "pc-q35-10.0"]), None),
    (f.find_machine(SPEC, "b", ["pc-q35-9.2"]), "machine-missing"),
    (f.find_cpu("b", cpu("sse2"), cpu("sse2", "avx")), None),
    (f.find_cpu("b", cpu("sse2", "avx"), cpu("sse2")), "cpu-features"),
    (f.find_cpu("b", cpu(vendor="GenuineIntel"), cpu(vendor="AuthenticAMD")), "cpu-features"),
    (f.find_memory("b", GIB, GIB), None),
    (f.find_memory("b", GIB + 1, GIB), "memory-room"),
    (f.find_memory("b", GIB, -5), "memory-room"),
    (f.find_room("b", {"local": GIB}, {"local": GIB}), None),
    (f.find_room("b", {"local": GIB + 1}, {"local": GIB}), "pool-room"),
    (f.find_clock("b", -999, 1000), None),
    (f.find_clock("b", -1001, 1000), "clock-differs"),
    (f.find_clock("b", 1001, 1000), "clock-differs"),
    (f.find_mtu([("lan", 1500, "lan", 1500), ("lan", 1500, "big", 9000)], "b"), None),
    (f.find_mtu([("lan", 9000, "lan", 1500)], "b"), "mtu-smaller"),
    (f.find_protocol("b", 1, 1), None),
    (f.find_protocol("b", 2, 1), "protocol-differs"),
]


@pytest.mark.parametrize(("findings", "code"), CASES)
def test_an_obstacle_is_an_error_with_its_fix_or_there_is_none(findings: list[Finding], code: str | None) -> None:
    stopping = blocking(tuple(findings))
    assert {finding.code for finding in stopping} == ({code} if code else set())
    for finding in stopping:
        assert (finding.message.endswith(".") and finding.fix.endswith(".")) or finding.fix.endswith("POOL.")
        assert finding.host


def test_every_blocker_and_every_pool_is_listed() -> None:
    assert len(f.find_blockers("a", ["one", "two"])) == 2
    assert len(f.find_room("b", {"local": 5, "fast": 6, "elsewhere": 7}, {"local": 1, "fast": 1})) == 2


def test_an_older_qemu_is_a_warning() -> None:
    (finding,) = f.find_versions("a", "10.0.2", "b", "9.2.4")
    assert finding.severity is Severity.WARNING
    assert f.find_versions("a", "10.0.2", "b", "10.0.1") == []
    assert f.find_versions("a", "9.2.4", "b", "10.0.1") == []


def test_the_clock_s_difference_has_a_sign() -> None:
    assert "+2.5 s" in f.find_clock("b", 2500, 1000)[0].message
    assert "-2.5 s" in f.find_clock("b", -2500, 1000)[0].message


@pytest.mark.parametrize(
    ("text", "version"),
    [("10.0.2", (10, 0, 2)), ("9.1.50-rc1", (9, 1, 0)), ("", (0,)), ("x.y", (0, 0)), ("7.2.17", (7, 2, 17))],
)
def test_versions(text: str, version: tuple[int, ...]) -> None:
    assert f.parse_version(text) == version


def test_many_missing_features_are_cut() -> None:
    (finding,) = f.find_cpu("b", cpu(*(f"feature{i}" for i in range(200))), cpu())
    assert len(finding.message) < 400
