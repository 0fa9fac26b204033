"""The one family of errors. Every error carries a stable code, what happened, and what to do next.

Library errors are translated at the library's one door, with the cause chained. Callers branch on the type or the
code, never on the text.
"""

from __future__ import annotations


class VmferryError(Exception):
    """What happened (`message`) and what to do (`fix`), under a stable `code`.

    The class says what the caller may assume: see each subclass. `exit_status` is the CLI's (interface.md).
    """

    exit_status = 1
    http_status = 500

    def __init__(self, code: str, message: str, fix: str = "") -> None:
        super().__init__(f"{message} {fix}".strip())
        self.code = code
        self.message = message
        self.fix = fix


class WrongInput(VmferryError):
    """The request itself is wrong; nothing was changed."""

    exit_status = 2
    http_status = 400


class NotFound(WrongInput):
    """The request names something that is not here; nothing was changed."""

    http_status = 404


class Conflict(VmferryError):
    """The request does not fit the present state of the thing it names; nothing was changed."""

    http_status = 409


class Refused(VmferryError):
    """The check found an obstacle; nothing was changed."""

    exit_status = 3
    http_status = 422


class Failed(VmferryError):
    """The other side said no, or an act did not work. The outcome is known: it did not happen."""


class OutcomeUnknown(VmferryError):
    """It may or may not have happened (an answer was lost). Look at the world before doing anything else."""

    exit_status = 4
    http_status = 504


class Unreachable(Failed):
    """A host or a process could not be spoken to at all; the request was certainly not carried out."""

    http_status = 502
