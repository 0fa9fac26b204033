"""A lab with the real daemons: up, a daemon killed and brought back, down while one is dead."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from vmferry.lab import processes
from vmferry.lab.namespaces import lab_down, lab_status, lab_up, restart_daemon, stop_daemon

pytestmark = [pytest.mark.system, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@pytest.fixture
def prefix() -> Iterator[str]:
    name = f"vfd-{os.getpid()}"
    try:
        yield name
    finally:
        lab_down(name)


def test_daemons_come_up_die_and_come_back(prefix: str) -> None:
    first = lab_up(hosts=2, prefix=prefix, accel="tcg")
    assert all(processes.is_running(daemon) for daemon in first.daemons.values())
    restarted = restart_daemon(prefix, "host1", signal.SIGKILL)
    assert restarted != first.daemons["host1"]
    stop_daemon(prefix, "host2", signal.SIGKILL)
    completed = lab_up(hosts=2, prefix=prefix, accel="tcg")
    assert completed.daemons["host1"] == restarted
    assert completed.daemons["host2"] != first.daemons["host2"]
    assert lab_status(prefix) == completed
    stop_daemon(prefix, "host1", signal.SIGTERM)
    lab_down(prefix)
    assert processes.find_lab_processes(prefix) == []
