"""The command line against real daemons and a real guest in a lab of its own."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.skipif(os.geteuid() != 0, reason="a lab needs root")]

PREFIX = "vf-clitest"
LIMIT_S = 240
COMMAND = (sys.executable, "-m", "vmferry.cli.main")


@dataclass(frozen=True)
class Lab:
    """A lab that is up."""

    config: str
    document: dict[str, Any]

    def run(self, *arguments: str, config: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "VMFERRY_CONFIG": config or self.config}
        argv = [*COMMAND, *arguments]
        return subprocess.run(
            argv, capture_output=True, text=True, env=environment, timeout=LIMIT_S, stdin=subprocess.DEVNULL
        )

    def ask(self, *arguments: str) -> Any:
        """The JSON that a command prints, which must succeed."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, f"{arguments}: {done.returncode} {done.stdout} {done.stderr}"
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=LIMIT_S)

    try:
        up = bare("lab", "up", "--hosts", "2", "--prefix", PREFIX, "--accel", "tcg", "--json")
        assert up.returncode == 0, up.stdout + up.stderr
        document = json.loads(up.stdout)
        yield Lab(document["client_config"], document)
    finally:
        down = bare("lab", "down", "--prefix", PREFIX)
    assert down.returncode == 0, down.stdout + down.stderr


@pytest.fixture(scope="module")
def vm(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running VM of 128 MiB on host1."""
    directory = tmp_path_factory.mktemp("spec")
    paths = lab.ask("lab", "guest")
    cmdline = "console=ttyS0 quiet panic=-1 vf.ip=10.77.0.60/24 vf.beat=200"
    (directory / "web1.toml").write_text(
        'name = "web1"\ncpus = 1\nmemory = "128MiB"\n'
        f'[boot]\nkernel = "{paths["kernel"]}"\ninitrd = "{paths["initrd"]}"\ncmdline = "{cmdline}"\n'
        '[[disk]]\nname = "root"\npool = "local"\nsize = "64MiB"\nformat = "qcow2"\n[[nic]]\nswitch = "lan"\n'
    )
    created = lab.ask("vm", "create", "-f", str(directory / "web1.toml"), "--host", "host1")
    assert (created["host"], created["state"]) == ("host1", "stopped")
    assert lab.ask("vm", "start", "web1")["state"] == "running"
    yield "web1"
    assert lab.ask("vm", "kill", "web1")["state"] == "stopped"
    lab.ask("vm", "delete", "web1")
    assert lab.ask("vm", "list") == []


def wait_for_guest(lab: Lab, name: str) -> None:
    """Until the guest says something on its console: it has booted and runs."""
    with socket.socket(socket.AF_UNIX) as console:
        console.connect(lab.ask("vm", "console", name)["console"])
        deadline, seen = time.monotonic() + LIMIT_S, b""
        while b"beat" not in seen:
            ready, _, _ = select.select([console], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the guest is silent: {seen!r}"
            said = console.recv(4096)
            assert said, f"the console is closed: {seen!r}"
            seen += said


def test_hosts(lab: Lab) -> None:
    views = lab.ask("host", "list")
    assert [(view["name"], view["reachable"], view["accel"]) for view in views] == [
        ("host1", True, "tcg"),
        ("host2", True, "tcg"),
    ]
    assert {pool["name"] for pool in lab.ask("host", "show", "host2")["pools"]} == {"local", "fast"}
    shown = lab.run("host", "list")
    assert shown.returncode == 0 and "host2" in shown.stdout


def test_a_vm_is_seen_from_anywhere(lab: Lab, vm: str) -> None:
    assert [(view["spec"]["name"], view["host"]) for view in lab.ask("vm", "list")] == [(vm, "host1")]
    assert lab.ask("vm", "show", vm)["spec"]["nics"][0]["switch"] == "lan"
    assert lab.run("vm", "show", vm, "--host", "host2").returncode == 2
    assert lab.ask("vm", "pause", vm)["state"] == "paused"
    assert lab.ask("vm", "resume", vm)["state"] == "running"
    inside = lab.run("lab", "exec", "client", "--prefix", PREFIX, "--", *COMMAND, "vm", "list")
    assert inside.returncode == 0 and vm in inside.stdout


def test_what_is_refused(lab: Lab, vm: str) -> None:
    assert lab.run("vm", "migrate", vm, "--to", "host9").returncode == 2
    assert lab.run("vm", "migrate", "nobody", "--to", "host2").returncode == 2
    assert lab.run("vm", "delete", vm).returncode == 1
    assert lab.run("vm", "check", vm, "--to", "host1").returncode == 3
    done = lab.run("vm", "check", vm, "--to", "host2", "--storage", "nowhere")
    assert done.returncode == 3 and "nowhere" in done.stdout
    done = lab.run("vm", "migrate", vm, "--to", "host2", "--storage", "nowhere", "--json")
    assert done.returncode == 3
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["error"]["code"] == "refused" and last["error"]["check"]["ok"] is False
    assert lab.ask("vm", "show", vm)["state"] == "running"


def test_there_and_back(lab: Lab, vm: str) -> None:
    wait_for_guest(lab, vm)
    check = lab.ask("vm", "migrate", vm, "--to", "host2", "--dry-run")
    assert check["ok"] and check["prediction"]["feasible"], check
    done = lab.run("vm", "migrate", vm, "--to", "host2", "--verify", "all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 lost" in done.stdout and "✔ equal" in done.stdout
    assert lab.ask("vm", "show", vm)["host"] == "host2"
    wait_for_guest(lab, vm)

    begun = lab.ask("vm", "migrate", vm, "--to", "host1", "--detach")
    watched = lab.run("migration", "watch", begun["id"], "--json")
    assert watched.returncode == 0, watched.stdout + watched.stderr
    assert json.loads(watched.stdout.splitlines()[-1])["outcome"] == "completed"
    assert lab.ask("vm", "show", vm)["host"] == "host1"
    wait_for_guest(lab, vm)

    migrations = lab.ask("migration", "list")
    assert [view["outcome"] for view in migrations[:2]] == ["completed", "completed"]
    receipt = lab.ask("migration", "receipt", begun["id"])
    assert (receipt["source"], receipt["target"], receipt["vm"]) == ("host2", "host1", vm)
    assert "valid" in lab.run("migration", "receipt", begun["id"]).stdout
    assert lab.run("migration", "cancel", begun["id"]).returncode == 1


def test_a_host_joins_and_speaks_over_tls(lab: Lab, tmp_path: Path) -> None:
    token = lab.ask("host", "token", "--host", "host1")["token"]
    identity = ("--name", "host9", "--address", "10.78.0.2:7443", "--config-dir", str(tmp_path / "tls"))
    join = ("host", "join", token, *identity, "--daemon-config", str(tmp_path / "none.toml"), "--json")
    on_host2 = ("lab", "exec", "host2", "--prefix", PREFIX, "--", *COMMAND)
    done = lab.run(*on_host2, *join)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["peers"]["host1"] == "10.78.0.1:7443"
    assert lab.run(*on_host2, *join).returncode == 3  # a token counts once

    config = tmp_path / "client.toml"
    config.write_text('[[host]]\nname = "host1"\naddress = "10.78.0.1:7443"\ntls_dir = "tls"\n')
    far = lab.run(*on_host2, "host", "list", "--host", "host1", "--config", str(config), "--json")
    assert far.returncode == 0, far.stdout + far.stderr
    assert json.loads(far.stdout)[0]["name"] == "host1"
    lab.ask("host", "remove", "host9", "--host", "host1")
