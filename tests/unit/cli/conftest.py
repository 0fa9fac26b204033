"""Hosts with recorded answers, and the command line run against them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from recorded import RecordedHost, serving


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Ran]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[RecordedHost]]:
    """host1 and host2, which answer, and host3, which does not run."""
    found = [RecordedHost(f"host{number}", tmp_path / f"host{number}.sock") for number in (1, 2, 3)]
    text = "".join(f'[[host]]\nname = "{host.name}"\nsocket = "{host.socket.name}"\n' for host in found[:2])
    (tmp_path / "client.toml").write_text(text)
    (tmp_path / "three.toml").write_text(text + '[[host]]\nname = "host3"\nsocket = "host3.sock"\n')
    with ExitStack() as stack:
        for host in found[:2]:
            stack.enter_context(serving(host))
        yield found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `vmferry ARGUMENTS` as a process with the configuration of `hosts`."""

    def run(*arguments: str, **environment: str) -> Ran:
        given = {**os.environ, "VMFERRY_CONFIG": str(tmp_path / "client.toml"), **environment}
        argv = [sys.executable, "-m", "vmferry.cli.main", *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, env=given, timeout=60, stdin=subprocess.DEVNULL)
        return Ran(done.returncode, done.stdout, done.stderr)

    return run
