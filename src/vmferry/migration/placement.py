"""The VM as the target will run it: pools and switches mapped, paths chosen. Pure."""

from __future__ import annotations

from dataclasses import replace

from vmferry.model.errors import WrongInput
from vmferry.model.migration import MigrateOptions
from vmferry.model.vm import Disk, Nic, VmSpec


def map_pools(spec: VmSpec, options: MigrateOptions) -> dict[str, str]:
    """Disk name to the target's pool. Raises WrongInput `unknown-disk` when the options name one that is not there."""
    names = {disk.name for disk in spec.disks}
    for disk in options.storage:
        if disk and disk not in names:
            has = ", ".join(sorted(names)) or "none"
            raise WrongInput("unknown-disk", f"{spec.name} has no disk {disk[:80]!r}.", f"Its disks: {has}.")
    default = options.storage.get("")
    return {disk.name: options.storage.get(disk.name) or default or disk.pool for disk in spec.disks}


def map_switches(spec: VmSpec, options: MigrateOptions) -> dict[str, str]:
    """Source switch to target switch. Raises WrongInput `unknown-switch` when the options name one the VM has not."""
    used = {nic.switch for nic in spec.nics}
    for name in options.network:
        if name not in used:
            has = ", ".join(sorted(used)) or "none"
            raise WrongInput("unknown-switch", f"{spec.name} is not on a switch {name[:80]!r}.", f"It is on: {has}.")
    return {switch: options.network.get(switch, switch) for switch in used}


def place(spec: VmSpec, options: MigrateOptions, generation: int) -> VmSpec:
    """The spec with the target's pools and switches; disk paths are empty until the images are there."""
    pools, switches = map_pools(spec, options), map_switches(spec, options)
    return replace(
        spec,
        generation=generation,
        disks=tuple(_place_disk(disk, pools[disk.name]) for disk in spec.disks),
        nics=tuple(_place_nic(nic, switches[nic.switch]) for nic in spec.nics),
    )


def _place_disk(disk: Disk, pool: str) -> Disk:
    return replace(disk, pool=pool, path="", backing=None)


def _place_nic(nic: Nic, switch: str) -> Nic:
    return replace(nic, switch=switch)
