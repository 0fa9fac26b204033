"""Fills a small file system of its own with a journal, and shows what happens; run in a private mount namespace."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from vmferry.host.journal import Journal, JournalBroken
from vmferry.migration.records import MigrationRecord, RecordState
from vmferry.model.migration import Role
from vmferry.model.vm import FirmwareBoot, VmSpec


async def main(directory: Path) -> None:
    journal = Journal(directory / "journal.sqlite")
    await journal.open()
    spec = VmSpec("id", "web1", 1, 1 << 28, "q35", "max", FirmwareBoot("bios"))
    await journal.add_vm(spec)
    record = MigrationRecord("m-1", Role.SOURCE, "id", "web1", "host2", 2, RecordState.ACTIVE, spec)
    await journal.begin_migration(record)
    (directory / "filler").write_bytes(b"x" * _room(directory))
    big = replace(spec, id="big", name="big", machine="x" * 200_000)
    for act in (lambda: journal.add_vm(big), lambda: journal.save_document("m-1", "receipt", "x" * 200_000)):
        try:
            await act()
        except JournalBroken as error:
            assert error.code == "journal-unwritable", error.code
            assert str(directory) in error.message, error.message
        else:
            raise AssertionError("there was room")
    assert [row.spec.name for row in await journal.list_vms()] == ["web1"]
    (directory / "filler").unlink()
    await journal.move(record, RecordState.HANDED_OVER)
    await journal.close()
    again = Journal(directory / "journal.sqlite")
    await again.open()
    assert [(row.spec.name, row.owned) for row in await again.list_vms()] == [("web1", False)]
    assert [found.state for found in await again.list_migrations()] == [RecordState.HANDED_OVER]
    await again.close()


def _room(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


if __name__ == "__main__":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", sys.argv[1]], check=True)
    asyncio.run(main(Path(sys.argv[1])))
