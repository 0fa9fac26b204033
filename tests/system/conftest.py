"""The system tests' lab: see sysrig. A failed test's report carries what the daemons logged meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import sysrig
from sysrig import Guest, Rig

_LONGEST_LOG = 20_000


class _Lab:
    """The rig between tests; None when it has to be built."""

    rig: Rig | None = None
    begins: dict[str, int] = {}  # noqa: RUF012 - where each daemon's log was when the test began


@pytest.fixture(scope="session")
def _lab() -> Iterator[_Lab]:
    if os.geteuid() != 0:
        pytest.skip("a lab needs root")
    lab = _Lab()
    try:
        yield lab
    finally:
        if lab.rig is not None:
            sysrig.end_rig(lab.rig)


@pytest.fixture
def rig(_lab: _Lab, request: pytest.FixtureRequest) -> Iterator[Rig]:
    if _lab.rig is None:
        _lab.rig = sysrig.build_rig()
    for host in _lab.rig.layout.hosts:
        _Lab.begins[str(host.log)] = host.log.stat().st_size if host.log.exists() else 0
    yield _lab.rig
    if getattr(request.node, "failed", False):
        broken, _lab.rig = _lab.rig, None
        sysrig.end_rig(broken)


@pytest.fixture
def guest(rig: Rig) -> Guest:
    """The guest that most tests move: small, busy with memory and disk."""
    return rig.ensure_guest("web", "10.77.0.61")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if not report.failed:
        return
    item.failed = True  # type: ignore[attr-defined]
    for path, begin in _Lab.begins.items():
        try:
            with open(path, "rb") as log:
                log.seek(begin)
                text = log.read().decode(errors="replace")
        except OSError:
            continue
        report.sections.append((path, text[-_LONGEST_LOG:]))
