"""What QEMU and this host can do, asked of the real thing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import BINARY, CPU, MACHINE, Lab, make_spec
from work_guest import ASSEMBLY as WORK_ASSEMBLY
from work_guest import boot_sector as work_sector

from vmferry.model.errors import Failed, Refused
from vmferry.qemu import accel, probe_guest
from vmferry.qemu.accel import Acceleration, observe_acceleration, run_tiny_guest
from vmferry.qemu.cpu import choose_cpu_model, compare_cpu, observe_cpu, observe_guest_cpu
from vmferry.qemu.features import observe_features, resolve_machine


async def test_features_are_asked_of_qemu() -> None:
    features = await observe_features(BINARY, "tcg")
    assert features.version >= (7, 2, 0)
    assert {"events", "return-path", "multifd"} <= set(features.capabilities)
    assert "max-bandwidth" in features.parameters and "blockdev-mirror" in features.commands
    assert features.has_argument("migrate", "uri") and not features.has_argument("migrate", "nothing")
    assert features.has_tls
    machine = resolve_machine(features, "q35")
    assert machine.startswith("pc-q35-") and resolve_machine(features, machine) == machine
    with pytest.raises(Refused):
        resolve_machine(features, "pc-q35-99.9")
    assert json.loads(json.dumps(dataclasses.asdict(features)))["accel"] == "tcg"
    assert choose_cpu_model([features, features]) == CPU


async def test_a_binary_that_does_not_start_says_why() -> None:
    with pytest.raises(Failed) as caught:
        await observe_features("/nonexistent/qemu", "tcg")
    assert caught.value.code == "probe-failed"
    with pytest.raises(Failed) as caught:
        await observe_features(BINARY, "no-such-accelerator")
    assert "no-such-accelerator" in caught.value.message


async def test_a_running_guest_has_the_cpu_that_was_promised(lab: Lab) -> None:
    promised = await observe_cpu(BINARY, MACHINE, "tcg", CPU)
    guest = await lab.start(lab.layout("a", make_spec(), paused=True))
    given = await observe_guest_cpu(guest.monitor)
    assert given == promised
    assert {"sse4-2", "aes"} <= set(given.flags) and "avx2" not in given.flags and "enforce" not in given.flags
    less = await observe_cpu(BINARY, MACHINE, "tcg", "Nehalem-v1")
    assert "aes" in compare_cpu(given, less)
    assert any(item.startswith("model ") for item in compare_cpu(given, less))
    with pytest.raises(Failed) as caught:
        await observe_cpu(BINARY, MACHINE, "tcg", "Icelake-Server-v1,enforce")
    assert "support requested feature" in caught.value.message


async def test_what_the_accelerator_filters_is_not_promised() -> None:
    asked = await observe_cpu(BINARY, MACHINE, "tcg", "Icelake-Server-v1")  # without enforce: filtered silently
    assert "avx512f" not in asked.flags and "avx2" in asked.flags


async def test_the_tiny_guest_proves_an_accelerator_that_works() -> None:
    result = await run_tiny_guest(BINARY, ("-accel", "tcg", "-cpu", "max"), 60)
    assert result.works, result


async def test_the_tiny_guest_does_not_prove_what_does_not_work() -> None:
    slow = await run_tiny_guest(BINARY, ("-accel", "tcg", "-cpu", "max", "-S"), 0.5)
    assert not slow.works and "did not finish" in slow.seen
    no_long_mode = await run_tiny_guest(BINARY, ("-accel", "tcg", "-cpu", "pentium3"), 2)
    assert not no_long_mode.works
    refused = await run_tiny_guest(BINARY, ("-accel", "tcg", "-cpu", "nothing"), 20)
    assert not refused.works and "ended with status 1" in refused.seen and "nothing" in refused.details


async def test_the_finding_is_kept_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "_KVM", tmp_path / "kvm")  # as on a host without it
    cache = tmp_path / "accel.json"
    found = await observe_acceleration(BINARY, cache=cache)
    assert found.kind == "tcg" and "no /dev/kvm" in found.reason
    stored = json.loads(cache.read_text())
    stored["found"]["reason"] = "from the cache"
    cache.write_text(json.dumps(stored))
    assert (await observe_acceleration(BINARY, cache=cache)).reason == "from the cache"
    stored["key"][-3] = "another kernel"
    cache.write_text(json.dumps(stored))
    assert await observe_acceleration(BINARY, cache=cache) == found
    cache.write_text("{broken")
    assert isinstance(await observe_acceleration(BINARY, cache=cache), Acceleration)
    with pytest.raises(Failed):
        await observe_acceleration("/nonexistent/qemu")


@pytest.mark.skipif(shutil.which("as") is None, reason="binutils are not installed")
@pytest.mark.parametrize(
    ("source", "sector"), [(probe_guest.ASSEMBLY, probe_guest.boot_sector()), (WORK_ASSEMBLY, work_sector())]
)
def test_the_boot_sectors_are_what_their_source_says(tmp_path: Path, source: str, sector: bytes) -> None:
    (tmp_path / "s.S").write_text(source)
    subprocess.run(["as", "--32", "s.S", "-o", "s.o"], cwd=tmp_path, check=True)
    linked = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "s.o", "-o", "s.bin"]
    subprocess.run(linked, cwd=tmp_path, check=True)
    assert (tmp_path / "s.bin").read_bytes() == sector
