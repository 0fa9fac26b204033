"""The rehearsal: un-booted twins of the guest, the same devices without images, migrate from host to host.

It takes well under a second and finds every mismatch that QEMU would otherwise find only after all memory was sent
(machine, RAM blocks, PCI addresses, device properties, TLS). It does not exercise features that a booted guest has
negotiated, nor its disks.
"""

from __future__ import annotations

import asyncio
import secrets

from vmferry.migration.guest import RunningGuest, build_twin, dismantle
from vmferry.migration.host_parts import HostParts
from vmferry.migration.link import PeerLink
from vmferry.migration.messages import EndRehearsal, RehearsalEnded, RehearsalReady, Rehearse
from vmferry.migration.streams import SOURCE_TLS, TARGET_TLS, add_source_tls, add_target_tls
from vmferry.migration.undoing import to_the_end
from vmferry.model.errors import VmferryError
from vmferry.model.findings import Finding, Severity
from vmferry.model.names import stream_name
from vmferry.model.vm import VmSpec
from vmferry.qemu.connections import prepare_listeners
from vmferry.qemu.memory_stream import (
    StreamSettings,
    expect_status,
    observe_migration,
    prepare_incoming,
    prepare_source,
    start_outgoing,
)

_LIMIT_S = 20.0
# Reading the twin's empty memory in order to send it would allocate all of it, and take a minute for a large guest.
_IGNORE = "x-ignore-shared"


class TargetTwin:
    """The target's twin of one rehearsal."""

    def __init__(self, parts: HostParts, twin: RunningGuest) -> None:
        self._parts = parts
        self._twin = twin

    @classmethod
    async def start(
        cls, parts: HostParts, spec: VmSpec, source: str, streams_from: str, nonce: str
    ) -> tuple[TargetTwin, RehearsalReady]:
        """Starts the twin and lets it listen. Raises Failed `guest-start` with QEMU's own words."""
        twin = await build_twin(parts, spec, nonce, incoming=True)
        try:
            await add_target_tls(parts, twin.monitor, source)
            settings = StreamSettings(
                ignore_shared=_IGNORE in parts.features.capabilities,
                tls_creds=TARGET_TLS.creds(parts),
                tls_authz=TARGET_TLS.authz(parts),
                pause_before_switchover=False,
            )
            port = await prepare_incoming(twin.monitor, parts.address, settings)
            await asyncio.to_thread(prepare_listeners, twin.process, (streams_from,))
        except BaseException:
            await asyncio.shield(dismantle(parts, twin))
            raise
        return cls(parts, twin), RehearsalReady(port)

    async def end(self) -> RehearsalEnded:
        """How it went; the twin is gone afterwards."""
        try:
            if not self._twin.process.running:
                return RehearsalEnded(False, " / ".join(self._twin.process.log_tail(3)))
            done = expect_status(self._twin.monitor, "completed", "failed")
            try:
                sample = await observe_migration(self._twin.monitor)
                if not sample.ended:
                    await asyncio.wait_for(done, _LIMIT_S)
                    sample = await observe_migration(self._twin.monitor)
            finally:
                done.cancel()
            problem = sample.error_desc or " / ".join(self._twin.process.log_tail(3))
            return RehearsalEnded(sample.status == "completed", "" if sample.status == "completed" else problem)
        except TimeoutError:
            return RehearsalEnded(False, f"the twin's stream did not end within {_LIMIT_S:g} s")
        except VmferryError as error:
            return RehearsalEnded(False, " / ".join(self._twin.process.log_tail(3)) or error.message)
        finally:
            await self.remove()

    async def remove(self) -> None:
        """The twin is gone afterwards. Idempotent."""
        await to_the_end(dismantle(self._parts, self._twin))


async def rehearse(parts: HostParts, link: PeerLink, spec: VmSpec) -> Finding:
    """Runs the rehearsal and says how it went. Nothing is left on either side.

    Given up, it leaves nothing here; the target's twin, which may have nobody to wait for, goes with the link.
    """
    nonce = secrets.token_hex(8)
    starting = asyncio.create_task(build_twin(parts, spec, nonce, incoming=False))
    try:
        ready = await link.call(Rehearse(spec, nonce, link.local_address), RehearsalReady, _LIMIT_S)
    except VmferryError as error:
        await to_the_end(_end_own(parts, starting))
        return _failed(link.peer, f"{link.peer} could not build the same machine: {error.message}")
    except BaseException:
        await to_the_end(_end_own(parts, starting))
        raise
    try:
        problem = await _send(parts, link, await starting, ready.port)
    except VmferryError as error:
        problem = error.message
    finally:
        await to_the_end(_end_own(parts, starting))
    ended = await link.call(EndRehearsal(nonce), RehearsalEnded, _LIMIT_S * 2)
    if ended.ok and not problem:
        return Finding("rehearsal", Severity.OK, "A twin of the guest was migrated and accepted.", "", link.peer)
    return _failed(link.peer, f"A twin of the guest was not accepted: {ended.problem or problem}")


def _failed(host: str, message: str) -> Finding:
    fix = "Compare QEMU's version, machine type and CPU on both hosts; `vmferry host probe` shows them."
    return Finding("rehearsal-failed", Severity.ERROR, message, fix, host)


async def _end_own(parts: HostParts, starting: asyncio.Task[RunningGuest]) -> None:
    starting.cancel()  # it may be up, or not yet
    await asyncio.wait([starting])
    if not starting.cancelled() and starting.exception() is None:
        await dismantle(parts, starting.result())


async def _send(parts: HostParts, link: PeerLink, twin: RunningGuest, port: int) -> str:
    """Migrates our twin; what went wrong, or ""."""
    await add_source_tls(parts, twin.monitor)
    settings = StreamSettings(
        ignore_shared=_IGNORE in parts.features.capabilities,
        tls_creds=SOURCE_TLS.creds(parts),
        tls_hostname=stream_name(link.peer) if parts.stream_dir else "",
        pause_before_switchover=False,
    )
    await prepare_source(twin.monitor, settings)
    done = expect_status(twin.monitor, "completed", "failed")
    try:
        await start_outgoing(twin.monitor, link.peer_address, port)
        event = await asyncio.wait_for(done, _LIMIT_S)
    except TimeoutError:
        return f"the twin's stream took longer than {_LIMIT_S:g} s"
    finally:
        done.cancel()
    if event.data["status"] == "completed":
        return ""
    return (await observe_migration(twin.monitor)).error_desc or "the twin's stream broke off"
