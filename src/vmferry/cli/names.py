"""Names of hosts, VMs and migrations as parameters, completed in the shell by asking the hosts for a short while.

For the nouns of `vmferry.cli`. Completion never fails and never prints: without an answer it offers nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from click.shell_completion import CompletionItem

from vmferry.cli.session import Session

if TYPE_CHECKING:
    from vmferry.api.client import HostClient

T = TypeVar("T")

COMPLETION_LIMIT_S = 0.8
_OFFERED = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z")  # anything else could mean something to the shell


class _Name(click.ParamType[str]):
    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            found = set(self.ask(_config(ctx), ctx.params.get("host")))
        except Exception:  # noqa: BLE001 - a shell waits for words and has no place for a message
            return []
        return [CompletionItem(name) for name in sorted(found) if name.startswith(incomplete) and _OFFERED.match(name)]

    def ask(self, config: Path | None, host: str | None) -> Iterable[str]:
        """The names there are now."""
        raise NotImplementedError


class HostName(_Name):
    """A host of the configuration."""

    name = "host"

    def ask(self, config: Path | None, host: str | None) -> Iterable[str]:
        from vmferry.api.endpoints import LOCAL_NAME, find_endpoints

        endpoints = find_endpoints(config)
        if [endpoint.name for endpoint in endpoints] != [LOCAL_NAME]:
            return [endpoint.name for endpoint in endpoints]
        return [view.name for views in _ask(config, None, lambda client: client.hosts()) for view in views]


class VmName(_Name):
    """A VM on any host."""

    name = "vm"

    def ask(self, config: Path | None, host: str | None) -> Iterable[str]:
        return [view.spec.name for views in _ask(config, host, lambda client: client.vms()) for view in views]


class MigrationId(_Name):
    """A migration known to any host."""

    name = "migration"

    def ask(self, config: Path | None, host: str | None) -> Iterable[str]:
        return [view.id for views in _ask(config, host, lambda client: client.migrations()) for view in views]


def _config(ctx: click.Context) -> Path | None:
    here = ctx.params.get("config") or ctx.find_root().params.get("config")
    return Path(here) if here else None


def _ask(config: Path | None, host: str | None, question: Callable[[HostClient], T]) -> list[T]:
    """What the hosts answer within the limit; the others are left out."""
    from vmferry.cli.fleet import ask_all, select

    answers = ask_all(select(Session(config, host=host)), question, COMPLETION_LIMIT_S)
    return [answer.value for answer in answers if answer.value is not None]
