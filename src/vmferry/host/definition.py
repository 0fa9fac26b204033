"""From what a user writes about a VM (interface.md, "A VM") to a definition that can be built. Pure.

Files and pools are looked at by `vmferry.host.creation`, not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vmferry.model.errors import VmferryError, WrongInput
from vmferry.model.names import require_mac, require_name
from vmferry.model.units import parse_size

_SMALLEST_MEMORY = 16 << 20
_MOST_CPUS = 255
_MOST_DEVICES = 12


@dataclass(frozen=True, slots=True)
class BootDefinition:
    """Either a kernel (paths on the host) or a firmware, "bios" or "uefi"."""

    kernel: str = ""
    initrd: str = ""
    cmdline: str = ""
    firmware: str = ""


@dataclass(frozen=True, slots=True)
class DiskDefinition:
    """A new, empty disk of `size_bytes`, or one imported from `image` (0: the image's own size)."""

    name: str
    pool: str
    size_bytes: int
    image: str
    backing: bool
    format: str


@dataclass(frozen=True, slots=True)
class NicDefinition:
    """A card on a switch; an empty `mac` is chosen and kept."""

    switch: str
    mac: str


@dataclass(frozen=True, slots=True)
class VmDefinition:
    """A checked definition."""

    name: str
    cpus: int
    memory_bytes: int
    cpu_model: str
    boot: BootDefinition
    disks: tuple[DiskDefinition, ...]
    nics: tuple[NicDefinition, ...]


class _Reader:
    """Collects every fault with its path instead of stopping at the first."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def table(self, value: object, path: str, known: set[str]) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            self.faults.append(f"{path}: a table is wanted here")
            return {}
        for key in value.keys() - known:
            self.faults.append(f"{path}.{key}: there is no such key; known: {', '.join(sorted(known))}")
        return value

    def text(self, table: Mapping[str, Any], key: str, path: str, default: str | None = None) -> str:
        value = table.get(key, default)
        if isinstance(value, str) and "\0" not in value and "\n" not in value:
            return value
        self.faults.append(f"{path}.{key}: " + ("is missing" if value is None else "must be a text of one line"))
        return ""

    def checked(self, path: str, parse: Callable[[str], Any], text: str, fallback: Any) -> Any:
        try:
            return parse(text)
        except VmferryError as error:
            self.faults.append(f"{path}: {error.message} {error.fix}")
            return fallback

    def one_of(self, path: str, value: str, allowed: tuple[str, ...]) -> str:
        if value not in allowed:
            self.faults.append(f"{path}: {value[:40]!r} is not one of {', '.join(allowed)}")
        return value


def read_definition(document: object) -> VmDefinition:
    """The definition. Raises WrongInput `bad-vm` which names every key that is wrong and what is wanted there."""
    reader = _Reader()
    table = reader.table(document, "vm", {"name", "cpus", "memory", "cpu_model", "boot", "disk", "nic"})
    name = reader.text(table, "name", "vm")
    cpus = table.get("cpus", 1)
    if not isinstance(cpus, int) or isinstance(cpus, bool) or not 1 <= cpus <= _MOST_CPUS:
        reader.faults.append(f"vm.cpus: must be a whole number from 1 to {_MOST_CPUS}")
    memory = reader.checked("vm.memory", parse_size, reader.text(table, "memory", "vm"), 0)
    if memory and (memory < _SMALLEST_MEMORY or memory % (1 << 20)):
        reader.faults.append("vm.memory: must be whole MiB, at least 16MiB")
    definition = VmDefinition(
        name=reader.checked("vm.name", lambda text: require_name(text, "VM"), name, ""),
        cpus=cpus,
        memory_bytes=memory,
        cpu_model=reader.text(table, "cpu_model", "vm", "auto"),
        boot=_read_boot(reader, table.get("boot", {"firmware": "bios"})),
        disks=tuple(_read_disk(reader, item, i) for i, item in enumerate(_array(reader, table, "disk"))),
        nics=tuple(_read_nic(reader, item, i) for i, item in enumerate(_array(reader, table, "nic"))),
    )
    _check_whole(reader, definition)
    if reader.faults:
        raise WrongInput("bad-vm", "The VM's definition is wrong: " + "; ".join(reader.faults) + ".", "Correct these.")
    return definition


def _array(reader: _Reader, table: Mapping[str, Any], key: str) -> list[Any]:
    value = table.get(key, [])
    if isinstance(value, list) and len(value) <= _MOST_DEVICES:
        return value
    reader.faults.append(f"vm.{key}: write [[{key}]] for each, at most {_MOST_DEVICES}")
    return []


def _read_boot(reader: _Reader, value: object) -> BootDefinition:
    table = reader.table(value, "boot", {"kernel", "initrd", "cmdline", "firmware"})
    boot = BootDefinition(**{key: reader.text(table, key, "boot", "") for key in BootDefinition.__slots__})
    if bool(boot.kernel) == bool(boot.firmware):
        reader.faults.append("boot: give either a kernel or a firmware")
    if boot.firmware:
        reader.one_of("boot.firmware", boot.firmware, ("bios", "uefi"))
        if boot.initrd or boot.cmdline:
            reader.faults.append("boot: initrd and cmdline go with a kernel, not with a firmware")
    return boot


def _read_disk(reader: _Reader, value: object, index: int) -> DiskDefinition:
    path = f"disk[{index}]"
    table = reader.table(value, path, {"name", "pool", "size", "image", "backing", "format"})
    image = reader.text(table, "image", path, "")
    size = reader.text(table, "size", path, "" if image else None)
    size_bytes = reader.checked(f"{path}.size", parse_size, size, 0) if size else 0
    if size and (size_bytes < 1 << 20 or size_bytes % 512):
        reader.faults.append(f"{path}.size: must be at least 1MiB and a multiple of 512 bytes")
    backing = table.get("backing", False)
    if not isinstance(backing, bool) or (backing and not image):
        reader.faults.append(f"{path}.backing: true or false, and only with an image")
    return DiskDefinition(
        name=reader.checked(f"{path}.name", lambda t: require_name(t, "disk"), reader.text(table, "name", path), ""),
        pool=reader.text(table, "pool", path),
        size_bytes=size_bytes,
        image=image,
        backing=bool(backing),
        format=reader.one_of(f"{path}.format", reader.text(table, "format", path, "qcow2"), ("qcow2", "raw")),
    )


def _read_nic(reader: _Reader, value: object, index: int) -> NicDefinition:
    path = f"nic[{index}]"
    table = reader.table(value, path, {"switch", "mac"})
    mac = reader.text(table, "mac", path, "")
    return NicDefinition(
        switch=reader.text(table, "switch", path),
        mac=reader.checked(f"{path}.mac", require_mac, mac, "") if mac else "",
    )


def _check_whole(reader: _Reader, definition: VmDefinition) -> None:
    names = [disk.name for disk in definition.disks]
    for name in {name for name in names if name and names.count(name) > 1}:
        reader.faults.append(f"disk: two disks are named {name!r}")
    macs = [nic.mac for nic in definition.nics if nic.mac]
    for mac in {mac for mac in macs if macs.count(mac) > 1}:
        reader.faults.append(f"nic: two cards have the MAC {mac}")
    if definition.boot.firmware and not definition.disks:
        reader.faults.append("boot: a firmware boots from the first disk, and there is none")
    if any(disk.backing and disk.format != "qcow2" for disk in definition.disks):
        reader.faults.append("disk: a shared base layer (backing) needs format qcow2")
