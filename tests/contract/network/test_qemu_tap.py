"""What QEMU does with its tap around STOP: the gate relies on it. The guest is iPXE, QEMU's network boot program."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .segment import MAC, Segment

QEMU = shutil.which("qemu-system-x86_64")


class Monitor:
    """The few QMP commands this test needs."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        wait(lambda: self.socket.connect_ex(str(path)) == 0, "the monitor")
        self.lines = self.socket.makefile("rw")
        self.lines.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str) -> Any:
        self.lines.write(json.dumps({"execute": command}))
        self.lines.flush()
        while "return" not in (answer := json.loads(self.lines.readline())):
            assert "error" not in answer, answer
        return answer["return"]


def wait(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"in {seconds} s not: {what}"
        time.sleep(0.01)


def numbers_of(segment: Segment, name: str) -> tuple[int, int]:
    """Frames that were read out of the tap, and frames sent by the guest."""
    stats = json.loads(segment.ip("a", "-json", "-s", "link", "show", "dev", name))[0]["stats64"]
    return stats["tx"]["packets"], stats["rx"]["packets"]


@pytest.mark.skipif(QEMU is None, reason="no qemu-system-x86_64")
async def test_qemu_reads_exactly_one_frame_after_stop(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        name = await segment.a.call("port", vm="q", mac=MAC, plugged=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "fd"))
            listener.listen()
            await segment.a.call("give", vm="q", path=str(tmp_path / "fd"))
            _, (fd,), _, _ = socket.recv_fds(listener.accept()[0], 100, 1)
        assert QEMU
        command = [QEMU, "-accel", "tcg", "-M", "q35", "-m", "64", "-nodefaults", "-nographic"]
        command += ["-qmp", f"unix:{tmp_path / 'qmp'},server=on,wait=off", "-netdev", f"tap,id=n,fd={fd},vhost=off"]
        command += ["-device", f"virtio-net-pci,netdev=n,mac={MAC},bootindex=0"]
        process = subprocess.Popen(command, pass_fds=[fd])  # noqa: ASYNC220
        os.close(fd)
        try:
            monitor = Monitor(tmp_path / "qmp")
            wait(lambda: numbers_of(segment, name)[1] > 0, "the guest's first frame")  # its driver is up
            await segment.client.call("start", mac=MAC, rate=200, kinds="u")
            before = numbers_of(segment, name)[0]
            wait(lambda: numbers_of(segment, name)[0] > before + 20, "frames read by the running guest")
            monitor.execute("stop")
            stopped = numbers_of(segment, name)[0]
            arrived = int(segment.in_ns("a", "cat", "/sys/class/net/up0/statistics/rx_packets"))
            wait(
                lambda: int(segment.in_ns("a", "cat", "/sys/class/net/up0/statistics/rx_packets")) > arrived + 50,
                "frames that arrive meanwhile",
            )
            assert numbers_of(segment, name)[0] - stopped <= 1
            await segment.client.call("stop")
            taken = numbers_of(segment, name)[0]
            monitor.execute("cont")
            wait(lambda: numbers_of(segment, name)[0] >= taken + 45, "the waiting frames read after cont")
        finally:
            process.kill()
            process.wait()
