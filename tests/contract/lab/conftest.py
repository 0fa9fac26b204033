"""A lab without daemons of these tests' own, and one real guest on its host1."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vmferry.lab.guest import guest_cmdline
from vmferry.lab.guest_client import GuestClient
from vmferry.lab.layout import LabLayout
from vmferry.lab.namespaces import lab_down, lab_up

from .rig import ADDRESS, RunningGuest, end_guest, start_guest


@pytest.fixture(scope="module")
def lab() -> Iterator[LabLayout]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    prefix = f"vft-{os.getpid()}"
    state = lab_up(hosts=2, link_bps=10**9, prefix=prefix, with_daemons=False)
    try:
        yield state.layout
    finally:
        lab_down(prefix)


@pytest.fixture(scope="module")
def guest(lab: LabLayout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGuest]:
    options = {"ip": f"{ADDRESS}/24", "dirty": 4, "wss": 8, "disk": 1, "diskrate": 50, "diskarea": 2}
    cmdline = guest_cmdline(**options, fill=8, udp=7, tcp=7, stream=9)
    running = start_guest(lab, tmp_path_factory.mktemp("guest"), cmdline)
    try:
        running.wait_for_line("vf: ready")
        running.wait_for_line("vf: fill done")
        yield running
    finally:
        end_guest(lab, running)


@pytest.fixture
def client(lab: LabLayout, guest: RunningGuest) -> Iterator[GuestClient]:
    with GuestClient(ADDRESS, lab.client_namespace) as made:
        yield made
