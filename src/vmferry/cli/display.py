"""Text, tables and JSON on the terminal. The one place that prints.

For `vmferry.cli`. Whatever comes from a host or a user is made harmless here: control characters are shown as escapes
and nothing is read as markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from vmferry.model.errors import VmferryError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

_PIPE_WIDTH = 200  # nobody reads at 80 columns from a file


def safe(text: object) -> str:
    """The text with everything that is not printable shown as an escape (also line ends and direction marks)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


@cache
def console(to_stderr: bool = False) -> Console:
    """Standard output or standard error; markup, emoji codes and highlighting are off."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise

    stream = sys.stderr if to_stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Plain(stderr=to_stderr, width=width, markup=False, emoji=False, highlight=False, soft_wrap=False)


def interactive() -> bool:
    """Whether a picture that changes may be drawn on standard output."""
    return console().is_terminal and not console().is_dumb_terminal


def text(content: object, style: str = "") -> Text:
    """`safe(content)` in a style."""
    from rich.text import Text

    return Text(safe(content), style=style)


def show(item: RenderableType) -> None:
    """Prints for people; into a file or pipe without the spaces that fill up lines."""
    if console().is_terminal:
        console().print(item)
        return
    with console().capture() as drawn:
        console().print(item)
    console().file.write("".join(f"{row.rstrip()}\n" for row in drawn.get().splitlines()))


def line(content: object, style: str = "") -> None:
    """Prints one line, never broken or cut: what people copy from it stays whole."""
    console().print(text(content, style), soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """Prints a table. A column's name that begins with `>` stands right; cells are text or rich Text."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        grid.add_row(*(cell if isinstance(cell, Text) else text(cell) for cell in row))
    if grid.row_count:
        show(grid)
    else:
        line(empty)


def facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Prints names and values below each other; values that are empty are left out."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        if value not in ("", None):
            grid.add_row(name, value if isinstance(value, Text) else text(value))
    show(grid)


def document(value: object) -> None:
    """Prints a value of the model as one JSON document. Pure ASCII, so that no terminal is steered by it."""
    from vmferry.api.codec import encode

    print(json.dumps(encode(value), indent=2), flush=True)  # noqa: T201


def json_line(value: object) -> None:
    """Prints one line of JSON, at once."""
    from vmferry.api.codec import encode

    print(json.dumps(encode(value)), flush=True)  # noqa: T201


def print_error(error: VmferryError) -> None:
    """`error: MESSAGE` and the fix, on stderr."""
    out = console(to_stderr=True)
    first, *more = error.message.splitlines() or [""]
    out.print(text("error: ", "bold red") + text(first), soft_wrap=True)
    for further in more:
        out.print(text(f"  {further}"), soft_wrap=True)
    if error.fix:
        out.print(text(f"  fix: {error.fix}"), soft_wrap=True)


def print_warning(message: str) -> None:
    """What went wrong beside the point, on stderr."""
    console(to_stderr=True).print(text("warning: ", "yellow") + text(message), soft_wrap=True)


def print_note(message: str) -> None:
    """Advice that is no result and no trouble, on stderr."""
    console(to_stderr=True).print(text(message, "dim"), soft_wrap=True)


def mark(good: str, plain: str) -> str:
    """A sign, or what stands for it where the terminal's character set lacks it."""
    return good if console().encoding.lower().startswith("utf") else plain
