"""The options of a migration on the command line, read with the units of `vmferry.model.units`.

For `vm check` and `vm migrate`. Pure; raises WrongInput, which the command line shows as wrong usage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click

from vmferry.cli.names import HostName
from vmferry.model.errors import WrongInput
from vmferry.model.migration import MigrateOptions, PostCopy, Verify
from vmferry.model.units import parse_duration_ms, parse_percent, parse_rate_bps

Function = Callable[..., Any]

_OPTIONS = (
    click.option("--to", required=True, type=HostName(), metavar="HOST", help="The target host."),
    click.option("--storage", multiple=True, metavar="[DISK=]POOL", help="The target's pool, for one disk or for all."),
    click.option("--network", multiple=True, metavar="SWITCH=SWITCH", help="The source's switch and the target's."),
    click.option("--mode", type=click.Choice(["live", "quick", "cold"]), default="live", help="How it moves."),
    click.option(
        "--max-blackout",
        metavar="TIME",
        default="300ms",
        show_default=True,
        help="Goal for the pause: the moment is chosen so that it is expected to be no longer.",
    ),
    click.option("--deadline", metavar="TIME", help="Longest time for all of it; without it there is no limit."),
    click.option("--bandwidth", metavar="RATE", help="For memory and disks together, such as 500mbit; else no limit."),
    click.option("--max-slowdown", metavar="PERCENT", default="50%", show_default=True, help="Guest's throttling."),
    click.option(
        "--post-copy",
        type=click.Choice([value.value for value in PostCopy]),
        default=PostCopy.NEVER.value,
        show_default=True,
        help="Whether memory may follow after the switchover; a failure of either host then loses the guest. "
        "Not with --verify all.",
    ),
    click.option(
        "--verify",
        type=click.Choice([value.value for value in Verify]),
        default=Verify.DISKS.value,
        show_default=True,
        help="Digests that are compared before the target takes over.",
    ),
    click.option("--keep-source", is_flag=True, help="Keep the disks on the source afterwards."),
)


def migrate_options(function: Function) -> Function:
    """Adds --to and the options of a migration to a command; it gets them as `to` and the rest for `read_options`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def read_options(given: dict[str, Any]) -> MigrateOptions:
    """The options as the host wants them. Raises WrongInput with the option to correct."""
    if given["mode"] != "live":
        raise WrongInput(
            "mode-not-there",
            f"The mode “{given['mode']}” is not there yet; a VM can move live only.",
            "Leave --mode out, or write --mode live.",
        )
    return MigrateOptions(
        max_blackout_ms=parse_duration_ms(given["max_blackout"]),
        deadline_ms=parse_duration_ms(given["deadline"]) if given["deadline"] else 0,
        bandwidth_bps=parse_rate_bps(given["bandwidth"]) if given["bandwidth"] else 0,
        max_slowdown_percent=parse_percent(given["max_slowdown"]),
        post_copy=PostCopy(given["post_copy"]),
        verify=Verify(given["verify"]),
        keep_source=given["keep_source"],
        storage=read_storage(given["storage"]),
        network=read_network(given["network"]),
    )


def read_storage(given: Iterable[str]) -> dict[str, str]:
    """`POOL` (all disks, key "") and `DISK=POOL`. Raises WrongInput `bad-storage`."""
    fix = "Write --storage POOL once, or --storage DISK=POOL for each disk."
    return _pairs(given, "storage", fix, bare_allowed=True)


def read_network(given: Iterable[str]) -> dict[str, str]:
    """`A=B`. Raises WrongInput `bad-network`."""
    return _pairs(given, "network", "Write --network SWITCH_HERE=SWITCH_THERE.", bare_allowed=False)


def _pairs(given: Iterable[str], what: str, fix: str, *, bare_allowed: bool) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in given:
        key, equals, value = item.rpartition("=")
        if not value or (equals and not key) or (not equals and not bare_allowed):
            raise WrongInput(f"bad-{what}", f"--{what} “{item}” is not understood.", fix)
        if key in pairs:
            raise WrongInput(f"bad-{what}", f"--{what} says twice where {key or 'all disks'} should go.", fix)
        pairs[key] = value
    return pairs
