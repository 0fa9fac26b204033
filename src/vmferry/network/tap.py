"""Tap descriptors: the ioctls of /dev/net/tun and reading frames with their virtio-net header.

For `ports` and the gate only. Numbers are from include/uapi/linux/if_tun.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from typing import Final

from vmferry.model.errors import Failed
from vmferry.network.netlink import KernelRefused

_TUNSETIFF: Final = 0x400454CA
_TUNSETOWNER: Final = 0x400454CC
_TUNGETIFF: Final = 0x800454D2
_TUNGETVNETHDRSZ: Final = 0x800454D7
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x8000
_IFREQ: Final = struct.Struct("16sH22x")
_LARGEST_FRAME: Final = 65536 + 4096
SHORT_HEADER_BYTES: Final = 10


def open_tap(name: str, owner_uid: int | None) -> int:
    """A new, non-persistent tap: it goes with its last descriptor. Raises KernelRefused (EBUSY: the name is in use)."""
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise KernelRefused("open /dev/net/tun", error.errno or errno.EIO, "") from error
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
        if owner_uid is not None:
            fcntl.ioctl(fd, _TUNSETOWNER, owner_uid)
    except OSError as error:
        os.close(fd)
        raise KernelRefused(f"make the tap {name}", error.errno or errno.EIO, "") from error
    return fd


def name_of_tap(fd: int) -> str:
    """The interface a tap descriptor belongs to. Raises Failed `port-not-a-tap`."""
    try:
        answer = fcntl.ioctl(fd, _TUNGETIFF, _IFREQ.pack(b"", 0))
    except OSError as error:
        raise Failed("port-not-a-tap", f"Descriptor {fd} is not that of a tap ({error.strerror}).") from error
    return str(_IFREQ.unpack(answer)[0].rstrip(b"\0").decode())


def header_bytes_of(fd: int) -> int:
    """The length of the virtio-net header in front of each frame: 10 at first, 12 once a modern guest driver is up."""
    return int(struct.unpack("=i", fcntl.ioctl(fd, _TUNGETVNETHDRSZ, struct.pack("=i", 0)))[0])


def has_frames(fd: int) -> bool:
    """Whether frames wait in the tap's ring to be read. Takes none."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(event & select.POLLIN for _, event in poll.poll(0))


def read_frames(fd: int, limit: int) -> list[bytes]:
    """Takes up to `limit` waiting frames out of the ring, each with the 10-byte form of its header.

    Frames of one ring may be shared out between readers: nobody else may be reading. Raises Failed `port-read`.
    """
    header = header_bytes_of(fd)
    frames: list[bytes] = []
    while len(frames) < limit:
        try:
            data = os.read(fd, _LARGEST_FRAME)
        except BlockingIOError:
            break
        except OSError as error:
            raise Failed("port-read", f"The port's waiting frames cannot be read ({error.strerror}).") from error
        frames.append(data[:SHORT_HEADER_BYTES] + data[header:])
    return frames
