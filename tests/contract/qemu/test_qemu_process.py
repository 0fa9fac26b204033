"""The guest's process: started, adopted, ended; what it holds."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import CPU, NIC, Lab, make_spec, run, until
from work_guest import MIB, make_disk

from vmferry.model.errors import Failed, WrongInput
from vmferry.model.vm import DirectBoot, Disk
from vmferry.qemu.layout import GuestLayout
from vmferry.qemu.liveness import observe_dead_halt, observe_vcpu_time, wait_vcpus_advance
from vmferry.qemu.memory_image import digest_memory, locate_memory
from vmferry.qemu.process import GuestUser, ProcessIdentity, adopt_guest, attach_process

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_PI_VNET_HDR = 0x0002 | 0x1000 | 0x4000


async def test_a_guest_starts_is_adopted_and_ends(lab: Lab) -> None:
    guest = await lab.work_guest("a")
    identity, run_dir = guest.identity, guest.run_dir
    await guest.monitor.close()
    await guest.yank.close()
    adopted = await adopt_guest(identity, run_dir)
    assert adopted is not None and adopted.pid == guest.pid
    assert (await adopted.monitor.execute("query-status"))["status"] == "running"
    assert await wait_vcpus_advance(adopted, adopted.monitor)
    assert await observe_vcpu_time(adopted, adopted.monitor) > 0
    adopted.terminate()
    assert await asyncio.wait_for(guest.exited(), 20) == 0
    await asyncio.wait_for(adopted.exited(), 20)
    await adopted.close()
    assert await adopt_guest(identity, run_dir) is None
    guest.kill()  # an ended process is fine


async def test_another_process_with_the_same_pid_is_not_adopted(lab: Lab) -> None:
    guest = await lab.start(lab.layout("a", make_spec(), paused=True))
    other = replace(guest.identity, start_time_ticks=guest.identity.start_time_ticks - 1)
    assert await adopt_guest(other, guest.run_dir) is None
    assert attach_process(replace(guest.identity, boot_id="another-boot"), guest.run_dir) is None
    assert attach_process(ProcessIdentity(2**22 - 1, 1), guest.run_dir) is None


async def test_a_zombie_is_gone_and_the_end_is_told_to_many(lab: Lab) -> None:
    guest = await lab.start(lab.layout("a", make_spec(), paused=True))
    told: list[int | None] = []
    guest.on_exit(told.append)
    guest.kill()
    assert await asyncio.gather(guest.exited(), guest.exited()) == [-9, -9]
    await until(lambda: told == [-9], "the callback")
    assert not guest.running
    assert not Path(f"/proc/{guest.pid}").exists()


async def test_a_halted_guest_does_not_pass_for_alive(lab: Lab, tmp_path: Path) -> None:
    disk = tmp_path / "halt.raw"
    disk.write_bytes((b"\xfa\xf4\xeb\xfd".ljust(510, b"\0") + b"\x55\xaa").ljust(MIB, b"\0"))  # cli; hlt; jmp
    guest = await lab.start(lab.layout("a", make_spec(disk, size=MIB)))
    deadline = time.monotonic() + 20
    while not await observe_dead_halt(guest.monitor):
        assert time.monotonic() < deadline
    assert not await wait_vcpus_advance(guest, guest.monitor, 0.5)


async def test_a_stopped_guest_does_not_pass_for_alive(lab: Lab) -> None:
    guest = await lab.work_guest("a")
    assert await wait_vcpus_advance(guest, guest.monitor)
    await guest.monitor.execute("stop")
    assert not await wait_vcpus_advance(guest, guest.monitor, 0.5)
    await guest.monitor.execute("cont")
    assert await wait_vcpus_advance(guest, guest.monitor)


async def test_errors_of_the_start_carry_qemus_words(lab: Lab) -> None:
    bad = lab.layout("a", make_spec(cpu="Icelake-Server-v1,enforce"))
    with pytest.raises(Failed) as caught:
        await lab.start(bad)
    assert caught.value.code == "guest-start" and "support requested feature" in caught.value.message
    with pytest.raises(Failed) as caught:
        await lab.start(replace(lab.layout("b", make_spec()), binary="/nonexistent/qemu"))
    assert "cannot be run" in caught.value.message
    with pytest.raises(WrongInput):
        await lab.start(lab.layout("c", make_spec(nics=(NIC,))))


async def test_a_cancelled_start_leaves_no_process(lab: Lab) -> None:
    layout = lab.layout("a", make_spec(), paused=True)
    for turns in (1, 2, 5):
        task = asyncio.create_task(lab.start(layout))
        for _ in range(turns):
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def left() -> bool:
        found = subprocess.run(["pgrep", "-f", str(layout.run_dir)], capture_output=True, check=False)
        return found.returncode == 0

    await until(lambda: not left(), "the process of a cancelled start to end")


async def test_hostile_paths_and_names(lab: Lab) -> None:
    deep = lab.run_dir("x") / "a,b='c\" {d},,e=on " / ("long" * 30)
    deep.mkdir(parents=True)
    disk = deep / "json:{},driver=null,.raw"
    make_disk(disk, 64 * MIB)
    name = "0" + "x" * 60 + "-9"
    other = name[:-1] + "8"
    spec = make_spec(
        disks=(Disk(name, "local", 64 * MIB, "raw", str(disk)), Disk(other, "local", MIB, "qcow2", str(deep / "o,o"))),
    )
    await run("qemu-img", "create", "-q", "-f", "qcow2", str(deep / "o,o"), "1M")
    guest = await lab.start(GuestLayout(spec, deep, deep, "tcg"))
    await lab.ticks(guest)
    adopted_later = guest.identity
    await guest.close()
    again = await adopt_guest(adopted_later, deep)
    assert again is not None
    lab.guests.append(again)


async def test_direct_kernel_boot_takes_any_path_and_command_line(lab: Lab) -> None:
    run_dir = lab.run_dir("a")
    kernel = run_dir / "vm,linuz"
    kernel.write_bytes(b"\0" * 4096)
    spec = make_spec(boot=DirectBoot("vm,linuz", None, "quiet x=a,b ,,"))
    guest = await lab.start(GuestLayout(spec, run_dir, run_dir, "tcg", paused=True))
    for name, value in (("kernel", str(kernel)), ("append", "quiet x=a,b ,,")):
        assert await guest.monitor.execute("qom-get", path="/machine", property=name) == value


@pytest.fixture
def open_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="vmferry-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


async def test_a_guest_runs_without_roots_rights(lab: Lab, open_dir: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give its rights up")
    disk = open_dir / "disk.raw"
    make_disk(disk, 64 * MIB)
    os.chown(disk, 65534, 65534)
    guest = await lab.start(GuestLayout(make_spec(disk), open_dir, open_dir, "tcg"), user=GuestUser(65534, 65534, (7,)))
    await lab.ticks(guest)
    status = Path(f"/proc/{guest.pid}/status").read_text()
    assert "Uid:\t65534\t65534\t65534\t65534" in status
    assert "Groups:\t7 \n" in status
    assert "CapEff:\t0000000000000000" in status
    assert "Seccomp:\t2" in status
    guest.set_priority(5)
    assert os.getpriority(os.PRIO_PROCESS, guest.pid) == 5
    await digest_memory(await locate_memory(guest.monitor, guest.pid, 128 * MIB))


async def test_the_memory_and_the_tap_are_found_in_the_process(lab: Lab) -> None:
    tap = _make_tap("vmftest0")
    try:
        layout = lab.layout("a", make_spec(nics=(NIC,)), tap_fds=(tap,), paused=True)
        guest = await lab.start(layout, fds=(tap,))
    finally:
        os.close(tap)
    stolen = guest.steal_tap("vmftest0")
    assert os.readlink(f"/proc/self/fd/{stolen}") == "/dev/net/tun"
    os.close(stolen)
    memory = await locate_memory(guest.monitor, guest.pid, 128 * MIB)
    assert memory.private and memory.size_bytes == 128 * MIB
    with pytest.raises(Failed):
        await locate_memory(guest.monitor, guest.pid, 1 << 50)
    with pytest.raises(Failed):
        guest.steal_tap("another0")


async def test_what_the_guest_is_given_is_what_was_asked_for(lab: Lab) -> None:
    guest = await lab.start(lab.layout("a", make_spec(cpus=2, cpu=CPU), paused=True))
    assert (await guest.monitor.execute("query-uuid"))["UUID"] == make_spec().id
    assert len(await guest.monitor.execute("query-cpus-fast")) == 2
    assert (await guest.monitor.execute("query-memory-size-summary"))["base-memory"] == 128 * MIB


def _make_tap(name: str) -> int:
    """A tap in a network namespace of its own, made by a thread that never touches the process's namespace."""
    result: list[int | OSError] = []

    def make() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "unshare")
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP_NO_PI_VNET_HDR))
            result.append(fd)
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]
