"""`./dev soak`: many migrations of one loaded VM round the lab's hosts; after each one everything is checked.

Run as a program. It drives the daemons through their API, as the command line does, and stops at the first violation
(or counts them with --go-on): what is there then is shown, and the daemons' logs are kept.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmferry.lab.crossing import Crossing, Watch, judge_crossing, judge_stream, start_stream
from vmferry.lab.guest_client import GuestClient
from vmferry.lab.layout import LabLayout
from vmferry.lab.leftovers import wait_until_clean
from vmferry.lab.namespaces import lab_status
from vmferry.lab.probes.launch import RunningProbe
from vmferry.lab.session import keep_logs, own_lab, turn_signals_into_interrupts
from vmferry.lab.soak_plan import HOSTS, Trip, plan_trips
from vmferry.lab.telling import complain, say, table
from vmferry.lab.trial_vm import LabCommand, TrialVm, create_and_start, host_client, wait_until_ready
from vmferry.model.errors import Failed, VmferryError
from vmferry.model.migration import MigrationView, Outcome
from vmferry.model.units import format_ms

DEFAULT_COUNT = 20
_VM = TrialVm(name="soak", wss_mib=64, dirty_mb=0, disk_rate=0, disk_area_mib=16, fill_mib=64, beat_ms=200)
_STREAM_BYTES_PER_S = 300_000
_MIGRATION_LIMIT_S = 300.0
_MOST_NEW_DESCRIPTORS = 8


@dataclass(frozen=True, slots=True)
class DaemonUse:
    """What a daemon holds: resident bytes and open descriptors."""

    rss_bytes: int
    descriptors: int


class Soak:
    """One run over one lab."""

    def __init__(self, layout: LabLayout, guest: GuestClient, stream: RunningProbe) -> None:
        self._layout = layout
        self._guest = guest
        self._stream = stream
        self._streamed = 0
        self.crossings: list[Crossing] = []

    def run(self, trip: Trip) -> tuple[str, ...]:
        """One migration; what is wrong after it. Prints its line."""
        self._guest.set_load(*trip.rates, within_s=60.0)
        head = f"{trip.number:3} {trip.source} -> {trip.target}  {trip.words}"
        try:
            with Watch(self._layout, _VM, self._guest) as watch:
                crossing = watch.finish(self._migrate(trip))
        except VmferryError as error:
            say(f"{head}  failed", "red")
            return (error.message,)
        self.crossings.append(crossing)
        wrong = [*judge_crossing(crossing), *self._judge_stream()]
        wrong += [f"left behind on {item}" for item in wait_until_clean(self._layout)]
        say(f"{head}  {_told(crossing)}  {'ok' if not wrong else 'WRONG'}", "red" if wrong else "")
        if wrong:
            say("    " + ", ".join(f"{step.name} {step.at_ms:.1f}" for step in crossing.receipt.switchover))
        return tuple(wrong)

    def end_stream(self) -> dict[str, Any]:
        """The report of the TCP connection over the whole run."""
        return self._stream.stop()

    def _migrate(self, trip: Trip) -> MigrationView:
        client = host_client(self._layout.host(trip.source))
        view = client.migrate(_VM.name, trip.target, trip.options)
        deadline = time.monotonic() + _MIGRATION_LIMIT_S
        while view.outcome in (Outcome.RUNNING, Outcome.UNKNOWN):
            if time.monotonic() > deadline:
                raise Failed("soak-stuck", f"{view.id} has not ended: {view.phase.value}, {view.outcome.value}.", "")
            time.sleep(0.1)
            view = client.migration(view.id)
        return view

    def _judge_stream(self) -> list[str]:
        """The one TCP connection of the whole run: whole so far, and it goes on."""
        deadline = time.monotonic() + 10
        while True:
            now = self._stream.progress()
            if now.get("broken") or now.get("errors"):
                return [f"the TCP stream: {now.get('broken') or 'open'}, {now.get('errors')} wrong bytes"]
            if now.get("received", 0) > self._streamed and now.get("silent_ms", 0) < 2000:
                self._streamed = now["received"]
                return []
            if time.monotonic() > deadline:
                return [f"the TCP stream stands still at {self._streamed} bytes"]
            time.sleep(0.1)


def _told(crossing: Crossing) -> str:
    receipt, udp = crossing.receipt, crossing.udp
    gap = format_ms(udp["longest_gap_ms"] or 0)
    times = f"pause {format_ms(receipt.blackout_ms or 0):>8}  gap {gap:>8}  total {format_ms(receipt.total_ms):>7}"
    drops = f", {crossing.guest_drops} dropped in the guest" if crossing.guest_drops else ""
    return f"{times}  held {receipt.frames.held}{drops}"


def observe_daemons(layout: LabLayout) -> dict[str, DaemonUse]:
    """Of every host's daemon, by host."""
    found = {}
    for name, process in lab_status(layout.prefix).daemons.items():
        place = Path(f"/proc/{process.pid}")
        pages = int((place / "statm").read_text().split()[1])
        found[name] = DaemonUse(pages * 4096, len(list((place / "fd").iterdir())))
    return found


def judge_growth(before: dict[str, DaemonUse], after: dict[str, DaemonUse]) -> tuple[str, ...]:
    """Descriptors that daemons do not give back. Pure."""
    return tuple(
        f"vmferryd of {name} had {before[name].descriptors} open descriptors, now {use.descriptors}"
        for name, use in after.items()
        if use.descriptors > before[name].descriptors + _MOST_NEW_DESCRIPTORS
    )


def _summarise(crossings: Sequence[Crossing], daemons: dict[str, DaemonUse]) -> None:
    if not crossings:
        return
    values = {
        "pause": [(crossing.receipt.blackout_ms or 0) for crossing in crossings],
        "longest UDP gap": [crossing.udp["longest_gap_ms"] or 0 for crossing in crossings],
        "total": [crossing.receipt.total_ms for crossing in crossings],
    }
    say()
    rows = [
        (name, *(format_ms(value) for value in (min(row), statistics.median(row), max(row))))
        for name, row in values.items()
    ]
    table(("", "MIN", "MEDIAN", "MAX"), rows)
    held = sum(crossing.receipt.frames.held for crossing in crossings)
    lost = sum(crossing.receipt.frames.lost for crossing in crossings)
    drops = sum(crossing.guest_drops for crossing in crossings)
    probes = sum(crossing.udp["sent"] for crossing in crossings)
    on_the_way = sum(crossing.lost_on_the_way for crossing in crossings)
    say(f"frames: {held} held, {lost} lost at the ports; probes: {probes} sent, {on_the_way} lost on the way")
    say(f"        {drops} more had arrived in the guest and were dropped by its own full socket buffer")
    used = ", ".join(f"{name} {use.rss_bytes >> 20} MiB/{use.descriptors}" for name, use in daemons.items())
    say(f"daemons (resident/descriptors): {used}")


def _soak(layout: LabLayout, trips: Sequence[Trip], go_on: bool) -> tuple[str, ...]:
    create_and_start(LabCommand(layout), _VM, layout.hosts[0])
    with GuestClient(_VM.address, layout.client_namespace) as guest:
        wait_until_ready(guest, _VM)
        with start_stream(layout, _VM, _STREAM_BYTES_PER_S) as stream:
            stream.wait_until_received()
            return _run_trips(Soak(layout, guest, stream), layout, trips, go_on)


def _run_trips(soak: Soak, layout: LabLayout, trips: Sequence[Trip], go_on: bool) -> tuple[str, ...]:
    before: dict[str, DaemonUse] | None = None
    wrong: list[str] = []
    for trip in trips:
        done = len(soak.crossings)
        wrong += [f"migration {trip.number}: {sentence}" for sentence in soak.run(trip)]
        if wrong and (not go_on or len(soak.crossings) == done):  # the VM is not where the next one begins
            break
        if {crossing.receipt.source for crossing in soak.crossings} >= set(HOSTS) and before is None:
            before = observe_daemons(layout)  # what each needs at all it has opened by now
    after = observe_daemons(layout)
    if before is not None:
        wrong += judge_growth(before, after)
    wrong += judge_stream(soak.end_stream())
    _summarise(soak.crossings, after)
    return tuple(wrong)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev soak", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("count", nargs="?", type=int, default=DEFAULT_COUNT, help="migrations (default %(default)s)")
    parser.add_argument("--seed", type=int, help="repeats the options of an earlier run")
    parser.add_argument("--prefix", default="vfsoak", help="the lab's name (default %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leaves the lab when something is wrong")
    parser.add_argument("--go-on", action="store_true", help="goes on after a violation, to count them")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all is as it must be; 1: not; 130: interrupted."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    turn_signals_into_interrupts()
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    say(f"soak: {options.count} migrations of a loaded VM, seed {seed}")
    try:
        with own_lab(options.prefix) as own:
            try:
                wrong = _soak(own.layout, tuple(plan_trips(options.count, seed)), options.go_on)
            except VmferryError as error:
                wrong = (f"{error.message} {error.fix}".strip(),)
            if wrong:
                own.keep = options.keep
                _say_wrong(wrong, seed, keep_logs(own.layout))
    except VmferryError as error:
        complain(f"{error.message} {error.fix}".strip())
        return error.exit_status
    except KeyboardInterrupt:
        say("interrupted; the lab is down")
        return 130
    if not wrong:
        say(f"all of it is as it must be (seed {seed})", "green")
    return 1 if wrong else 0


def _say_wrong(wrong: Sequence[str], seed: int, logs: Path) -> None:
    say()
    for sentence in wrong:
        complain(sentence)
    say(f"  the daemons' logs: {logs}; to run the same again: ./dev soak --seed {seed}")


if __name__ == "__main__":
    sys.exit(main())
