"""vmferryd put together: from its settings to the running parts, and their orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import platform
import pwd
import shutil
import ssl
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from aiohttp import web

from vmferry.api.identity import certificate_expiry, identity_name, stream_dir
from vmferry.api.pki import peer_host_name
from vmferry.api.tls import client_context, server_context
from vmferry.host import log
from vmferry.host.config import HostConfig
from vmferry.host.creation import VmFiles
from vmferry.host.doors import Doors
from vmferry.host.incoming import Incoming
from vmferry.host.joining import Joining
from vmferry.host.journal import Journal
from vmferry.host.migration_views import MigrationViews
from vmferry.host.migrations import Migrations
from vmferry.host.peering import fetch_host
from vmferry.host.peers import Peers
from vmferry.host.strays import end_processes_of
from vmferry.host.vms import Vms, observe_free_memory
from vmferry.migration.gates import remove_gate_leftovers
from vmferry.migration.host_parts import EngineLimits, HostParts
from vmferry.migration.records import MigrationRecord, RecordState
from vmferry.model.errors import Conflict, NotFound, VmferryError, WrongInput
from vmferry.model.migration import Role
from vmferry.model.views import HostView, PoolView, SwitchView
from vmferry.network.netlink import Netlink
from vmferry.network.switches import SwitchConfig, ensure_switch, observe_switch
from vmferry.qemu.accel import Acceleration, observe_acceleration
from vmferry.qemu.features import observe_features
from vmferry.qemu.process import GuestUser
from vmferry.storage.pool import DirectoryPool


class Daemon:
    """One host's vmferryd. `run` serves until `stop` is called."""

    def __init__(self, config: HostConfig) -> None:
        self.config = config
        self._stopping = asyncio.Event()
        self._accel = Acceleration("tcg", "not probed")

    def stop(self) -> None:
        """Asks it to end. Guests run on; migrations under way are waited for."""
        self._stopping.set()

    async def run(self) -> None:
        """Starts everything, serves, ends everything. Raises VmferryError with what is wrong at the start."""
        config = self.config
        await asyncio.to_thread(_make_directories, config)
        lock = await asyncio.to_thread(_lock_state, config.state_dir)
        try:
            self.journal = Journal(config.state_dir / "journal.sqlite")
            await self.journal.open()
            self._netlink = Netlink()
            self.parts = await self._gather_parts()
            await self._build()
            doors = Doors(self)
            await doors.open()
            log.event("ready", host=config.name, accel=self.parts.accel, socket=str(config.socket_path))
            await self._stopping.wait()
            log.event("stopping")
            await self.migrations.close()
            await self.incoming.close()
            await doors.close()
            await self.vms.close()
            await self.journal.close()
        finally:
            os.close(lock)

    async def _build(self) -> None:
        config, parts = self.config, self.parts
        self.peers = Peers(config, self.journal, self._client_context)
        await self.peers.load()
        self.views = MigrationViews(self.journal, config.name)
        await self.views.load()
        self.vms = Vms(parts, self.journal, VmFiles(parts))
        self.joining = Joining(config, self.journal, self.peers)
        self.migrations = Migrations(parts, self.journal, self.vms, self.peers, self.views, config.tls_dir)
        self.incoming = Incoming(parts, self.journal, self.vms, self.peers, self.views, config.tls_dir)
        await self._recover()

    async def _recover(self) -> None:
        """What an earlier life left: guests are adopted, unfinished migrations go on or are undone."""
        records = await self.journal.list_migrations()
        open_records = [record for record in records if record.state is not RecordState.ENDED]
        outgoing = {r.vm_id: r.id for r in open_records if r.role is Role.SOURCE}
        # Twins of rehearsals that were cut short; they were never anything.
        twins = self.config.run_dir / "twins"
        await end_processes_of(str(twins))
        await asyncio.to_thread(shutil.rmtree, twins, ignore_errors=True)
        await self.vms.load(outgoing)
        # First of all the guests that are ours get their frames again; only a VM that was handed over is still held.
        handed = [r.id for r in open_records if r.state in (RecordState.HANDED_OVER, RecordState.TAKEN)]
        await remove_gate_leftovers(self.parts, handed)
        for vm in self.vms.all():
            await self.vms.plug_ports(vm)
        for record in open_records:
            log.event("migration-left-open", id=record.id, role=record.role, state=record.state)
            try:
                await self._resume(record)
            except VmferryError as error:
                # One that cannot be tidied up must not keep all other VMs from being managed; the record stays open.
                log.alarm("migration-not-resumed", id=record.id, problem=error.message, fix=error.fix)
        await self.migrations.sweep_gates()

    async def _resume(self, record: MigrationRecord) -> None:
        if record.role is Role.SOURCE:
            await self.migrations.resume_after_restart(record)
        else:
            await self.incoming.resume_after_restart(record)

    # -- what this host is made of -----------------------------------------------------------------------------------

    async def _gather_parts(self) -> HostParts:
        config = self.config
        self._accel = await self._prove_acceleration()
        features = await observe_features(config.qemu, self._accel.kind)
        user = await asyncio.to_thread(_guest_user, config.guest_user)
        owner = (user.uid, user.gid) if user else None
        pools = {pool.name: DirectoryPool(pool.name, pool.path, owner) for pool in config.pools}
        for pool in pools.values():
            await pool.ensure_pool()
        switches = {s.name: SwitchConfig(s.name, s.device, s.uplinks, s.mtu, s.kind) for s in config.switches}
        for switch in switches.values():
            await ensure_switch(self._netlink, switch)
        return HostParts(
            name=config.name,
            address=config.migration.address,
            binary=config.qemu,
            accel=self._accel.kind,
            features=features,
            user=user,
            state_dir=config.state_dir,
            run_dir=config.run_dir,
            pools=pools,
            switches=switches,
            netlink=self._netlink,
            journal=self.journal,
            limits=_limits(config),
            stream_dir=await asyncio.to_thread(self._stream_dir),
            gate_port=config.migration.gate_port,
            version=version("vmferry"),
        )

    async def _prove_acceleration(self, anew: bool = False) -> Acceleration:
        config = self.config
        if config.accel == "tcg":
            return Acceleration("tcg", "the configuration says so")
        cache = config.state_dir / "acceleration.json"
        if anew:
            cache.unlink(missing_ok=True)
        found = await observe_acceleration(config.qemu, cache=cache)
        if config.accel == "kvm" and found.kind != "kvm":
            raise WrongInput("no-kvm", f"KVM does not work here: {found.reason}.", 'Set [host] accel = "auto".')
        return found

    def _stream_dir(self) -> Path | None:
        if not self.config.migration.address or not self.config.migration.tls:
            return None
        return stream_dir(self.config.tls_dir)

    def _client_context(self) -> ssl.SSLContext:
        return client_context(self.config.tls_dir)

    def server_context(self, *, joining: bool) -> ssl.SSLContext:
        """For the listener towards other hosts. Raises when the certificate is not this host's."""
        name = identity_name(self.config.tls_dir)
        if name != self.config.name:
            raise Conflict(
                "other-name",
                f"The certificate in {self.config.tls_dir} is {name}'s, the configuration says {self.config.name}.",
                "Correct [host] name, or get a certificate for it.",
            )
        return server_context(self.config.tls_dir, joining=joining)

    # -- what is shown -----------------------------------------------------------------------------------------------

    async def describe(self) -> HostView:
        """This host as it is now."""
        config, parts = self.config, self.parts
        memory = await asyncio.to_thread(observe_free_memory)
        expires = ""
        with contextlib.suppress(NotFound):
            expires = (await asyncio.to_thread(certificate_expiry, config.tls_dir)).isoformat()
        return HostView(
            name=config.name,
            address=f"{config.migration.address}:{config.migration.port}" if config.migration.address else "",
            reachable=True,
            version=parts.version,
            accel=parts.accel,
            accel_reason=self._accel.reason,
            qemu_version=".".join(map(str, parts.features.version)),
            kernel=platform.release(),
            cpus=os.cpu_count() or 1,
            memory_total_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            memory_free_bytes=max(0, memory - parts.limits.memory_reserve_bytes),
            vms=len(self.vms.all()),
            pools=tuple([await _pool_view(pool) for pool in parts.pools.values()]),
            switches=tuple([await _switch_view(parts.netlink, switch) for switch in parts.switches.values()]),
            certificate_expires_at=expires,
        )

    async def probe(self) -> HostView:
        """This host, its acceleration proven anew (in force for guests after the next start of the daemon)."""
        found = await self._prove_acceleration(anew=True)
        view = await self.describe()
        reason = found.reason
        if found.kind != self.parts.accel:
            reason += f"; now it is {found.kind}: restart vmferryd to use it"
        return replace(view, accel_reason=reason)

    async def describe_all(self) -> list[HostView]:
        """This host and every peer; one that does not answer says why."""
        peers = self.peers.addresses()
        others = await asyncio.gather(*(self._describe_peer(name, peers[name]) for name in sorted(peers)))
        return [await self.describe(), *others]

    async def _describe_peer(self, name: str, address: str) -> HostView:
        try:
            return await fetch_host(name, address, self._client_context(), self.parts.limits.request_s)
        except VmferryError as error:
            return HostView(name=name, address=address, reachable=False, problem=error.message)

    # -- the door for other hosts ------------------------------------------------------------------------------------

    async def authenticate(self, request: web.Request) -> str:
        """The name of the host at the other end. Raises Refused without a host's certificate of our CA."""
        transport = request.transport
        tls = transport.get_extra_info("ssl_object") if transport else None
        return peer_host_name(tls.getpeercert(binary_form=True) if tls else None)


async def _pool_view(pool: DirectoryPool) -> PoolView:
    try:
        room = await pool.observe_room()
    except VmferryError as error:
        return PoolView(pool.name, "directory", str(pool.path), 0, 0, error.message)
    return PoolView(pool.name, "directory", str(pool.path), room.total_bytes, room.free_bytes)


async def _switch_view(netlink: Netlink, switch: SwitchConfig) -> SwitchView:
    try:
        state = await observe_switch(netlink, switch)
    except VmferryError as error:
        return SwitchView(switch.name, switch.kind, switch.device, switch.mtu, switch.uplinks, 0, error.message)
    problem = "" if state.exists and state.up else f"{switch.device} is down or gone"
    return SwitchView(
        switch.name, switch.kind, switch.device, state.mtu or switch.mtu, switch.uplinks, len(state.ports), problem
    )


def _limits(config: HostConfig) -> EngineLimits:
    limits = config.limits
    return EngineLimits(
        request_s=limits.request_timeout_ms / 1000,
        prepare_s=limits.prepare_timeout_ms / 1000,
        start_s=limits.start_timeout_ms / 1000,
        qemu_silence_s=limits.qemu_silence_ms / 1000,
        disk_stall_s=limits.disk_stall_ms / 1000,
        memory_stall_s=limits.memory_stall_ms / 1000,
        switchover_s=limits.switchover_stall_ms / 1000,
        stopped_s=limits.switchover_limit_ms / 1000,
        handoff_retry_s=limits.handoff_retry_ms / 1000,
        forward_s=limits.forward_limit_ms / 1000,
        incoming=limits.incoming,
        outgoing=limits.outgoing,
        memory_reserve_bytes=limits.memory_reserve_bytes,
        clock_difference_ms=limits.clock_difference_ms,
        bandwidth_bps=_share(config.migration.network_bandwidth_bps, limits.outgoing),
    )


def _share(bandwidth_bps: int, migrations: int) -> int:
    """What each of so many migrations may use of a ceiling for all; 0: no ceiling."""
    return bandwidth_bps // max(1, migrations)


def _guest_user(name: str) -> GuestUser | None:
    if not name:
        return None
    try:
        entry = pwd.getpwnam(name)
    except KeyError as error:
        raise WrongInput(
            "no-guest-user",
            f"[host] guest_user: there is no user {name!r}.",
            f"Make it: useradd --system --no-create-home --shell /usr/sbin/nologin {name}",
        ) from error
    groups = tuple(group.gr_gid for group in grp.getgrall() if name in group.gr_mem)
    return GuestUser(entry.pw_uid, entry.pw_gid, groups)


def _make_directories(config: HostConfig) -> None:
    try:
        config.state_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        (config.state_dir / "vms").mkdir(mode=0o711, exist_ok=True)
        config.run_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
    except OSError as error:
        raise WrongInput(
            "bad-directory", f"{error.filename} cannot be made: {error.strerror}.", "Run as root?"
        ) from error


def _lock_state(state_dir: Path) -> int:
    """Two daemons on one state would each think that the guests are theirs."""
    import fcntl

    fd = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise Conflict("already-running", f"Another vmferryd uses {state_dir}.", "Stop that one first.") from error
    return fd
