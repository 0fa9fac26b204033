"""Kernel and initramfs move with a VM that boots them directly: those parts that the target lacks are sent."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

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
        try:
            data = await asyncio.to_thread((directory / name).read_bytes)
        except OSError as error:
            raise Failed(
                "boot-file", f"{directory / name} cannot be read: {error}.", "Was it removed by hand?"
            ) from error
        for offset in range(0, len(data), _PART_BYTES):
            part = data[offset : offset + _PART_BYTES]
            last = offset + _PART_BYTES >= len(data)
            await link.call(PutBootFile(record.id, name, offset, base64.b64encode(part).decode(), last), Done)
