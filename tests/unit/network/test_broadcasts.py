"""The repair of broadcasts where the port has no room."""

from __future__ import annotations

from typing import Any, cast

from vmferry.network.broadcasts import BroadcastHandover
from vmferry.network.frames import FrameRecorder, FrameSender

_BROADCAST = bytes(10) + b"\xff" * 6 + bytes(54)


class Recorder:
    """Stands for a `FrameRecorder` with these frames."""

    def __init__(self, *frames: bytes) -> None:
        self._frames = list(frames)

    def take(self) -> list[bytes]:
        return self._frames

    def take_stamped(self) -> list[tuple[bytes, float]]:
        return [(frame, float("inf")) for frame in self._frames]

    def missed(self) -> int:
        return 0

    def close(self) -> None:
        return


class FullPort:
    """A port that nobody reads."""

    offered = 0

    def offer(self, _frame: bytes) -> bool:
        self.offered += 1
        return False


def test_a_port_without_room_drops_what_would_be_repaired() -> None:
    """Else the target could never finish a migration of a NIC that its guest does not drive."""
    port = FullPort()
    with BroadcastHandover((), cast(FrameRecorder, Recorder(_BROADCAST))) as handover:
        handover._brought = cast(Any, [Recorder(_BROADCAST, _BROADCAST)])
        assert handover.repair(cast(FrameSender, port)) == 0
    assert port.offered == 1
