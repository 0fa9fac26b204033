"""A VM's files on this host: images in pools, boot files in the store; made all or none, removed together."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import uuid
from pathlib import Path

from vmferry.host.definition import DiskDefinition, NicDefinition, VmDefinition
from vmferry.migration.disks import pool_of, remove_images
from vmferry.migration.guest import switch_of
from vmferry.migration.host_parts import HostParts
from vmferry.model.errors import Conflict, WrongInput
from vmferry.model.vm import DirectBoot, Disk, FirmwareBoot, Nic, VmSpec
from vmferry.qemu.cpu import choose_cpu_model
from vmferry.qemu.features import resolve_machine
from vmferry.storage.boot_files import store_boot_file
from vmferry.storage.image_info import observe_image
from vmferry.storage.pool import ImageRequest, ImportRequest

_OUI = "52:54:00"  # QEMU's; locally administered


class VmFiles:
    """Makes and removes what belongs to a VM on disk."""

    def __init__(self, parts: HostParts) -> None:
        self._parts = parts

    async def create(self, definition: VmDefinition, macs_in_use: frozenset[str]) -> VmSpec:
        """The VM with its files. Raises Refused (`pool-missing`, `switch-missing`), WrongInput, errors of storage."""
        parts, vm_id = self._parts, str(uuid.uuid4())
        nics = tuple(self._nic(nic, macs_in_use) for nic in definition.nics)
        for disk in definition.disks:
            pool_of(parts, disk.pool)
        cpu, machine = self._cpu(definition.cpu_model), resolve_machine(parts.features, "q35")
        made: list[str] = []
        try:
            boot = await self._boot(definition, vm_id)
            disks = []
            for disk in definition.disks:
                disks.append(await self._disk(vm_id, disk, made))
        except BaseException:
            await asyncio.shield(self._remove(vm_id, made))
            raise
        return VmSpec(
            id=vm_id,
            name=definition.name,
            cpus=definition.cpus,
            memory_bytes=definition.memory_bytes,
            machine=machine,
            cpu=cpu,
            boot=boot,
            disks=tuple(disks),
            nics=nics,
        )

    async def remove(self, spec: VmSpec) -> None:
        """Removes images (never a shared base layer) and boot files. What is gone already is fine."""
        await self._remove(spec.id, [disk.path for disk in spec.disks])

    async def _remove(self, vm_id: str, images: list[str]) -> None:
        await remove_images(self._parts, images)
        await asyncio.to_thread(shutil.rmtree, self._parts.vm_dir(vm_id), ignore_errors=True)

    def _cpu(self, model: str) -> str:
        if model == "auto":
            return choose_cpu_model([self._parts.features])
        if not any(known.name == model for known in self._parts.features.cpu_models):
            raise WrongInput(
                "unknown-cpu", f"QEMU here has no CPU model {model[:60]!r}.", 'Use "auto", or a model of QEMU.'
            )
        return f"{model},enforce" if model not in ("host", "max") else model

    def _nic(self, nic: NicDefinition, macs_in_use: frozenset[str]) -> Nic:
        switch = switch_of(self._parts, nic.switch)
        if nic.mac in macs_in_use:
            raise Conflict(
                "mac-in-use", f"MAC {nic.mac} belongs to another VM here.", "Leave it out: a free one is chosen."
            )
        mac = nic.mac
        while not mac or mac in macs_in_use:
            mac = f"{_OUI}:" + ":".join(f"{octet:02x}" for octet in secrets.token_bytes(3))
        return Nic(nic.switch, mac, switch.mtu)

    async def _boot(self, definition: VmDefinition, vm_id: str) -> DirectBoot | FirmwareBoot:
        boot, directory = definition.boot, self._parts.vm_dir(vm_id)
        if boot.firmware:
            return FirmwareBoot(boot.firmware)
        kernel = await store_boot_file(directory, _absolute(boot.kernel))
        initrd = await store_boot_file(directory, _absolute(boot.initrd)) if boot.initrd else None
        return DirectBoot(kernel, initrd, boot.cmdline)

    async def _disk(self, vm_id: str, disk: DiskDefinition, made: list[str]) -> Disk:
        pool = pool_of(self._parts, disk.pool)
        await pool.ensure_pool()
        path = pool.plan_path(vm_id, disk.name, disk.format)
        made.append(str(path))
        backing = _absolute(disk.image) if disk.backing else None
        if disk.image and not disk.backing:
            request = ImportRequest(vm_id, disk.name, _absolute(disk.image), disk.size_bytes, disk.format)
            await pool.import_image(request, path)
        else:
            size = disk.size_bytes or (await observe_image(_absolute(disk.image), "qcow2")).virtual_size
            await pool.create_image(ImageRequest(vm_id, disk.name, size, disk.format, backing), path)
        size_bytes = (await observe_image(path, disk.format, chain=False)).virtual_size
        return Disk(disk.name, disk.pool, size_bytes, disk.format, str(path), str(backing) if backing else None)


def _absolute(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise WrongInput("relative-path", f"{text[:200]!r} is not an absolute path.", "Write the path from / on.")
    return path
