"""What every command has: `--json`, `--config`, `--host`, an example in its help, and the session made of them.

For the nouns of `vmferry.cli`. Quick to import; asks no host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vmferry.cli.names import HostName
from vmferry.cli.session import Session

Function = Callable[..., Any]


class ReaderLeft(Exception):
    """Whoever read our standard output closed it; nothing failed."""


def example(*lines: str) -> str:
    """The epilog of a help text; its lines stay as they are."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def common(function: Function) -> Function:
    """Adds --json and --config to a command; it gets a Session as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="JSON on standard output, and nothing else there.")
    @click.option("--config", type=click.Path(path_type=Path), help="Client configuration: which hosts there are.")
    @click.pass_context
    @functools.wraps(function)
    def with_session(ctx: click.Context, /, as_json: bool, config: Path | None, **rest: Any) -> Any:
        given = config or ctx.find_root().obj
        try:
            return function(Session(given, as_json, rest.pop("host", None)), **rest)
        except BrokenPipeError as error:
            raise ReaderLeft from error  # click would call it a failure

    return with_session


def narrowed(function: Function) -> Function:
    """As `common`, with --host to ask one host only."""
    return click.option("--host", "host", type=HostName(), metavar="HOST", help="Ask this host only.")(common(function))
