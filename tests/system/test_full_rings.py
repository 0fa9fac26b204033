"""Ports that nobody has read for long: of a NIC that the guest does not drive, of a VM that was paused."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
from collections.abc import Iterator

import pytest
from sysrig import QUICK, Guest, Rig, in_phase

from vmferry.lab.netns import open_socket
from vmferry.model.migration import MigrateOptions, Outcome, Phase, Verify
from vmferry.model.vm import RunState
from vmferry.network.ports import port_name

pytestmark = pytest.mark.system

_DRIVEN, _UNDRIVEN = 0, 1
_PROVEN = MigrateOptions(max_blackout_ms=2000, verify=Verify.DISKS)
_BROADCAST = b"\xff" * 6 + b"\x02\0\0\0\0\x09" + b"\x88\xb5" + bytes(46)  # of a type for experiments (IEEE 802)


@pytest.fixture
def two_nics(rig: Rig) -> Iterator[Guest]:
    """A guest that has brought up only the first of its NICs."""
    yield rig.ensure_guest("rings", "10.77.0.66", nic=[{"switch": "lan"}, {"switch": "lan"}])
    rig.forget_guest("rings")
    rig.require_clean()


def test_a_full_port_is_moved_and_taken_back(rig: Rig, two_nics: Guest) -> None:
    guest = two_nics
    source, target = rig.place(guest.name)
    fill(rig, guest, source, _UNDRIVEN)
    begun = rig.on(source).migrate(guest.name, target, QUICK)
    rig.wait_until(source, begun.id, in_phase(Phase.SWITCHOVER))
    with rig.frozen(*rig.qemu_pids(target)):
        ended = rig.wait_end(source, begun.id, 40.0)
    assert ended.outcome is Outcome.FAILED and ended.reason is not None, ended
    assert ended.reason.code != "frame-not-sent" and "tidied" not in ended.reason.message, ended.reason
    rig.require_alive(guest, source)
    rig.require_clean(30.0)
    require_open(rig, guest, source)

    receipt = rig.on(source).receipt(rig.migrate(guest.name, _PROVEN).id)
    print(f"blackout {receipt.blackout_ms} ms, {receipt.frames}, {receipt.switchover}")
    rig.require_alive(guest, target)
    require_open(rig, guest, target)
    rig.require_clean()


def test_a_vm_that_was_paused_for_long_is_moved(rig: Rig, two_nics: Guest) -> None:
    guest = two_nics
    source, target = rig.place(guest.name)
    rig.on(source).pause_vm(guest.name)
    for index in (_DRIVEN, _UNDRIVEN):
        fill(rig, guest, source, index)
    rig.migrate(guest.name, _PROVEN)
    assert rig.owners(guest.name) == [(target, RunState.PAUSED)]
    rig.on(target).resume_vm(guest.name)
    rig.require_alive(guest, target)
    require_open(rig, guest, target)
    rig.require_clean()


def port_of(rig: Rig, guest: Guest, host: str, index: int) -> str:
    return port_name(rig.on(host).vm(guest.name).spec.id, index)


def fill(rig: Rig, guest: Guest, host: str, index: int) -> None:
    """As the broadcasts of hours do: until the port takes no more."""
    sock = open_socket(rig.host(host).namespace, socket.AF_PACKET, socket.SOCK_RAW)
    with sock:
        sock.bind((port_of(rig, guest, host, index), 0))
        sock.setsockopt(263, 20, 1)  # PACKET_QDISC_BYPASS
        for _ in range(100_000):
            try:
                sock.send(_BROADCAST)
            except OSError as error:
                assert error.errno == errno.ENOBUFS, error
                return
    raise AssertionError("the port takes everything: somebody reads it")


def require_open(rig: Rig, guest: Guest, host: str) -> None:
    """Both of the guest's ports are in the switch, and nothing leads their frames away."""
    namespace = rig.host(host).namespace
    for index in (_DRIVEN, _UNDRIVEN):
        port = port_of(rig, guest, host, index)
        show = subprocess.run(
            ["ip", "-n", namespace, "-json", "link", "show", port], check=True, capture_output=True, text=True
        )
        assert json.loads(show.stdout)[0].get("master"), (port, show.stdout)
        filters = subprocess.run(
            ["tc", "-n", namespace, "filter", "show", "dev", port, "egress"], check=True, capture_output=True, text=True
        )
        assert not filters.stdout.strip(), filters.stdout
