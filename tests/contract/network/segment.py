"""Two hosts, a client and a switch in network namespaces of their own, for one test; all are removed at its end."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

WORKER = Path(__file__).with_name("worker.py")
MAC = "52:54:00:aa:00:01"


class Refused(Exception):
    """The code under test raised one of its errors; the text is its code."""


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Worker:
    """A process in a namespace; `call` runs a method there, `ms[name]` keeps what each call took."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.ms: dict[str, list[float]] = {}

    @classmethod
    async def start(cls, namespace: str, role: str) -> Worker:
        process = await asyncio.create_subprocess_exec(
            *("ip", "netns", "exec", namespace, sys.executable, str(WORKER), role),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=1 << 26,
        )
        return cls(process)

    async def call(self, name: str, **arguments: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"call": name, "arguments": arguments}).encode() + b"\n")
        async with asyncio.timeout(30):
            line = await self.process.stdout.readline()
        assert line, f"the worker died in {name}"
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"], answer["message"])
        self.ms.setdefault(name, []).append(answer["ms"])
        return answer["result"]

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


async def until(condition: Callable[[], Awaitable[bool]], what: str, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"in {seconds} s not: {what}"
        await asyncio.sleep(0.002)


class Segment:
    """client -- switch -- host a, host b; a and b also have a migration network 10.99.0.0/24 of their own."""

    def __init__(self, path: Path, mtu: int = 1500, migration_mtu: int = 1500) -> None:
        self.path = path
        self.mtu, self.migration_mtu = mtu, migration_mtu
        self.stem = "vmt" + secrets.token_hex(3)
        self.addresses = ("10.99.0.1", "10.99.0.2")
        self._undo = AsyncExitStack()

    def ns(self, name: str) -> str:
        return f"{self.stem}-{name}"

    def ip(self, namespace: str, *arguments: str) -> str:
        return run("ip", "-n", self.ns(namespace), *arguments)

    def in_ns(self, namespace: str, *command: str) -> str:
        return run("ip", "netns", "exec", self.ns(namespace), *command)

    async def __aenter__(self) -> Self:
        try:
            self._build()
            self.a, self.b = await self.worker("a", "host"), await self.worker("b", "host")
            self.client, self.guest = await self.worker("client", "client"), await self.worker("guest", "guest")
            await self.a.call("switch", mtu=self.mtu)
            await self.b.call("switch", mtu=self.mtu)
            await self.guest.call("listen", path=str(self.path / "guest"), mac=MAC)
        except BaseException:
            await self._undo.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._undo.aclose()

    async def worker(self, namespace: str, role: str) -> Worker:
        worker = await Worker.start(self.ns(namespace), role)
        self._undo.push_async_callback(worker.kill)
        return worker

    def _build(self) -> None:
        for name in ("sw", "client", "guest", "a", "b"):
            run("ip", "netns", "add", self.ns(name))
            self._undo.callback(run, "ip", "netns", "del", self.ns(name))
            self.ip(name, "link", "set", "dev", "lo", "up")
            self.in_ns(name, "sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        self.ip("sw", "link", "add", "name", "sw0", "mtu", str(self.mtu), "type", "bridge")
        self.ip("sw", "link", "set", "dev", "sw0", "up")
        for name, device in (("client", "c0"), ("a", "up0"), ("b", "up0")):
            port = f"p-{name}"
            peer = ("peer", "name", device, "mtu", str(self.mtu), "netns", self.ns(name))
            self.ip("sw", "link", "add", "name", port, "mtu", str(self.mtu), "type", "veth", *peer)
            self.ip("sw", "link", "set", "dev", port, "master", "sw0", "up")
            self.ip(name, "link", "set", "dev", device, "up")
        self.ip("client", "link", "set", "dev", "c0", "address", "02:00:00:00:00:09")
        mtu = str(self.migration_mtu)
        peer = ("peer", "name", "mig0", "mtu", mtu, "netns", self.ns("b"))
        self.ip("a", "link", "add", "name", "mig0", "mtu", mtu, "type", "veth", *peer)
        for name, number in (("a", 1), ("b", 2)):
            self.ip(name, "address", "add", f"10.99.0.{number}/24", "dev", "mig0")
            self.ip(name, "link", "set", "dev", "mig0", "up")

    def packets(self, namespace: str) -> int:
        """All frames that crossed the veth links of a namespace so far, in and out."""
        links = json.loads(self.ip(namespace, "-json", "-s", "link"))
        veths = [link["stats64"] for link in links if link["ifname"].startswith("p-")]
        return sum(stats["rx"]["packets"] + stats["tx"]["packets"] for stats in veths)

    def address(self, host: Worker) -> str:
        return self.addresses[0 if host is self.a else 1]

    async def boot(self, host: Worker, vm: str) -> None:
        """A port on that host with the running guest behind it."""
        await host.call("port", vm=vm, mac=MAC, plugged=True, mtu=self.mtu)
        await self.hand_over(host, vm)
        await self.guest.call("run", label=vm)

    async def hand_over(self, host: Worker, vm: str) -> None:
        await host.call("give", vm=vm, path=str(self.path / "guest"))
        await self.guest.call("take", label=vm)

    async def prepare(self, source: Worker, target: Worker, old: str, new: str, migration: str = "m1") -> None:
        await target.call("port", vm=new, mac=MAC, plugged=False, mtu=self.mtu)
        await self.hand_over(target, new)
        ends = {"migration": migration, "mtu": self.mtu}
        here, there = self.address(source), self.address(target)
        await target.call("make_target", vm=new, local=there, remote=here, **ends)
        await source.call("make_source", vm=old, local=here, remote=there, **ends)

    async def received(self, more: int) -> None:
        """Waits until the guest has got so many frames more."""
        goal = await self.guest.call("count") + more
        await until(lambda: self._reached(goal), f"{more} frames more")

    async def _reached(self, goal: int) -> bool:
        return bool(await self.guest.call("count") >= goal)

    async def held(self, target: Worker, more: int) -> None:
        goal = await target.call("target.held") + more

        async def reached() -> bool:
            return bool(await target.call("target.held") >= goal)

        await until(reached, f"{more} frames held")


class Verdict:
    """What the guest got, compared with what was sent."""

    def __init__(self, sent: list[list[Any]], got: list[list[Any]]) -> None:
        numbers = [number for _, _, number, _ in got]
        self.lost = sorted({number for _, number in sent} - set(numbers))
        self.duplicates = sorted(number for number, times in Counter(numbers).items() if times > 1)
        self.damaged = [number for _, _, number, whole in got if not whole]
        self.disordered = [later for earlier, later in itertools.pairwise(numbers) if later < earlier]

    def __repr__(self) -> str:
        return f"lost {self.lost}, duplicates {self.duplicates}, damaged {self.damaged}, out of order {self.disordered}"


async def verdict(segment: Segment) -> Verdict:
    """Stops the client, waits for the last frame, compares."""
    sent = await segment.client.call("stop")
    goal, quiet_since, count = len(sent), time.monotonic(), -1
    while count < goal and time.monotonic() - quiet_since < 1.5:
        now = await segment.guest.call("count")
        if now != count:
            count, quiet_since = now, time.monotonic()
        await asyncio.sleep(0.02)
    return Verdict(sent, await segment.guest.call("log"))
