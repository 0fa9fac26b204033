"""A lab of one's own for as long as a program runs: up at the beginning, gone at the end, whatever happens between.

For demo and soak. Signals that end a program (Ctrl-C, TERM, HUP) become KeyboardInterrupt, and are held off while the
lab is taken down.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from vmferry.lab.layout import LabLayout
from vmferry.lab.namespaces import lab_down, lab_status, lab_up
from vmferry.model.errors import Conflict, Failed, NotFound

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(slots=True)
class OwnLab:
    """The lab. Whoever sets `keep` leaves it up at the end, unless the program is interrupted."""

    layout: LabLayout
    keep: bool = False


@contextmanager
def own_lab(prefix: str, accel: str = "auto") -> Iterator[OwnLab]:
    """A lab of three hosts. Raises Conflict `lab-is-up`, Failed."""
    require_no_lab(prefix)
    own = OwnLab(_lab_up(prefix, accel))
    try:
        yield own
    except KeyboardInterrupt:
        own.keep = False
        raise
    finally:
        if not own.keep:
            _take_down(prefix)


def _lab_up(prefix: str, accel: str) -> LabLayout:
    try:
        return lab_up(3, prefix=prefix, accel=accel).layout
    except KeyboardInterrupt:  # it has cleaned up, and keeps logs of what it takes for a failure
        shutil.rmtree(LabLayout(prefix).kept_logs, ignore_errors=True)
        raise


def require_no_lab(prefix: str) -> None:
    """Raises Conflict `lab-is-up`: a lab that somebody else uses is left alone. Raises Failed `not-root`."""
    if os.geteuid() != 0:
        raise Failed("not-root", "This makes network namespaces, and that needs root.", "Run it with sudo.")
    try:
        lab_status(prefix)
    except NotFound:
        return
    how = "vmferry lab down" if prefix == LabLayout().prefix else f"vmferry lab down --prefix {prefix}"
    raise Conflict(
        "lab-is-up",
        f"A lab named {prefix} is up already, and this needs that name. It was left alone.",
        f"If you do not need it any more, take it down with “{how}”, then start this again.",
    )


def keep_logs(layout: LabLayout) -> Path:
    """Copies of the daemons' logs, in a directory that stays."""
    place = Path(tempfile.mkdtemp(prefix="vmferry-logs-"))
    for host in layout.hosts:
        if host.log.exists():
            shutil.copyfile(host.log, place / f"{host.name}.log")
    return place


def turn_signals_into_interrupts() -> None:
    """To be called first: until then a TERM or HUP ends the program without clean-up."""
    for number in _ENDING:
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _take_down(prefix: str) -> None:
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    lab_down(prefix)
