"""Whether KVM really works here: proved by running a tiny guest, not by the existence of /dev/kvm.

There are machines (nested, old or odd CPUs) on which /dev/kvm opens and a virtual machine can be created, and yet a
guest hangs, or QEMU aborts on an MSR. The proof is positive: the guest itself reports the right result (`probe_guest`).
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import which
from typing import IO

from vmferry.model.errors import Failed
from vmferry.qemu.probe import end_probe, last_words, spawn_probe
from vmferry.qemu.probe_guest import IMAGE_BYTES, SUCCESS_STATUS, boot_sector

_KVM = Path("/dev/kvm")
_REVISION = 1  # of the probe: a new one does not trust what an older one found


@dataclass(frozen=True, slots=True)
class Acceleration:
    """`kind` is "kvm" or "tcg"; `reason` one sentence for people; `details` what QEMU said when KVM failed."""

    kind: str
    reason: str
    details: str = ""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Whether the tiny guest reported the right result, and if not what was seen."""

    works: bool
    seen: str
    details: str = ""


async def observe_acceleration(binary: str, time_limit_s: float = 10, cache: Path | None = None) -> Acceleration:
    """How guests run best here. Takes about 0.3 s if KVM works, the whole limit at worst, nothing with a fresh cache.

    The cache (a JSON file, written by this function) is fresh while binary, kernel and CPU are the same. Raises Failed
    `probe-failed` if the binary cannot be run.
    """
    key = await asyncio.to_thread(_key, binary)
    if cache is not None and (known := await asyncio.to_thread(_read_cache, cache, key)) is not None:
        return known
    found = await _observe(binary, time_limit_s)
    if cache is not None:
        await asyncio.to_thread(_write_cache, cache, key, found)
    return found


async def _observe(binary: str, time_limit_s: float) -> Acceleration:
    if not _KVM.exists():
        return Acceleration("tcg", "This host has no /dev/kvm: guests are emulated, which is slow.")
    if not os.access(_KVM, os.R_OK | os.W_OK):
        return Acceleration("tcg", "/dev/kvm may not be opened by this user: guests are emulated, which is slow.")
    result = await run_tiny_guest(binary, ("-accel", "kvm", "-cpu", "host"), time_limit_s)
    if result.works:
        return Acceleration("kvm", "KVM works: a small guest ran and computed correctly.")
    reason = f"/dev/kvm is there, but a small guest {result.seen}: guests are emulated, which is slow."
    return Acceleration("tcg", reason, result.details)


async def run_tiny_guest(binary: str, arguments: Sequence[str], time_limit_s: float) -> ProbeResult:
    """Runs the tiny guest with this accelerator and CPU. Raises Failed `probe-failed` if QEMU cannot be run."""
    with tempfile.TemporaryFile() as image, tempfile.TemporaryFile() as log:
        image.write(boot_sector().ljust(IMAGE_BYTES, b"\0"))
        image.flush()
        process = await spawn_probe(_command(binary, arguments, image), log, (image.fileno(),))
        try:
            async with asyncio.timeout(time_limit_s):
                status = await process.wait()
        except TimeoutError:
            return ProbeResult(False, f"did not finish within {time_limit_s:g} s", last_words(log, 40))
        finally:
            await end_probe(process)
        if status == SUCCESS_STATUS:
            return ProbeResult(True, "ran and computed correctly")
        how = f"made QEMU abort (signal {-status})" if status < 0 else f"ended with status {status}"
        return ProbeResult(False, how, last_words(log, 40))


def _command(binary: str, arguments: Sequence[str], image: IO[bytes]) -> list[str]:
    disk = {
        "driver": "raw",
        "node-name": "disk",
        "read-only": True,
        "file": {"driver": "file", "filename": f"/proc/self/fd/{image.fileno()}"},
    }
    return [
        binary,
        *arguments,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-object", '{"qom-type":"memory-backend-memfd","id":"pc.ram","size":67108864,"share":true}'),
        *("-machine", "q35,memory-backend=pc.ram", "-m", "size=65536K"),
        *("-blockdev", json.dumps(disk)),
        *("-device", "virtio-blk-pci,drive=disk,bootindex=0"),
        *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
    ]


def _key(binary: str) -> list[str | int]:
    path = which(binary)
    if path is None:
        raise Failed("probe-failed", f"{binary} is not installed.", "Install the package qemu-system-x86.")
    stat = Path(path).stat()
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    kvm = str(_KVM.exists() and os.access(_KVM, os.R_OK | os.W_OK))
    return [_REVISION, path, stat.st_mtime_ns, stat.st_size, os.uname().release, cpu.partition(":")[2].strip(), kvm]


def _read_cache(cache: Path, key: list[str | int]) -> Acceleration | None:
    try:
        stored = json.loads(cache.read_text())
        return Acceleration(**stored["found"]) if stored["key"] == key else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # nothing there, or not ours: look again


def _write_cache(cache: Path, key: list[str | int], found: Acceleration) -> None:
    fresh = cache.with_name(cache.name + ".new")
    fresh.write_text(json.dumps({"key": key, "found": asdict(found)}, indent=1))
    fresh.replace(cache)
