"""`vmferry completion`: the script with which bash or zsh complete commands and names."""

from __future__ import annotations

import click

from vmferry.cli.command import common, example
from vmferry.cli.session import Session

_VARIABLE = "_VMFERRY_COMPLETE"


@click.group("completion")
def command() -> None:
    """Completion of commands and names in the shell."""


@command.command("bash", epilog=example("vmferry completion bash > /etc/bash_completion.d/vmferry"))
@common
def bash(session: Session) -> None:
    """The script for bash."""
    _print_script(session, "bash")


@command.command("zsh", epilog=example('vmferry completion zsh > "${fpath[1]}/_vmferry"'))
@common
def zsh(session: Session) -> None:
    """The script for zsh."""
    _print_script(session, "zsh")


def _print_script(session: Session, shell: str) -> None:
    from click.shell_completion import get_completion_class

    from vmferry.cli.display import document

    kind = get_completion_class(shell)
    assert kind is not None  # both are built into click
    script = kind(command, {}, "vmferry", _VARIABLE).source()
    if session.as_json:
        document({"shell": shell, "script": script})
    else:
        click.echo(script)
