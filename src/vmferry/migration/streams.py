"""The encryption of the memory and disk streams: TLS objects inside both QEMUs, from the host's stream certificates.

A guest's QEMU never holds the host's own identity, only `stream.<host>` (vmferry.api.pki). Each side lets in, and talks
to, only the other host of this migration.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from vmferry.migration.host_parts import HostParts
from vmferry.model.names import stream_identity
from vmferry.qemu.exports import NbdTls
from vmferry.qemu.monitor import Monitor, QmpRefused
from vmferry.qemu.tls import add_authorization, add_tls, remove_object


@dataclass(frozen=True, slots=True)
class TlsNames:
    """Ids of the objects inside a QEMU; empty where the streams are not encrypted."""

    creds_id: str
    authz_id: str

    def creds(self, parts: HostParts) -> str:
        """The credentials' id, or ""."""
        return self.creds_id if parts.stream_dir else ""

    def authz(self, parts: HostParts) -> str:
        """The authorization's id, or ""."""
        return self.authz_id if parts.stream_dir else ""

    def nbd(self, parts: HostParts) -> NbdTls | None:
        """For the NBD server."""
        return NbdTls(self.creds_id, self.authz_id) if parts.stream_dir else None


SOURCE_TLS = TlsNames("stream-client", "")
TARGET_TLS = TlsNames("stream-server", "stream-peers")


async def add_source_tls(parts: HostParts, monitor: Monitor) -> None:
    """Loads the source's credentials anew (they may have been renewed since the guest was started)."""
    await remove_tls(monitor, SOURCE_TLS)
    if parts.stream_dir:
        await add_tls(monitor, SOURCE_TLS.creds_id, parts.stream_dir, "client")


async def add_target_tls(parts: HostParts, monitor: Monitor, source: str) -> None:
    """Loads the target's credentials and lets in the source's QEMU, and ourselves for the verification."""
    if parts.stream_dir:
        await add_tls(monitor, TARGET_TLS.creds_id, parts.stream_dir, "server")
        await add_authorization(monitor, TARGET_TLS.authz_id, [stream_identity(source), stream_identity(parts.name)])


async def remove_tls(monitor: Monitor, names: TlsNames) -> None:
    """Removes the objects; those that are not there are fine."""
    for object_id in (names.creds_id, names.authz_id):
        if object_id:
            with contextlib.suppress(QmpRefused):
                await remove_object(monitor, object_id)
