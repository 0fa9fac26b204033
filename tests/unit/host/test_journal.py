"""The host's journal on real SQLite: what each method guarantees, whatever happens to process, file and disk."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vmferry.host.journal import Journal, JournalBroken, VmRow
from vmferry.migration.records import MigrationRecord, RecordState, Reserved
from vmferry.model.errors import Conflict, NotFound
from vmferry.model.migration import (
    MigrateOptions,
    MigrationView,
    Mode,
    Outcome,
    Phase,
    PhaseTime,
    Progress,
    Range,
    Reason,
    Role,
)
from vmferry.model.vm import DirectBoot, Disk, Nic, VmSpec

HERE = Path(__file__).parent
SPEC = VmSpec(
    id="id-1",
    name="web1",
    cpus=2,
    memory_bytes=1 << 28,
    machine="pc-q35-10.0",
    cpu="Westmere-v1,enforce",
    boot=DirectBoot("vmlinuz", "initrd", "quiet – “Zürich”"),
    disks=(Disk("root", "local", 1 << 31, "qcow2", "/p/root.qcow2", "/p/base.qcow2"),),
    nics=(Nic("lan", "52:54:00:12:34:56", 9000),),
    generation=4,
)
OTHER = replace(SPEC, id="id-2", name="db1")


def record_of(role: Role, migration_id: str = "m-1", spec: VmSpec = SPEC) -> MigrationRecord:
    return MigrationRecord(
        id=migration_id,
        role=role,
        vm_id=spec.id,
        vm_name=spec.name,
        peer="host2",
        generation=5,
        state=RecordState.ACTIVE,
        spec=spec,
        reserved=Reserved(images=("/p/a", "/p/b"), run_dir="/run/x", pid=77, start_ticks=88),
    )


def view_of(migration_id: str = "m-1", role: Role = Role.SOURCE) -> MigrationView:
    return MigrationView(
        id=migration_id,
        vm="web1",
        vm_id="id-1",
        role=role,
        source="host1",
        target="host2",
        mode=Mode.LIVE,
        phase=Phase.COPY,
        outcome=Outcome.RUNNING,
        generation=5,
        started_at="2026-01-01T00:00:00.000+00:00",
        ended_at="",
        phases=(PhaseTime(Phase.COPY, "2026-01-01T00:00:00.000+00:00"),),
        progress=Progress(rounds=3, blackout_ms=Range(1, 2.5)),
        options=MigrateOptions(storage={"": "fast"}),
        reason=Reason("code", "message", "fix"),
    )


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    found = Journal(tmp_path / "journal.sqlite")
    await found.open()
    yield found
    await found.close()


async def reopened(journal: Journal, tmp_path: Path) -> Journal:
    """Another life of the daemon (the first one is closed by the fixture, and must not mind)."""
    again = Journal(tmp_path / "journal.sqlite")
    await again.open()
    return again


async def moved(journal: Journal, record: MigrationRecord, *states: RecordState) -> MigrationRecord:
    for state in states:
        record = await journal.move(record, state)
    return record


# -- VMs -------------------------------------------------------------------------------------------------------------


async def test_a_vm_is_owned_and_stopped_and_comes_back_after_a_restart(journal: Journal, tmp_path: Path) -> None:
    await journal.add_vm(SPEC)
    await journal.add_vm(OTHER)
    await journal.set_wanted("id-1", "running")
    await journal.set_process("id-1", 4711, 99)
    again = await reopened(journal, tmp_path)
    rows = await again.list_vms()
    await again.close()
    assert [row.spec for row in rows] == [OTHER, SPEC]
    assert [(row.owned, row.wanted, row.pid, row.start_ticks) for row in rows] == [
        (True, "stopped", 0, 0),
        (True, "running", 4711, 99),
    ]


@pytest.mark.parametrize("clash", [replace(OTHER, id="id-1"), replace(OTHER, name="web1")])
async def test_names_and_identities_are_there_once(journal: Journal, clash: VmSpec) -> None:
    await journal.add_vm(SPEC)
    with pytest.raises(Conflict) as caught:
        await journal.add_vm(clash)
    assert caught.value.code == "vm-exists"
    assert [row.spec for row in await journal.list_vms()] == [SPEC]


async def test_removing_a_vm_twice_is_fine(journal: Journal) -> None:
    await journal.add_vm(SPEC)
    await journal.remove_vm("id-1")
    await journal.remove_vm("id-1")
    assert await journal.list_vms() == []


# -- migrations ------------------------------------------------------------------------------------------------------


async def test_a_migration_comes_back_after_a_restart(journal: Journal, tmp_path: Path) -> None:
    await journal.begin_migration(record_of(Role.TARGET, "m-1"))
    await journal.begin_migration(record_of(Role.SOURCE, "m-2", OTHER), view_of("m-2"))
    changed = replace(record_of(Role.TARGET), reserved=Reserved(images=("/q",)))
    await journal.update_migration(changed)
    again = await reopened(journal, tmp_path)
    assert sorted(await again.list_migrations(), key=lambda r: r.id) == [
        changed,
        record_of(Role.SOURCE, "m-2", OTHER),
    ]
    assert {row.id: row.view for row in await again.list_views()} == {"m-1": None, "m-2": view_of("m-2")}
    await again.close()


async def test_one_migration_of_a_vm_at_a_time(journal: Journal) -> None:
    await journal.add_vm(SPEC)
    await journal.begin_migration(record_of(Role.SOURCE, "m-1"))
    with pytest.raises(Conflict) as caught:
        await journal.begin_migration(record_of(Role.SOURCE, "m-2"))
    assert caught.value.code == "migration-running"
    await moved(journal, record_of(Role.SOURCE), RecordState.ENDED)
    await journal.begin_migration(record_of(Role.SOURCE, "m-2"))


async def test_a_migration_begins_once(journal: Journal) -> None:
    """A source that sends a late or repeated request for one that has ended: no second life for it."""
    await journal.begin_migration(record_of(Role.TARGET))
    await moved(journal, record_of(Role.TARGET), RecordState.REFUSED, RecordState.ENDED)
    with pytest.raises(Conflict) as caught:
        await journal.begin_migration(record_of(Role.TARGET))
    assert caught.value.code == "migration-exists"
    assert [r.state for r in await journal.list_migrations()] == [RecordState.ENDED]


async def test_a_target_needs_a_free_name(journal: Journal) -> None:
    await journal.add_vm(SPEC)
    for spec in (SPEC, replace(SPEC, id="id-9"), replace(SPEC, name="other")):
        with pytest.raises(Conflict) as caught:
            await journal.begin_migration(record_of(Role.TARGET, "m-9", spec))
        assert caught.value.code == "vm-exists"
    assert await journal.list_migrations() == []


async def test_the_name_of_an_incoming_vm_is_promised(journal: Journal) -> None:
    """Otherwise the take would fail, in the middle of the blackout."""
    record = record_of(Role.TARGET)
    await journal.begin_migration(record)
    same_name = replace(OTHER, name="web1")
    with pytest.raises(Conflict):
        await journal.add_vm(same_name)
    with pytest.raises(Conflict):
        await journal.begin_migration(record_of(Role.TARGET, "m-2", same_name))
    await moved(journal, record, RecordState.REFUSED, RecordState.ENDED)
    await journal.add_vm(same_name)


STATES = list(RecordState)
WAYS = {  # to each state that a side can be in
    (Role.SOURCE, RecordState.ACTIVE): (),
    (Role.SOURCE, RecordState.HANDED_OVER): (RecordState.HANDED_OVER,),
    (Role.SOURCE, RecordState.TAKEN): (RecordState.HANDED_OVER, RecordState.TAKEN),
    (Role.SOURCE, RecordState.ENDED): (RecordState.ENDED,),
    (Role.TARGET, RecordState.ACTIVE): (),
    (Role.TARGET, RecordState.TAKEN): (RecordState.TAKEN,),
    (Role.TARGET, RecordState.REFUSED): (RecordState.REFUSED,),
    (Role.TARGET, RecordState.ENDED): (RecordState.REFUSED, RecordState.ENDED),
}
LEGAL = {
    Role.SOURCE: {"active>handed-over", "active>ended", "handed-over>taken", "handed-over>ended", "taken>ended"},
    Role.TARGET: {"active>taken", "active>refused", "taken>ended", "refused>ended"},
}


@pytest.mark.parametrize(("role", "old"), list(WAYS))
async def test_illegal_moves_change_nothing(journal: Journal, role: Role, old: RecordState) -> None:
    if role is Role.SOURCE:
        await journal.add_vm(SPEC)
    await journal.begin_migration(record_of(role))
    record = await moved(journal, record_of(role), *WAYS[role, old])
    before = await journal.list_vms(), await journal.list_migrations()
    for new in STATES:
        if f"{old}>{new}" not in LEGAL[role]:
            with pytest.raises(Conflict) as caught:
                await journal.move(record, new)
            assert caught.value.code == "bad-transition"
    assert (await journal.list_vms(), await journal.list_migrations()) == before


async def test_a_move_is_a_compare_and_set(journal: Journal) -> None:
    """A take and a refusal cannot both happen: the one who comes second has an old record in hand."""
    record = record_of(Role.TARGET)
    await journal.begin_migration(record)
    results = await asyncio.gather(
        journal.move(record, RecordState.TAKEN), journal.move(record, RecordState.REFUSED), return_exceptions=True
    )
    assert isinstance(results[0], MigrationRecord)
    assert isinstance(results[1], Conflict) and results[1].code == "state-changed"
    assert [r.state for r in await journal.list_migrations()] == [RecordState.TAKEN]
    assert len(await journal.list_vms()) == 1


async def test_a_refusal_first_leaves_nothing_to_take(journal: Journal) -> None:
    record = record_of(Role.TARGET)
    await journal.begin_migration(record)
    await journal.move(record, RecordState.REFUSED)
    with pytest.raises(Conflict):
        await journal.move(record, RecordState.TAKEN)
    assert await journal.list_vms() == []


async def test_a_move_of_an_unknown_migration_is_refused(journal: Journal) -> None:
    with pytest.raises(Conflict) as caught:
        await journal.move(record_of(Role.SOURCE), RecordState.HANDED_OVER)
    assert caught.value.code == "state-changed"


async def owned(journal: Journal) -> list[bool]:
    return [row.owned for row in await journal.list_vms()]


async def test_the_source_s_ownership_goes_with_the_record(journal: Journal) -> None:
    await journal.add_vm(SPEC)
    record = record_of(Role.SOURCE)
    await journal.begin_migration(record)
    assert await owned(journal) == [True]
    record = await journal.move(record, RecordState.HANDED_OVER)
    assert await owned(journal) == [False]
    record = await journal.move(record, RecordState.TAKEN)
    assert await owned(journal) == []
    await journal.move(record, RecordState.ENDED)
    assert await owned(journal) == []


async def test_a_refused_handoff_gives_the_vm_back_as_it_was(journal: Journal) -> None:
    await journal.add_vm(SPEC)
    await journal.set_wanted("id-1", "paused")
    await journal.set_process("id-1", 5, 6)
    before = await journal.list_vms()
    await journal.begin_migration(record_of(Role.SOURCE))
    await moved(journal, record_of(Role.SOURCE), RecordState.HANDED_OVER, RecordState.ENDED)
    assert await journal.list_vms() == before


async def test_a_failure_before_the_handoff_leaves_the_vm_alone(journal: Journal) -> None:
    await journal.add_vm(SPEC)
    await journal.begin_migration(record_of(Role.SOURCE))
    await moved(journal, record_of(Role.SOURCE), RecordState.ENDED)
    assert await owned(journal) == [True]


async def test_the_target_owns_what_it_took_with_generation_and_process(journal: Journal, tmp_path: Path) -> None:
    record = record_of(Role.TARGET)
    await journal.begin_migration(record)
    taken = await journal.move(record, RecordState.TAKEN, wanted="paused")
    assert taken.was_taken and taken.state is RecordState.TAKEN
    again = await reopened(journal, tmp_path)
    (row,) = await again.list_vms()
    assert row.spec == replace(SPEC, generation=5)
    assert (row.owned, row.wanted, row.pid, row.start_ticks) == (True, "paused", 77, 88)
    assert await again.list_migrations() == [taken]
    await again.close()


async def test_that_it_has_owned_the_vm_is_never_forgotten(journal: Journal) -> None:
    """The source may ask long after the VM has moved on."""
    await journal.begin_migration(record_of(Role.TARGET))
    record = await moved(journal, record_of(Role.TARGET), RecordState.TAKEN, RecordState.ENDED)
    await journal.remove_vm("id-1")
    assert record.was_taken
    assert (await journal.list_migrations())[0].was_taken


async def test_there_and_back_again(journal: Journal) -> None:
    """The VM leaves this host and comes home under another generation."""
    await journal.add_vm(SPEC)
    await journal.begin_migration(record_of(Role.SOURCE, "m-1"))
    await moved(journal, record_of(Role.SOURCE, "m-1"), RecordState.HANDED_OVER, RecordState.TAKEN, RecordState.ENDED)
    home = replace(record_of(Role.TARGET, "m-2"), generation=6)
    await journal.begin_migration(home)
    await moved(journal, home, RecordState.TAKEN, RecordState.ENDED)
    assert [(row.owned, row.spec.generation) for row in await journal.list_vms()] == [(True, 6)]


# -- views, documents, peers, tokens ---------------------------------------------------------------------------------


async def test_views_and_documents(journal: Journal) -> None:
    await journal.begin_migration(record_of(Role.SOURCE), view_of())
    await journal.save_view(replace(view_of(), outcome=Outcome.COMPLETED))
    (row,) = await journal.list_views()
    assert (row.id, row.role, row.view, row.problem) == ("m-1", "source", replace(view_of(), outcome="completed"), "")
    assert datetime.now(UTC) - datetime.fromisoformat(row.began_at) < timedelta(minutes=1)
    for kind in ("checked", "receipt"):
        with pytest.raises(NotFound) as caught:
            await journal.load_document("m-1", kind)
        assert caught.value.code == "no-document"
        await journal.save_document("m-1", kind, {"kind": kind})
        assert await journal.load_document("m-1", kind) == {"kind": kind}


async def test_peers(journal: Journal) -> None:
    await journal.put_peer("host2", "192.0.2.2:7443")
    await journal.put_peer("host2", "192.0.2.3:7443")
    await journal.put_peer("host3", "[2001:db8::3]:7443")
    await journal.remove_peer("host3")
    await journal.remove_peer("host3")
    assert await journal.list_peers() == {"host2": "192.0.2.3:7443"}


async def test_a_token_works_once(journal: Journal) -> None:
    await journal.add_token("hash", {"expires": 5})
    assert await journal.list_tokens() == [{"expires": 5}]
    results = await asyncio.gather(*(journal.take_token("hash") for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), Conflict, Conflict]
    assert await journal.list_tokens() == []


# -- what may happen to process, file and disk -----------------------------------------------------------------------


async def test_a_cancelled_caller_leaves_a_whole_write(journal: Journal) -> None:
    await journal.add_vm(SPEC)
    task = asyncio.create_task(journal.remove_vm("id-1"))
    await asyncio.sleep(0)  # (it has begun)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await journal.list_vms() == []


async def test_a_closed_journal_says_so(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    with pytest.raises(JournalBroken) as caught:
        await journal.list_vms()
    assert caught.value.code == "journal-closed"
    await journal.open()
    await journal.close()
    with pytest.raises(JournalBroken) as caught:
        await journal.add_vm(SPEC)
    assert caught.value.code == "journal-closed"


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    for _ in range(2):
        path.unlink(missing_ok=True)
        argv = [sys.executable, str(HERE / "journal_writer.py"), str(path)]
        acknowledged = -1
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            while acknowledged < 20:
                acknowledged = int(writer.stdout.readline())
            writer.kill()
            rest = writer.stdout.read().split("\n")
        whole = [int(line) for line in rest[:-1]]
        last = max([acknowledged, *whole])
        found = {int(row.spec.id.removeprefix("id-")): row for row in asyncio.run(_rows(path))}
        assert sorted(found) == list(range(len(found)))
        assert last < len(found) <= last + 2
        assert all(found[number].pid == number + 1 for number in range(last + 1))
        for leftover in tmp_path.iterdir():
            leftover.unlink()


async def _rows(path: Path) -> list[VmRow]:
    journal = Journal(path)
    await journal.open()
    rows = await journal.list_vms()
    await journal.close()
    return rows


async def test_a_file_that_is_no_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"this is not a database, but long enough to be looked at as one" * 20)
    await _refused(path, "journal-damaged")


async def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journal = Journal(path)
    await journal.open()
    for number in range(60):
        await journal.add_vm(replace(SPEC, id=f"id-{number}", name=f"vm-{number}"))
    await journal.close()
    content = bytearray(path.read_bytes())
    middle = slice(4096 * 2, 4096 * 6)
    content[middle] = b"\xa5" * (4096 * 4)
    path.write_bytes(content)
    await _refused(path, "journal-damaged")


async def test_a_row_that_cannot_be_read_is_named(journal: Journal, tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    await journal.add_vm(SPEC)
    for text in ("{", '{"id": 5}'):
        with sqlite3.connect(path) as db:
            db.execute("UPDATE vm SET spec=?", (text,))
        with pytest.raises(JournalBroken) as caught:
            await journal.list_vms()
        assert caught.value.code == "journal-damaged"
        assert str(path) in caught.value.message


DAMAGE = (b"{", b'{"id": 5}', b"\xff\xfe\xa5" * 20, b"[" * 100_000, b"\0", b"null")


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: repr(damage[:12]))
async def test_a_view_that_cannot_be_read_spoils_no_other(journal: Journal, tmp_path: Path, damage: bytes) -> None:
    await journal.begin_migration(record_of(Role.SOURCE, "m-1"), view_of("m-1"))
    await journal.begin_migration(record_of(Role.SOURCE, "m-2", OTHER), view_of("m-2"))
    overwrite(tmp_path, "view", damage)
    rows = {row.id: row for row in await journal.list_views()}
    assert (rows["m-1"].view, bool(rows["m-1"].problem)) == (None, True)
    assert (rows["m-2"].view, rows["m-2"].problem) == (view_of("m-2"), "")


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: repr(damage[:12]))
async def test_a_record_that_cannot_be_read_is_an_error(journal: Journal, tmp_path: Path, damage: bytes) -> None:
    """It decides who may run the VM: none is left out."""
    await journal.begin_migration(record_of(Role.SOURCE, "m-1"), view_of("m-1"))
    await journal.begin_migration(record_of(Role.SOURCE, "m-2", OTHER), view_of("m-2"))
    overwrite(tmp_path, "record", damage)
    with pytest.raises(JournalBroken):
        await journal.list_migrations()


def overwrite(tmp_path: Path, column: str, damage: bytes) -> None:
    """A part of the row of m-1 as a disk that lies may leave it: text by its type, of any bytes."""
    with sqlite3.connect(tmp_path / "journal.sqlite") as db:
        assert db.execute(f"UPDATE migration SET {column}=CAST(? AS TEXT) WHERE id='m-1'", (damage,)).rowcount == 1


async def test_another_format_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE future (x)")
        db.execute("PRAGMA user_version=99")
    message = await _refused(path, "journal-format")
    assert "99" in message


async def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    await _refused(tmp_path / "missing" / "journal.sqlite", "journal-unwritable")


async def _refused(path: Path, code: str) -> str:
    journal = Journal(path)
    with pytest.raises(JournalBroken) as caught:
        await journal.open()
    assert caught.value.code == code
    assert str(path) in caught.value.message and caught.value.fix
    await journal.close()
    return caught.value.message


def test_a_full_disk_writes_nothing_by_halves(tmp_path: Path) -> None:
    possible = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if possible.returncode:
        pytest.skip(f"no mount namespaces here: {possible.stderr.decode().strip()}")
    argv = ["unshare", "--mount", sys.executable, str(HERE / "full_disk.py"), str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("role", list(Role))
async def test_one_host_may_be_both_sides(journal: Journal, role: Role) -> None:
    """A VM that left with one migration and comes back with the same id in another role keeps its records apart."""
    await journal.begin_migration(record_of(Role.TARGET))
    await moved(journal, record_of(Role.TARGET), RecordState.TAKEN, RecordState.ENDED)
    await journal.begin_migration(record_of(Role.SOURCE))
    await moved(journal, record_of(Role.SOURCE), RecordState.ENDED)
    states = {record.role: record.state for record in await journal.list_migrations()}
    assert states[role] is RecordState.ENDED
