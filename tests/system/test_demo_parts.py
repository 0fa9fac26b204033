"""The demo and what it is made of: its manners towards other labs, clean-up, leftovers found, judgements."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmferry.lab.layout import LabLayout, existing_namespaces
from vmferry.lab.leftovers import Leftover, find_leftovers, wait_until_clean
from vmferry.lab.namespaces import exec_prefix, lab_down, lab_status, lab_up
from vmferry.lab.processes import find_lab_processes
from vmferry.lab.trial_vm import LabCommand, TrialVm, create_and_start, find_owner
from vmferry.network.ports import port_name

pytestmark = [pytest.mark.system, pytest.mark.skipif(os.geteuid() != 0, reason="a lab needs root")]

PREFIX = "vf-demoparts"
DEMO_PREFIX = "vf-demotest"
LIMIT_S = 120
MAC = "52:54:00:00:00:09"


@pytest.fixture(scope="module")
def lab() -> Iterator[LabLayout]:
    """Two hosts with daemons."""
    try:
        yield lab_up(2, prefix=PREFIX, accel="tcg").layout
    finally:
        lab_down(PREFIX)


@pytest.fixture
def demo_output(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "demo.txt"
    lab_down(DEMO_PREFIX)


def start_demo(output: Path, *arguments: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "vmferry.lab.demo", *arguments]
    with output.open("wb") as out:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)


def wait_for_words(output: Path, words: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while words not in output.read_text(errors="replace"):
        assert process.poll() is None, output.read_text(errors="replace")
        assert time.monotonic() < deadline, output.read_text(errors="replace")
        time.sleep(0.05)


def test_a_lab_that_is_up_is_left_alone(lab: LabLayout, tmp_path: Path) -> None:
    before = lab_status(PREFIX)
    demo = start_demo(tmp_path / "demo.txt", "--prefix", PREFIX)
    assert demo.wait(LIMIT_S) == 1
    said = (tmp_path / "demo.txt").read_text()
    assert "is up already" in said and "vmferry lab down" in said
    assert lab_status(PREFIX) == before
    assert all(state["running"] for host in before.document()["hosts"] if (state := host["daemon"]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["[1/5]", "[2/5]"])
def test_an_interrupted_demo_leaves_nothing(demo_output: Path, moment: str, number: int) -> None:
    demo = start_demo(demo_output, "--keep", "--prefix", DEMO_PREFIX)
    wait_for_words(demo_output, moment, demo)
    demo.send_signal(number)
    assert demo.wait(LIMIT_S) == 130, demo_output.read_text()
    assert "Nothing is left" in demo_output.read_text()
    layout = LabLayout(DEMO_PREFIX)
    assert not list(existing_namespaces(DEMO_PREFIX)) and not find_lab_processes(DEMO_PREFIX)
    assert not layout.state_root.exists() and not layout.run_root.exists() and not layout.kept_logs.exists()


def test_leftovers_of_every_kind_are_found(lab: LabLayout) -> None:
    assert wait_until_clean(lab) == ()
    first, second = lab.hosts
    run, table = ["ip", "-n", first.namespace], ["bridge", "-n", first.namespace, "fdb"]
    filters = ["tc", "-n", first.namespace, "filter"]
    stray = subprocess.Popen([*exec_prefix(second.namespace), "sleep", "1000"])
    image = first.pools["fast"] / "some-vm" / "root.qcow2.aside-m-1"
    directories = (second.run_dir / "twins" / "1234-in", second.state_dir / "vms" / "some-vm")
    try:
        for command in (
            [*run, "tuntap", "add", "dev", "vf0123456789", "mode", "tap"],
            ["tc", "-n", first.namespace, "qdisc", "add", "dev", "vf0123456789", "clsact"],
            [*filters, "add", "dev", "vf0123456789", "egress", "u32", "match", "u32", "0", "0"],
            [*table, "replace", MAC, "dev", "lan0", "master", "dynamic", "sticky"],
        ):
            subprocess.run(command, check=True)
        image.parent.mkdir(mode=0o711)
        image.touch()
        for directory in directories:
            directory.mkdir(parents=True)
        found = find_leftovers(lab)
        assert {(item.host, item.kind) for item in found} == {
            ("host1", "device"),
            ("host1", "traffic rule"),
            ("host1", "bridge entry"),
            ("host1", "image"),
            ("host2", "process"),
            ("host2", "directory"),
        }, found
        assert Leftover("host1", "image", "pools/fast/some-vm/root.qcow2.aside-m-1") in found
    finally:
        stray.kill()
        stray.wait()
        image.unlink(missing_ok=True)
        for directory in (*directories, image.parent):
            if directory.exists():
                directory.rmdir()
        subprocess.run([*run, "link", "delete", "vf0123456789"], check=False)
        subprocess.run([*table, "delete", MAC, "dev", "lan0", "master"], check=False)
    assert wait_until_clean(lab) == ()


def test_what_a_running_vm_needs_is_no_leftover(lab: LabLayout) -> None:
    command = LabCommand(lab)
    vm = TrialVm(name="small", address="10.77.0.66", memory_mib=128, disk_gib=1, wss_mib=0, disk_area_mib=0)
    create_and_start(command, vm, lab.hosts[0])
    try:
        view = find_owner(lab, "small")
        assert view.host == "host1" and view.pid
        assert wait_until_clean(lab) == ()
        links = subprocess.run(["ip", "-n", lab.hosts[0].namespace, "link"], capture_output=True, text=True).stdout
        assert port_name(view.spec.id, 0) in links
    finally:
        command.ask("vm", "kill", "small")
        command.ask("vm", "delete", "small")
    assert wait_until_clean(lab) == ()
