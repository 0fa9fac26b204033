"""The host's journal: what it owns and what is in flight, in SQLite with an fsync for every change.

The one place that imports sqlite3. Every method is one transaction and returns after it is on disk
(`synchronous=FULL`: SQLite syncs the WAL at each commit). All of them run on one thread of their own, in order.
Errors: `JournalBroken` when the file is damaged or the disk refuses; then nothing of that call was written. A row that
decides who may run a VM is read as it was written or not at all; what is only shown may be unreadable (`list_views`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from vmferry.api.codec import decode, encode
from vmferry.host.priority import raise_priority
from vmferry.migration.records import MigrationRecord, RecordState, require_transition
from vmferry.model.errors import Conflict, Failed, NotFound, WrongInput
from vmferry.model.migration import MigrationView, Role
from vmferry.model.vm import VmSpec

T = TypeVar("T")
_FORMAT = 1
_SCHEMA = """
CREATE TABLE vm (
  id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, spec TEXT NOT NULL, owned INTEGER NOT NULL,
  wanted TEXT NOT NULL, pid INTEGER NOT NULL DEFAULT 0, start_ticks INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE migration (
  id TEXT NOT NULL, role TEXT NOT NULL, vm_id TEXT NOT NULL, state TEXT NOT NULL, record TEXT NOT NULL,
  view TEXT NOT NULL DEFAULT '', checked TEXT NOT NULL DEFAULT '', receipt TEXT NOT NULL DEFAULT '',
  created REAL NOT NULL DEFAULT (julianday('now')), PRIMARY KEY (id, role)
);
CREATE INDEX migration_vm ON migration (vm_id);
CREATE TABLE peer (name TEXT PRIMARY KEY, address TEXT NOT NULL);
CREATE TABLE token (id TEXT PRIMARY KEY, record TEXT NOT NULL);
"""


class JournalBroken(Failed):
    """The journal cannot be read or written; the host must not start or take any guest."""


@dataclass(frozen=True, slots=True)
class VmRow:
    """A VM in the journal. `owned` is False between the handoff and the target's word that it has taken the VM.

    `wanted` is what the user asked for: "running", "paused" or "stopped". `pid` 0: no process is known.
    """

    spec: VmSpec
    owned: bool
    wanted: str
    pid: int = 0
    start_ticks: int = 0


@dataclass(frozen=True, slots=True)
class ViewRow:
    """What was saved to be shown of a migration's `role` on this host; `began_at` is RFC 3339 in UTC.

    `view` None: nothing was saved, or `problem` says why what was saved cannot be read.
    """

    id: str
    role: str
    began_at: str
    view: MigrationView | None
    problem: str = ""


class _BadRow(Exception):
    """A row does not hold what this version writes."""


def _closed() -> JournalBroken:
    return JournalBroken("journal-closed", "The journal is not open.", "Start vmferryd again.")


class Journal:
    """One host's journal. Guarantees: atomic, durable, one writer; compare-and-set where a state changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal", initializer=raise_priority)
        self._db: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Opens or creates the file. Raises JournalBroken `journal-damaged`, `journal-format`, `journal-unwritable`."""
        await self._run(self._open)

    async def close(self) -> None:
        """Closes the file; later calls fail."""
        await self._run(self._close)
        self._thread.shutdown(wait=True)

    def _open(self) -> None:
        try:
            self._connect()
        except BaseException:
            self._close()
            raise

    def _connect(self) -> None:
        self._hide()
        self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=True)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        found = self._db.execute("PRAGMA quick_check").fetchone()[0]
        if found != "ok":
            raise self._damaged(found)
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_FORMAT}; COMMIT;")
        elif version != _FORMAT:
            raise JournalBroken(
                "journal-format",
                f"{self._path} has format {version}, this vmferryd knows {_FORMAT}.",
                "Install the version of vmferry that wrote it, or a later one.",
            )

    def _hide(self) -> None:
        """Guests' processes may pass through the state directory; what is in here is none of their business.

        SQLite gives the WAL and its index the mode of the file.
        """
        try:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            self._path.chmod(0o600)
        except OSError as error:
            raise self._unwritable(error) from error

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    async def _run(self, work: Callable[[], T]) -> T:
        def guarded() -> T:
            try:
                return work()
            except sqlite3.DatabaseError as error:
                raise self._broken(error) from error
            except _BadRow as error:
                raise self._damaged(f"a row cannot be read: {error}") from error

        try:
            running = asyncio.get_running_loop().run_in_executor(self._thread, guarded)
        except RuntimeError as error:  # its thread has ended
            raise _closed() from error
        # Shielded: a cancelled caller must not leave a half-awaited write whose result nobody looks at.
        return await asyncio.shield(running)

    def _damaged(self, found: str) -> JournalBroken:
        return JournalBroken("journal-damaged", f"{self._path} is damaged ({found}).", "Restore it from a backup.")

    def _broken(self, error: sqlite3.DatabaseError) -> JournalBroken:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return self._damaged(str(error))
        return self._unwritable(error)

    def _unwritable(self, error: Exception) -> JournalBroken:
        return JournalBroken(
            "journal-unwritable",
            f"The journal {self._path} failed: {error}.",
            "Look at its disk: full, read-only, broken?",
        )

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        db = self._db
        if db is None:
            raise _closed()
        db.execute("BEGIN IMMEDIATE")
        try:
            result = work(db)
            db.execute("COMMIT")
        except BaseException:
            # SQLite rolls back by itself after some errors (disk full); a second rollback would hide the first error.
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return result

    async def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await self._run(lambda: self._transact(work))

    # -- VMs ---------------------------------------------------------------------------------------------------------

    async def add_vm(self, spec: VmSpec) -> None:
        """A new VM, owned and stopped. Raises Conflict `vm-exists`, also for a VM that is coming here."""
        await self._write(lambda db: _insert_vm(db, spec, "stopped"))

    async def list_vms(self) -> list[VmRow]:
        """All VMs, by name."""
        return await self._write(lambda db: [_vm_row(row) for row in db.execute(f"{_SELECT_VM} ORDER BY name")])

    async def set_wanted(self, vm_id: str, wanted: str) -> None:
        """What the user wants of the VM, before it is done."""
        await self._write(lambda db: db.execute("UPDATE vm SET wanted=? WHERE id=?", (wanted, vm_id)))

    async def set_process(self, vm_id: str, pid: int, start_ticks: int) -> None:
        """The guest's process, or 0, 0 when it has ended."""
        await self._write(
            lambda db: db.execute("UPDATE vm SET pid=?, start_ticks=? WHERE id=?", (pid, start_ticks, vm_id))
        )

    async def remove_vm(self, vm_id: str) -> None:
        """Forgets a VM; nothing happens when it is gone already."""
        await self._write(lambda db: db.execute("DELETE FROM vm WHERE id=?", (vm_id,)))

    # -- migrations --------------------------------------------------------------------------------------------------

    async def begin_migration(self, record: MigrationRecord, view: MigrationView | None = None) -> None:
        """The intent, before anything is made.

        Raises Conflict `migration-running` when this host has another migration of the VM in flight, `vm-exists` when
        it is to be the target and has, or awaits, a VM of that name or id, `migration-exists` when it had this one.
        """

        def work(db: sqlite3.Connection) -> None:
            if db.execute("SELECT 1 FROM migration WHERE vm_id=? AND state!='ended'", (record.vm_id,)).fetchone():
                raise Conflict("migration-running", f"{record.vm_name} is being migrated already.", "Wait for its end.")
            if db.execute("SELECT 1 FROM migration WHERE id=? AND role=?", (record.id, record.role)).fetchone():
                raise Conflict("migration-exists", f"Migration {record.id} has ended here.", "Begin a new one.")
            if record.role is Role.TARGET:
                _require_free(db, record.vm_id, record.vm_name)
            db.execute(
                "INSERT INTO migration (id, role, vm_id, state, record, view) VALUES (?,?,?,?,?,?)",
                (record.id, record.role, record.vm_id, record.state, _dump(record), _dump(view) if view else ""),
            )

        await self._write(work)

    async def list_migrations(self) -> list[MigrationRecord]:
        """All records, newest first."""
        return await self._write(
            lambda db: [
                _record(row[0], row[1])
                for row in db.execute("SELECT record, state FROM migration ORDER BY created DESC")
            ]
        )

    async def update_migration(self, record: MigrationRecord) -> None:
        """Changes what is reserved (not the state)."""
        await self._write(
            lambda db: db.execute(
                "UPDATE migration SET record=? WHERE id=? AND role=?", (_dump(record), record.id, record.role)
            )
        )

    async def move(self, record: MigrationRecord, new: RecordState, *, wanted: str = "running") -> MigrationRecord:
        """Compare-and-set of the state, together with what it means for the VM; the handoff's durable acts.

        Source: `handed-over` stops owning the VM, `ended` from `handed-over` owns it again, `taken` forgets it.
        Target: `taken` owns the VM at the record's generation. Raises Conflict `bad-transition` when the rules forbid
        it and `state-changed` when the record is not in `record.state` any more.
        """
        require_transition(record.role, record.state, new)
        taken = record.was_taken or (record.role is Role.TARGET and new is RecordState.TAKEN)
        moved = replace(record, state=new, was_taken=taken)

        def work(db: sqlite3.Connection) -> None:
            changed = db.execute(
                "UPDATE migration SET state=?, record=? WHERE id=? AND role=? AND state=?",
                (new, _dump(moved), record.id, record.role, record.state),
            ).rowcount
            if changed != 1:
                raise Conflict("state-changed", f"Migration {record.id} is not {record.state} any more.", "Look again.")
            _apply_to_vm(db, record, new, wanted)

        await self._write(work)
        return moved

    async def save_view(self, view: MigrationView) -> None:
        """What is shown of a migration; kept so that it is still there after a restart."""
        await self._write(
            lambda db: db.execute(
                "UPDATE migration SET view=? WHERE id=? AND role=?", (_dump(view), view.id, view.role)
            )
        )

    async def list_views(self) -> list[ViewRow]:
        """What was saved of all migrations, newest first. One that cannot be read is no error: it decides nothing."""
        return await self._write(lambda db: [_view_row(row) for row in db.execute(_SELECT_VIEW)])

    async def save_document(self, migration_id: str, kind: str, document: object) -> None:
        """Keeps a `checked` or `receipt` document with every record of the migration on this host."""
        column = {"checked": "checked", "receipt": "receipt"}[kind]
        text = json.dumps(document)
        await self._write(lambda db: db.execute(f"UPDATE migration SET {column}=? WHERE id=?", (text, migration_id)))

    async def load_document(self, migration_id: str, kind: str) -> Any:
        """The document, or raises NotFound `no-document`."""
        column = {"checked": "checked", "receipt": "receipt"}[kind]
        row = await self._write(
            lambda db: db.execute(
                f"SELECT {column} FROM migration WHERE id=? AND {column}!=''", (migration_id,)
            ).fetchone()
        )
        if row is None:
            raise NotFound("no-document", f"Migration {migration_id} has no {kind} document.", "Did it get that far?")
        return json.loads(row[0])

    # -- peers and tokens --------------------------------------------------------------------------------------------

    async def list_peers(self) -> dict[str, str]:
        """Name to address of the hosts that joined or were added."""
        return await self._write(lambda db: dict(db.execute("SELECT name, address FROM peer").fetchall()))

    async def put_peer(self, name: str, address: str) -> None:
        """Adds or replaces a host."""
        await self._write(lambda db: db.execute("INSERT OR REPLACE INTO peer VALUES (?,?)", (name, address)))

    async def remove_peer(self, name: str) -> None:
        """Forgets a host."""
        await self._write(lambda db: db.execute("DELETE FROM peer WHERE name=?", (name,)))

    async def add_token(self, token_id: str, record: object) -> None:
        """Keeps a join token's hash and expiry."""
        await self._write(lambda db: db.execute("INSERT INTO token VALUES (?,?)", (token_id, json.dumps(record))))

    async def list_tokens(self) -> list[Any]:
        """The records of all join tokens that were not used."""
        return await self._write(lambda db: [json.loads(row[0]) for row in db.execute("SELECT record FROM token")])

    async def take_token(self, token_id: str) -> None:
        """Removes a token: it works once. Raises Conflict `token-used`."""

        def work(db: sqlite3.Connection) -> None:
            if db.execute("DELETE FROM token WHERE id=?", (token_id,)).rowcount != 1:
                raise Conflict("token-used", "This join token was used already.", "Make a new one on the CA's host.")

        await self._write(work)


_SELECT_VM = "SELECT spec, owned, wanted, pid, start_ticks FROM vm"
# As bytes: sqlite3 would refuse the whole query for one text that is no UTF-8 any more.
_SELECT_VIEW = """
SELECT id, role, coalesce(strftime('%Y-%m-%dT%H:%M:%f+00:00', created), ''), CAST(view AS BLOB)
FROM migration ORDER BY created DESC
"""


def _dump(value: object) -> str:
    return json.dumps(encode(value), separators=(",", ":"))


def _load(kind: type[T], text: str | bytes) -> T:
    try:
        return decode(kind, json.loads(text))
    except (ValueError, RecursionError, WrongInput) as error:
        raise _BadRow(str(error)) from error


def _vm_row(row: tuple[str, int, str, int, int]) -> VmRow:
    return VmRow(_load(VmSpec, row[0]), bool(row[1]), row[2], row[3], row[4])


def _view_row(row: tuple[str, str, str, bytes]) -> ViewRow:
    migration_id, role, began_at, saved = row
    if not saved:
        return ViewRow(migration_id, role, began_at, None)
    try:
        return ViewRow(migration_id, role, began_at, _load(MigrationView, saved))
    except _BadRow as error:
        return ViewRow(migration_id, role, began_at, None, str(error))


def _record(text: str, state: str) -> MigrationRecord:
    return replace(_load(MigrationRecord, text), state=RecordState(state))


def _require_free(db: sqlite3.Connection, vm_id: str, name: str) -> None:
    if db.execute("SELECT 1 FROM vm WHERE id=? OR name=?", (vm_id, name)).fetchone():
        raise Conflict(
            "vm-exists", f"This host has a VM named {name} already.", "Choose another name, or delete that VM."
        )
    # A name that is promised to an incoming VM is in use: the take, in the middle of its blackout, would find it gone.
    promised = "SELECT 1 FROM migration WHERE role='target' AND state='active' AND json_extract(record, '$.vm_name')=?"
    if db.execute(promised, (name,)).fetchone():
        raise Conflict("vm-exists", f"A VM named {name} is migrating to this host.", "Choose another name.")


def _insert_vm(db: sqlite3.Connection, spec: VmSpec, wanted: str) -> None:
    _require_free(db, spec.id, spec.name)
    db.execute(
        "INSERT INTO vm (id, name, spec, owned, wanted) VALUES (?,?,?,1,?)", (spec.id, spec.name, _dump(spec), wanted)
    )


def _apply_to_vm(db: sqlite3.Connection, record: MigrationRecord, new: RecordState, wanted: str) -> None:
    if record.role is Role.TARGET:
        if new is RecordState.TAKEN:
            _insert_vm(db, replace(record.spec, generation=record.generation), wanted)
            # In the same transaction: a guest whose process nobody knows could be started a second time.
            process = (record.reserved.pid, record.reserved.start_ticks, record.vm_id)
            db.execute("UPDATE vm SET pid=?, start_ticks=? WHERE id=?", process)
        return
    if new is RecordState.HANDED_OVER:
        db.execute("UPDATE vm SET owned=0 WHERE id=?", (record.vm_id,))
    elif new is RecordState.ENDED and record.state is RecordState.HANDED_OVER:
        db.execute("UPDATE vm SET owned=1 WHERE id=?", (record.vm_id,))
    elif new is RecordState.TAKEN:
        db.execute("DELETE FROM vm WHERE id=?", (record.vm_id,))
