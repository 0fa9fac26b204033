"""The daemon's priority: raised where that is allowed, never inherited by guests."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, subprocess, sys
from vmferry.host.priority import raise_priority
nobody = len(sys.argv) > 1
if nobody:
    os.setgid(65534); os.setuid(65534)
raised = raise_priority()
child = subprocess.run(["nice"], capture_output=True, text=True, check=True).stdout.strip()
print(raised, os.getpriority(os.PRIO_PROCESS, 0), child)
"""


def run(*arguments: str) -> str:
    argv = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_it_is_raised_and_children_start_at_the_normal_one() -> None:
    assert run() == "True -10 0"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_without_the_right_to_it_nothing_happens() -> None:
    assert run("nobody").startswith("False ")
