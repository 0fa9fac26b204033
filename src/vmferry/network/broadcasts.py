"""Repairs the change-over of broadcasts from the tunnel to the target's own switch, so that none is lost or doubled.

For the target's gate only. A broadcast comes to the target twice: through its own uplink, and a little later through
the tunnel. At the change-over the tunnel's are cut off first, then the switch's let in; a broadcast that had already
come by the uplink and was still in the tunnel is delivered by neither. So what the uplinks bring in is recorded from
just before, compared with what went into the port, and what is missing is put in.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Final, Self

from vmferry.network.frames import FrameRecorder, FrameSender, Recorded
from vmferry.network.tap import SHORT_HEADER_BYTES

_GROUP_BIT: Final = 1


def undelivered(brought: Iterable[bytes], delivered: Iterable[bytes]) -> list[bytes]:
    """The frames brought in more often than they were delivered, in order. Metadata (the header) is not compared."""
    credit = Counter(frame[SHORT_HEADER_BYTES:] for frame in delivered if frame[SHORT_HEADER_BYTES] & _GROUP_BIT)
    missing = []
    for frame in brought:
        if credit[frame[SHORT_HEADER_BYTES:]] > 0:
            credit[frame[SHORT_HEADER_BYTES:]] -= 1
        else:
            missing.append(frame)
    return missing


class BroadcastHandover:
    """Made shortly before the change-over (`TargetGate.listen`); `repair` some time after it.

    `into_port` has recorded all along.
    """

    def __init__(self, uplinks: Sequence[str], into_port: FrameRecorder) -> None:
        self._into_port = into_port
        self._open = ExitStack()
        self._since = time.time()
        try:
            self._brought = [
                self._open.enter_context(FrameRecorder(uplink, Recorded.INCOMING_GROUPS)) for uplink in uplinks
            ]
        except BaseException:
            self._open.close()
            raise

    def repair(self, inject: FrameSender) -> int:
        """Puts what was lost into the port; how many. Nothing if a record is incomplete. Blocks. Raises Failed.

        A port without room (its guest does not read it) drops them, as it does those that come by the switch.
        """
        brought = [frame for recorder in self._brought for frame in recorder.take()]
        complete = not self._into_port.missed() and not any(recorder.missed() for recorder in self._brought)
        delivered = (frame for frame, at in self._into_port.take_stamped() if at >= self._since)
        missing = undelivered(brought, delivered) if complete else []
        return sum([inject.offer(frame) for frame in missing])

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
