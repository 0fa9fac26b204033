"""Lab up and down: twice, beside another lab, after kill -9 in the middle, half-built. Real namespaces, no daemons."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmferry.lab import processes
from vmferry.lab.daemons import write_host_config
from vmferry.lab.faults import Direction, Link, cut_link, restore_link, slow_link, unplug
from vmferry.lab.layout import NETNS_ROOT, LabLayout, existing_namespaces
from vmferry.lab.namespaces import exec_prefix, lab_down, lab_exec, lab_status, lab_up
from vmferry.lab.netns import open_socket
from vmferry.model.errors import Conflict, NotFound, WrongInput

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def prefix() -> Iterator[str]:
    name = f"vfn-{os.getpid()}"
    try:
        yield name
    finally:
        lab_down(name)


def left_behind(prefix: str) -> list[object]:
    layout = LabLayout(prefix)
    paths = [path for path in (layout.state_root, layout.run_root, layout.client_config, layout.lock) if path.exists()]
    return [*existing_namespaces(prefix), *paths, *processes.find_lab_processes(prefix)]


def up(prefix: str, hosts: int = 2) -> LabLayout:
    return lab_up(hosts=hosts, prefix=prefix, with_daemons=False).layout


def test_up_and_down_twice(prefix: str) -> None:
    for _ in range(2):
        layout = up(prefix)
        assert up(prefix) == layout
        assert layout.client_config.exists()
        lab_down(prefix)
        assert left_behind(prefix) == []
    lab_down(prefix)


def test_another_shape_is_refused(prefix: str) -> None:
    up(prefix)
    with pytest.raises(Conflict, match="another shape"):
        up(prefix, hosts=3)


def test_wrong_shapes_are_refused(prefix: str) -> None:
    for hosts in (0, 9):
        with pytest.raises(WrongInput):
            up(prefix, hosts)
    with pytest.raises(WrongInput):
        up("../x")


def test_two_labs_side_by_side(prefix: str) -> None:
    other = f"{prefix}-b"
    up(prefix)
    try:
        up(other)
        lab_down(other)
        assert left_behind(other) == []
        assert len(list(existing_namespaces(prefix))) == 4
    finally:
        lab_down(other)


def test_hosts_reach_each_other_and_the_client_does_not_see_the_migration_network(prefix: str) -> None:
    layout = up(prefix)
    with open_socket(layout.hosts[1].namespace, socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("10.78.0.2", 7443))
        server.listen()
        with open_socket(layout.hosts[0].namespace, socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(5)
            client.connect(("10.78.0.2", 7443))
            assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"cubic"
    with open_socket(layout.client_namespace, socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        with pytest.raises(OSError):
            client.connect(("10.78.0.2", 7443))


def test_status_and_exec(prefix: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotFound):
        lab_status(prefix)
    up(prefix)
    document = lab_status(prefix).document()
    assert [host["migration_address"] for host in document["hosts"]] == ["10.78.0.1", "10.78.0.2"]
    assert lab_exec(prefix, "client", ["ip", "-json", "address", "show", "dev", "lan0"]) == 0
    assert json.loads(capfd.readouterr().out)[0]["addr_info"][0]["local"] == "10.77.0.9"
    assert lab_exec(prefix, "host1", ["sh", "-c", "exit 7"]) == 7
    with pytest.raises(NotFound):
        lab_exec(prefix, "host9", ["true"])


BUILD = "import sys; from vmferry.lab.namespaces import lab_up; print('go', flush=True); "
BUILD += "lab_up(hosts=3, prefix=sys.argv[1], with_daemons=False); print('up', flush=True)"


@pytest.mark.parametrize("delay_ms", [0, 10, 30, 60, 90, 120])
@pytest.mark.parametrize("clear_first", [True, False])
def test_killed_in_the_middle_of_up(prefix: str, delay_ms: int, clear_first: bool) -> None:
    """Whenever it is killed, down removes what there is, and up completes without it."""
    builder = subprocess.Popen([sys.executable, "-c", BUILD, prefix], stdout=subprocess.PIPE)
    assert builder.stdout is not None and builder.stdout.readline() == b"go\n"
    time.sleep(delay_ms / 1000)  # the moment of the kill; any is right
    builder.kill()
    builder.wait()
    builder.stdout.close()
    if clear_first:
        lab_down(prefix)
        assert left_behind(prefix) == []
    assert up(prefix, hosts=3).host_count == 3


DOWN = "import sys; from vmferry.lab.namespaces import lab_down; print('go', flush=True); lab_down(sys.argv[1])"


@pytest.mark.parametrize("delay_ms", [0, 5, 10, 20, 40])
def test_killed_in_the_middle_of_down(prefix: str, delay_ms: int) -> None:
    up(prefix)
    remover = subprocess.Popen([sys.executable, "-c", DOWN, prefix], stdout=subprocess.PIPE)
    assert remover.stdout is not None and remover.stdout.readline() == b"go\n"
    time.sleep(delay_ms / 1000)  # the moment of the kill; any is right
    remover.kill()
    remover.communicate()
    lab_down(prefix)
    assert left_behind(prefix) == []


def test_half_made_namespace_is_removed(prefix: str) -> None:
    NETNS_ROOT.mkdir(exist_ok=True)
    (NETNS_ROOT / f"{prefix}-host1").touch()
    lab_down(prefix)
    assert left_behind(prefix) == []


def test_mounts_in_the_lab_are_removed(prefix: str) -> None:
    layout = up(prefix)
    subprocess.run(["mount", "-t", "tmpfs", "none", layout.hosts[0].pools["fast"]], check=True)
    lab_down(prefix)
    assert left_behind(prefix) == []


def test_processes_of_the_lab_are_ended_and_no_others(prefix: str) -> None:
    layout = up(prefix)
    place = str(layout.hosts[0].run_dir / "x.sock")
    sleep = [
        sys.executable,
        "-c",
        "import signal, time; signal.signal(15, 1); print('on', flush=True); time.sleep(600)",
    ]
    inside = subprocess.Popen([*exec_prefix(layout.hosts[0].namespace), *sleep], stdout=subprocess.PIPE)
    qemu = subprocess.Popen(
        ["qemu-system-x86_64", *sleep[1:], place], executable=sys.executable, stdout=subprocess.PIPE
    )
    bystander = subprocess.Popen([*sleep, place], stdout=subprocess.PIPE)
    try:
        for each in (inside, qemu, bystander):
            assert each.stdout is not None and each.stdout.readline() == b"on\n"
        lab_down(prefix)
        assert inside.wait(5) == qemu.wait(5) == -signal.SIGKILL
        assert bystander.poll() is None
    finally:
        for each in (inside, qemu, bystander):
            each.kill()
            each.communicate()


def test_a_pid_that_was_used_again_is_not_signalled() -> None:
    own = processes.observe_process(os.getpid())
    assert own is not None and processes.is_running(own)
    stranger = processes.Process(own.pid, own.start_ticks - 1)
    assert not processes.is_running(stranger)
    assert not processes.send_signal(stranger, signal.SIGKILL)
    processes.end_processes([stranger])


def test_host_config_is_what_the_daemon_reads(prefix: str) -> None:
    config = pytest.importorskip("vmferry.host.config")
    layout = up(prefix)
    read = config.load_config(write_host_config(layout.hosts[0]))
    assert read.socket_path == layout.hosts[0].socket
    assert [peer.name for peer in read.peers] == ["host2"]
    assert {pool.name: pool.path for pool in read.pools} == layout.hosts[0].pools


def passes(layout: LabLayout, number: int, source: int, target: int, within_s: float = 10.0) -> bool:
    """Whether a datagram gets from one host to another in time."""
    deadline = time.monotonic() + within_s
    with open_socket(layout.hosts[target - 1].namespace, socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((f"10.78.0.{target}", 9000 + number))
        server.settimeout(0.1)
        with open_socket(layout.hosts[source - 1].namespace, socket.AF_INET, socket.SOCK_DGRAM) as client:
            while time.monotonic() < deadline:
                try:
                    client.sendto(b"x", (f"10.78.0.{target}", 9000 + number))
                    server.recv(10)
                    return True
                except OSError:
                    continue
    return False


def blocked(layout: LabLayout, number: int, source: int, target: int) -> bool:
    return not passes(layout, number, source, target, within_s=0.4)


def test_links_are_cut_in_each_direction_and_restored(prefix: str) -> None:
    layout = up(prefix)
    first = layout.hosts[0]
    assert passes(layout, 1, 1, 2) and passes(layout, 2, 2, 1)  # both know the other's MAC from now on
    cut_link(first, Link.MIGRATION, Direction.OUT)
    assert blocked(layout, 3, 1, 2) and passes(layout, 4, 2, 1)
    restore_link(first)
    cut_link(first, Link.MIGRATION, Direction.IN)
    cut_link(first, Link.MIGRATION, Direction.IN)
    assert passes(layout, 5, 1, 2) and blocked(layout, 6, 2, 1)
    restore_link(first)
    restore_link(first)
    unplug(first)
    assert blocked(layout, 7, 1, 2)
    restore_link(first)
    assert passes(layout, 8, 1, 2)


def test_link_is_shaped(prefix: str) -> None:
    layout = up(prefix)
    slow_link(layout.hosts[0], 50_000_000)
    for namespace, device in ((layout.hosts[0].namespace, "mig0"), (layout.switch_namespace, "mig-host1")):
        told = subprocess.run(["tc", "-n", namespace, "qdisc", "show", "dev", device], capture_output=True, text=True)
        assert "tbf" in told.stdout and "50Mbit" in told.stdout


def test_state_directories_are_for_this_lab_only(prefix: str) -> None:
    layout = up(prefix)
    assert layout.state_root.name == prefix
    assert Path("/var/lib/vmferry-lab") in layout.state_root.parents
