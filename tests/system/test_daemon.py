"""The daemon itself: what it uses when idle, how it runs guests, what it says of wrong settings, what it boots."""

from __future__ import annotations

import os
import pwd
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sysrig import Guest, Rig, wait_for

from vmferry.model.errors import VmferryError, WrongInput

pytestmark = pytest.mark.system

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_idle_daemon_uses_little(rig: Rig, guest: Guest) -> None:
    """Also after it has moved a guest: below 80 MiB, and no CPU time to speak of."""
    rig.migrate(guest.name)
    rig.require_clean()
    pids = {name: rig.daemon_pid(name) for name in ("host1", "host2")}
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    time.sleep(5)  # the length of the measurement, not a condition
    for name, pid in pids.items():
        assert int(status_of(pid)["VmRSS"].split()[0]) < 80 * 1024, status_of(pid)["VmRSS"]
        assert cpu_s(pid) - before[name] <= 0.1, name


def test_guests_are_confined(rig: Rig, guest: Guest) -> None:
    host, _ = rig.place(guest.name)
    (pid,) = rig.qemu_pids(host, guest.name)
    status = status_of(pid)
    uid = pwd.getpwnam("vmferry").pw_uid
    assert status["Uid"].split() == [str(uid)] * 4
    assert int(status["CapEff"], 16) == 0 and status["Seccomp"] == "2"
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    sandbox = words[words.index("-sandbox") + 1]
    assert sandbox.startswith("on") and "spawn=deny" in sandbox, sandbox
    for path in (rig.host(host).socket, rig.host(host).state_dir / "journal.sqlite"):
        assert path.stat().st_uid == 0 and not path.stat().st_mode & 0o007, path


def console_says(rig: Rig, host: str, name: str, wanted: bytes, within_s: float = 60.0) -> bytes:
    with socket.socket(socket.AF_UNIX) as console:
        console.connect(rig.on(host).vm(name).console)
        deadline, seen = time.monotonic() + within_s, b""
        while wanted not in seen:
            ready, _, _ = select.select([console], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the guest is silent: {seen!r}"
            part = console.recv(4096)
            assert part, f"the console is closed: {seen!r}"
            seen += part
        return seen


def boot_image(directory: Path) -> Path:
    """A disk whose boot sector prints for ever on the serial port (its console may be opened late)."""
    code = bytearray()
    code += b"\xfa\x31\xc0\x8e\xd8"  # cli; xor ax,ax; mov ds,ax
    again = len(code)
    code += b"\xbe\x00\x00"  # mov si, text (filled in below)
    here = len(code)
    code += b"\xac\x84\xc0\x74\x06"  # lodsb; test al,al; jz pause
    code += b"\xba\xf8\x03\xee"  # mov dx,0x3f8; out dx,al
    code += bytes([0xEB, (here - (len(code) + 2)) & 0xFF])  # jmp here
    code += b"\xb9\xff\xff\xf3\x90\xe2\xfc"  # mov cx,-1; pause; loop
    code += bytes([0xEB, (again - (len(code) + 2)) & 0xFF])  # jmp again
    text = 0x7C00 + len(code)
    code[again + 1 : again + 3] = text.to_bytes(2, "little")
    code += b"FERRY BOOTED\r\n\0"
    image = directory / "boot.img"
    image.write_bytes(bytes(code).ljust(510, b"\0") + b"\x55\xaa" + bytes((4 << 20) - 512))
    image.chmod(0o644)
    return image


def test_firmware_boot_from_a_disk(rig: Rig, tmp_path: Path) -> None:
    """SeaBIOS boots an imported image; the machine moves and goes on."""
    spec = rig.spec("bios", "10.77.0.67", boot={"firmware": "bios"}, memory="64MiB")
    spec["disk"] = [{"name": "root", "pool": "local", "image": str(boot_image(tmp_path)), "format": "raw"}]
    rig.on("host1").create_vm(spec)
    try:
        rig.on("host1").start_vm("bios")
        console_says(rig, "host1", "bios", b"FERRY BOOTED")
        rig.migrate("bios")
        console_says(rig, "host2", "bios", b"FERRY BOOTED")
    finally:
        rig.forget_guest("bios")
    rig.require_clean()


def test_uefi_starts(rig: Rig, tmp_path: Path) -> None:
    spec = rig.spec("uefi", "10.77.0.68", boot={"firmware": "uefi"})
    spec["disk"] = [{"name": "root", "pool": "local", "image": str(boot_image(tmp_path)), "format": "qcow2"}]
    rig.on("host1").create_vm(spec)
    try:
        assert rig.on("host1").start_vm("uefi").state.value == "running"
        console_says(rig, "host1", "uefi", b"BdsDxe", 120.0)
    finally:
        rig.forget_guest("uefi")
    rig.require_clean()


def test_wrong_settings_are_named(rig: Rig, tmp_path: Path) -> None:
    """File, key and what is allowed, all at once; the daemon does not start."""
    text = rig.host("host1").config.read_text()
    for before, after in (('accel = "tcg"', 'accel = "warp"'), ("incoming = 4", 'incoming = "many"')):
        assert before in text
        text = text.replace(before, after)
    config = tmp_path / "wrong.toml"
    config.write_text(text + "[nonsense]\n")
    argv = [sys.executable, "-m", "vmferry.host.main", "--config", str(config)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    for words in (str(config), "accel", "auto", "kvm", "incoming", "nonsense"):
        assert words in done.stderr, done.stderr


def test_second_daemon_is_refused(rig: Rig) -> None:
    host = rig.host("host1")
    argv = ["ip", "netns", "exec", host.namespace, sys.executable, "-m", "vmferry.host.main"]
    done = subprocess.run(
        [*argv, "--config", str(host.config)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and "Another vmferryd" in done.stderr, done
    assert rig.on("host1").host().name == "host1"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory": "12 parsecs"}, "vm.memory"),
        ({"disk": [{"name": "root", "pool": "nowhere", "size": "1MiB"}]}, "nowhere"),
        ({"nic": [{"switch": "wan"}]}, "wan"),
        ({"disk": [{"name": "root", "pool": "local", "image": "/dev/null"}]}, "/dev/null"),
        ({"disk": [{"name": "root", "pool": "local", "image": "IMAGE", "size": "1MiB"}]}, "more than asked"),
        ({"boot": {"kernel": "/nowhere/vmlinuz"}}, "/nowhere/vmlinuz"),
    ],
    ids=["memory", "pool", "switch", "no image", "too small for its image", "kernel"],
)
def test_wrong_definition(rig: Rig, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    if changes.get("disk", [{}])[0].get("image") == "IMAGE":
        changes = {"disk": [changes["disk"][0] | {"image": str(boot_image(tmp_path))}]}
    with pytest.raises(VmferryError) as refused:
        rig.on("host1").create_vm(rig.spec("wrong", "10.77.0.69", **changes))
    assert words in refused.value.message and (refused.value.fix or isinstance(refused.value, WrongInput))
    assert not rig.owners("wrong")
    rig.require_clean(2.0)


def test_probe(rig: Rig) -> None:
    """What the host can do, proven anew; the daemon answers others meanwhile."""
    view = rig.on("host1").probe_host()
    assert view.accel == "tcg" and view.accel_reason and view.qemu_version
    assert {pool.name for pool in view.pools} == {"local", "fast"} and all(pool.total_bytes for pool in view.pools)
    assert [switch.name for switch in view.switches] == ["lan"] and not view.switches[0].problem
    others = {each.name: each.reachable for each in rig.on("host1").hosts()}
    assert others == {"host1": True, "host2": True}
    wait_for("an expiry", lambda: view.certificate_expires_at, 1.0)
