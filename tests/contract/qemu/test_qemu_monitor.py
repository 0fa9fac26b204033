"""The QMP connection against a real QEMU."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import Lab, make_spec

from vmferry.qemu.layout import QMP_SOCKET
from vmferry.qemu.monitor import Monitor, QmpInterrupted, QmpLost, QmpRefused, QmpTimeout


async def test_a_command_is_answered_and_a_wrong_one_refused(lab: Lab) -> None:
    guest = await lab.start(lab.layout("a", make_spec(), paused=True))
    assert (await guest.monitor.execute("query-status"))["status"] == "prelaunch"
    with pytest.raises(QmpRefused) as caught:
        await guest.monitor.execute("no-such-command")
    assert caught.value.error_class == "CommandNotFound"
    with pytest.raises(QmpRefused) as caught:
        await guest.monitor.execute("object-del", id="nothing")
    assert "nothing" in caught.value.desc
    assert caught.value.code == "qmp-refused"


async def test_events_come_to_a_future_that_was_armed_before(lab: Lab) -> None:
    guest = await lab.start(lab.layout("a", make_spec(), paused=True))
    async with guest.monitor.subscribe(["STOP", "RESUME"]) as stream:
        before, wall = time.monotonic_ns(), time.time_ns() // 1000
        resume = guest.monitor.expect("RESUME")
        never = guest.monitor.expect("STOP", lambda event: False)
        await guest.monitor.execute("cont")
        event = await asyncio.wait_for(resume, 5)
        await guest.monitor.execute("stop")
        names = [(await stream.get()).name for _ in range(2)]
    assert before < event.at_ns < time.monotonic_ns()
    assert abs(event.qemu_us - wall) < 60_000_000
    assert names == ["RESUME", "STOP"]
    assert not never.done()
    never.cancel()


async def test_the_end_of_the_process_ends_everything_that_waits(lab: Lab) -> None:
    guest = await lab.start(lab.layout("a", make_spec(), paused=True))
    told: list[QmpLost] = []
    guest.monitor.on_lost(told.append)
    waiting = guest.monitor.expect("RESUME")
    async with guest.monitor.subscribe(["STOP"]) as stream:
        guest.kill()
        with pytest.raises(QmpLost):
            await asyncio.wait_for(waiting, 5)
        for _ in range(2):
            with pytest.raises(QmpLost):
                await asyncio.wait_for(stream.get(), 5)
    assert len(told) == 1 and guest.monitor.lost
    with pytest.raises(QmpLost):
        await guest.monitor.execute("query-status")
    with pytest.raises(QmpLost):
        await guest.monitor.expect("RESUME")
    assert await guest.exited() == -signal.SIGKILL


async def test_an_answer_that_was_lost_is_an_unknown_outcome(lab: Lab) -> None:
    guest = await lab.start(lab.layout("a", make_spec(), paused=True))
    os.kill(guest.pid, signal.SIGSTOP)
    command = asyncio.create_task(guest.monitor.execute("cont"))
    await asyncio.sleep(0)  # sent once the loop has run the writer
    with pytest.raises(QmpTimeout):
        await guest.monitor.execute("query-status", timeout_s=0.2)
    guest.kill()
    with pytest.raises(QmpInterrupted) as caught:
        await command
    assert caught.value.exit_status == 4


async def test_a_late_answer_disturbs_nobody(lab: Lab) -> None:
    guest = await lab.start(lab.layout("a", make_spec(), paused=True))
    os.kill(guest.pid, signal.SIGSTOP)
    try:
        with pytest.raises(QmpTimeout) as caught:
            await guest.monitor.execute("query-status", timeout_s=0.1)
        assert caught.value.command == "query-status"
    finally:
        os.kill(guest.pid, signal.SIGCONT)
    assert (await guest.monitor.execute("query-name"))["name"] == "web1"


async def test_nobody_there_and_somebody_else_there(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(QmpLost):
        await Monitor.connect(tmp_path / "nothing.sock")
    guest = await lab.start(lab.layout("a", make_spec(), paused=True))
    with pytest.raises(QmpTimeout):
        await Monitor.connect(guest.run_dir / QMP_SOCKET, timeout_s=0.3)
    await guest.monitor.close()
    async with await Monitor.connect(guest.run_dir / QMP_SOCKET) as again:
        assert (await again.execute("query-status"))["status"] == "prelaunch"


async def test_out_of_band_commands_and_closing_twice(lab: Lab) -> None:
    guest = await lab.start(lab.layout("a", make_spec(), paused=True))
    await guest.yank.yank([])
    with pytest.raises(QmpRefused):
        await guest.yank.yank([{"type": "block-node", "node-name": "nothing"}])
    await guest.monitor.close()
    await guest.monitor.close()
    assert guest.running
