"""The registry of VMs where one of them is in trouble: real journal, stand-ins for processes."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rig import SPEC, Host, Process, guest_of, host_at, refusing_writes

from vmferry.host.journal import Journal
from vmferry.host.vms import Vm
from vmferry.migration.guest import RunningGuest
from vmferry.model.vm import RunState


async def test_one_vm_s_trouble_keeps_no_other_from_being_managed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    await journal.open()
    await journal.add_vm(replace(SPEC, id="../odd", name="a-odd"))  # its directory cannot be told
    await journal.add_vm(SPEC)
    await journal.close()
    async with host_at(tmp_path) as host:
        odd = host.vms.get("a-odd")
        assert odd.state is RunState.UNKNOWN and "../odd" in odd.problem
        assert host.vms.get("web1").state is RunState.STOPPED


async def test_a_guest_s_end_is_told_though_the_journal_is_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits for it (stop, kill, a migration) would wait for ever."""
    async with host_at(tmp_path) as host:
        await host.journal.add_vm(SPEC)
        process = Process(tmp_path / "guest", status=1)
        vm = host.vms.receive(SPEC, guest_of(process), RunState.RUNNING, "")
        with refusing_writes(tmp_path, "vm"):
            process.kill()
            await asyncio.wait_for(vm.ended.wait(), 10)
        assert vm.guest is None and vm.state is RunState.FAILED
        assert "guest-end-not-tidied" in caplog.text


async def test_a_guest_s_directory_goes_with_it(tmp_path: Path) -> None:
    async with host_at(tmp_path) as host:
        await host.journal.add_vm(SPEC)
        await host.journal.set_process(SPEC.id, 4711, 1)
        process = Process(tmp_path / "guest")
        process.run_dir.mkdir()
        vm = host.vms.receive(SPEC, guest_of(process), RunState.RUNNING, "")
        process.kill()
        await asyncio.wait_for(vm.ended.wait(), 10)
        assert not process.run_dir.exists()
        assert [row.pid for row in await host.journal.list_vms()] == [0]


async def handed_over(host: Host, guest: RunningGuest) -> Vm:
    """A VM as the daemon's next life finds it, when the handoff was written and the target has not answered yet."""
    await host.journal.add_vm(SPEC)
    vm = host.vms.receive(SPEC, guest, RunState.PAUSED, "m-1")
    vm.owned = False
    return vm


async def test_the_end_of_a_handed_over_guest_is_seen(tmp_path: Path) -> None:
    """The target may refuse it: then the VM is here, and is to be started, killed or deleted like any other."""
    async with host_at(tmp_path) as host:
        process = Process(tmp_path / "guest", status=-9)
        vm = await handed_over(host, guest_of(process))
        process.kill()
        await asyncio.wait_for(vm.ended.wait(), 10)
        await host.vms.release(vm)  # taken back
        assert vm.guest is None and vm.state is RunState.FAILED
        await asyncio.wait_for(host.vms.kill("web1"), 10)
        await host.vms.delete("web1")


async def test_the_end_of_a_guest_that_was_given_away_is_left_to_its_migration(tmp_path: Path) -> None:
    async with host_at(tmp_path) as host:
        process = Process(tmp_path / "guest")
        process.run_dir.mkdir()
        vm = await handed_over(host, guest_of(process))
        host.vms.give_away(vm)
        process.kill()
        await asyncio.sleep(0.05)
        assert vm.guest is not None and process.run_dir.exists()


async def test_a_rehearsal_that_does_not_start_leaves_no_directory(tmp_path: Path) -> None:
    from vmferry.migration.guest import build_twin
    from vmferry.model.errors import VmferryError

    async with host_at(tmp_path) as host:
        twins = host.parts.run_dir / "twins"
        with pytest.raises(VmferryError):
            await build_twin(host.parts, SPEC, "n0", incoming=True)
        assert list(twins.iterdir()) == []
        shutil.rmtree(twins)
