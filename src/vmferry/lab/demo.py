"""`./dev demo`: a running VM moves host1 -> host2 -> host3 with the real command line, and is measured from outside.

Run as a program. It makes the default lab for itself and removes it again, also when it fails or is interrupted; with
--keep the lab stays. A lab that is up already is left alone. Exit status: 0 if everything that it claims is so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vmferry.lab.crossing import Crossing, Watch, find_newest, judge_crossing, judge_stream, start_stream
from vmferry.lab.demo_words import INTRODUCTION, stream_words, summary, things_to_try
from vmferry.lab.guest import build_guest
from vmferry.lab.guest_client import GuestClient
from vmferry.lab.layout import DEFAULT_PREFIX, LabLayout
from vmferry.lab.namespaces import lab_status
from vmferry.lab.probes.launch import RunningProbe
from vmferry.lab.session import keep_logs, own_lab, require_no_lab, turn_signals_into_interrupts
from vmferry.lab.telling import Steps, complain, say, table
from vmferry.lab.trial_vm import LabCommand, TrialVm, create_and_start, find_owner, wait_until_ready
from vmferry.model.errors import Failed, VmferryError
from vmferry.model.units import format_rate, format_size

_VM = TrialVm()
_STREAM_BYTES_PER_S = 1_000_000
_MOVES = (
    ("host1", "host2", (), "as it comes: the disk's digests are compared before the target takes over"),
    (
        "host2",
        "host3",
        ("--verify", "all"),
        "with --verify all: the stopped guest's memory is hashed on both hosts too",
    ),
)


class Demo:
    """One run in a lab of its own."""

    def __init__(self, layout: LabLayout, steps: Steps) -> None:
        self._layout = layout
        self._steps = steps
        self._command = LabCommand(layout)
        self.crossings: list[Crossing] = []
        self.stream: dict[str, Any] = {}

    def run(self) -> tuple[str, ...]:
        """Everything after the lab is up; what is not as claimed. Raises Failed when it cannot go on."""
        self._boot()
        with ExitStack() as open_things:
            guest = open_things.enter_context(GuestClient(_VM.address, self._layout.client_namespace))
            self._fill(guest)
            stream = open_things.enter_context(start_stream(self._layout, _VM, _STREAM_BYTES_PER_S))
            stream.wait_until_received()
            wrong = [sentence for move in _MOVES for sentence in self._move(guest, *move)]
            self.stream = self._end_stream(stream)
        return (*wrong, *judge_stream(self.stream))

    def _boot(self) -> None:
        host = self._layout.hosts[0]
        size = f"{_VM.memory_mib} MiB of memory, a new {_VM.disk_gib} GiB disk"
        self._steps.begin(f"The VM {_VM.name} on {host.name}: {size}")
        create_and_start(self._command, _VM, host)

    def _fill(self, guest: GuestClient) -> None:
        status = wait_until_ready(guest, _VM)
        load = f"dirties {_VM.dirty_mb} MB/s of memory, {_VM.disk_rate} disk records/s with fsync"
        self._steps.done(f"booted; wrote {format_size(status.disk.fill_bytes)} to its disk; {load}")

    def _move(self, guest: GuestClient, source: str, target: str, options: Sequence[str], what: str) -> Sequence[str]:
        """One migration with the command's own view; what is wrong after it."""
        self._steps.begin(f"{source} -> {target}, {what}")
        arguments = ["vm", "migrate", _VM.name, "--to", target, *options]
        say(f"$ vmferry {' '.join(arguments)}", "bold")
        with Watch(self._layout, _VM, guest) as watch:
            status = self._command.show(*arguments)
            if status != 0:
                raise self._not_migrated(arguments, status)
            crossing = watch.finish(find_newest(self._layout, source, _VM.name))
        self.crossings.append(crossing)
        self._steps.done("the guest has checked its memory and its disk since")
        return [f"{source} -> {target}: {sentence}" for sentence in judge_crossing(crossing)]

    def _not_migrated(self, arguments: Sequence[str], status: int) -> Failed:
        owner = find_owner(self._layout, _VM.name)
        text = f"vmferry {' '.join(arguments)} ended with status {status}; {_VM.name} is {owner.state} on {owner.host}."
        return Failed("demo-migrate", text, "What the command said is above.")

    @staticmethod
    def _end_stream(stream: RunningProbe) -> dict[str, Any]:
        return stream.stop()

    def conclude(self) -> None:
        """The table of what was measured."""
        self._steps.begin("What was measured")
        table(*summary(self.crossings, self.stream))
        say(stream_words(self.stream))

    def say_what_to_try(self) -> None:
        """For a lab that is kept."""
        say()
        say(f"The lab stays up and {_VM.name} runs. Try:", "bold")
        owner = find_owner(self._layout, _VM.name).host
        daemon = lab_status(self._layout.prefix).daemons[owner].pid
        command = _shortest(self._command.path)
        for line in things_to_try(command, self._layout, _VM.name, self._layout.host(owner), daemon):
            say(f"  {line}")


def _shortest(path: Path) -> Path:
    """As one types it in the present directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _build_once(steps: Steps) -> None:
    steps.begin("A small guest from Debian's kernel, and the lab: three hosts, a switch, a client")
    build_guest()


def _run(prefix: str, keep: bool) -> tuple[str, ...]:
    steps = Steps(5)
    require_no_lab(prefix)
    _build_once(steps)
    with own_lab(prefix) as own:
        link = format_rate(own.layout.link_bps)
        steps.done(f"up: host1 to host3 with {link} between them, each with its own disks, vmferryd and certificate")
        own.keep = keep
        demo = Demo(own.layout, steps)
        try:
            wrong = demo.run()
            demo.conclude()
        except VmferryError as error:
            wrong = (f"{error.message} {error.fix}".strip(),)
        _say_verdict(wrong, own.layout)
        if keep:
            demo.say_what_to_try()
        else:
            say("Taking the lab down. (./dev demo --keep leaves it up, to play with.)", "dim")
    return wrong


def _say_verdict(wrong: Sequence[str], layout: LabLayout) -> None:
    say()
    if not wrong:
        say(
            "The VM moved twice while it worked. Nothing was lost, nothing was changed, no connection broke.",
            "bold green",
        )
        return
    say("Not everything is as it must be:", "bold red")
    for sentence in wrong:
        complain(sentence)
    say(f"  The daemons' logs: {keep_logs(layout)}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./dev demo", description="A running VM moves between three hosts on this machine."
    )
    parser.add_argument("--keep", action="store_true", help="leaves the lab up and says what to try")
    parser.add_argument("--prefix", default=DEFAULT_PREFIX, help="the lab's name (default %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all is as claimed; 1: something is not, or it failed; 130: interrupted."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    turn_signals_into_interrupts()
    for line in INTRODUCTION:
        say(line)
    try:
        return 1 if _run(options.prefix, options.keep) else 0
    except VmferryError as error:
        say()
        complain(f"{error.message} {error.fix}".strip())
        return 1
    except KeyboardInterrupt:
        say()
        say("Interrupted: the lab was taken down with all that was in it. Nothing is left of the demo.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
