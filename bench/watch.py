"""Sees guests stop and resume through a monitor of its own in every QEMU, whoever started it.

The stage puts a wrapper around QEMU that gives every guest one more QMP socket in `directory`; the same for all tools.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path

from bench.qmp import Event, Qmp
from vmferry.model.errors import Failed

_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Pause:
    """A time in which no guest ran; microseconds since the epoch."""

    begin_us: int
    end_us: int

    @property
    def ms(self) -> float:
        return (self.end_us - self.begin_us) / 1000


class PauseWatch:
    """Connects to what is there, and to what comes later. Events stay in the sockets until `stop` reads them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._monitors: dict[str, Qmp] = {}
        self._end = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    def stop(self) -> list[Pause]:
        """The pauses since the start, in order."""
        self._end.set()
        self._thread.join()
        events: list[Event] = []
        for monitor in self._monitors.values():
            events += monitor.drain()
        self._monitors.clear()
        return find_pauses(events)

    def _look_on(self) -> None:
        while not self._end.wait(_LOOK_S):
            self._look()

    def _look(self) -> None:
        for path in sorted(self._directory.glob("*.sock")):
            if path.name not in self._monitors:
                with contextlib.suppress(Failed, OSError):  # it ended again, or is tried again at the next look
                    self._monitors[path.name] = Qmp.connect(path, 2.0)


def find_pauses(events: list[Event]) -> list[Pause]:
    """Each STOP with the next RESUME of any guest. Pure."""
    pauses: list[Pause] = []
    stopped: int | None = None
    for event in sorted(events, key=lambda event: event.at_us):
        if event.name == "STOP" and stopped is None:
            stopped = event.at_us
        elif event.name == "RESUME" and stopped is not None:
            pauses.append(Pause(stopped, event.at_us))
            stopped = None
    return pauses
