"""What demo and soak print: steps, facts, complaints. The lab's one place that prints; plain without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import cache

from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 120


@cache
def _console() -> Console:
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(width=width, markup=False, emoji=False, highlight=False)


def say(text: str = "", style: str = "") -> None:
    """One line, at once, broken only where the terminal ends."""
    _console().print(Text(text, style=style), soft_wrap=True)
    sys.stdout.flush()


def complain(text: str) -> None:
    """Something that is not as it must be."""
    say(f"  {'✘' if _console().encoding.startswith('utf') else 'x'} {text}", "bold red")


class Steps:
    """Headings with numbers; each step ends with `done`, which tells how long it took."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._number = 0
        self._began = 0.0

    def begin(self, title: str) -> None:
        """The next step."""
        self._number += 1
        self._began = time.monotonic()
        say()
        say(f"[{self._number}/{self._count}] {title}", "bold")

    def done(self, what: str) -> None:
        """The end of a step with its result."""
        say(f"      {what}  ({time.monotonic() - self._began:.1f} s)", "dim")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column is dim, the others are values."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        grid.add_column(column, style="" if number else "dim", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    with _console().capture() as drawn:
        _console().print(grid)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in drawn.get().splitlines()))
    sys.stdout.flush()
