"""Kernel and initramfs move with a VM that boots them directly: those parts that the target lacks are sent."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from vmferry.migration.host_parts import HostParts
from vmferry.migration.link import PeerLink
from vmferry.migration.messages import Done, PutBootFile
from vmferry.migration.records import MigrationRecord
from vmferry.model.errors import Failed

_PART_BYTES = 4 << 20


async def send_boot_files(parts: HostParts, link: PeerLink, record: MigrationRecord, names: Sequence[str]) -> None:
    """Sends the files; the target checks each one's digest. Raises Failed `boot-file`."""
    directory = parts.vm_dir(record.vm_id)
    for name in names:
        offset, last = 0, False
        while not last:
            data, last = await asyncio.to_thread(_read_part, directory / name, offset)
            await link.call(PutBootFile(record.id, name, offset, last), Done, data=data)
            offset += len(data)


def _read_part(path: Path, offset: int) -> tuple[bytes, bool]:
    """A part, and whether it is the last one."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(_PART_BYTES)
            return data, not file.read(1)
    except OSError as error:
        raise Failed("boot-file", f"{path} cannot be read: {error}.", "Was it removed by hand?") from error
