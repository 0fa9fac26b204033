"""The check: everything that could stop the migration, from both hosts, found now and listed at once.

`check` runs on the source and changes nothing; `TargetChecks` answers on the target. What facts mean is in
`findings_of` (pure); here they are gathered.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vmferry.migration import findings_of as find
from vmferry.migration.guest import RunningGuest, locate, switch_of
from vmferry.migration.host_parts import HostParts
from vmferry.migration.link import PeerLink
from vmferry.migration.messages import (
    PROTOCOL_VERSION,
    CheckTarget,
    CollectProbe,
    ListenForProbe,
    ProbeListening,
    ProbeSeen,
    SourceFacts,
    TargetChecked,
)
from vmferry.migration.placement import map_pools, map_switches
from vmferry.migration.prediction import Measured, predict
from vmferry.migration.rehearsal import rehearse
from vmferry.migration.together import together
from vmferry.model.errors import VmferryError
from vmferry.model.findings import Finding, Severity, blocking
from vmferry.model.migration import CheckResult, MigrateOptions, PostCopy, Prediction
from vmferry.model.vm import Disk, VmSpec
from vmferry.network.probes import PathProbeListener, observe_mac_elsewhere, send_path_probe
from vmferry.network.switches import observe_switch
from vmferry.qemu.cpu import CpuFeatures, observe_cpu, observe_guest_cpu
from vmferry.qemu.memory_image import observe_used_bytes
from vmferry.qemu.memory_stream import estimate_dirty_rate, observe_migration
from vmferry.qemu.post_copy import may_fault
from vmferry.storage.image_info import observe_image

_SMALLEST_PROBE = 46
_PROBE_WAIT_S = 1.5
_DIRTY_WINDOW_MS = 400
_MIGRATABLE = frozenset({"running", "paused"})


@dataclass(frozen=True, slots=True)
class HostUse:
    """What is in use on the target, as its registry has it."""

    free_memory_bytes: int
    vm_names: Mapping[str, str]  # name to id
    macs: Mapping[str, str]  # MAC to the VM that has it
    incoming: int


# -- the source ------------------------------------------------------------------------------------------------------


async def check(
    parts: HostParts,
    guest: RunningGuest,
    link: PeerLink,
    options: MigrateOptions,
    promising: Callable[[], None] | None = None,
) -> CheckResult:
    """All findings of both hosts and the prediction. Changes nothing. Raises only what ends the link or the guest.

    `promising` is called when only the rehearsal and the measuring are left, and nothing speaks against it so far.
    Nothing of the check goes on here after it has raised; what it has on the target goes with the link.
    """

    async def find() -> tuple[list[Finding], SourceFacts, int]:
        # The link alone with what costs little: what else the check does would slow it down.
        rate, facts = await together(link.measure_rate(), _facts(parts, guest))

        async def find_all_else() -> list[Finding]:
            results = await together(
                _find_here(parts, guest),
                _find_there(parts, guest, link, options, facts),
                _find_paths(parts, guest.spec, link, options),
            )
            found = [finding for result in results for finding in result]
            if promising is not None and not blocking(tuple(found)):
                promising()
            return found

        found, rehearsed = await together(find_all_else(), rehearse(parts, link, guest.spec))
        return [*found, rehearsed], facts, rate

    (findings, facts, rate), dirty = await together(find(), estimate_dirty_rate(guest.monitor, _DIRTY_WINDOW_MS))
    measured = Measured(
        memory_bytes=await asyncio.to_thread(observe_used_bytes, await locate(guest)),
        disk_bytes=sum(facts.disk_bytes.values()),
        dirty_rate=dirty.bytes_per_s,
        link_rate=rate,
    )
    prediction = predict(measured, options)
    # The link may look slower than it is while other work goes on; a refusal must hold for a link twice as fast, too.
    hopeful = predict(replace(measured, link_rate=measured.link_rate * 2), options)
    findings += _find_goal(parts.name, prediction, certain=not hopeful.feasible)
    ordered = tuple(sorted(findings, key=lambda f: (f.severity is not Severity.ERROR, f.host, f.code)))
    return CheckResult(
        vm=guest.spec.name,
        source=parts.name,
        target=link.peer,
        ok=not blocking(ordered),
        findings=ordered,
        prediction=prediction,
    )


async def _facts(parts: HostParts, guest: RunningGuest) -> SourceFacts:
    allocated = {disk.name: await _allocated(disk) for disk in guest.spec.disks}
    mtus = {name: switch.mtu for name, switch in parts.switches.items()}
    return SourceFacts(
        host=parts.name,
        protocol=PROTOCOL_VERSION,
        qemu_version=_version(parts),
        accel=parts.accel,
        cpu=await _cpu_of(guest),
        machine=guest.spec.machine,
        clock_unix_ms=time.time() * 1000,
        switch_mtu=mtus,
        disk_bytes=allocated,
    )


async def _cpu_of(guest: RunningGuest) -> CpuFeatures:
    """Asked once in the life of the process: some hundred questions, and the answers never change."""
    if guest.cpu is None:
        guest.cpu = await observe_guest_cpu(guest.monitor)
    return guest.cpu


async def _allocated(disk: Disk) -> int:
    """Bytes that the disk takes up in all of its layers: about what has to be sent."""
    info = await observe_image(Path(disk.path), disk.format, chain=True)
    below = [await asyncio.to_thread(path.stat) for path in info.backing]
    return min(info.allocated_bytes + sum(stat.st_blocks * 512 for stat in below), disk.size_bytes)


async def _find_here(parts: HostParts, guest: RunningGuest) -> list[Finding]:
    monitor = guest.monitor
    found = find.find_qemu(parts.name, _version(parts), parts.accel)
    sample = await observe_migration(monitor)
    found += find.find_blockers(parts.name, sample.blocked_reasons)
    status = (await monitor.execute("query-status"))["status"]
    if status not in _MIGRATABLE and sample.status not in ("cancelled", "failed"):
        message = f"The guest is {status}; only a running or paused one can move live."
        found.append(find.error("guest-state", message, "Resume it, or restart it.", parts.name))
    jobs = await monitor.execute("query-block-jobs")
    if jobs:
        message = f"A block job runs on its disks ({jobs[0]['device']})."
        found.append(find.error("block-job", message, "Wait for its end.", parts.name))
    return found


async def _find_there(
    parts: HostParts, guest: RunningGuest, link: PeerLink, options: MigrateOptions, facts: SourceFacts
) -> list[Finding]:
    started = time.time()
    checked = await link.call(CheckTarget(guest.spec, options, facts), TargetChecked)
    middle_ms = (started + time.time()) * 500
    target = link.peer
    # The answer was written at an unknown moment of the round trip: half of it is the error of the difference.
    slack_ms = (time.time() - started) * 500
    difference = checked.clock_unix_ms - middle_ms
    return [
        *checked.findings,
        *find.find_clock(target, max(0.0, abs(difference) - slack_ms), parts.limits.clock_difference_ms),
        *find.find_accelerators(parts.name, parts.accel, target, checked.accel),
        *find.find_versions(parts.name, _version(parts), target, checked.qemu_version),
    ]


async def _find_paths(parts: HostParts, spec: VmSpec, link: PeerLink, options: MigrateOptions) -> list[Finding]:
    found = []
    mapped = map_switches(spec, options)
    for here, there in sorted(mapped.items()):
        switch = parts.switches.get(here)
        if switch is None:
            continue
        mtu = max(nic.mtu for nic in spec.nics if nic.switch == here)
        found.append(await _probe_path(parts, link, here, there, mtu))
    return found


async def _probe_path(parts: HostParts, link: PeerLink, here: str, there: str, mtu: int) -> Finding:
    nonce, sizes = secrets.token_bytes(16), (_SMALLEST_PROBE, mtu)
    try:
        listening = await link.call(ListenForProbe(there, nonce.hex(), sizes), ProbeListening)
        await send_path_probe(parts.netlink, parts.switches[here].device, listening.mac, nonce, sizes)
        seen = await link.call(CollectProbe(nonce.hex()), ProbeSeen)
    except VmferryError as failure:
        message = f"No probe could be sent from switch {here} to {there} on {link.peer}: {failure.message}"
        return find.error("path-not-probed", message, failure.fix, link.peer)
    if set(seen.sizes) == set(sizes):
        return find.ok("path", f"Frames up to {mtu} bytes pass from switch {here} to {there}.", link.peer)
    if not seen.sizes:
        message = f"No frame gets from switch {here} on {parts.name} to {there} on {link.peer}."
        fix = "Are both in the same network (uplinks, VLAN)? Another switch: --network A=B."
        return find.error("path-broken", message, fix, link.peer)
    message = f"Small frames pass from switch {here} to {there} on {link.peer}, frames of {mtu} bytes do not."
    return find.error("path-mtu", message, f"Raise the MTU of the network between them to {mtu}.", link.peer)


def _find_goal(host: str, prediction: Prediction, *, certain: bool) -> list[Finding]:
    if prediction.feasible:
        return []
    fix = "Allow a longer --max-blackout, --deadline or --max-slowdown, more --bandwidth, or --post-copy allow."
    if certain:
        return [find.error("goal-not-feasible", f"The goal cannot be met: {prediction.reason}.", fix, host)]
    message = f"The goal may not be met: {prediction.reason}."
    return [Finding("goal-doubtful", Severity.WARNING, message, fix, host)]


def _version(parts: HostParts) -> str:
    return ".".join(str(part) for part in parts.features.version)


# -- the target ------------------------------------------------------------------------------------------------------


class TargetChecks:
    """The target's answers to a check, and the spare ports of its probes."""

    def __init__(
        self, parts: HostParts, use: Callable[[], Awaitable[HostUse]], cpus: dict[tuple[str, str], CpuFeatures]
    ) -> None:
        self._parts = parts
        self._cpus = cpus
        self._use = use
        self._probes: dict[str, asyncio.Task[frozenset[int]]] = {}

    async def check(self, request: CheckTarget) -> TargetChecked:
        """Everything that this host has against the VM."""
        parts, spec, facts = self._parts, request.spec, request.facts
        use = await self._use()
        findings = [
            *find.find_protocol(parts.name, PROTOCOL_VERSION, facts.protocol),
            *find.find_qemu(parts.name, _version(parts), parts.accel),
            *find.find_machine(spec, parts.name, [m.name for m in parts.features.machines]),
            *find.find_memory(parts.name, spec.memory_bytes, use.free_memory_bytes),
            *self._find_names(spec, use),
            *await self._find_cpu(request),
            *await self._find_pools(request),
            *await self._find_switches(request),
            *await asyncio.to_thread(self._find_post_copy, request),
        ]
        return TargetChecked(
            findings=tuple(findings),
            clock_unix_ms=time.time() * 1000,
            qemu_version=_version(parts),
            accel=parts.accel,
            capabilities=parts.features.capabilities,
            migration_address=parts.address,
        )

    def _find_names(self, spec: VmSpec, use: HostUse) -> list[Finding]:
        found, host = [], self._parts.name
        if spec.name in use.vm_names or spec.id in use.vm_names.values():
            message = f"{host} has a VM named {spec.name} already."
            found.append(find.error("name-in-use", message, "Rename or delete one of them.", host))
        for nic in spec.nics:
            if nic.mac in use.macs:
                message = f"MAC {nic.mac} belongs to {use.macs[nic.mac]} on {host}."
                found.append(find.error("mac-in-use", message, "Give one of the VMs another MAC.", host))
        if use.incoming >= self._parts.limits.incoming:
            message = f"{host} takes {self._parts.limits.incoming} incoming migrations at a time, and has as many."
            found.append(find.error("incoming-limit", message, "Wait, or raise [limits] incoming.", host))
        return found

    def _find_post_copy(self, request: CheckTarget) -> list[Finding]:
        if request.options.post_copy is PostCopy.NEVER or may_fault(self._parts.user):
            return []
        user = self._parts.user
        group = f"group {user.gid}" if user else "root"
        message = f"Guests on {self._parts.name} may not use userfaultfd, which post-copy needs."
        fix = f"Let {group} open /dev/userfaultfd (packaging/70-vmferry.rules), or leave --post-copy out."
        return [find.error("post-copy-not-allowed", message, fix, self._parts.name)]

    async def _find_cpu(self, request: CheckTarget) -> list[Finding]:
        parts, spec = self._parts, request.spec
        try:
            available = await self._available_cpu(spec)
        except VmferryError as failure:
            return [
                find.error("cpu-model", f"{parts.name} cannot run CPU {spec.cpu}: {failure.message}", "", parts.name)
            ]
        return find.find_cpu(parts.name, request.facts.cpu, available)

    async def _available_cpu(self, spec: VmSpec) -> CpuFeatures:
        """Asked of a QEMU of its own, once for each machine and model in the daemon's life (0.1 to 0.3 s each)."""
        key = (spec.machine, spec.cpu)
        if key not in self._cpus:
            self._cpus[key] = await observe_cpu(self._parts.binary, spec.machine, self._parts.accel, spec.cpu)
        return self._cpus[key]

    async def _find_pools(self, request: CheckTarget) -> list[Finding]:
        parts, found = self._parts, []
        wanted: dict[str, int] = {}
        for disk, pool in map_pools(request.spec, request.options).items():
            wanted[pool] = wanted.get(pool, 0) + request.facts.disk_bytes.get(disk, 0)
        free: dict[str, int] = {}
        for name in wanted:
            place = parts.pools.get(name)
            if place is None:
                known = ", ".join(sorted(parts.pools)) or "none"
                message = f"{parts.name} has no pool {name} (it has: {known})."
                found.append(find.error("pool-missing", message, "Choose one: --storage POOL.", parts.name))
                continue
            try:
                await place.ensure_pool()
                free[name] = (await place.observe_room()).free_bytes
            except VmferryError as failure:
                found.append(find.error("pool-broken", f"Pool {name}: {failure.message}", failure.fix, parts.name))
        return [*found, *find.find_room(parts.name, wanted, free)]

    async def _find_switches(self, request: CheckTarget) -> list[Finding]:
        parts, found = self._parts, []
        pairs = []
        for here, there in map_switches(request.spec, request.options).items():
            switch = parts.switches.get(there)
            if switch is None:
                known = ", ".join(sorted(parts.switches)) or "none"
                message = f"{parts.name} has no switch {there} (it has: {known})."
                found.append(find.error("switch-missing", message, "Map it: --network A=B.", parts.name))
                continue
            state = await observe_switch(parts.netlink, switch)
            if not state.exists or not state.up:
                message = f"Switch {there} on {parts.name} is down or gone ({switch.device})."
                found.append(find.error("switch-down", message, "Restart vmferryd there.", parts.name))
                continue
            nics = [nic for nic in request.spec.nics if nic.switch == here]
            pairs.append((here, max(nic.mtu for nic in nics), there, state.mtu))
            for nic in nics:
                seen = await observe_mac_elsewhere(parts.netlink, switch.device, nic.mac, switch.uplinks)
                if seen.port is not None:
                    message = f"MAC {nic.mac} is in use on {parts.name}, at {seen.port}."
                    found.append(find.error("mac-in-use", message, "Remove that port.", parts.name))
        return [*found, *find.find_mtu(pairs, parts.name)]

    async def listen(self, request: ListenForProbe) -> ProbeListening:
        """Opens a spare port and waits there in the background. Raises NotFound `switch-missing`."""
        switch = switch_of(self._parts, request.switch)
        listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def run() -> frozenset[int]:
            try:
                async with PathProbeListener(self._parts.netlink, switch.device, switch.mtu) as listener:
                    listening.set_result(listener.mac)
                    return await listener.wait(bytes.fromhex(request.nonce), request.sizes, _PROBE_WAIT_S)
            except VmferryError as failure:
                if not listening.done():
                    listening.set_exception(failure)
                return frozenset()

        self._probes[request.nonce] = asyncio.create_task(run())
        return ProbeListening(await listening)

    async def collect(self, request: CollectProbe) -> ProbeSeen:
        """What came."""
        task = self._probes.pop(request.nonce, None)
        return ProbeSeen(tuple(sorted(await task)) if task else ())

    async def close(self) -> None:
        """Ends all listening."""
        for task in self._probes.values():
            task.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)
        self._probes.clear()
