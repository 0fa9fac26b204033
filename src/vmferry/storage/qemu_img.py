"""Running qemu-img. Its only door; for this room only.

Every call names the format (`-f`): a format that is guessed from a file's content lets that content choose how it is
read. A cancelled call ends the process and waits for it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmferry.model.errors import Failed
from vmferry.storage.faults import error_of_qemu_img

_ENVIRONMENT = {"LC_ALL": "C", "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")}


@dataclass(frozen=True, slots=True)
class Call:
    """A call of qemu-img: its arguments, and for messages what it does to which path. `fds` stay open in it."""

    arguments: Sequence[str]
    act: str
    path: Path | str
    fds: tuple[int, ...] = ()


async def run_qemu_img(call: Call) -> bytes:
    """Standard output. Raises Failed `no-qemu-img`, and what `error_of_qemu_img` makes of its message."""
    try:
        process = await asyncio.create_subprocess_exec(
            "qemu-img",
            *call.arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_ENVIRONMENT,
            pass_fds=call.fds,
        )
    except FileNotFoundError as error:
        raise Failed("no-qemu-img", "The program qemu-img is not installed.", "Install qemu-utils.") from error
    try:
        stdout, stderr = await process.communicate()
    except asyncio.CancelledError:
        with suppress(ProcessLookupError):
            process.kill()
        await asyncio.shield(process.wait())
        raise
    if process.returncode != 0:
        raise error_of_qemu_img(stderr.decode(errors="replace"), call.act, call.path)
    return stdout


async def query_image(path: Path, format_name: str, *, chain: bool = False, fds: tuple[int, ...] = ()) -> Any:
    """`qemu-img info` as JSON: an object, or with `chain` the list from the top layer down.

    Works on an image that a guest uses (-U); what it says of such an image may be outdated.
    """
    arguments = ["info", "-U", "--output=json", "-f", format_name, *(["--backing-chain"] if chain else []), str(path)]
    return json.loads(await run_qemu_img(Call(arguments, "read", path, fds)))
