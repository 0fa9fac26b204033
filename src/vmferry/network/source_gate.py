"""The source's side of the gate: leads a running VM's incoming frames to the target, and takes them back on rollback.

For `migration/`. Order: `prepare`, `arm`, (target: plug), `close`, guest STOP, `mark`, `drain`, ... then `release`;
or, if the guest stays: `reclaim`, (target: return_frames), `reopen`, `release`.

**All** frames that would enter the port are redirected after `close`, broadcasts too, and the target's own port takes
no broadcasts from its own switch until `announce`. The two hosts cannot change over in the same instant; were both to
take broadcasts for a while, the guest would get them twice, and were neither, an ARP request would be lost. This way
the source alone takes them until the target does so for itself.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from vmferry.network.announce import Announcer, announcement_frames
from vmferry.network.frames import FrameRecorder, FrameSender, Recorded
from vmferry.network.messages import fdb_replace, link_master, observe_link, observe_link_by_index
from vmferry.network.netlink import Netlink, PreparedBatch, aside
from vmferry.network.ports import Port
from vmferry.network.priming import unanswered_frame
from vmferry.network.redirects import (
    ANY_FRAME,
    CLSACT_EGRESS,
    Redirect,
    clsact_new,
    frames_to,
    observe_redirects,
    redirect_delete,
    redirect_new,
)
from vmferry.network.tap import SHORT_HEADER_BYTES, has_frames, read_frames
from vmferry.network.tunnel import TunnelSpec, delete_tunnel, make_tunnel, tunnel_name

EXISTS: Final = frozenset({errno.EEXIST})
GONE: Final = frozenset({errno.ENOENT, errno.EINVAL, errno.ENODEV})
_UNICAST_PRIORITY, _OTHER_PRIORITY = 10, 20
_REMEMBERED_S = 1.0


@dataclass(frozen=True, slots=True)
class GateCounters:
    """What has gone through the gate on this host.

    `frames` and `bytes` are unicast to the VM: they end when the network has learnt the VM's new place. `others`
    (broadcasts) do not end. The kernel counts a GSO frame as its segments, or as 0 where it does not know their
    number, so judge silence by `bytes`. `dropped` are frames lost on this host. `tunnelled` is what the tunnel's
    device sent (source) or received (target), a GSO frame as one: the source's less the target's was lost between
    the hosts (unless a network card split GSO frames on the way).
    """

    frames: int = 0
    bytes: int = 0
    others: int = 0
    dropped: int = 0
    tunnelled: int = 0


class SourceGate:
    """See the module. One migration, one NIC. All methods may be called again after they failed or succeeded."""

    def __init__(
        self, netlink: Netlink, port: Port, tunnel: TunnelSpec, uplinks: Sequence[str], addresses: Sequence[str] = ()
    ) -> None:
        self._netlink = netlink
        self._port = port
        self._spec = tunnel
        self._uplinks = tuple(uplinks)
        self._frames = announcement_frames(port.mac, addresses)
        self._open = ExitStack()
        self._closed = False
        self._prepared: _Prepared | None = None
        self._redirects: tuple[Redirect, ...] = ()
        self._recorder: FrameRecorder | None = None
        self._recorded: list[tuple[bytes, float]] = []
        self._missed = 0  # by the recorder, until it was last emptied
        self._marker = b""
        self._no_room = False  # for the marker: the port's ring was full
        self._sent_for_qemu: list[bytes] = []
        self._lost = 0  # frames that were in no copy, or for which the port had no room
        self._drained = 0
        self._reinjected = 0

    @property
    def closed(self) -> bool:
        return self._closed

    async def prepare(self) -> None:
        """Everything `close` and a rollback need. The VM's traffic is not touched. Raises KernelRefused."""
        if self._prepared is None:
            self._prepared = await aside(self._prepare)

    def _prepare(self) -> _Prepared:
        with ExitStack() as undo:
            tunnel = make_tunnel(self._netlink, self._spec)
            undo.callback(delete_tunnel, self._netlink, tunnel.name)
            self._netlink.run(
                clsact_new(self._port.name, self._port.ifindex),
                # Sticky: the target's announcement comes in through the uplink and would move the entry there, and
                # frames that were on their way to this host would be dropped (seen with frames spread over two CPUs).
                fdb_replace(self._port.ifindex, self._port.mac, sticky=True),
                accept=EXISTS,
            )
            redirects = tuple(
                Redirect(self._port.ifindex, CLSACT_EGRESS, priority, keys, tunnel.index)
                for priority, keys in ((_UNICAST_PRIORITY, frames_to(self._port.mac)), (_OTHER_PRIORITY, ANY_FRAME))
            )
            self._redirects = redirects
            with ExitStack() as opened:
                prepared = self._open_all(opened, tunnel.name, tunnel.index, redirects)
                self._open = opened.pop_all()
            undo.pop_all()
        return prepared

    def _open_all(self, opened: ExitStack, name: str, index: int, redirects: tuple[Redirect, ...]) -> _Prepared:
        netlink, port = self._netlink, self._port
        prepared = _Prepared(
            tunnel_index=index,
            close=netlink.prepare(*(redirect_new(redirect) for redirect in redirects)),
            reopen=netlink.prepare(*(redirect_delete(redirect) for redirect in reversed(redirects))),
            reclaim=netlink.prepare(fdb_replace(port.ifindex, port.mac, sticky=True)),
            forward=opened.enter_context(FrameSender(name)),
            returned=opened.enter_context(FrameRecorder(name, Recorded.INCOMING)),
            inject=opened.enter_context(FrameSender(port.name, bypass=True)),
            announcer=opened.enter_context(Announcer(self._uplinks, self._frames)),
        )
        for batch in (prepared.close, prepared.reopen, prepared.reclaim):
            opened.callback(batch.close)
        return prepared

    def close(self) -> None:
        """From now on every frame for the VM goes to the target. About 0.2 ms, no await.

        Close a few milliseconds before the guest stops, when `settled` soon becomes true: then nothing stays behind
        in QEMU. Raises KernelRefused: the gate is then not, or not fully, closed; `reopen` opens it.
        """
        self._ready().close.fire(accept=EXISTS)
        self._closed = True

    def settled(self) -> bool:
        """Whether the guest's QEMU has emptied the port's ring."""
        return not has_frames(self._port.fd)

    async def settle(self, timeout_ms: float) -> bool:
        """Waits, with the gate closed and the guest running, until the ring stays empty; False if time ran out.

        Seen empty twice, 0.5 ms apart: another CPU may still be putting in a frame that passed just before `close`.
        """
        deadline = asyncio.get_running_loop().time() + timeout_ms / 1000
        seen_empty = 0
        while True:
            seen_empty = seen_empty + 1 if self.settled() else 0
            if seen_empty == 2:
                return True
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(0.0005)

    async def arm(self) -> None:
        """Keeps a copy of what goes into the port from now on (up to 64 MiB), for `drain`.

        Before the guest may stop, because QEMU chooses the moment. Called again it forgets what is older than a second,
        so that there is room. Raises KernelRefused, Failed.
        """
        if self._recorder is None:
            self._recorder = self._open.enter_context(FrameRecorder(self._port.name, Recorded.TO_GUEST))
        fresh = await aside(self._recorder.take_stamped)
        self._missed = self._recorder.missed()
        since = time.time() - _REMEMBERED_S
        self._recorded = [frame for frame in (*self._recorded, *fresh) if frame[1] >= since]

    def mark(self) -> None:
        """Puts a frame of ours into the port, behind all others. With the gate closed and the guest stopped.

        After STOP QEMU reads one frame more and keeps it for a guest that will not run here again (net/tap.c of 10.0
        reads before it asks whether the guest takes it, and then reads no more). Whether it has done so cannot be
        asked, and when it stopped is not known to the millisecond: but once it has looked at its ports again (two
        answers over QMP), the frame is gone if it was the first one to be read, and is there if QEMU has another one.
        No system answers to the frame.

        A full ring has no room for it, and needs none: there is a frame in it for QEMU to look at, and since frames
        are in it that QEMU has not read, the one before them is what QEMU keeps. (A ring is full when its VM has been
        paused for long, or its guest does not drive the NIC.) Raises Failed `frame-not-sent`.
        """
        self._marker = unanswered_frame(self._port)
        self._no_room = not self._ready().inject.offer(self._marker)

    def drain(self) -> int:
        """Sends what the old guest has not got to the target; how many frames. After `mark`, QEMU having looked.

        First the frame that QEMU has kept (`mark`), from the copy that `arm` makes, then those left in the ring. One
        that is in no copy, because `arm` was late or the copy overflowed, counts as dropped. Raises Failed
        `port-read`, `frame-not-sent`.
        """
        assert self._marker, "mark() first"
        left: list[bytes] = []
        while frames := read_frames(self._port.fd, 256):
            left += frames
        unread = [frame for frame in left if not _same(frame, self._marker)]
        kept = self._kept_by_qemu(unread) if left or self._no_room else []
        for frame in kept + unread:
            self._ready().forward.send(frame)
        self._drained += len(kept) + len(unread)
        return len(kept) + len(unread)

    def _kept_by_qemu(self, unread: list[bytes]) -> list[bytes]:
        """The frame before those that it has not read."""
        fresh = self._recorder.take_stamped() if self._recorder is not None else []
        recorded = [frame for frame, _ in (*self._recorded, *fresh) if not _same(frame, self._marker)]
        at = len(recorded) - len(unread)
        while unread and at > 0 and not _same(recorded[at], unread[0]):  # a full ring has dropped what came last
            at -= 1
        if at <= 0 or (self._recorder is not None and self._recorder.missed() > self._missed):
            self._lost += 1
            return []
        self._sent_for_qemu.append(recorded[at - 1])
        return [recorded[at - 1]]

    def reclaim(self) -> None:
        """Rollback, first step: the network leads the VM's frames to this host again; the gate stays closed."""
        self._ready().reclaim.fire(accept=GONE)
        self._ready().announcer.send()

    async def reopen(self, returned: int | None = None, timeout_s: float = 1.0) -> int:
        """Rollback, last step: frames go to the port again; first those that came back, in order.

        `returned` is what the target's `return_frames` said: so many are waited for (at most `timeout_s`) before the
        gate opens; None if the target cannot be asked. Late ones are put into the port as they come, until `release`.
        Gives back all frames that came back so far; those for which the port has no room count as dropped. Whatever
        fails before, the gate is opened. Idempotent. Raises KernelRefused, Failed.
        """
        prepared = self._ready()
        try:
            self.reclaim()
            await self._take_back(returned, timeout_s)
        finally:
            prepared.reopen.fire(accept=GONE)
            self._closed = False
        self._reinject()
        prepared.returned.call_on_arrival(self._reinject)
        return self._reinjected

    async def _take_back(self, returned: int | None, timeout_s: float) -> None:
        deadline = asyncio.get_running_loop().time() + timeout_s
        self._reinject()
        while returned is not None and self._reinjected < returned:
            remaining = deadline - asyncio.get_running_loop().time()
            if remaining <= 0 or not await self._ready().returned.wait(remaining):
                break
            self._reinject()

    def _reinject(self) -> None:
        prepared = self._ready()
        for frame in prepared.returned.take():
            self._reinjected += 1
            if frame in self._sent_for_qemu:  # QEMU has it in its queue and gives it to the guest itself
                self._sent_for_qemu.remove(frame)
            elif not prepared.inject.offer(frame):
                self._lost += 1

    async def traffic(self) -> GateCounters:
        """What the gate has passed on so far. Raises KernelRefused."""
        return await aside(self._traffic)

    def _traffic(self) -> GateCounters:
        found = observe_redirects(self._netlink, self._port.ifindex, CLSACT_EGRESS)
        tunnel = observe_link_by_index(self._netlink, self._ready().tunnel_index)
        unicast, others = found.get(_UNICAST_PRIORITY), found.get(_OTHER_PRIORITY)
        return GateCounters(
            frames=(unicast.frames if unicast else 0) + self._drained,
            bytes=unicast.bytes if unicast else 0,
            others=others.frames if others else 0,
            dropped=tunnel.stat("tx_dropped") + tunnel.stat("tx_errors") + self._lost,
            tunnelled=tunnel.stat("tx_packets"),
        )

    async def release(self, *, guest_stays: bool = False) -> None:
        """Ends it. If the gate is closed the port leaves its switch first: frames must not go to a guest that left.

        With `guest_stays` it does not: a gate that could not be reopened is opened by this. Idempotent, also after a
        failed `prepare`, and if port or tunnel are gone. Raises KernelRefused.
        """
        self._open.close()
        self._prepared = self._recorder = None
        await aside(self._release, guest_stays)

    def _release(self, guest_stays: bool) -> None:
        port = self._port
        link = observe_link(self._netlink, port.name)
        if link is not None and link.index == port.ifindex:
            leaves = self._closed and not guest_stays
            if leaves:
                self._netlink.run(link_master(port.name, port.ifindex, 0))
            self._netlink.run(*(redirect_delete(redirect) for redirect in self._redirects), accept=GONE)
            if link.master and not leaves:
                self._netlink.run(fdb_replace(port.ifindex, port.mac, sticky=False), accept=GONE)
        delete_tunnel(self._netlink, tunnel_name(self._spec.migration_id, self._spec.index))

    def _ready(self) -> _Prepared:
        assert self._prepared is not None, "prepare() first"
        return self._prepared


def _same(one: bytes, other: bytes) -> bool:
    """Whether two frames are the same but for their metadata."""
    return one[SHORT_HEADER_BYTES:] == other[SHORT_HEADER_BYTES:]


@dataclass(frozen=True, slots=True)
class _Prepared:
    tunnel_index: int
    close: PreparedBatch
    reopen: PreparedBatch
    reclaim: PreparedBatch
    forward: FrameSender
    returned: FrameRecorder
    inject: FrameSender
    announcer: Announcer
