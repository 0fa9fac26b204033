"""The source's side of a disk's way: mirrors to NBD targets, what is observed of them, their end; dirty bitmaps.

Used by `migration/`. A mirror starts in the background mode and, once ready, is switched to write-blocking, where every
guest write reaches the target before it is acknowledged: then nothing is left to be copied when the guest stops.
The sparse recipe (qemu-notes 0.9): the source's NBD node finds zeros and passes discards on; the target's nodes
(`command`) do too.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmferry.model.errors import Failed
from vmferry.qemu.monitor import Monitor, QmpEvent, QmpLost, QmpRefused

_JOB_EVENTS = ("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_ERROR")
_SYNC_LOOK_EVERY_S = 0.01


_UNHARMED = "The guest is unharmed. Look at the target's pool (full?) and at the migration network, then migrate again."


class MirrorFailed(Failed):
    """A mirror ended with an error. The guest is unharmed, the target is no copy."""

    def __init__(self, job_id: str, reason: str) -> None:
        super().__init__("mirror-failed", f"The copy of disk {job_id} broke off: {reason}.", _UNHARMED)
        self.job_id = job_id


@dataclass(frozen=True, slots=True)
class NbdTarget:
    """An export on another QEMU, as a node of this one. `tls_creds`: id of a client's tls-creds object; "": plain."""

    node: str
    host: str
    port: int
    export: str
    tls_creds: str = ""
    tls_hostname: str = ""


@dataclass(frozen=True, slots=True)
class MirrorSample:
    """query-block-jobs for one mirror. Bytes; `length` grows when the guest writes, and counts the holes of raw images.

    `actively_synced` is None where QEMU does not say (before 8.2, or in the background mode's first copy).
    """

    job_id: str
    offset: int
    length: int
    speed: int
    ready: bool
    actively_synced: bool | None
    status: str
    error: str


class Mirror:
    """A running mirror. `ready` and `ended` are futures, armed before the job was started.

    `ready`: the target has caught up once; fails with MirrorFailed if the job ends before.
    `ended`: the job is over and the target is a copy; fails with MirrorFailed if it is not.
    """

    def __init__(self, monitor: Monitor, job_id: str, device_node: str, target_node: str) -> None:
        loop = asyncio.get_running_loop()
        self.job_id = job_id
        self.device_node = device_node
        self.target_node = target_node
        self.ready: asyncio.Future[QmpEvent] = loop.create_future()
        self.ended: asyncio.Future[QmpEvent] = loop.create_future()
        for future in (self.ready, self.ended):
            future.add_done_callback(_look_at)
        self._last_error = ""
        self._stop = [monitor.listen(_JOB_EVENTS, self._on_event), monitor.on_lost(self._on_lost)]

    def forget(self) -> None:
        """Stops listening. The job itself is not touched."""
        for stop in self._stop:
            stop()

    def _on_event(self, event: QmpEvent) -> None:
        if event.data.get("device") != self.job_id:
            return
        if event.name == "BLOCK_JOB_READY":
            _resolve(self.ready, event)
        elif event.name == "BLOCK_JOB_ERROR":
            self._last_error = f"{event.data.get('operation')} error"
        elif event.name == "BLOCK_JOB_COMPLETED" and "error" not in event.data:
            _resolve(self.ended, event)
            self._fail(MirrorFailed(self.job_id, "it ended before it was ready"))
        elif event.name == "BLOCK_JOB_COMPLETED":
            details = f" ({self._last_error})" if self._last_error else ""
            self._fail(MirrorFailed(self.job_id, f"{event.data['error']}{details}"))
        else:
            self._fail(MirrorFailed(self.job_id, "it was cancelled"))

    def _on_lost(self, error: QmpLost) -> None:
        self._fail(error)

    def _fail(self, error: Failed) -> None:
        for future in (self.ready, self.ended):
            if not future.done():
                future.set_exception(error)


async def add_nbd_target(monitor: Monitor, target: NbdTarget) -> None:
    """Connects to an export and makes it a node. Raises QmpRefused (no such export, wrong certificate, no answer)."""
    node: dict[str, Any] = {
        "driver": "nbd",
        "node-name": target.node,
        "server": {"type": "inet", "host": target.host, "port": str(target.port)},
        "export": target.export,
        "discard": "unmap",
        "detect-zeroes": "unmap",
        # Each flush here would be an fdatasync there, several of them while the guest stands still. The target's side
        # writes its images out by itself, before the guest may run there (`TargetMigration.await_loaded`).
        "cache": {"no-flush": True},
    }
    if target.tls_creds:
        node["tls-creds"] = target.tls_creds
        if target.tls_hostname:
            node["tls-hostname"] = target.tls_hostname
    await monitor.execute("blockdev-add", arguments=node)


async def start_mirror(
    monitor: Monitor, device_node: str, target: str, job_id: str, speed: int = 0, sync: str = "full"
) -> Mirror:
    """Starts copying a device's node to a target node in the background. Speed in bytes a second; 0: no limit.

    `sync`: "full" copies what the guest sees, "top" only the top layer (the target has the same layers below).
    Raises QmpRefused.
    """
    mirror = Mirror(monitor, job_id, device_node, target)
    arguments: dict[str, Any] = {
        "job-id": job_id,
        "device": device_node,
        "target": target,
        "sync": sync,
        "copy-mode": "background",
        "speed": speed,
        "on-source-error": "report",
        "on-target-error": "report",
        "auto-dismiss": False,
    }
    try:
        await monitor.execute("blockdev-mirror", arguments=arguments)
    except BaseException:
        mirror.forget()
        raise
    return mirror


async def set_mirror_speed(monitor: Monitor, mirror: Mirror, speed: int) -> None:
    """Limits a running mirror (bytes a second; 0: no limit). Raises QmpRefused if it has ended."""
    await monitor.execute("block-job-set-speed", device=mirror.job_id, speed=speed)


async def make_write_blocking(monitor: Monitor, mirrors: Sequence[Mirror], deadline_s: float = 30.0) -> bool:
    """From now on guest writes wait for the target; gives True when all mirrors are known to be in step.

    For mirrors that are ready. False after the deadline (the guest writes faster than the network takes it, or this
    QEMU cannot switch: before 8.2). There is no way back but cancelling. Raises MirrorFailed, QmpRefused.
    """
    for mirror in mirrors:
        arguments = {"id": mirror.job_id, "type": "mirror", "copy-mode": "write-blocking"}
        try:
            await monitor.execute("block-job-change", arguments=arguments)
        except QmpRefused as error:
            if error.error_class != "CommandNotFound":
                raise
            return False
    until = asyncio.get_running_loop().time() + deadline_s
    while not await all_in_step(monitor, mirrors):
        if asyncio.get_running_loop().time() > until:
            return False
        await asyncio.sleep(_SYNC_LOOK_EVERY_S)  # QEMU has no event for it
    return True


async def all_in_step(monitor: Monitor, mirrors: Sequence[Mirror]) -> bool:
    """Whether all mirrors are ready and actively synced now. Raises MirrorFailed if one has ended."""
    for mirror in mirrors:
        if mirror.ended.done():
            mirror.ended.result()
    samples = {sample.job_id: sample for sample in await observe_mirrors(monitor)}
    found = [samples.get(mirror.job_id) for mirror in mirrors]
    return all(sample is not None and sample.ready and sample.actively_synced for sample in found)


async def finish_mirrors(monitor: Monitor, mirrors: Sequence[Mirror]) -> None:
    """Ends all mirrors at once so that each target is an exact copy (the guest must be stopped by then).

    The jobs and the target nodes are still there afterwards: `clean_mirrors` may wait until after the blackout.
    Raises MirrorFailed: then the targets are no copies.
    """
    orders = (monitor.execute("block-job-cancel", device=mirror.job_id) for mirror in mirrors)
    # Not job-cancel: that one means "give up" for a mirror that is ready (qemu-notes 0.11).
    # Shielded: whoever gives up waiting must still be able to wait for their end when it cancels them.
    await asyncio.gather(*orders, *(asyncio.shield(mirror.ended) for mirror in mirrors))


async def clean_mirrors(monitor: Monitor, mirrors: Sequence[Mirror]) -> None:
    """Removes ended jobs and their target nodes. What is gone already is fine. Raises QmpRefused (a node in use)."""
    for mirror in mirrors:
        mirror.forget()
        with contextlib.suppress(QmpRefused):
            await monitor.execute("job-dismiss", id=mirror.job_id)
        await remove_node(monitor, mirror.target_node)


async def cancel_mirrors(monitor: Monitor, mirrors: Sequence[Mirror]) -> None:
    """Gives up all mirrors, whatever state they are in, and removes their nodes. The guest is not touched.

    If a target hangs, this takes until the connection is cut: `Monitor.yank` with `yank_node` does that.
    """
    for mirror in mirrors:
        with contextlib.suppress(QmpRefused):  # it has ended by itself
            await monitor.execute("block-job-cancel", device=mirror.job_id, force=True)
    for mirror in mirrors:
        if any(sample.job_id == mirror.job_id for sample in await observe_mirrors(monitor)):
            with contextlib.suppress(MirrorFailed):
                await mirror.ended
    await clean_mirrors(monitor, mirrors)


async def remove_node(monitor: Monitor, node: str) -> None:
    """Removes a node; one that is not there is fine. Raises QmpRefused if it is in use."""
    try:
        await monitor.execute("blockdev-del", node_name=node)
    except QmpRefused:
        nodes = await monitor.execute("query-named-block-nodes", flat=True)
        if any(entry["node-name"] == node for entry in nodes):
            raise


async def observe_mirrors(monitor: Monitor) -> tuple[MirrorSample, ...]:
    """All mirror jobs there are, running or concluded."""
    jobs = await monitor.execute("query-block-jobs")
    return tuple(read_mirror(job) for job in jobs if job["type"] == "mirror")


async def observe_mirror(monitor: Monitor, job_id: str) -> MirrorSample:
    """One mirror. Raises MirrorFailed if there is no such job (any more)."""
    for sample in await observe_mirrors(monitor):
        if sample.job_id == job_id:
            return sample
    raise MirrorFailed(job_id, "there is no such job")


def read_mirror(job: Mapping[str, Any]) -> MirrorSample:
    """A MirrorSample of an entry of query-block-jobs. Pure."""
    return MirrorSample(
        job_id=str(job["device"]),
        offset=int(job["offset"]),
        length=int(job["len"]),
        speed=int(job.get("speed", 0)),
        ready=bool(job["ready"]),
        actively_synced=job.get("actively-synced"),
        status=str(job["status"]),
        error=str(job.get("error", "")),
    )


async def add_bitmap(monitor: Monitor, node: str, name: str, granularity_bytes: int = 65536) -> None:
    """Starts recording which parts of a node are written to. Lives in memory only. Raises QmpRefused."""
    await monitor.execute("block-dirty-bitmap-add", node=node, name=name, granularity=granularity_bytes)


async def clear_bitmap(monitor: Monitor, node: str, name: str) -> None:
    """Forgets what was recorded. Raises QmpRefused."""
    await monitor.execute("block-dirty-bitmap-clear", node=node, name=name)


async def freeze_bitmap(monitor: Monitor, node: str, name: str) -> None:
    """Stops recording, keeps the marks: what a read-only export demands of its bitmaps. Raises QmpRefused."""
    await monitor.execute("block-dirty-bitmap-disable", node=node, name=name)


async def remove_bitmap(monitor: Monitor, node: str, name: str) -> None:
    """Stops recording. Raises QmpRefused (while it is exported)."""
    await monitor.execute("block-dirty-bitmap-remove", node=node, name=name)


async def observe_bitmap(monitor: Monitor, node: str, name: str) -> int:
    """How many bytes are marked. Raises Failed `bitmap-not-found`."""
    for entry in await monitor.execute("query-named-block-nodes", flat=True):
        if entry["node-name"] == node:
            for bitmap in entry.get("dirty-bitmaps", ()):
                if bitmap.get("name") == name:
                    return int(bitmap["count"])
    raise Failed("bitmap-not-found", f"Node {node} has no bitmap {name}.")


def job_ids(mirrors: Iterable[Mirror]) -> list[str]:
    """The ids of the jobs."""
    return [mirror.job_id for mirror in mirrors]


def _resolve(future: asyncio.Future[QmpEvent], event: QmpEvent) -> None:
    if not future.done():
        future.set_result(event)


def _look_at(future: asyncio.Future[QmpEvent]) -> None:
    if not future.cancelled():
        future.exception()  # a mirror nobody waits for any more gets no warning from asyncio
