"""The command `vmferry`: finds the noun's module, runs the command, turns errors into messages and exit statuses.

The entry point of the package; nothing imports it. It must stay quick to import (the command starts in under 0.3 s):
click and the errors only, everything else is loaded by the noun that is asked for.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from vmferry.cli.command import ReaderLeft, example
from vmferry.model.errors import VmferryError, WrongInput

_NOUNS = {
    "host": "Hosts: what they are and can do, and how they come to trust each other.",
    "vm": "VMs: create, run, look at, check, migrate.",
    "migration": "Migrations: watch, cancel, recover, receipts.",
    "lab": "Hosts in network namespaces on this machine, to try and to test.",
    "completion": "Completion of commands and names in the shell.",
}
_INTERRUPTED = 130


class _Nouns(click.Group):
    """Loads `vmferry.cli.NOUN` (its `command`) only when that noun is used; help of all nouns needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_NOUNS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _NOUNS:
            return None
        loaded = importlib.import_module(f"vmferry.cli.{cmd_name}").command
        assert isinstance(loaded, click.Command)
        return loaded

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_NOUNS.items()))


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"vmferry {version('vmferry')}")
        ctx.exit()


@click.group(
    cls=_Nouns,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=example("vmferry vm check web1 --to host2", "vmferry vm migrate web1 --to host2"),
)
@click.option("--config", type=click.Path(path_type=Path), help="Client configuration: which hosts there are.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="The version."
)
@click.pass_context
def root(ctx: click.Context, config: Path | None) -> None:
    """Moves running VMs between Linux hosts: memory, disks and connections together, with proof.

    Exit status: 0 done; 1 failed, and the VM runs where it ran before; 2 wrong usage; 3 refused by the check;
    4 outcome unknown, `migration recover` settles it; 130 interrupted (a migration goes on).
    """
    ctx.obj = config


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line and exits with its status (interface.md)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # always a TextIOWrapper here
    try:
        status = _run(given)
        sys.stdout.flush()
    except (BrokenPipeError, ReaderLeft):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader left; Python would complain once more at exit
        status = _INTERRUPTED
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    try:
        result = root.main(arguments, prog_name="vmferry", standalone_mode=False)
    except VmferryError as error:
        return _report(error, arguments)
    except click.exceptions.NoArgsIsHelpError as error:  # only a noun was given, or nothing: the help is the answer
        click.echo(error.format_message())
        return WrongInput.exit_status
    except click.UsageError as error:
        return _report(_usage(error), arguments, error.ctx)
    except click.ClickException as error:
        return _report(WrongInput("usage", error.format_message()), arguments)
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)  # noqa: T201
        return _INTERRUPTED
    return result if isinstance(result, int) else 0


def _usage(error: click.UsageError) -> WrongInput:
    command = error.ctx.command_path if error.ctx else "vmferry"
    return WrongInput("usage", error.format_message(), f"See {command} --help.")


def _report(error: VmferryError, arguments: list[str], ctx: click.Context | None = None) -> int:
    """The error for people on stderr; for programs also as a document on stdout."""
    from vmferry.cli.display import print_error

    if ctx is not None:
        click.echo(ctx.get_usage(), err=True)
    print_error(error)
    before_command = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--json" in before_command:
        from vmferry.api.codec import problem

        print(json.dumps({"error": problem(error)}), flush=True)  # noqa: T201
    return error.exit_status


if __name__ == "__main__":
    main()
