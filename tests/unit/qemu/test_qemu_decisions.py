"""Pure parts: CPU choice and comparison, samples of QEMU's answers, the digest of memory."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
from pathlib import Path

import pytest

from vmferry.model.errors import Failed, Refused
from vmferry.qemu.blocks import read_mirror
from vmferry.qemu.cpu import CpuFeatures, choose_cpu_model, compare_cpu
from vmferry.qemu.features import CpuModel, MachineType, QemuFeatures, resolve_machine
from vmferry.qemu.memory_image import (
    CHUNK_BYTES,
    MemoryReader,
    compare_digests,
    digest_memory,
    find_place,
    observe_used_bytes,
)
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


class Memory:
    """Some memory of this process, as a guest's is in its QEMU: page-aligned, private, at first never used."""

    def __init__(self, size: int, flags: int = mmap.MAP_PRIVATE) -> None:
        self.bytes = mmap.mmap(-1, size, flags=flags | mmap.MAP_ANONYMOUS)
        first = ctypes.c_char.from_buffer(self.bytes)
        self.place = find_place(os.getpid(), ctypes.addressof(first), size)
        del first


def test_memory_is_found_only_as_a_whole() -> None:
    memory = Memory(4 * MIB)
    place = memory.place
    assert (place.pid, place.size_bytes, place.private) == (os.getpid(), 4 * MIB, True)
    assert not Memory(MIB, mmap.MAP_SHARED).place.private
    with pytest.raises(Failed, match="memory was not found"):
        find_place(os.getpid(), 0x1000, 4 * MIB)
    with pytest.raises(Failed, match="memory was not found"):
        find_place(2**22 + 1, place.address, MIB)


async def test_memory_never_used_and_zeros_have_the_same_digest() -> None:
    memory = Memory(5 * MIB + 4096)
    empty = await digest_memory(memory.place)
    memory.bytes[MIB : 3 * MIB] = bytes(2 * MIB)
    memory.bytes[5 * MIB :] = bytes(4096)
    assert observe_used_bytes(memory.place) >= 2 * MIB
    assert await digest_memory(memory.place) == empty
    assert compare_digests(empty, await digest_memory(memory.place, threads=1)) is None


async def test_shared_memory_has_the_same_digest() -> None:
    one, other = Memory(3 * MIB), Memory(3 * MIB, mmap.MAP_SHARED)
    for memory in (one, other):
        memory.bytes[2 * MIB + 5] = 7
    assert await digest_memory(one.place) == await digest_memory(other.place)


async def test_reading_makes_no_pages() -> None:
    memory = Memory(64 * MIB)
    memory.bytes[10 * MIB + 5] = 1
    before = observe_used_bytes(memory.place)
    assert 0 < before <= 4 * MIB
    await digest_memory(memory.place)
    assert observe_used_bytes(memory.place) == before


@pytest.mark.parametrize("offset", [0, CHUNK_BYTES - 1, CHUNK_BYTES, 33 * MIB + 7, 40 * MIB - 1])
async def test_one_byte_makes_a_difference_and_is_found(offset: int) -> None:
    memory = Memory(40 * MIB)
    memory.bytes[3 * MIB : 4 * MIB] = os.urandom(MIB)
    before = await digest_memory(memory.place)
    memory.bytes[offset] ^= 1
    after = await digest_memory(memory.place)
    assert before.hex != after.hex
    assert compare_digests(before, after) == offset // CHUNK_BYTES * CHUNK_BYTES


async def test_memories_of_different_size_differ() -> None:
    assert compare_digests(await digest_memory(Memory(MIB).place), await digest_memory(Memory(2 * MIB).place)) == MIB


async def test_the_memory_of_a_process_that_has_ended_cannot_be_read() -> None:
    process = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        lines = [line.split() for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()]
        start, end = (int(bound, 16) for bound in next(line[0] for line in lines if line[1] == "rw-p").split("-"))
        reader = MemoryReader(find_place(process.pid, start, end - start))
    finally:
        process.kill()
        await process.wait()
    try:
        with pytest.raises(Failed, match="its process has ended"):
            await reader.digest()
    finally:
        reader.close()
