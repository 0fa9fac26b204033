"""What format a file is in, and whether it would make QEMU open other files: read from its header alone.

Asking qemu-img would be too late: it opens an external data file, or the extents of a VMDK descriptor, before it
answers. Everything here takes bytes from an untrusted file. Sources: QEMU's docs/interop/qcow2.txt, the VMDK 5.0, VHD
and VHDX specifications.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

QEMU_FORMATS = {"qcow2": "qcow2", "raw": "raw", "vhdx": "vhdx", "vhd": "vpc", "vmdk": "vmdk"}
_QCOW2_DATA_FILE = 1 << 2  # incompatible feature bit 2
_VHD_FIXED, _VHD_DYNAMIC = 2, 3
_LARGEST_DESCRIPTOR = 1 << 20
_SECTOR = 512
_QEMU_DESCRIPTOR = 20 * _SECTOR  # QEMU reads that much, whatever the header says (block/vmdk.c, DESC_SIZE)


@dataclass(frozen=True, slots=True)
class Header:
    """`format` as users name it. `elsewhere` says which other files the image leans on, "" if it stands alone."""

    format: str
    elsewhere: str = ""


def observe_header(fd: int) -> Header:
    """Reads the header of the open file. Blocking. A file without a known mark is raw. Raises OSError."""
    head = os.pread(fd, 4096, 0)
    if head[:4] == b"QFI\xfb":
        return _qcow2(fd, head)
    if head[:8] == b"vhdxfile":
        return Header("vhdx")  # QEMU refuses differencing VHDX itself
    if head[:4] == b"KDMV":
        return _vmdk(fd, head)
    if head[:4] == b"COWD" or head.lstrip().startswith(b"# Disk DescriptorFile"):
        return Header("vmdk", "the extent files that its descriptor lists")
    size = os.lseek(fd, 0, os.SEEK_END)
    footer = os.pread(fd, _SECTOR, max(0, size - _SECTOR))
    for block in (head[:_SECTOR], footer):
        if block[:8] == b"conectix":
            return _vhd(block)
    return Header("raw")


def _qcow2(fd: int, head: bytes) -> Header:
    if len(head) < 72:
        return Header("qcow2")
    version, backing_offset, backing_size = struct.unpack_from(">IQI", head, 4)
    if backing_offset:
        name = os.pread(fd, min(backing_size, 1023), backing_offset).decode(errors="replace")
        return Header("qcow2", f"the backing file {name[:200]!r}")
    features = struct.unpack_from(">Q", head, 72)[0] if version >= 3 and len(head) >= 80 else 0
    return Header("qcow2", "an external data file" if features & _QCOW2_DATA_FILE else "")


def _vmdk(fd: int, head: bytes) -> Header:
    if len(head) < 44:
        return Header("vmdk")
    capacity, _, descriptor_offset, descriptor_size = struct.unpack_from("<QQQQ", head, 12)
    if capacity == 0:
        return Header("vmdk", "the extent files that its descriptor lists")
    length = min(max(descriptor_size * _SECTOR, _QEMU_DESCRIPTOR), _LARGEST_DESCRIPTOR)
    offset = descriptor_offset * _SECTOR
    text = os.pread(fd, length, offset) if offset < 1 << 62 else b""
    return Header("vmdk", "a parent image" if b"parentFileNameHint" in text else "")


def _vhd(footer: bytes) -> Header:
    kind = struct.unpack_from(">I", footer, 60)[0] if len(footer) >= 64 else 0
    return Header("vhd", "" if kind in (_VHD_FIXED, _VHD_DYNAMIC) else "a parent image")
