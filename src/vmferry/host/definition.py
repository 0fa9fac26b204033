"""From what a user writes about a VM (interface.md, "A VM") to a definition that can be built. Pure.

Files and pools are looked at by `vmferry.host.creation`, not here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vmferry.model.errors import VmferryError, WrongInput
from vmferry.model.names import require_mac, require_name
from vmferry.model.units import parse_size

_SMALLEST_MEMORY = 16 << 20
_MOST_CPUS = 255
_MOST_DEVICES = 12
_LONGEST_TEXT = 4096


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
        for key in sorted(str(key) for key in value.keys() - known):
            shown = key if key.isidentifier() and len(key) <= 40 else repr(key[:40])
            self.faults.append(f"{path}.{shown}: there is no such key; known: {', '.join(sorted(known))}")
        return value

    def text(self, table: Mapping[str, Any], key: str, path: str, default: str | None = None) -> str:
        return self._line(table, key, path, default) or ""

    def parsed(
        self, table: Mapping[str, Any], key: str, path: str, parse: Callable[[str], Any], default: str | None = None
    ) -> Any:
        """What `parse` makes of the text; None when it is wrong, or empty and that is the default."""
        value = self._line(table, key, path, default)
        if value is None or (not value and default == ""):
            return None
        try:
            return parse(value)
        except VmferryError as error:
            self.faults.append(f"{path}.{key}: {error.message} {error.fix}")
            return None

    def _line(self, table: Mapping[str, Any], key: str, path: str, default: str | None) -> str | None:
        value = table.get(key, default)
        if isinstance(value, str) and len(value) <= _LONGEST_TEXT and _is_one_line(value):
            return value
        wanted = f"must be a text of one line, at most {_LONGEST_TEXT} characters"
        self.faults.append(f"{path}.{key}: {'is missing' if value is None else wanted}")
        return None

    def one_of(self, path: str, value: str, allowed: tuple[str, ...]) -> str:
        if value not in allowed:
            self.faults.append(f"{path}: {value[:40]!r} is not one of {', '.join(allowed)}")
        return value


def _is_one_line(text: str) -> bool:
    """No control characters, and no halves of surrogate pairs (JSON may carry them, no file name or QMP text can)."""
    return all(unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") for character in text)


def read_definition(document: object) -> VmDefinition:
    """The definition. Raises WrongInput `bad-vm` which names every key that is wrong and what is wanted there."""
    reader = _Reader()
    table = reader.table(document, "vm", {"name", "cpus", "memory", "cpu_model", "boot", "disk", "nic"})
    name = reader.parsed(table, "name", "vm", lambda text: require_name(text, "VM"))
    cpus = table.get("cpus", 1)
    if not isinstance(cpus, int) or isinstance(cpus, bool) or not 1 <= cpus <= _MOST_CPUS:
        reader.faults.append(f"vm.cpus: must be a whole number from 1 to {_MOST_CPUS}")
    memory = reader.parsed(table, "memory", "vm", parse_size)
    if memory is not None and (memory < _SMALLEST_MEMORY or memory % (1 << 20)):
        reader.faults.append("vm.memory: must be whole MiB, at least 16MiB")
    definition = VmDefinition(
        name=name or "",
        cpus=cpus,
        memory_bytes=memory or 0,
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
    before = len(reader.faults)
    table = reader.table(value, "boot", {"kernel", "initrd", "cmdline", "firmware"})
    boot = BootDefinition(**{key: reader.text(table, key, "boot", "") for key in BootDefinition.__slots__})
    if len(reader.faults) > before:
        return boot
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
    size_bytes = reader.parsed(table, "size", path, parse_size, "" if image else None)
    if size_bytes is not None and (size_bytes < 1 << 20 or size_bytes % 512):
        reader.faults.append(f"{path}.size: must be at least 1MiB and a multiple of 512 bytes")
    backing = table.get("backing", False)
    if not isinstance(backing, bool) or (backing and not image):
        reader.faults.append(f"{path}.backing: true or false, and only with an image")
    return DiskDefinition(
        name=reader.parsed(table, "name", path, lambda text: require_name(text, "disk")) or "",
        pool=reader.text(table, "pool", path),
        size_bytes=size_bytes or 0,
        image=image,
        backing=bool(backing),
        format=reader.one_of(f"{path}.format", reader.text(table, "format", path, "qcow2"), ("qcow2", "raw")),
    )


def _read_nic(reader: _Reader, value: object, index: int) -> NicDefinition:
    path = f"nic[{index}]"
    table = reader.table(value, path, {"switch", "mac"})
    return NicDefinition(
        switch=reader.text(table, "switch", path), mac=reader.parsed(table, "mac", path, require_mac, "") or ""
    )


def _check_whole(reader: _Reader, definition: VmDefinition) -> None:
    names = [disk.name for disk in definition.disks]
    for name in sorted({name for name in names if name and names.count(name) > 1}):
        reader.faults.append(f"disk: two disks are named {name!r}")
    macs = [nic.mac for nic in definition.nics if nic.mac]
    for mac in sorted({mac for mac in macs if macs.count(mac) > 1}):
        reader.faults.append(f"nic: two cards have the MAC {mac}")
    if definition.boot.firmware and not definition.disks:
        reader.faults.append("boot: a firmware boots from the first disk, and there is none")
    if any(disk.backing and disk.format != "qcow2" for disk in definition.disks):
        reader.faults.append("disk: a shared base layer (backing) needs format qcow2")
