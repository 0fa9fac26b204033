"""The target's side of the gate: the new port as the place where the VM's frames wait, and its opening.

For `migration/`. Order: `prepare`, `plug`, (source: close, drain), `listen`, guest RESUME, `announce`, ... `release`;
or, if the guest stays on the source: (source: reclaim), `return_frames`, (source: reopen), `release`.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from vmferry.network.announce import Announcer, announcement_frames
from vmferry.network.broadcasts import BroadcastHandover
from vmferry.network.frames import FrameRecorder, FrameSender, Recorded
from vmferry.network.messages import (
    bridge_port_floods,
    fdb_delete,
    fdb_replace,
    link_master,
    observe_link,
    observe_link_by_index,
)
from vmferry.network.netlink import Netlink, PreparedBatch, aside
from vmferry.network.ports import Port, enslave_quietly
from vmferry.network.redirects import (
    ANY_FRAME,
    CLSACT_INGRESS,
    GROUP_FRAME,
    UNICAST_FRAME,
    Redirect,
    clsact_new,
    observe_redirects,
    redirect_delete,
    redirect_new,
)
from vmferry.network.source_gate import EXISTS, GONE, GateCounters
from vmferry.network.tunnel import TunnelSpec, delete_tunnel, make_tunnel, tunnel_name

_REFLECT_PRIORITY, _GROUP_PRIORITY, _UNICAST_PRIORITY = 5, 10, 20
_NONE: Final = frozenset({errno.ENOENT})


class TargetGate:
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
        self._prepared: _Prepared | None = None
        self._returned = 0
        self._announced = False
        self._handover: BroadcastHandover | None = None
        self._dropped_in_tunnel = 0

    async def prepare(self) -> None:
        """Tunnel into the new port, the port in its switch but deaf to it, everything built that `plug` needs.

        The port is put into the switch now (leaving out flooding, and with no table entry for its MAC no frame comes
        through it) because joining a bridge costs milliseconds and, with spanning tree, seconds. Raises NotFound
        `switch-missing`, KernelRefused.
        """
        if self._prepared is None:
            self._prepared = await aside(self._prepare)

    def _prepare(self) -> _Prepared:
        port, netlink = self._port, self._netlink
        with ExitStack() as undo:
            enslave_quietly(netlink, port)
            tunnel = make_tunnel(netlink, self._spec)
            undo.callback(delete_tunnel, netlink, tunnel.name)
            group = Redirect(tunnel.index, CLSACT_INGRESS, _GROUP_PRIORITY, GROUP_FRAME, port.ifindex)
            unicast = Redirect(tunnel.index, CLSACT_INGRESS, _UNICAST_PRIORITY, UNICAST_FRAME, port.ifindex)
            with ExitStack() as opened:
                prepared = self._open_all(opened, tunnel.name, tunnel.index, group)
                netlink.run(clsact_new(tunnel.name, tunnel.index), redirect_new(group), redirect_new(unicast))
                self._open = opened.pop_all()
            undo.pop_all()
        return prepared

    def _open_all(self, opened: ExitStack, name: str, index: int, group: Redirect) -> _Prepared:
        netlink, port = self._netlink, self._port
        prepared = _Prepared(
            tunnel_index=index,
            plug=netlink.prepare(fdb_replace(port.ifindex, port.mac, sticky=True)),
            take_over=netlink.prepare(
                redirect_delete(group),
                bridge_port_floods(port.name, port.ifindex, floods=True),
                fdb_replace(port.ifindex, port.mac, sticky=False),
            ),
            give_back=netlink.prepare(
                bridge_port_floods(port.name, port.ifindex, floods=False), fdb_delete(port.ifindex, port.mac)
            ),
            reflect=netlink.prepare(redirect_new(Redirect(index, CLSACT_INGRESS, _REFLECT_PRIORITY, ANY_FRAME, index))),
            record=opened.enter_context(FrameRecorder(port.name, Recorded.TO_GUEST)),
            back=opened.enter_context(FrameSender(name)),
            inject=opened.enter_context(FrameSender(port.name, bypass=True)),
            announcer=opened.enter_context(Announcer(self._uplinks, self._frames)),
        )
        for batch in (prepared.plug, prepared.take_over, prepared.give_back, prepared.reflect):
            opened.callback(batch.close)
        return prepared

    def plug(self) -> None:
        """The switch leads the VM's frames to the new port, where they wait, and the network is told. No await.

        The table entry is sticky until `announce`: the guest still speaks on the source, and its frames would move
        the entry to the uplink. Broadcasts come through the tunnel only (see `source_gate`). Raises KernelRefused.
        """
        prepared = self._ready()
        prepared.plug.fire()
        prepared.announcer.send()

    def held(self) -> int:
        """Frames put into the port so far: until the guest resumes, those that wait for it."""
        return self._ready().record.seen()

    def listen(self) -> None:
        """Records broadcasts at the uplinks, for the repair of the change-over. About 0.2 ms, no await. Idempotent.

        Some milliseconds after the source's gate was closed: a broadcast that the guest still got there must not come
        by the uplink here after this. And some before `announce`: one that is in the tunnel then, and so is cut off,
        must have come by the uplink after this. Raises KernelRefused.
        """
        if self._handover is None and not self._announced:
            self._handover = self._open.enter_context(BroadcastHandover(self._uplinks, self._ready().record))

    def announce(self) -> int:
        """After RESUME: the port takes broadcasts from its own switch, no longer through the tunnel; the network is
        told (once: see `announcer` for rounds). Gives back the announcements accepted. `complete` it afterwards.

        Idempotent. No await, under 1 ms. Raises KernelRefused.
        """
        prepared = self._ready()
        if not self._announced:
            self._dropped_in_tunnel = self._tunnel_drops()
            self.listen()
        prepared.take_over.fire(accept=_NONE)
        self._announced = True
        return prepared.announcer.send()

    async def complete(self, after_s: float = 0.1) -> int:
        """After `announce`: waits until what was in the tunnel has come, and puts in broadcasts that fell between.

        Gives back how many. Ends the recording of the port's frames. Idempotent. Raises Failed.
        """
        if self._handover is None:
            return 0
        await asyncio.sleep(after_s)
        handover, self._handover = self._handover, None
        if handover is None:
            return 0
        with handover:
            repaired = await aside(handover.repair, self._ready().inject)
        self._ready().record.close()
        return repaired

    @property
    def announcer(self) -> Announcer:
        """For `announce_rounds` after `announce`. Closed by `release`."""
        return self._ready().announcer

    async def return_frames(self) -> int:
        """Rollback: the port hears its switch no more, and every frame that was put into it goes back, in order.

        All of them, whether or not QEMU has read them already: the guest has not run here. What comes through the
        tunnel from then on is sent straight back. Only before the guest has run. Gives back the number of all frames
        returned so far. Idempotent. Raises KernelRefused, Failed.
        """
        return await aside(self._return_frames)

    def _return_frames(self) -> int:
        prepared = self._ready()
        prepared.give_back.fire(accept=GONE)
        self._send_back()
        prepared.reflect.fire(accept=EXISTS)
        self._send_back()
        return self._returned

    def _send_back(self) -> None:
        prepared = self._ready()
        for frame in prepared.record.take():
            prepared.back.send(frame)
            self._returned += 1

    async def traffic(self) -> GateCounters:
        """What has come through the tunnel, and what was dropped: the port's ring full, or in the tunnel."""
        return await aside(self._traffic)

    def _traffic(self) -> GateCounters:
        tunnel = observe_link_by_index(self._netlink, self._ready().tunnel_index)
        port = observe_link_by_index(self._netlink, self._port.ifindex)
        found = observe_redirects(self._netlink, tunnel.index, CLSACT_INGRESS)
        unicast, group = found.get(_UNICAST_PRIORITY), found.get(_GROUP_PRIORITY)
        # After `announce` the tunnel drops broadcasts on purpose, and the kernel counts them as any other drop.
        in_tunnel = self._dropped_in_tunnel if self._announced else self._tunnel_drops()
        return GateCounters(
            frames=unicast.frames if unicast else 0,
            bytes=unicast.bytes if unicast else 0,
            others=group.frames if group else 0,
            dropped=port.stat("tx_dropped") + in_tunnel,
            tunnelled=tunnel.stat("rx_packets"),
        )

    def _tunnel_drops(self) -> int:
        tunnel = observe_link_by_index(self._netlink, self._ready().tunnel_index)
        return tunnel.stat("rx_dropped") + tunnel.stat("rx_errors")

    async def release(self) -> None:
        """Ends the tunnel. The port stays; if it was never announced it leaves its switch. Idempotent."""
        if self._announced:  # else the guest stays on the source, and gets them there
            await self.complete()
        self._open.close()
        self._handover = None
        self._prepared = None
        await aside(self._release)

    def _release(self) -> None:
        port = self._port
        if not self._announced:
            link = observe_link(self._netlink, port.name)
            if link is not None and link.index == port.ifindex:
                self._netlink.run(link_master(port.name, port.ifindex, 0))
        delete_tunnel(self._netlink, tunnel_name(self._spec.migration_id, self._spec.index))

    def _ready(self) -> _Prepared:
        assert self._prepared is not None, "prepare() first"
        return self._prepared


@dataclass(frozen=True, slots=True)
class _Prepared:
    tunnel_index: int
    plug: PreparedBatch
    take_over: PreparedBatch
    give_back: PreparedBatch
    reflect: PreparedBatch
    record: FrameRecorder
    back: FrameSender
    inject: FrameSender
    announcer: Announcer
