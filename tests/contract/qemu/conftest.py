"""Guests for the contract tests: small, under TCG, and gone when the test is over."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from work_guest import MIB, make_disk

from vmferry.model.vm import Disk, FirmwareBoot, Nic, VmSpec
from vmferry.qemu.layout import CONSOLE_LOG, GuestLayout
from vmferry.qemu.process import GuestProcess, start_guest

BINARY = "qemu-system-x86_64"
MACHINE = "pc-q35-10.0"
CPU = "Westmere-v1,enforce"

pytestmark = pytest.mark.skipif(shutil.which(BINARY) is None, reason="QEMU is not installed")


async def until(condition: Callable[[], bool], what: str, limit_s: float = 20.0) -> None:
    """Waits until the condition holds; fails with `what` after the limit."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        await asyncio.sleep(0.02)


async def run(*command: str) -> str:
    """The output of a command that must succeed."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


def make_spec(disk: Path | None = None, size: int = 64 * MIB, memory: int = 128 * MIB, **changes: Any) -> VmSpec:
    """A VM of the work guest; `changes` replace fields of the spec."""
    disks = (Disk("root", "local", size, "raw", str(disk)),) if disk else ()
    values: dict[str, Any] = {
        "id": "5b0e2f0e-8d3e-4a53-9b64-0f1d8b0c2c11",
        "name": "web1",
        "cpus": 1,
        "memory_bytes": memory,
        "machine": MACHINE,
        "cpu": CPU,
        "boot": FirmwareBoot("bios"),
        "disks": disks,
        "nics": (),
    }
    return VmSpec(**{**values, **changes})


@dataclass
class Lab:
    """Starts guests in directories of their own and kills them in the end."""

    root: Path
    guests: list[GuestProcess] = field(default_factory=list)

    def run_dir(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(exist_ok=True)
        return path

    def layout(self, name: str, spec: VmSpec, **options: Any) -> GuestLayout:
        run_dir = self.run_dir(name)
        return GuestLayout(spec, run_dir, run_dir, "tcg", BINARY, **options)

    async def start(self, layout: GuestLayout, **options: Any) -> GuestProcess:
        guest = await start_guest(layout, **options)
        self.guests.append(guest)
        return guest

    async def work_guest(self, name: str, **disk: Any) -> GuestProcess:
        """A running work guest that has begun to tick."""
        path = self.run_dir(name) / "disk.raw"
        make_disk(path, 64 * MIB, **disk)
        guest = await self.start(self.layout(name, make_spec(path)))
        await self.ticks(guest)
        return guest

    async def ticks(self, guest: GuestProcess, more: int = 2) -> None:
        """Waits until the work guest has ticked so many times from now on."""
        log = guest.run_dir / CONSOLE_LOG
        before = log.stat().st_size
        await until(lambda: log.stat().st_size >= before + more, "the guest's heartbeat")

    async def close(self) -> None:
        for guest in self.guests:
            guest.kill()
            if guest.running:
                await guest.exited()
            await guest.close()


@pytest_asyncio.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    made = Lab(tmp_path)
    try:
        yield made
    finally:
        await made.close()


NIC = Nic("lan", "52:54:00:11:22:33")


def allocated(path: Path) -> int:
    """Bytes that a file takes on its file system."""
    return os.stat(path).st_blocks * 512
