"""The memory's way between two QEMUs: capabilities, parameters, the stream's two ends, what is observed of it.

Used by `migration/`, which decides when to do what. Events: MIGRATION (status), MIGRATION_PASS, STOP, RESUME, SUSPEND
come through `Monitor.subscribe` and `Monitor.expect`; `expect_status` is the short form for the first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmferry.model.errors import Failed
from vmferry.qemu.features import observe_capabilities
from vmferry.qemu.monitor import Monitor, QmpEvent, QmpRefused

_ENDED = frozenset(("completed", "failed", "cancelled"))
_RATE_LOOK_EVERY_S = 0.05
# QEMU keeps a limit in windows of 100 ms, and looks at it after each of multifd's packets (multifd.h).
_WINDOWS_PER_S = 10
_PACKET_BYTES = 512 << 10
_NARROW_BYTES_PER_S = 25_000_000


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What both ends agree on (capabilities) and what each is told (parameters). Rates: bytes a second, 0: no limit."""

    multifd_channels: int = 1  # not more without need, not 0 without need: see `channels`
    postcopy: bool = False
    auto_converge: bool = False
    late_block_activate: bool = False
    validate_uuid: bool = True
    ignore_shared: bool = False  # RAM that is shared memory is not sent, only its blocks are compared
    pause_before_switchover: bool = True
    tls_creds: str = ""  # id of a tls-creds object; "": plain
    tls_hostname: str = ""  # source: what the target's certificate must be for
    tls_authz: str = ""  # target: id of an authz object
    max_bandwidth: int = 0  # bytes a second, the same on both sides; 0: no limit
    downtime_limit_ms: int = 300
    switchover_bandwidth: int = 0  # what QEMU's stop rule reckons with; 0: its own estimate
    max_postcopy_bandwidth: int = 0
    throttle_max_percent: int = 99

    @property
    def channels(self) -> int:
        """The multifd channels really used. Post-copy goes without them (QEMU before 10.1 cannot combine the two).

        Why not none: with the plain stream the target's main loop reads the pages, and touches each zero page. A 512
        MiB guest of mostly zeros left it a backlog of up to 1 s at the switchover and all of its memory allocated; with
        multifd the blackout was 13 ms, and zero pages stayed holes (measured with QEMU 10.0.2).

        Why not several: if the connection breaks in the switchover, the channel that notices wakes the migration
        thread, but the others end silently, and it waits for them forever, holding the big lock: the source's guest is
        lost, and yank does not help (1 in 10 with two channels; multifd_send_sync_main of 10.0.2). One cannot do that.

        Nor with a narrow limit: QEMU looks at it between multifd's packets, which are too large for that.
        """
        narrow = 0 < self.max_bandwidth < _NARROW_BYTES_PER_S
        return 0 if self.postcopy or narrow else self.multifd_channels

    @property
    def limit(self) -> int:
        """What QEMU is told so that `max_bandwidth` is kept: bytes a second, 0 for no limit."""
        if not self.max_bandwidth or not self.channels:
            return self.max_bandwidth
        return self.max_bandwidth - _PACKET_BYTES * _WINDOWS_PER_S


@dataclass(frozen=True, slots=True)
class MemorySample:
    """query-migrate at one moment. Bytes unless named otherwise; None where QEMU does not say (yet)."""

    status: str
    remaining_bytes: int = 0
    transferred_bytes: int = 0
    total_bytes: int = 0
    dirty_sync_count: int = 0
    dirty_pages_rate: int = 0  # pages a second in the last sync interval
    page_size: int = 4096
    mbps: float = 0.0
    throttle_percent: int = 0
    expected_downtime_ms: int | None = None
    downtime_ms: int | None = None
    total_time_ms: int | None = None
    setup_time_ms: int | None = None
    normal_pages: int = 0
    zero_pages: int = 0
    postcopy_requests: int = 0
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    postcopy_bytes: int = 0
    error_desc: str = ""
    blocked_reasons: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the migration is over, well or not."""
        return self.status in _ENDED


@dataclass(frozen=True, slots=True)
class DirtyRate:
    """How much memory the guest wrote to in a window: distinct bytes, a second. `samples` a GiB were looked at.

    QEMU leaves out RAM blocks under 128 MiB: for a smaller guest the rate is 0 and means nothing (`meaningful`).
    """

    bytes_per_s: int
    window_ms: int
    samples: int
    meaningful: bool


async def prepare_source(monitor: Monitor, settings: StreamSettings) -> None:
    """Sets capabilities and parameters on the source. Resets what an earlier attempt left. Raises QmpRefused."""
    await _set_capabilities(monitor, settings, source=True)
    await _set_parameters(monitor, settings, source=True)


async def prepare_incoming(monitor: Monitor, host: str, settings: StreamSettings, port: int = 0) -> int:
    """Makes a QEMU started with `-incoming defer` listen; gives the port. Raises QmpRefused, Failed.

    Where QEMU can (9.1), a failed migration leaves it running with the reason in query-migrate.
    """
    await _set_capabilities(monitor, settings, source=False)
    await _set_parameters(monitor, settings, source=False)
    arguments: dict[str, Any] = {"uri": tcp_uri(host, port)}
    try:
        await monitor.execute("migrate-incoming", arguments={**arguments, "exit-on-error": False})
    except QmpRefused as error:
        # Asked of QEMU, not of its version (it came with 9.1); its schema would take longer to read than this.
        if "exit-on-error" not in error.desc:
            raise
        await monitor.execute("migrate-incoming", arguments=arguments)
    for address in (await monitor.execute("query-migrate")).get("socket-address", ()):
        if "port" in address:
            return int(address["port"])
    raise Failed("no-migration-port", "QEMU does not say on which port it waits for the migration.")


async def start_outgoing(monitor: Monitor, host: str, port: int) -> None:
    """Starts the migration; what becomes of it is told by events. Raises QmpRefused (a blocker, a wrong capability)."""
    await monitor.execute("migrate", uri=tcp_uri(host, port))


def tcp_uri(host: str, port: int) -> str:
    """QEMU's address of a TCP port; an IPv6 address gets its brackets."""
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


def expect_status(monitor: Monitor, *statuses: str) -> asyncio.Future[QmpEvent]:
    """A future of the first MIGRATION event with one of these statuses, armed at once."""
    wanted = frozenset(statuses)
    return monitor.expect("MIGRATION", lambda event: event.data.get("status") in wanted)


async def observe_migration(monitor: Monitor) -> MemorySample:
    """query-migrate as it is now. Status "none" before the first migration."""
    return read_sample(await monitor.execute("query-migrate"))


def read_sample(answer: Mapping[str, Any]) -> MemorySample:
    """A MemorySample of an answer to query-migrate. Pure."""
    ram: Mapping[str, Any] = answer.get("ram") or {}
    return MemorySample(
        status=str(answer.get("status", "none")),
        remaining_bytes=int(ram.get("remaining", 0)),
        transferred_bytes=int(ram.get("transferred", 0)),
        total_bytes=int(ram.get("total", 0)),
        dirty_sync_count=int(ram.get("dirty-sync-count", 0)),
        dirty_pages_rate=int(ram.get("dirty-pages-rate", 0)),
        page_size=int(ram.get("page-size", 4096)),
        mbps=float(ram.get("mbps", 0.0)),
        throttle_percent=int(answer.get("cpu-throttle-percentage", 0)),
        expected_downtime_ms=answer.get("expected-downtime"),
        downtime_ms=answer.get("downtime"),
        total_time_ms=answer.get("total-time"),
        setup_time_ms=answer.get("setup-time"),
        normal_pages=int(ram.get("normal", 0)),
        zero_pages=int(ram.get("duplicate", 0)),
        postcopy_requests=int(ram.get("postcopy-requests", 0)),
        precopy_bytes=int(ram.get("precopy-bytes", 0)),
        downtime_bytes=int(ram.get("downtime-bytes", 0)),
        postcopy_bytes=int(ram.get("postcopy-bytes", 0)),
        error_desc=str(answer.get("error-desc", "")),
        blocked_reasons=tuple(answer.get("blocked-reasons", ())),
    )


async def set_bandwidth(monitor: Monitor, bytes_per_s: int, postcopy_bytes_per_s: int | None = None) -> None:
    """Limits the stream, also while it runs; 0: no limit. (QEMU looks at it at the end of its 100 ms window.)"""
    parameters = {"max-bandwidth": bytes_per_s}
    if postcopy_bytes_per_s is not None:
        parameters["max-postcopy-bandwidth"] = postcopy_bytes_per_s
    await monitor.execute("migrate-set-parameters", arguments=parameters)


async def set_switchover_limit(monitor: Monitor, downtime_ms: int, bandwidth: int | None = None) -> None:
    """QEMU stops the guest once what is left takes at most this long at this rate (bytes/s; 0: its own estimate)."""
    parameters = {"downtime-limit": downtime_ms}
    if bandwidth is not None:
        parameters["avail-switchover-bandwidth"] = bandwidth
    await monitor.execute("migrate-set-parameters", arguments=parameters)


async def set_throttle(monitor: Monitor, initial_percent: int, increment_percent: int, max_percent: int) -> None:
    """How much auto-converge may slow the guest down, also while it runs."""
    await monitor.execute(
        "migrate-set-parameters",
        cpu_throttle_initial=initial_percent,
        cpu_throttle_increment=increment_percent,
        max_cpu_throttle=max_percent,
    )


async def continue_switchover(monitor: Monitor) -> None:
    """Lets a migration that waits at pre-switchover go on with the devices' state. Raises QmpRefused if none waits."""
    await monitor.execute("migrate-continue", state="pre-switchover")


async def cancel(monitor: Monitor) -> None:
    """Cancels; a guest that ran runs again. Nothing happens if none is under way; refused during post-copy."""
    await monitor.execute("migrate_cancel")


async def start_postcopy(monitor: Monitor) -> None:
    """Switches over now and fetches the rest later: from here there is no way back. Raises QmpRefused."""
    await monitor.execute("migrate-start-postcopy")


async def estimate_dirty_rate(monitor: Monitor, window_ms: int = 1000, samples_per_gib: int = 4096) -> DirtyRate:
    """Measures by sampling pages: the only mode that is safe under TCG (qemu-notes 0.4).

    A QEMU before 8.2 measures for whole seconds. Raises QmpRefused (one is under way already).
    """
    arguments = {"sample-pages": samples_per_gib, "mode": "page-sampling"}
    in_ms = {**arguments, "calc-time": window_ms, "calc-time-unit": "millisecond"}
    try:
        await monitor.execute("calc-dirty-rate", arguments=in_ms)
    except QmpRefused as error:
        if "calc-time-unit" not in error.desc:
            raise
        window_ms = -(-window_ms // 1000) * 1000
        await monitor.execute("calc-dirty-rate", arguments={**arguments, "calc-time": window_ms // 1000})
    await asyncio.sleep(window_ms / 1000)
    while (answer := await monitor.execute("query-dirty-rate"))["status"] == "measuring":  # noqa: ASYNC110 QEMU has no event for it
        await asyncio.sleep(_RATE_LOOK_EVERY_S)
    memory = (await monitor.execute("query-memory-size-summary"))["base-memory"]
    rate = int(answer.get("dirty-rate", 0)) << 20
    return DirtyRate(rate, window_ms, samples_per_gib, meaningful=int(memory) >= 128 << 20)


async def _set_capabilities(monitor: Monitor, settings: StreamSettings, source: bool) -> None:
    offered = await observe_capabilities(monitor)
    wanted = {
        "events": True,
        "return-path": True,
        "pause-before-switchover": source and settings.pause_before_switchover,
        "late-block-activate": settings.late_block_activate,
        "validate-uuid": settings.validate_uuid,
        "auto-converge": source and settings.auto_converge,
        "x-ignore-shared": settings.ignore_shared,
        "multifd": settings.channels > 0,
        "postcopy-ram": settings.postcopy,
    }
    missing = sorted(name for name, on in wanted.items() if on and name not in offered)
    if missing:
        raise Failed("capability-missing", f"QEMU here cannot do {', '.join(missing)}.", "Install a newer QEMU.")
    states = [{"capability": name, "state": on} for name, on in wanted.items() if name in offered]
    await monitor.execute("migrate-set-capabilities", capabilities=states)


async def _set_parameters(monitor: Monitor, settings: StreamSettings, source: bool) -> None:
    known = await monitor.execute("query-migrate-parameters")
    wanted: dict[str, Any] = {
        "tls-creds": settings.tls_creds,
        "tls-hostname": settings.tls_hostname if source else "",
        "tls-authz": "" if source else settings.tls_authz,
        "max-bandwidth": settings.limit,
        "max-postcopy-bandwidth": settings.max_postcopy_bandwidth,
        "downtime-limit": settings.downtime_limit_ms,
        "avail-switchover-bandwidth": settings.switchover_bandwidth,
        "max-cpu-throttle": settings.throttle_max_percent,
    }
    if settings.channels:
        wanted["multifd-channels"] = settings.channels
    await monitor.execute("migrate-set-parameters", arguments={k: v for k, v in wanted.items() if k in known})
