"""Real NBD servers for the tests of this folder."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

DEADLINE_S = 30


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until a server listens at the Unix socket `path`."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
            sock.connect(str(path))
            return
        time.sleep(0.01)
    raise AssertionError(f"nobody listens at {path}")


@contextmanager
def running(arguments: list[str], sock: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server process; ended afterwards."""
    process = subprocess.Popen(arguments)
    try:
        wait_for(sock, process)
        yield process
    finally:
        process.kill()
        process.wait(DEADLINE_S)


@contextmanager
def qemu_nbd(image: Path, image_format: str, *options: str) -> Iterator[Path]:
    """qemu-nbd with the export "disk" of `image`, read-only; its Unix socket."""
    sock = image.with_name(image.name + ".sock")
    command = [
        "qemu-nbd",
        "-r",
        "-f",
        image_format,
        "-k",
        str(sock),
        "-x",
        "disk",
        "-t",
        "-e",
        "4",
        *options,
        str(image),
    ]
    with running(command, sock):
        yield sock


class Qmp:
    """As much QMP as these tests need."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(DEADLINE_S)
        self._sock.connect(str(path))
        self._file = self._sock.makefile("rb")
        self._file.readline()
        self.call("qmp_capabilities")

    def call(self, command: str, **arguments: Any) -> Any:
        self._sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = json.loads(self._file.readline())
            if "error" in answer:
                raise RuntimeError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._file.close()
        self._sock.close()


@contextmanager
def storage_daemon(image: Path, image_format: str, *options: str) -> Iterator[tuple[Qmp, Path]]:
    """qemu-storage-daemon with `image` as node "d0"; QMP and the socket of its NBD server."""
    qmp_path, nbd_path = image.with_name("qmp.sock"), image.with_name("nbd.sock")
    command = [
        "qemu-storage-daemon",
        *("--blockdev", f"driver=file,node-name=f0,filename={image},discard=unmap"),
        *("--blockdev", f"driver={image_format},node-name=d0,file=f0,discard=unmap"),
        *("--nbd-server", f"addr.type=unix,addr.path={nbd_path},max-connections=0"),
        *("--chardev", f"socket,id=c0,path={qmp_path},server=on,wait=off"),
        *("--monitor", "chardev=c0"),
        *options,
    ]
    process = subprocess.Popen(command)
    try:
        wait_for(nbd_path, process)
        end = time.monotonic() + DEADLINE_S
        while not qmp_path.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        qmp = Qmp(qmp_path)
        try:
            yield qmp, nbd_path
        finally:
            qmp.close()
    finally:
        process.kill()
        process.wait(DEADLINE_S)


def qemu_io(target: str, *commands: str, image_format: str = "raw") -> None:
    """Writes into an image or an NBD URI."""
    flags = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", "-f", image_format, *flags, target], check=True, stdout=subprocess.DEVNULL)
