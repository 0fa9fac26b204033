"""What another host may do to this one with an incoming migration: real journal, real directories, hostile requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from rig import SPEC, Host, Process, eventually, guest_of, host_at, prepare_of, refusing_writes
from test_journal import record_of, view_of

from vmferry.api import pki
from vmferry.api.codec import encode
from vmferry.api.signing import sign_document
from vmferry.host import incoming as module
from vmferry.migration import messages as m
from vmferry.migration.handoff import PeerSays
from vmferry.migration.records import RecordState, Reserved
from vmferry.migration.target import TargetMigration, clear_reserved
from vmferry.model.errors import Conflict, Failed, NotFound, Refused, VmferryError, WrongInput
from vmferry.model.migration import MigrateOptions, Mode, Outcome, Role
from vmferry.model.receipt import Bytes, Frames, NetworkProof, Receipt, Verified
from vmferry.model.vm import DirectBoot, RunState

OTHER = replace(SPEC, id="id-2", name="db1")
THIRD = replace(SPEC, id="id-3", name="mail1")


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    async with host_at(tmp_path) as found:
        yield found


async def settled() -> None:
    """Tasks that run in the background have come as far as they can without a journal."""
    for _ in range(5):
        await asyncio.sleep(0)


async def code_of(work: Any) -> str:
    with pytest.raises(VmferryError) as caught:
        await work
    return caught.value.code


# -- what leads out of its directory ---------------------------------------------------------------------------------

LEADING_OUT = ["../../victim", "..", ".", "", "/etc", "a/b", "a\0b", "x" * 64, "A", "a.b"]


@pytest.fixture
def victims(host: Host) -> tuple[Path, ...]:
    """Files around everything that a migration may make or remove."""
    parts = host.parts
    found = [parts.state_dir.parent / "victim", parts.state_dir, parts.state_dir / "vms", parts.run_dir / "guests"]
    for directory in found:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "precious").write_text("kept")
    return tuple(directory / "precious" for directory in found)


@pytest.mark.parametrize("vm_id", LEADING_OUT)
async def test_a_vm_id_leads_nowhere(host: Host, victims: tuple[Path, ...], vm_id: str) -> None:
    """The directories of a VM are removed by root, when its migration is refused."""
    session = host.incoming.session("host2")
    assert await code_of(session.handle(prepare_of(spec=replace(SPEC, id=vm_id)))) == "bad-name"
    await session.close()
    assert all(victim.read_text() == "kept" for victim in victims)
    assert await host.journal.list_migrations() == [] and not host.incoming.busy
    for place in (host.parts.vm_dir, host.parts.guest_dir):
        with pytest.raises(WrongInput) as caught:
            place(vm_id)
        assert caught.value.code == "bad-name"


@pytest.mark.parametrize("migration_id", LEADING_OUT)
async def test_a_migration_id_leads_nowhere(host: Host, victims: tuple[Path, ...], migration_id: str) -> None:
    """It is in the names of files and of devices."""
    assert await code_of(host.incoming.prepare(prepare_of(migration_id), "host2")) == "bad-name"
    assert all(victim.exists() for victim in victims) and await host.journal.list_migrations() == []


@pytest.mark.parametrize("name", ["../precious", "/etc/passwd", "..", ".", ".hidden", "a/b"])
@pytest.mark.parametrize("which", ["kernel", "initrd"])
async def test_a_boot_file_leads_nowhere(host: Host, victims: tuple[Path, ...], name: str, which: str) -> None:
    boot = DirectBoot(name, None, "") if which == "kernel" else DirectBoot("vmlinuz", name, "")
    assert await code_of(host.incoming.prepare(prepare_of(spec=replace(SPEC, boot=boot)), "host2")) == "bad-boot-file"
    assert all(victim.exists() for victim in victims) and await host.journal.list_migrations() == []


async def test_a_boot_file_that_is_not_the_vm_s_is_not_written(host: Host, tmp_path: Path) -> None:
    session = host.incoming.session("host2")
    await session.handle(prepare_of(spec=replace(SPEC, boot=DirectBoot("vmlinuz", None, ""))))
    for name in ("../vmlinuz", "initrd", ".vmlinuz"):
        assert await code_of(session.handle(m.PutBootFile("m-1", name, 0, False), b"xx")) == "unknown-boot-file"
    assert not list(tmp_path.rglob("*vmlinuz*")) and not list(tmp_path.rglob("*.part"))
    await session.close()
    await host.until(RecordState.ENDED)


async def test_what_a_record_names_is_not_what_is_removed(host: Host, victims: tuple[Path, ...]) -> None:
    """The directories are derived from the VM's id; a record may be an older version's, or damaged."""
    away = victims[0].parent
    own = [host.parts.vm_dir(SPEC.id), host.parts.guest_dir(SPEC.id)]
    for directory in own:
        directory.mkdir(parents=True)
    record = replace(record_of(Role.TARGET, spec=SPEC), reserved=Reserved(run_dir=str(away), vm_dir=str(away)))
    await clear_reserved(host.parts, record)
    assert victims[0].read_text() == "kept" and not any(directory.exists() for directory in own)
    await clear_reserved(host.parts, record)  # a second time is fine
    with pytest.raises(WrongInput):
        await clear_reserved(host.parts, replace(record, vm_id="../../victim"))
    assert victims[0].read_text() == "kept"


@pytest.mark.parametrize("what", ["no image", "no directory", "a file in its place", "no pool"])
async def test_an_image_that_never_was_made_is_none_to_remove(host: Host, what: str) -> None:
    """Refusing goes on to the directories and to the record's end."""
    pool = host.parts.pools["local"].path
    (pool / "id-1").mkdir()
    if what != "no image":
        (pool / "id-1").rmdir()
    if what == "a file in its place":
        (pool / "id-1").write_text("planted")
    if what == "no pool":
        pool.rmdir()
    image = pool / "id-1" / "root-01234567.raw"
    other = Path("/nonexistent/elsewhere.raw")  # in no pool of this host
    own = host.parts.vm_dir(SPEC.id)
    own.mkdir(parents=True)
    record = replace(record_of(Role.TARGET, spec=SPEC), reserved=Reserved(images=(str(image), str(other))))
    await clear_reserved(host.parts, record)
    assert not own.exists()


# -- how many --------------------------------------------------------------------------------------------------------


async def test_many_that_ask_at_once_are_counted(host: Host) -> None:
    asked = [prepare_of(f"m-{n}", replace(SPEC, id=f"id-{n}", name=f"vm-{n}")) for n in range(5)]
    results = await asyncio.gather(*(host.incoming.prepare(each, "host2") for each in asked), return_exceptions=True)
    refused = [result.code for result in results if isinstance(result, Refused)]
    assert refused == ["incoming-limit"] * 3
    assert sum(isinstance(result, m.Prepared) for result in results) == host.parts.limits.incoming


async def test_one_that_is_asked_for_twice_at_once_is_there_once(host: Host) -> None:
    asked = [host.incoming.prepare(prepare_of(), "host2") for _ in range(2)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(results[0], m.Prepared)
    assert isinstance(results[1], Conflict) and results[1].code == "migration-exists"
    assert await host.state() is RecordState.ACTIVE  # the second one's failure has undone nothing of the first


async def test_memory_is_counted_before_it_is_used(host: Host) -> None:
    """Two that have room alone, and not together."""
    most = int((await host.incoming.use()).free_memory_bytes * 0.6)
    asked = [prepare_of(f"m-{spec.id}", replace(spec, memory_bytes=most)) for spec in (SPEC, OTHER)]
    results = await asyncio.gather(*(host.incoming.prepare(each, "host2") for each in asked), return_exceptions=True)
    assert [isinstance(result, m.Prepared) for result in results] == [True, False]
    assert isinstance(results[1], Refused) and results[1].code == "memory-room"
    await host.incoming.prepare(prepare_of("m-3", THIRD), "host2")  # what was refused is not counted any more


async def test_a_daemon_that_ends_takes_no_more(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a source that keeps its reservation does not keep the daemon."""
    monkeypatch.setattr(module, "_CLOSE_LIMIT_S", 0.05)
    await host.incoming.prepare(prepare_of(), "host2")
    async with asyncio.timeout(10):
        closing = asyncio.create_task(host.incoming.close())
        await asyncio.sleep(0)
        assert await code_of(host.incoming.prepare(prepare_of("m-2", OTHER), "host2")) == "stopping"
        await closing
    assert await host.state() is RecordState.ACTIVE  # the next life refuses it


# -- a connection that is lost ---------------------------------------------------------------------------------------


async def test_a_lost_connection_refuses_what_was_prepared_on_it(host: Host) -> None:
    session = host.incoming.session("host2")
    await session.handle(prepare_of())
    host.parts.vm_dir(SPEC.id).mkdir(parents=True)
    await session.close()
    await host.until(RecordState.ENDED)
    await settled()
    assert not host.parts.vm_dir(SPEC.id).exists() and await host.owned() == {}
    assert (await host.views.wait_for("m-1", lambda view: bool(view.ended_at))).outcome is Outcome.FAILED
    assert not host.incoming.busy


async def test_a_lost_connection_ends_only_its_own_migrations(host: Host) -> None:
    first, second = host.incoming.session("host2"), host.incoming.session("host2")
    foreign = host.incoming.session("host3")
    await first.handle(prepare_of())
    await second.handle(prepare_of("m-2", OTHER))
    assert await code_of(foreign.handle(prepare_of())) == "migration-exists"
    for session in (second, foreign):
        await session.close()
    await host.until(RecordState.ENDED, "m-2")
    await settled()
    assert await host.state("m-1") is RecordState.ACTIVE


@pytest.mark.parametrize("steps", range(8))
async def test_a_connection_that_is_lost_while_preparing(host: Host, steps: int) -> None:
    """Whenever it is: what was written is taken back, and the next one finds its place free."""
    session = host.incoming.session("host2")
    preparing = asyncio.create_task(session.handle(prepare_of()))
    for _ in range(steps):
        await asyncio.sleep(0)
    preparing.cancel()
    await asyncio.gather(preparing, return_exceptions=True)
    await session.close()
    if await host.journal.list_migrations():
        await host.until(RecordState.ENDED)
    await settled()
    assert host.incoming._reserved_bytes == {} and not host.incoming.busy
    assert isinstance(await host.incoming.session("host2").handle(prepare_of("m-2")), m.Prepared)


async def test_one_that_has_undone_itself_is_forgotten_with_its_connection(host: Host) -> None:
    """Its QEMU did not start, say; its place and its memory are counted until then."""
    session = host.incoming.session("host2")
    await session.handle(prepare_of())
    await host.incoming.get("m-1", "host2").refuse()
    assert host.incoming.busy
    await session.close()

    async def forgotten() -> bool:
        return not host.incoming.busy

    await eventually(forgotten)
    assert host.incoming._reserved_bytes == {}


class Twin:
    """Stands for a rehearsal's QEMU."""

    removed = 0

    @classmethod
    async def start(cls, *_: object) -> tuple[Twin, m.RehearsalReady]:
        return cls(), m.RehearsalReady(1)

    async def remove(self) -> None:
        Twin.removed += 1
        raise Failed("stuck", "It does not end.") if Twin.removed == 1 else Failed("gone", "It is gone.")


# -- rehearsals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """No QEMU is started for a rehearsal."""
    monkeypatch.setattr(module, "TargetTwin", Twin)
    monkeypatch.setattr(Twin, "removed", 0)


@pytest.mark.parametrize("nonce", ["", "../x", "a b", "a/b", ".", "a\n", "x,y=z", "a" * 33])
async def test_a_nonce_that_is_no_name(host: Host, twins: None, nonce: str) -> None:
    """It names a directory, which is removed by root."""
    assert await code_of(host.incoming.session("host2").handle(m.Rehearse(SPEC, nonce, "127.0.0.1"))) == "bad-nonce"


async def test_a_nonce_counts_once_and_twins_are_few(host: Host, twins: None) -> None:
    session = host.incoming.session("host2")
    await session.handle(m.Rehearse(SPEC, "n0", "127.0.0.1"))
    assert await code_of(session.handle(m.Rehearse(SPEC, "n0", "127.0.0.1"))) == "bad-nonce"
    for number in range(1, 8):
        await session.handle(m.Rehearse(SPEC, f"n{number}", "127.0.0.1"))
    assert await code_of(session.handle(m.Rehearse(SPEC, "n8", "127.0.0.1"))) == "too-many-rehearsals"


async def test_twins_that_do_not_end_keep_no_migration(host: Host, twins: None) -> None:
    """What was prepared is refused first, and each twin is tried to be removed."""
    session = host.incoming.session("host2")
    await session.handle(prepare_of())
    for number in range(3):
        await session.handle(m.Rehearse(SPEC, f"n{number}", "127.0.0.1"))
    with pytest.raises(Failed):
        await session.close()
    await host.until(RecordState.ENDED)
    assert Twin.removed == 3


# -- the take --------------------------------------------------------------------------------------------------------


class _Disks:
    async def stop_serving(self) -> None:
        return


async def loaded(host: Host, process: Process) -> TargetMigration:
    """A migration whose guest is complete here, waiting for the take."""
    await host.incoming.prepare(prepare_of(), "host2")
    migration = host.incoming.get("m-1", "host2")
    migration.guest = guest_of(process, migration.record.spec)
    migration._loaded, migration._disks = True, cast(Any, _Disks())
    return migration


async def test_a_vm_that_was_taken_is_managed_though_it_did_not_run(host: Host, tmp_path: Path) -> None:
    """It is this host's for good: known to no host otherwise."""
    await loaded(host, Process(tmp_path / "guest", fails=True))
    assert await code_of(host.incoming.take(m.Take("m-1", 2, True), "host2")) == "qmp-lost"
    await settled()
    assert await host.state() is RecordState.TAKEN and await host.owned() == {"web1": True}
    assert host.vms.get("web1").spec.generation == 2


async def test_a_take_is_carried_through_when_the_source_hangs_up(host: Host, tmp_path: Path) -> None:
    process = Process(tmp_path / "guest")
    await loaded(host, process)
    taking = asyncio.create_task(host.incoming.take(m.Take("m-1", 2, False), "host2"))
    await asyncio.sleep(0)
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    await host.until(RecordState.TAKEN)

    async def managed() -> bool:
        return bool(host.vms.all())

    await eventually(managed)
    assert host.vms.get("web1").state is RunState.PAUSED


async def test_a_take_that_is_not_written_has_not_happened(host: Host, tmp_path: Path) -> None:
    process = Process(tmp_path / "guest")
    await loaded(host, process)
    with refusing_writes(tmp_path):
        assert await code_of(host.incoming.take(m.Take("m-1", 2, True), "host2")) == "journal-unwritable"
    await settled()
    assert "cont" not in process.executed and host.vms.all() == [] and await host.owned() == {}
    assert await host.incoming.answer_inquiry(m.Inquire("m-1", "id-1", 2, refuse=False), "host2") == m.Answer(
        PeerSays.ACTIVE
    )


# -- questions about the journal -------------------------------------------------------------------------------------


async def test_a_refusal_that_is_answered_is_written(host: Host) -> None:
    """A record that nothing in memory belongs to: the source lets its guest run on the strength of the answer."""
    await host.journal.begin_migration(record_of(Role.TARGET, spec=SPEC))
    answer = await host.incoming.answer_inquiry(m.Inquire("m-1", "id-1", 5, refuse=True), "host2")
    assert answer == m.Answer(PeerSays.REFUSED)
    (record,) = await host.journal.list_migrations()
    assert record.state is RecordState.ENDED and not record.was_taken
    with pytest.raises(Conflict):
        await host.journal.move(record, RecordState.TAKEN)


async def test_a_refusal_of_one_that_was_taken_meanwhile(host: Host, tmp_path: Path) -> None:
    await loaded(host, Process(tmp_path / "guest"))
    await host.incoming.take(m.Take("m-1", 2, False), "host2")
    answer = await host.incoming.answer_inquiry(m.Inquire("m-1", "id-1", 2, refuse=True), "host2")
    assert answer == m.Answer(PeerSays.TAKEN)


async def test_only_the_other_side_is_answered(host: Host) -> None:
    await host.incoming.prepare(prepare_of(), "host2")
    answer = await host.incoming.answer_inquiry(m.Inquire("m-1", "id-1", 2, refuse=True), "host3")
    assert answer == m.Answer(PeerSays.ABSENT) and await host.state() is RecordState.ACTIVE


# -- the end ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def identities(tmp_path: Path) -> dict[str, Path]:
    """Three hosts of one CA; this one's is where the rig's host looks for it."""
    ca = tmp_path / "tls"
    pki.create_ca(ca, "test CA")
    pki.issue_host(ca, "host1", [])
    found = {"host1": ca}
    for name in ("host2", "host3"):
        found[name] = tmp_path / name
        pki.install_certificates(found[name], pki.sign_csr(ca, pki.make_csr(found[name], name), []))
    return found


def receipt(signer: Path) -> dict[str, Any]:
    document: dict[str, Any] = encode(
        Receipt(
            id="m-1",
            vm="web1",
            kind=Mode.LIVE,
            source="host2",
            target="host1",
            outcome=Outcome.COMPLETED,
            started_at="2026-01-01T00:00:00.000+00:00",
            phases=(),
            total_ms=2000.0,
            blackout_ms=12.5,
            predicted=None,
            rounds=1,
            bytes=Bytes(1, 2),
            frames=Frames(0, 0, 0),
            verified=Verified(None, ()),
            network=NetworkProof(None, None),
            options=MigrateOptions(),
            versions={},
            generation=2,
        )
    )
    document["signature"] = sign_document(signer, document)
    return document


@pytest.mark.parametrize("life", ["this life", "an earlier life"])
async def test_only_the_source_s_own_receipt_is_kept(
    host: Host, tmp_path: Path, identities: dict[str, Path], life: str
) -> None:
    session = host.incoming.session("host2")
    if life == "this life":
        await loaded(host, Process(tmp_path / "guest"))
        await host.incoming.take(m.Take("m-1", 2, False), "host2")
        await settled()
    else:
        record = record_of(Role.TARGET, spec=SPEC)
        await host.journal.begin_migration(record, view_of(role=Role.TARGET))
        await host.journal.move(await host.journal.move(record, RecordState.TAKEN), RecordState.ENDED)
    changed = {**receipt(identities["host2"]), "blackout_ms": 1.0}
    for document in (receipt(identities["host3"]), receipt(identities["host1"]), changed):
        assert await code_of(session.handle(m.Finish("m-1", document))) == "bad-receipt"
    assert await code_of(session.handle(m.Finish("m-1", {"blackout_ms": "<b>"}))) == "bad-document"
    with pytest.raises(NotFound):
        await host.journal.load_document("m-1", "receipt")
    if life == "this life":
        assert await host.state() is RecordState.TAKEN  # and it has not ended by what was refused
    right = receipt(identities["host2"])
    assert await code_of(host.incoming.session("host3").handle(m.Finish("m-1", right))) == "no-such-migration"
    await session.handle(m.Finish("m-1", right))
    assert await host.journal.load_document("m-1", "receipt") == right
    if life == "this life":
        assert (host.views.get("m-1").blackout_ms, await host.state()) == (12.5, RecordState.ENDED)


async def test_what_was_not_taken_cannot_be_finished(host: Host, identities: dict[str, Path]) -> None:
    """It would be forgotten, with its images and its guest, and its record open for ever."""
    session = host.incoming.session("host2")
    await session.handle(prepare_of())
    assert await code_of(session.handle(m.Finish("m-1", receipt(identities["host2"])))) == "not-taken"
    assert await host.state() is RecordState.ACTIVE and host.incoming.busy
    await session.handle(m.Abort("m-1", "failed"))
    assert await host.state() is RecordState.ENDED
