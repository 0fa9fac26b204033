"""The daemon's scheduling priority: in a blackout a starved event loop is blackout. Guests do not inherit it."""

from __future__ import annotations

import os

_NICE = -10


def raise_priority() -> bool:
    """Raises the calling thread's priority; its children and new threads start at the normal one. False if not allowed.

    Source: sched(7), SCHED_RESET_ON_FORK: a negative nice value is reset to zero in the child.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    except PermissionError:
        return False
    return True
