"""What a check found, for people: findings by host with their fixes, then the prediction.

For `vm check`, `vm migrate` and `migration watch`. Shows; judges nothing.
"""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from vmferry.cli.display import line, mark, safe, show, text
from vmferry.model.findings import Finding, Severity
from vmferry.model.migration import CheckResult, Prediction, Range
from vmferry.model.units import format_ms, format_size

_ORDER = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.OK: 2}
_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.OK: "green"}


def show_check(check: CheckResult) -> None:
    """Prints all findings grouped by host, obstacles first, the prediction and the verdict."""
    line(f"{check.vm}: {check.source} {mark('→', '->')} {check.target}", "bold")
    for host in sorted({finding.host for finding in check.findings}, key=lambda host: _rank(check, host)):
        line(host or "both", "bold cyan")
        show(_findings([finding for finding in check.findings if finding.host == host]))
    if check.prediction:
        show_prediction(check.prediction)
    line(*_verdict(check))


def _rank(check: CheckResult, host: str) -> tuple[int, str]:
    known = (check.source, check.target)
    return (known.index(host) if host in known else len(known), host)


def _findings(findings: list[Finding]) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=3, justify="right")
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for finding in sorted(findings, key=lambda finding: _ORDER[finding.severity]):
        said = text(finding.message)
        if finding.fix and finding.severity is not Severity.OK:
            said.append(f"\nfix: {safe(finding.fix)}", style="italic")
        grid.add_row(_sign(finding.severity), text(finding.code), said)
    return grid


def _sign(severity: Severity) -> Text:
    signs = {Severity.ERROR: mark("✘", "x"), Severity.WARNING: "!", Severity.OK: mark("✔", "+")}
    return Text(signs[severity], style=_STYLES[severity])


def show_prediction(prediction: Prediction) -> None:
    """Prints what is expected before anything moves."""
    line("prediction", "bold cyan")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=4)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    rows = (
        ("sends", f"memory {format_size(prediction.memory_bytes)}, disks {format_size(prediction.disk_bytes)}"),
        ("takes", format_range(prediction.total_ms)),
        ("blackout", format_range(prediction.blackout_ms)),
        ("rounds", f"{prediction.rounds}, dirtied {format_size(prediction.dirty_bytes_per_s)}/s"),
        ("link", f"{format_size(prediction.link_bytes_per_s)}/s"),
    )
    for name, value in rows:
        grid.add_row("", name, text(value))
    show(grid)
    if not prediction.feasible:
        line(f"  the goal cannot be met: {prediction.reason}", "bold red")


def format_range(span: Range) -> str:
    """`5.3 s to 8.0 s`, or one value where both are the same to a reader."""
    low, high = format_ms(span.low), format_ms(span.high)
    return low if low == high else f"{low} to {high}"


def _verdict(check: CheckResult) -> tuple[str, str]:
    errors = sum(finding.severity is Severity.ERROR for finding in check.findings)
    warnings = sum(finding.severity is Severity.WARNING for finding in check.findings)
    counted = f"{errors} {'obstacle' if errors == 1 else 'obstacles'}, {warnings} {_plural(warnings)}"
    if check.ok:
        return f"{mark('✔', '+')} {check.vm} can move to {check.target} ({counted})", "bold green"
    return f"{mark('✘', 'x')} {check.vm} cannot move to {check.target} ({counted})", "bold red"


def _plural(warnings: int) -> str:
    return "warning" if warnings == 1 else "warnings"
