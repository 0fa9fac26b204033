"""What a check finds: every obstacle at once, each with a stable code, one plain sentence and the fix."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """`error` stops the migration, `warning` does not, `ok` says what was proven."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check looked at. `host` is the host on which it was seen."""

    code: str
    severity: Severity
    message: str
    fix: str = ""
    host: str = ""


def blocking(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """Those that stop the migration."""
    return tuple(finding for finding in findings if finding.severity is Severity.ERROR)
