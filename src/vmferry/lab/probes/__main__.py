"""`python -m vmferry.lab.probes`: see the package."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vmferry.lab.probes.pacing import Progress, StopFlag, raise_priority


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vmferry.lab.probes", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, port, rate, what in (
        ("udp", 7, 1000.0, "UDP echo: gaps, losses, order"),
        ("tcp", 7, 100.0, "TCP echo: stalls, content"),
        ("stream", 9, 0.0, "a TCP stream of numbers in one direction"),
    ):
        kind = kinds.add_parser(name, help=what)
        kind.add_argument("--target", required=True)
        kind.add_argument("--port", type=int, default=port)
        if name == "stream":
            kind.add_argument("--direction", choices=("down", "up"), default="down", help="down: the guest sends")
            kind.add_argument("--bytes-per-second", type=int, default=1_000_000, help="0: as fast as possible")
        else:
            kind.add_argument("--rate", type=float, default=rate, help="messages per second")
            kind.add_argument("--size", type=int, default=64, help="bytes of a message")
    frames = kinds.add_parser("frames", help="counts a MAC's frames and announcements on a device")
    frames.add_argument("--device", default="lan0")
    frames.add_argument("--mac", required=True)
    for kind in kinds.choices.values():
        kind.add_argument("--duration", type=float, help="seconds; without it until SIGTERM or SIGINT")
        kind.add_argument("--progress", type=Path, help="file that always holds one JSON line of the present state")
    return parser.parse_args()


def _run(options: argparse.Namespace, stop: StopFlag, progress: Progress) -> dict[str, Any]:
    if options.kind == "udp":
        from vmferry.lab.probes.udp import run_udp

        return run_udp(options.target, options.port, options.rate, options.size, stop, progress)
    if options.kind == "frames":
        from vmferry.lab.probes.frames import run_frames

        return run_frames(options.device, options.mac, stop, progress)
    from vmferry.lab.probes import tcp

    if options.kind == "tcp":
        return tcp.run_echo(options.target, options.port, options.rate, options.size, stop, progress)
    run = tcp.run_down if options.direction == "down" else tcp.run_up
    return run(options.target, options.port, options.bytes_per_second, stop, progress)


def main() -> int:
    options = _parse()
    stop = StopFlag(options.duration)
    prioritised = raise_priority()
    try:
        document = _run(options, stop, Progress(options.progress))
    except OSError as error:
        document = {"probe": options.kind, "error": error.strerror or type(error).__name__, "broken": True}
    json.dump({**document, "prioritised": prioritised}, sys.stdout)
    sys.stdout.write("\n")
    return 1 if "error" in document else 0


if __name__ == "__main__":
    sys.exit(main())
