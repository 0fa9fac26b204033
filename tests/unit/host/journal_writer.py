"""Writes to a journal as fast as it can and says what was acknowledged; killed in the middle by test_journal."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from vmferry.host.journal import Journal
from vmferry.model.vm import FirmwareBoot, VmSpec


async def main(path: Path) -> None:
    journal = Journal(path)
    await journal.open()
    number = 0
    while True:
        spec = VmSpec(f"id-{number}", f"vm-{number}", 1, 1 << 28, "q35", "max", FirmwareBoot("bios"))
        await journal.add_vm(spec)
        await journal.set_process(spec.id, number + 1, number + 2)
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
        number += 1


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
