"""One process inside a network namespace for the contract tests: a host with the code under test, a client, or a guest.

Runs as `python worker.py host|client|guest`; reads one JSON call a line, answers one JSON line.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import hashlib
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from typing import Any

from vmferry.model.errors import VmferryError
from vmferry.network.announce import Announcer, announce_rounds, announcement_frames
from vmferry.network.gate import SourceGate, TargetGate, TunnelSpec, remove_leftovers
from vmferry.network.netlink import Netlink
from vmferry.network.ports import (
    Port,
    PortRequest,
    adopt_port,
    close_port,
    create_port,
    list_ports,
    plug,
    remove_port,
    unplug,
)
from vmferry.network.probes import (
    PathProbeListener,
    new_nonce,
    observe_mac_elsewhere,
    observe_neighbours,
    send_path_probe,
)
from vmferry.network.switches import SwitchConfig, SwitchState, ensure_switch, observe_switch

MAGIC = b"NUMBERED"
ETHERTYPE = 0x88B6
HEAD = struct.Struct("!8scII")  # magic, kind, sequence number, whole length of the frame
TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454D0, 0x400454D8
OFFLOADS = 0x01 | 0x02 | 0x04  # checksum, TSO4, TSO6


class Host:
    """The code under test, one call for one step."""

    def __init__(self) -> None:
        self.netlink = Netlink()
        self.ports: dict[str, Port] = {}
        self.source: SourceGate | None = None
        self.target: TargetGate | None = None
        self.listener: PathProbeListener | None = None

    async def switch(self, device: str = "br0", uplinks: tuple[str, ...] = ("up0",), **more: Any) -> SwitchState:
        return await ensure_switch(self.netlink, SwitchConfig("lan", device, tuple(uplinks), **more))

    async def look(self, device: str = "br0", uplinks: tuple[str, ...] = ("up0",)) -> SwitchState:
        return await observe_switch(self.netlink, SwitchConfig("lan", device, tuple(uplinks)))

    async def plugged(self, vm: str, is_plugged: bool) -> None:
        await (plug if is_plugged else unplug)(self.netlink, self.ports[vm])

    async def adopt(self, vm: str, interface: str) -> Port:
        port = self.ports[vm]
        return await adopt_port(self.netlink, interface, port.fd, port.mac)

    async def remove(self, interface: str) -> None:
        await remove_port(self.netlink, interface)

    async def cancelled_port(self, vm: str, mac: str) -> bool:
        """A port whose making is cancelled at once; whether the cancellation came through."""
        task = asyncio.create_task(self.port(vm, mac, plugged=True))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    async def port(self, vm: str, mac: str, plugged: bool, mtu: int = 1500, txqueuelen: int = 10_000) -> str:
        request = PortRequest(vm, 0, mac, "br0", mtu=mtu, plugged=plugged, txqueuelen=txqueuelen)
        self.ports[vm] = await create_port(self.netlink, request)
        return self.ports[vm].name

    async def give(self, vm: str, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            socket.send_fds(sock, [vm.encode()], [self.ports[vm].fd])

    async def drop(self, vm: str) -> None:
        close_port(self.ports.pop(vm))

    async def names(self) -> list[str]:
        return list(await list_ports(self.netlink))

    def _tunnel(self, migration: str, local: str, remote: str, mtu: int) -> TunnelSpec:
        return TunnelSpec(migration, 0, local, remote, vni=4711, mtu=mtu)

    async def make_source(self, vm: str, migration: str, local: str, remote: str, mtu: int = 1500) -> None:
        tunnel = self._tunnel(migration, local, remote, mtu)
        self.source = SourceGate(self.netlink, self.ports[vm], tunnel, ("up0",))
        await self.source.prepare()

    async def is_closed(self) -> bool:
        assert self.source
        return self.source.closed

    async def make_target(self, vm: str, migration: str, local: str, remote: str, mtu: int = 1500) -> None:
        tunnel = self._tunnel(migration, local, remote, mtu)
        self.target = TargetGate(self.netlink, self.ports[vm], tunnel, ("up0",), ("10.9.0.50", "fd00::50"))
        await self.target.prepare()

    async def leftovers(self, alive: list[str]) -> list[str]:
        return list(await remove_leftovers(self.netlink, alive))

    async def announce(self, mac: str, addresses: tuple[str, ...] = ()) -> None:
        with Announcer(("up0",), announcement_frames(mac, addresses)) as announcer:
            await announce_rounds(announcer, (1, 2))

    async def listen(self, mtu: int) -> str:
        self.listener = PathProbeListener(self.netlink, "br0", mtu)
        await self.listener.__aenter__()
        return self.listener.mac

    async def heard(self, nonce: str, sizes: list[int], seconds: float) -> list[int]:
        assert self.listener
        found = await self.listener.wait(bytes.fromhex(nonce), sizes, seconds)
        await self.listener.__aexit__()
        return sorted(found)

    async def probe(self, mac: str, sizes: list[int]) -> str:
        nonce = new_nonce()
        await send_path_probe(self.netlink, "br0", mac, nonce, sizes)
        return nonce.hex()

    async def sighting(self, mac: str, expected: list[str]) -> list[str | None]:
        found = await observe_mac_elsewhere(self.netlink, "br0", mac, ("up0",), expected)
        return [found.port, found.uplink]

    async def neighbours(self) -> list[str]:
        return [neighbour.address for neighbour in await observe_neighbours(self.netlink, "br0")]


def numbered_frame(kind: bytes, number: int, mac: bytes, source: bytes, length: int) -> bytes:
    """A frame with its own number; kinds u(nicast), b(roadcast), g(SO: one TCP segment to be split by the receiver)."""
    head = HEAD.pack(MAGIC, kind, number, length)
    if kind != b"g":
        destination = b"\xff" * 6 if kind == b"b" else mac
        return bytes(10) + (destination + source + struct.pack("!H", ETHERTYPE) + head).ljust(length, b"\0")
    tcp = struct.pack("!HHIIBBHHH", 1, 2, number, 0, 0x50, 0x10, 1000, 0, 0)
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, length - 14, 0, 0x4000, 64, 6, 0, b"\x0a\x09\x00\x09", b"\x0a\x09\x00\x32"
    )
    ip = ip[:10] + struct.pack("!H", ~checksum(ip) & 0xFFFF) + ip[12:]
    pseudo = checksum(ip[12:20] + struct.pack("!HH", 6, length - 34))
    tcp = tcp[:16] + struct.pack("!H", pseudo) + tcp[18:]
    vnet = struct.pack("=BBHHHH", 1, 1, 54, 1448, 34, 16)  # checksum wanted, TCPv4, segments of 1448
    return vnet + (mac + source + b"\x08\x00" + ip + tcp + head).ljust(length, b"\0")


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def tcp_payload(frame: bytes) -> int:
    """How many bytes of TCP's data an Ethernet frame carries; 0 if it is no TCP over IPv4."""
    if frame[12:14] != b"\x08\x00" or frame[23] != 6:
        return 0
    ip_header = (frame[14] & 0x0F) * 4
    tcp_header = (frame[14 + ip_header + 12] >> 4) * 4
    return int.from_bytes(frame[16:18]) - ip_header - tcp_header


class Client:
    """Sends numbered frames at a rate; counts what its own device receives."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []
        self.going = False
        self.thread: threading.Thread | None = None

    async def start(self, mac: str, rate: int, kinds: str, large: int = 1514) -> None:
        self.going, self.sent = True, []
        raw = bytes.fromhex(mac.replace(":", ""))
        self.thread = threading.Thread(target=self._send, args=(raw, rate, kinds.encode(), large))
        self.thread.start()

    def _send(self, mac: bytes, rate: int, kinds: bytes, large: int) -> None:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sock.setsockopt(263, 15, 1)  # PACKET_VNET_HDR
        sock.bind(("c0", 0))
        source = sock.getsockname()[4]
        begin, number = time.monotonic(), 0
        while self.going:
            kind = kinds[number % len(kinds) : number % len(kinds) + 1]
            length = {b"u": 64, b"b": 80, b"f": large, b"g": 9000}[kind]
            frame = numbered_frame(b"u" if kind == b"f" else kind, number, mac, source, length)
            sock.send(frame)
            self.sent.append((kind.decode(), number))
            number += 1
            pause = begin + number / rate - time.monotonic()
            if pause > 0:
                time.sleep(pause)
        sock.close()

    async def stop(self) -> list[tuple[str, int]]:
        self.going = False
        assert self.thread
        await asyncio.to_thread(self.thread.join)
        return self.sent

    async def pour(self, address: str) -> None:
        """Sends a TCP stream to the guest until `stop_pouring`."""
        self.stream = socket.create_connection((address, 9), timeout=60)
        self.going, self.digest, self.poured = True, hashlib.sha256(), 0
        self.thread = threading.Thread(target=self._pour)
        self.thread.start()

    def _pour(self) -> None:
        while self.going:
            data = os.urandom(1 << 16)
            self.stream.sendall(data)
            self.digest.update(data)
            self.poured += len(data)
        self.stream.shutdown(socket.SHUT_WR)

    async def stop_pouring(self) -> dict[str, Any]:
        """Whether the guest got the same, and from struct tcp_info the bytes sent, each repetition counted too."""
        self.going = False
        assert self.thread
        await asyncio.to_thread(self.thread.join)
        answer = await asyncio.to_thread(self.stream.recv, 32, socket.MSG_WAITALL)
        info = self.stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        (sent,) = struct.unpack_from("=Q", info, 200)
        (retransmitted,) = struct.unpack_from("=I", info, 100)
        self.stream.close()
        return {"equal": answer == self.digest.digest(), "sent": sent, "retransmitted": retransmitted}


class Guest:
    """Reads a tap as QEMU does, keeps what it got, and can be stopped: then it takes one frame more (net/tap.c)."""

    def __init__(self) -> None:
        self.taps: dict[str, int] = {}
        self.got: list[tuple[str, str, int, bool]] = []
        self.stuck: dict[str, list[bytes]] = {}
        self.listener: socket.socket | None = None
        self.thread: threading.Thread | None = None
        self.wake_read, self.wake_write = os.pipe()
        self.mac = b""
        self.nic, self.largest, self.arrived = -1, 0, 0

    async def listen(self, path: str, mac: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        self.mac = bytes.fromhex(mac.replace(":", ""))

    async def take(self, label: str) -> None:
        assert self.listener
        connection, _ = self.listener.accept()
        with connection:
            _, fds, _, _ = socket.recv_fds(connection, 100, 1)
        fcntl.ioctl(fds[0], TUNSETVNETHDRSZ, struct.pack("=i", 12))
        fcntl.ioctl(fds[0], TUNSETOFFLOAD, OFFLOADS)
        self.taps[label] = fds[0]

    async def run(self, label: str, talk: bool = True) -> None:
        for frame in self.stuck.pop(label, []):
            self._receive(label, frame)
        self.thread = threading.Thread(target=self._read, args=(label, talk))
        self.thread.start()

    def _read(self, label: str, talk: bool) -> None:
        fd, count = self.taps[label], 0
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self.wake_read, select.POLLIN)
        while True:
            ready = [number for number, _ in poll.poll()]
            if self.wake_read in ready:
                os.read(self.wake_read, 1)
                return
            try:
                self._receive(label, os.read(fd, 70000))
            except BlockingIOError:
                continue
            count += 1
            if talk and count % 7 == 0:  # the guest speaks too: switches see its MAC
                destination = b"\xff" * 6 if count % 5 == 0 else b"\x02\0\0\0\0\x09"
                os.write(fd, bytes(12) + (destination + self.mac + b"\x88\xb7").ljust(64, b"\0"))

    def _receive(self, label: str, data: bytes) -> None:
        frame = data[12:]
        offset = 54 if frame[12:14] == b"\x08\x00" else 14
        if frame[offset : offset + 8] != MAGIC:
            return
        _, kind, number, length = HEAD.unpack_from(frame, offset)
        self.got.append((label, kind.decode(), number, len(frame) == length))

    async def make_nic(self, mac: str, address: str) -> None:
        """A real network stack behind the ports: a tap here whose frames are relayed, with all offloads."""
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"eth0", 0x2 | 0x1000 | 0x4000))
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("=i", 12))
        fcntl.ioctl(fd, TUNSETOFFLOAD, OFFLOADS)
        self.nic = fd
        for command in (f"link set dev eth0 address {mac} txqueuelen 10000 up", f"address add {address} dev eth0"):
            process = await asyncio.create_subprocess_exec("ip", *command.split())
            assert await process.wait() == 0

    async def relay(self, label: str) -> None:
        self.thread = threading.Thread(target=self._relay, args=(self.taps[label],))
        self.thread.start()

    def _relay(self, fd: int) -> None:
        poll = select.poll()
        for number in (fd, self.nic, self.wake_read):
            poll.register(number, select.POLLIN)
        while True:
            for number, _ in poll.poll():
                if number == self.wake_read:
                    os.read(number, 1)
                    return
                try:
                    data = os.read(number, 70000)
                except BlockingIOError:
                    continue
                self.largest = max(self.largest, len(data))
                if number == fd:
                    self.arrived += tcp_payload(data[12:])
                while True:
                    try:
                        os.write(fd if number == self.nic else self.nic, data)
                        break
                    except BlockingIOError:
                        continue

    async def sink(self) -> None:
        """A TCP server on port 9 that reads all and answers with the digest of what it read."""

        async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            digest = hashlib.sha256()
            while data := await reader.read(1 << 18):
                digest.update(data)
            writer.write(digest.digest())
            writer.close()

        self.server = await asyncio.start_server(read, "0.0.0.0", 9)

    async def halt(self) -> None:
        """As QEMU in the middle of stopping: it reads nothing now."""
        os.write(self.wake_write, b"x")
        assert self.thread
        await asyncio.to_thread(self.thread.join)

    async def stop(self, label: str) -> int:
        """As QEMU after STOP: it reads one frame more if there is one, keeps it, and then reads no more."""
        await self.halt()
        return await self.swallow(label)

    async def swallow(self, label: str) -> int:
        if not self.stuck.get(label):
            try:
                self.stuck[label] = [os.read(self.taps[label], 70000)]
            except BlockingIOError:
                return 0
        return 1

    async def die(self, label: str) -> None:
        os.close(self.taps.pop(label))
        self.stuck.pop(label, None)

    async def count(self) -> int:
        return len(self.got)

    async def log(self) -> list[tuple[str, str, int, bool]]:
        return self.got


async def call(owner: Any, name: str, arguments: dict[str, Any]) -> Any:
    """`source.close` means the method `close` of `owner.source`."""
    for part in name.split("."):
        owner = getattr(owner, part)
    result = owner(**arguments)
    return await result if asyncio.iscoroutine(result) else result


def as_json(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


async def serve(owner: Any) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        request = json.loads(line)
        begin = time.perf_counter()
        try:
            answer = {"result": as_json(await call(owner, request["call"], request["arguments"]))}
        except VmferryError as error:
            answer = {"error": error.code, "message": str(error), "fix": error.fix}
        answer["ms"] = (time.perf_counter() - begin) * 1000
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(serve({"host": Host, "client": Client, "guest": Guest}[sys.argv[1]]()))
