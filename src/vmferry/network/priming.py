"""Takes the place of the one frame that a waiting QEMU reads too early.

QEMU reads one frame from a tap before it asks whether the guest can take it (net/tap.c of 10.0). An incoming QEMU does
so as soon as the first frame comes, before it knows how long the metadata of frames will be: that frame is lost. So the
first one is ours, and nobody misses it; QEMU then leaves the tap alone until the guest runs.
"""

from __future__ import annotations

import struct

from vmferry.network.frames import FrameSender
from vmferry.network.messages import mac_bytes
from vmferry.network.ports import Port, host_side_mac
from vmferry.network.probes import PROBE_ETHERTYPE, SMALLEST_PAYLOAD_BYTES
from vmferry.network.tap import SHORT_HEADER_BYTES


def prime_port(port: Port) -> None:
    """Puts one frame into the port that no system answers. After its QEMU has started. Raises Failed, KernelRefused."""
    sender = FrameSender(port.name, bypass=True)
    try:
        sender.send(unanswered_frame(port))
    finally:
        sender.close()


def unanswered_frame(port: Port) -> bytes:
    """A frame for the port's guest, with metadata, of a type that no system knows: it is dropped there unseen."""
    head = mac_bytes(port.mac) + mac_bytes(host_side_mac(port.mac)) + struct.pack("!H", PROBE_ETHERTYPE)
    return bytes(SHORT_HEADER_BYTES) + head + bytes(SMALLEST_PAYLOAD_BYTES)
