"""The picture of a running migration: phases, bars, rates, what is left. One frame is a pure function of what is known.

For `follow` and `migration_view`. It draws; it asks nobody, and but for `elapsed_ms` it knows no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vmferry.cli.check_view import format_range
from vmferry.cli.display import mark, text
from vmferry.model.migration import MigrationView, Outcome, Phase, Progress, Range
from vmferry.model.units import format_ms, format_size

_BAR_MOST = 30
_BAR_LEAST = 8
_BESIDE_BAR = 67  # what stands beside a bar, widest case
_COPYING = (Phase.COPY, Phase.SWITCHOVER)


@dataclass(frozen=True, slots=True)
class Frame:
    """What one picture shows. Rates are those seen lately, bytes per second; `notice` is the client's own word."""

    view: MigrationView
    elapsed_ms: float
    disk_rates: tuple[int, ...] = ()
    memory_rates: tuple[int, ...] = ()
    notice: str = ""


def elapsed_ms(started_at: str) -> float:
    """Milliseconds since then by this machine's clock; 0 where that makes no sense."""
    try:
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(started_at)).total_seconds() * 1000)
    except (ValueError, TypeError):
        return 0.0


def draw(frame: Frame, width: int) -> RenderableType:
    """The picture for a terminal of that many columns (from 76 on nothing is cut)."""
    view = frame.view
    parts: list[RenderableType] = [_head(frame), _phases(view)]
    if _has_numbers(view.progress):
        parts += [_bars(frame, width), *_numbers(view)]
    if view.progress.note and _is_copying(view):
        parts.append(text(f"  {view.progress.note}", "yellow"))
    if frame.notice:
        parts.append(text(f"  {frame.notice}", "bold yellow"))
    return Group(*parts)


def _head(frame: Frame) -> Text:
    view = frame.view
    head = text(view.vm, "bold") + text(f"  {view.source} {mark('→', '->')} {view.target}  ")
    return head + text(f"{view.id}  ", "dim") + text(f"elapsed {_elapsed(frame.elapsed_ms)}")


def _elapsed(elapsed_ms: float) -> str:
    return format_ms(elapsed_ms) if elapsed_ms >= 1000 else f"{max(elapsed_ms, 0) / 1000:.1f} s"


def _phases(view: MigrationView) -> Text:
    """The line of phases: done, present, to come; a phase in which it failed is crossed."""
    done = {phase.name for phase in view.phases if phase.ended_at}
    spoilt = view.outcome in (Outcome.FAILED, Outcome.CANCELLED)
    row = Text("  ")
    for phase in Phase:
        if phase is view.phase and view.outcome is not Outcome.COMPLETED:
            sign, style = (mark("✘", "x"), "bold red") if spoilt else (mark("▶", ">"), "bold cyan")
        elif phase in done or view.outcome is Outcome.COMPLETED:
            sign, style = mark("✔", "+"), "green"
        else:
            sign, style = mark("·", "."), "dim"
        row.append(f"{sign} {phase.value}  ", style=style)
    row.rstrip()
    return row


def _is_copying(view: MigrationView) -> bool:
    """Whether what the numbers predict is still to come."""
    return view.outcome is Outcome.RUNNING and view.phase in _COPYING


def _has_numbers(progress: Progress) -> bool:
    return progress.disk_total_bytes > 0 or progress.memory_total_bytes > 0


def _bars(frame: Frame, width: int) -> Table:
    progress, running = frame.view.progress, _is_copying(frame.view)
    bar_width = min(_BAR_MOST, max(_BAR_LEAST, width - _BESIDE_BAR))
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=8)
    grid.add_column(no_wrap=True)
    for least in (15, 11):  # so that nothing jumps about while numbers change
        grid.add_column(no_wrap=True, justify="right", min_width=least)
    grid.add_column(no_wrap=True)
    if progress.disk_total_bytes:
        left = progress.disk_total_bytes - progress.disk_done_bytes
        time_left = span_left(left, frame.disk_rates, 0) if running else None
        grid.add_row("  disks", *_row(progress.disk_total_bytes, left, progress.disk_rate, time_left, bar_width))
    if progress.memory_total_bytes:
        left = progress.memory_remaining_bytes
        time_left = span_left(left, frame.memory_rates, progress.dirty_rate) if running else None
        grid.add_row("  memory", *_row(progress.memory_total_bytes, left, progress.memory_rate, time_left, bar_width))
    return grid


def _row(total: int, left: int, rate: int, time_left: Range | None, bar_width: int) -> Iterator[Text]:
    left = min(max(left, 0), total)
    yield _bar(1 - left / total, bar_width)
    yield text(f"{format_size(left)} left" if left else "all sent")
    yield text(f"{format_size(rate)}/s" if left else "", "cyan")
    yield text(_time_left(time_left) if left else "", "dim")


def _bar(done: float, width: int) -> Text:
    full = int(done * width)
    bar = Text(mark("━", "#") * full, style="green")
    bar.append(mark("─", "-") * (width - full), style="dim")
    return bar + text(f" {int(done * 100):3d}%")


def span_left(left_bytes: int, rates: tuple[int, ...], grows: int) -> Range | None:
    """The time left in ms: at the best rate seen lately, and at the worst with `grows` bytes a second coming anew.

    The upper bound is infinite where the worst rate does not outrun what is coming; None where nothing is known.
    """
    moving = [rate for rate in rates if rate > 0]
    if not moving:
        return None
    net = min(moving) - grows
    return Range(left_bytes / max(moving) * 1000, left_bytes / net * 1000 if net > 0 else float("inf"))


def _time_left(span: Range | None) -> str:
    if span is None:
        return ""
    if span.high == float("inf"):
        return f"{format_ms(span.low)} or more"
    return format_range(span)


def _numbers(view: MigrationView) -> Iterator[Text]:
    progress = view.progress
    parts = [f"dirtied {format_size(progress.dirty_rate)}/s", f"round {progress.rounds}"]
    parts.append(f"throttle {progress.throttle_percent}%")
    yield text("  " + mark(" · ", " | ").join(parts))
    parts = [f"left {format_range(progress.eta_ms)}"] if progress.eta_ms and _is_copying(view) else []
    if view.blackout_ms is not None:
        parts.append(f"blackout {format_ms(view.blackout_ms)}")
    elif progress.blackout_ms and _is_copying(view):
        parts.append(f"blackout now {format_range(progress.blackout_ms)} (goal {view.options.max_blackout_ms} ms)")
    elif view.prediction:
        parts.append(f"blackout predicted {format_range(view.prediction.blackout_ms)}")
    if parts:
        yield text("  " + mark(" · ", " | ").join(parts))
