"""`python -m bench`: the program. See ./dev bench --help."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from bench.bare import Bare
from bench.libvirtd import Libvirtd
from bench.measure import Conditions, measure
from bench.ours import Ours
from bench.plan import BARE, BARE_TUNED, LINK_BPS, LOADS, OURS, TOOLS, VIRSH, VIRSH_TUNED, Contender, Measured
from bench.quiet import CpuAccount, Patience
from bench.report import document, print_report
from bench.stage import Stage, open_stage
from bench.steps import print_steps
from bench.virsh import Virsh
from vmferry.model.errors import VmferryError
from vmferry.model.units import parse_rate_bps


def main() -> int:
    options = _parse()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    rows: list[Measured] = []
    began = datetime.now(UTC).isoformat(timespec="seconds")
    status = 0
    try:
        patience = Patience(0 if options.first else options.patience)
        _say(f"load average {patience.wait_for_low_load():.2f}; making the hosts")
        with (
            CpuAccount(options.prefix, options.first) as account,
            open_stage(options.prefix, options.link) as stage,
            _contenders(stage, options) as contenders,
        ):
            conditions = Conditions(account, patience)
            _run_all(stage, contenders, conditions, options, rows)
    except KeyboardInterrupt:
        _say("interrupted; everything is removed")
        status = 130
    except VmferryError as error:
        _say(f"{error} {error.fix}")
        status = 1
    if options.steps:
        print_steps(rows)
    passed = print_report(rows)
    if options.json and rows:
        options.json.write_text(json.dumps(document(rows, options.link, began), indent=1) + "\n", encoding="utf-8")
    return status or (0 if passed and rows else 1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev bench", description="vmferry, virsh and a bare script side by side.")
    parser.add_argument("--runs", type=int, default=3, help="runs of each tool under each load (3)")
    parser.add_argument("--load", action="append", choices=[*LOADS], help="only this load; can be repeated")
    parser.add_argument("--only", action="append", choices=[*TOOLS], help="only this tool; can be repeated")
    parser.add_argument("--quick", action="store_true", help="one run of each, without waiting for a quiet machine")
    parser.add_argument("--steps", action="store_true", help="only vmferry: the steps of its switchover")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--link", type=parse_rate_bps, default=LINK_BPS, help="the hosts' migration links (1gbit)")
    parser.add_argument(
        "--patience", type=float, metavar="SECONDS", default=600, help="to lose to other work on this machine (600)"
    )
    parser.add_argument("--first", action="store_true", help="do not wait: let the kernel prefer the bench to others")
    parser.add_argument("--option", action="append", default=[], help="for vmferry vm migrate: --option=--verify=none")
    parser.add_argument("--prefix", default="vfbench", help="of namespaces and directories (vfbench)")
    options = parser.parse_args()
    if options.steps:
        options.only = [OURS]
    if options.quick:
        options.runs, options.patience = 1, 0
    return options


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _contenders(stage: Stage, options: argparse.Namespace) -> Iterator[dict[str, Contender]]:
    wanted = [name for name in TOOLS if not options.only or name in options.only]
    found: dict[str, Contender] = {}
    with contextlib.ExitStack() as stack:
        if VIRSH in wanted or VIRSH_TUNED in wanted:
            daemons = [Libvirtd(host, stage.home) for host in (stage.source, stage.target)]
            for daemon in daemons:
                stack.callback(daemon.stop)
                daemon.start()
        for name in wanted:
            limit_ms = TOOLS[name].limit_ms
            if name == OURS:
                found[name] = Ours(stage.layout, stage.home, tuple(options.option))
            elif name in (BARE, BARE_TUNED):
                found[name] = Bare((stage.source, stage.target), stage.home, stage.emulator, limit_ms)
            else:
                virsh = Virsh(daemons[0], daemons[1], stage.target.migration_address, stage.emulator, limit_ms)
                virsh.warm_up()
                found[name] = virsh
        yield found


def _run_all(
    stage: Stage,
    contenders: dict[str, Contender],
    conditions: Conditions,
    options: argparse.Namespace,
    rows: list[Measured],
) -> None:
    """Tools in turn, so that what changes on the machine meets all of them alike."""
    loads: Sequence[str] = [name for name in LOADS if not options.load or name in options.load]
    for run in range(1, options.runs + 1):
        for load in loads:
            for tool, contender in contenders.items():
                row = measure(stage, conditions, contender, Measured(tool, load, run))
                rows.append(row)
                _say(_short(row))


def _short(row: Measured) -> str:
    head = f"run {row.run} {row.load:5} {row.tool:9}"
    if row.blackout_ms is None or row.gap_ms is None or row.total_ms is None:
        return f"{head} {row.fault}"
    return (
        f"{head} blackout {row.blackout_ms:6.1f}  gap {row.gap_ms:6.1f}  lost {row.lost:3}  "
        f"total {row.total_ms / 1000:5.1f} s  others {row.others or 0:.0%}  {row.fault}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
