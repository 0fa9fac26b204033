"""The program `vmferryd`: reads its settings, runs the daemon until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys
from pathlib import Path

from vmferry.host import log
from vmferry.host.config import DEFAULT_PATH, load_config
from vmferry.host.daemon import Daemon
from vmferry.host.heap import keep_heap_small
from vmferry.host.priority import raise_priority
from vmferry.model.errors import VmferryError


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 after a stop, 2 when the settings are wrong or something is in the way."""
    parser = argparse.ArgumentParser(prog="vmferryd", description="The vmferry daemon of one host.")
    parser.add_argument("--config", type=Path, default=DEFAULT_PATH, help=f"settings (default: {DEFAULT_PATH})")
    parser.add_argument("--check", action="store_true", help="only say whether the settings are right")
    parser.add_argument("--verbose", action="store_true", help="log more")
    arguments = parser.parse_args(argv)
    log.configure(arguments.verbose)
    try:
        config = load_config(arguments.config)
        if arguments.check:
            sys.stdout.write(f"{arguments.config}: right\n")
            return 0
        asyncio.run(_serve(Daemon(config)))
    except VmferryError as error:
        sys.stderr.write(f"vmferryd: {error.message}\n{error.fix}\n")
        return 2
    return 0


async def _serve(daemon: Daemon) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stop)
    keep_heap_small()
    if not raise_priority():
        log.alarm("priority-not-raised", fix="run as root, or give CAP_SYS_NICE")
    # What is there now stays: collections in a blackout need not look at it.
    gc.freeze()
    await daemon.run()


if __name__ == "__main__":
    sys.exit(main())
