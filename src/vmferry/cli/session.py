"""How a command was called, as all of its parts need it. Quick to import; asks no host."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Session:
    """Where the hosts are written down, whether the output is JSON, and the one host that counts, if one was named."""

    config: Path | None = None
    as_json: bool = False
    host: str | None = None
