"""Pure parts: CPU choice and comparison, samples of QEMU's answers, the digest of memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vmferry.model.errors import Refused
from vmferry.qemu.blocks import read_mirror
from vmferry.qemu.cpu import CpuFeatures, choose_cpu_model, compare_cpu
from vmferry.qemu.features import CpuModel, MachineType, QemuFeatures, resolve_machine
from vmferry.qemu.memory_image import CHUNK_BYTES, compare_digests, digest_memory
from vmferry.qemu.memory_stream import StreamSettings, read_sample, tcp_uri
from vmferry.qemu.monitor import _merge

MIB = 1 << 20


def host(accel: str, vendor: str, *models: tuple[str, tuple[str, ...]]) -> QemuFeatures:
    return QemuFeatures(
        binary="qemu",
        accel=accel,
        version=(10, 0, 2),
        package="",
        vendor=vendor,
        machines=(MachineType("pc-q35-10.0", "q35", False, 288), MachineType("pc-q35-9.2", "", False, 288)),
        capabilities=(),
        parameters=(),
        commands=(),
        arguments=(),
        cpu_models=tuple(CpuModel(name, "", True, missing) for name, missing in models),
        has_seccomp=True,
        has_io_uring=True,
        has_tls=True,
    )


def test_the_best_model_that_all_hosts_can_run() -> None:
    new = host("kvm", "GenuineIntel", ("SapphireRapids-v1", ()), ("Haswell-v4", ()), ("Westmere-v1", ()))
    old = host("kvm", "GenuineIntel", ("SapphireRapids-v1", ("amx",)), ("Haswell-v4", ()), ("Westmere-v1", ()))
    assert choose_cpu_model([new]) == "SapphireRapids-v1,enforce"
    assert choose_cpu_model([new, old]) == choose_cpu_model([old, new]) == "Haswell-v4,enforce"


def test_hosts_of_two_makers_get_a_model_of_neither() -> None:
    intel = host("kvm", "GenuineIntel", ("Haswell-v4", ()), ("EPYC-v4", ()), ("qemu64-v1", ()))
    amd = host("kvm", "AuthenticAMD", ("Haswell-v4", ()), ("EPYC-v4", ()), ("qemu64-v1", ()))
    assert choose_cpu_model([intel, amd]) == "qemu64-v1,enforce"
    assert choose_cpu_model([amd]) == "EPYC-v4,enforce"


def test_emulation_has_one_model_and_does_not_mix_with_kvm() -> None:
    tcg = host("tcg", "AuthenticAMD", ("Westmere-v1", ()), ("EPYC-v4", ()))
    assert choose_cpu_model([tcg, tcg]) == "Westmere-v1,enforce"
    for hosts in ([], [tcg, host("kvm", "AuthenticAMD", ("EPYC-v4", ()))], [host("kvm", "X", ("EPYC-v4", ("a",)))]):
        with pytest.raises(Refused) as caught:
            choose_cpu_model(hosts)
        assert caught.value.code == "no-common-cpu"


def test_a_cpu_may_have_more_there_but_not_less_or_other() -> None:
    one = CpuFeatures("m", ("a", "b"), (("family", "6"), ("phys-bits", "40")))
    assert compare_cpu(one, CpuFeatures("n", ("a", "b", "c"), one.numbers)) == []
    assert compare_cpu(one, CpuFeatures("n", ("b",), (("family", "6"), ("phys-bits", "39")))) == [
        "a",
        "phys-bits 40 (there: 39)",
    ]


def test_an_alias_becomes_a_machine() -> None:
    features = host("tcg", "X")
    assert resolve_machine(features, "q35") == "pc-q35-10.0"
    assert resolve_machine(features, "pc-q35-9.2") == "pc-q35-9.2"
    with pytest.raises(Refused):
        resolve_machine(features, "")


def test_samples_of_sparse_answers() -> None:
    assert read_sample({}).status == "none"
    full = read_sample({"status": "active", "ram": {"remaining": 7, "mbps": 1.5, "dirty-sync-count": 3}, "downtime": 2})
    assert (full.remaining_bytes, full.mbps, full.dirty_sync_count, full.downtime_ms, full.ended) == (
        7,
        1.5,
        3,
        2,
        False,
    )
    assert read_sample({"status": "failed", "error-desc": "x"}).ended
    job = {"device": "m", "offset": 1, "len": 2, "ready": True, "status": "ready", "speed": 0, "type": "mirror"}
    assert read_mirror(job).actively_synced is None
    assert read_mirror({**job, "actively-synced": True}).actively_synced is True


def test_small_things() -> None:
    assert tcp_uri("10.0.0.1", 5) == "tcp:10.0.0.1:5" and tcp_uri("::1", 5) == "tcp:[::1]:5"
    assert _merge({"a-b": 1}, {"c_d": 2}) == {"a-b": 1, "c-d": 2}
    assert StreamSettings(postcopy=True, multifd_channels=4).channels == 0


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("test")
    yield fd
    os.close(fd)


async def test_holes_and_zeros_have_the_same_digest(memory: int) -> None:
    size = 5 * MIB + 4096
    os.ftruncate(memory, size)
    empty = await digest_memory(memory, size)
    os.pwrite(memory, bytes(2 * MIB), MIB)
    os.pwrite(memory, bytes(4096), 5 * MIB)
    assert os.fstat(memory).st_blocks > 0
    assert await digest_memory(memory, size) == empty
    assert compare_digests(empty, await digest_memory(memory, size, threads=1)) is None


async def test_reading_makes_no_pages(memory: int) -> None:
    os.ftruncate(memory, 64 * MIB)
    os.pwrite(memory, b"x", 10 * MIB + 5)
    before = os.fstat(memory).st_blocks
    await digest_memory(memory, 64 * MIB)
    assert os.fstat(memory).st_blocks == before


@pytest.mark.parametrize("offset", [0, CHUNK_BYTES - 1, CHUNK_BYTES, 33 * MIB + 7, 40 * MIB - 1])
async def test_one_byte_makes_a_difference_and_is_found(memory: int, offset: int) -> None:
    size = 40 * MIB
    os.ftruncate(memory, size)
    os.pwrite(memory, os.urandom(MIB), 3 * MIB)
    before = await digest_memory(memory, size)
    os.pwrite(memory, bytes([os.pread(memory, 1, offset)[0] ^ 1]), offset)
    after = await digest_memory(memory, size)
    assert before.hex != after.hex
    assert compare_digests(before, after) == offset // CHUNK_BYTES * CHUNK_BYTES


async def test_memories_of_different_size_differ(memory: int) -> None:
    os.ftruncate(memory, 2 * MIB)
    assert compare_digests(await digest_memory(memory, MIB), await digest_memory(memory, 2 * MIB)) == MIB
