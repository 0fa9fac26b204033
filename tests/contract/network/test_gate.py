"""The gate against the kernel: no frame lost, doubled, damaged or out of order, forward and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .segment import MAC, Refused, Segment, Worker, until, verdict


async def migrate(segment: Segment, source: Worker, target: Worker, old: str, new: str, migration: str = "m1") -> int:
    """The engine's order of steps; gives back how many frames were left in the old port."""
    await segment.prepare(source, target, old, new, migration)
    await target.call("target.plug")
    await source.call("source.close")
    assert await source.call("source.settle", timeout_ms=2000)
    assert await segment.guest.call("stop", label=old) == 0
    left = await drain(segment, source, old)
    await segment.held(target, 20)
    await target.call("target.listen")
    await segment.guest.call("run", label=new)
    await target.call("target.announce")
    await segment.received(100)
    return left


async def drain(segment: Segment, source: Worker, old: str) -> int:
    await source.call("source.mark")
    await segment.guest.call("swallow", label=old)  # QEMU looks at its port
    return int(await source.call("source.drain"))


async def finish(segment: Segment, source: Worker, target: Worker, old: str) -> None:
    await source.call("source.release")
    await target.call("target.release")
    await segment.guest.call("die", label=old)
    await source.call("drop", vm=old)


@pytest.mark.parametrize(
    ("kinds", "rounds"),
    [("u", 4), ("uuuf", 4), ("uuufuufg", 20), ("bu", 6), ("uuubuufg", 20)],
)
async def test_no_frame_is_lost_there_and_back(tmp_path: Path, kinds: str, rounds: int) -> None:
    async with Segment(tmp_path) as segment:
        await segment.boot(segment.a, "v0")
        await segment.client.call("start", mac=MAC, rate=2000, kinds=kinds)
        await segment.received(100)
        source, target = segment.a, segment.b
        for round_number in range(rounds):
            old, new = f"v{round_number}", f"v{round_number + 1}"
            await migrate(segment, source, target, old, new, f"m{round_number}")
            await finish(segment, source, target, old)
            source, target = target, source
        found = await verdict(segment)
        print(found)
        for name in ("target.plug", "source.close", "source.drain", "target.announce", "source.settle"):
            times = sorted(segment.a.ms[name] + segment.b.ms[name])
            print(f"{name}: median {times[len(times) // 2]:.3f} ms, worst {times[-1]:.3f} ms")
        await segment.guest.call("stop", label=new)
    assert not found.lost and not found.duplicates and not found.damaged
    # At a change of path (tunnel, direct) a frame may overtake one that is still in the tunnel.
    assert len(found.disordered) <= 2 * rounds


async def begin(segment: Segment, swallow: bool) -> None:
    """Up to the point where the guest is stopped and frames wait on the target."""
    await segment.prepare(segment.a, segment.b, "old", "new")
    await segment.b.call("target.plug")
    await segment.a.call("source.close")
    assert await segment.a.call("source.settle", timeout_ms=2000)
    await segment.guest.call("stop", label="old")
    await drain(segment, segment.a, "old")
    await segment.held(segment.b, 20)
    if swallow:  # the target's QEMU reads one frame although its guest does not run
        assert await segment.guest.call("swallow", label="new") == 1


@pytest.mark.parametrize("swallow", [False, True])
async def test_a_rollback_loses_no_frame(tmp_path: Path, swallow: bool) -> None:
    async with Segment(tmp_path) as segment:
        await segment.boot(segment.a, "old")
        await segment.client.call("start", mac=MAC, rate=2000, kinds="uuubuufg")
        await segment.received(100)
        for _ in range(5):
            await begin(segment, swallow)
            await segment.a.call("source.reclaim")
            returned = await segment.b.call("target.return_frames")
            assert returned >= 20
            assert await segment.a.call("source.reopen", returned=returned) >= returned
            await segment.guest.call("run", label="old")
            await segment.received(100)
            await segment.b.call("target.release")
            await segment.a.call("source.release")
            await segment.guest.call("die", label="new")
            await segment.b.call("drop", vm="new")
            await segment.received(100)
        found = await verdict(segment)
        print(found)
        await segment.guest.call("stop", label="old")
    assert not found.lost and not found.duplicates and not found.damaged


async def until_waiting(segment: Segment) -> None:
    async def waiting() -> bool:
        return not await segment.a.call("source.settled")

    await until(waiting, "a frame in the port's ring")


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("late", ["none", "one", "some", "unlooked"])
async def test_the_frame_qemu_reads_after_stop_is_not_lost(tmp_path: Path, late: str, rollback: bool) -> None:
    """The guest stops while the gate is still open, as when QEMU chooses the moment."""
    async with Segment(tmp_path) as segment:
        await segment.boot(segment.a, "old")
        await segment.client.call("start", mac=MAC, rate=2000, kinds="u")
        await segment.received(100)
        await segment.prepare(segment.a, segment.b, "old", "new")
        await segment.a.call("source.arm")
        await segment.received(20)
        await segment.b.call("target.plug")
        if late == "none":
            await segment.a.call("source.close")
            assert await segment.a.call("source.settle", timeout_ms=2000)
        if late == "unlooked":  # QEMU is busy stopping: frames come, and it has not read one of them yet
            await segment.guest.call("halt")
            await until_waiting(segment)
        else:
            await segment.guest.call("stop", label="old")
        if late in ("one", "some"):

            async def swallowed() -> bool:
                return bool(await segment.guest.call("swallow", label="old"))

            await until(swallowed, "a frame after the stop")
        if late == "some":
            await until_waiting(segment)
        await segment.a.call("source.close")
        left = await drain(segment, segment.a, "old")
        assert left >= 1 if late != "none" else left == 0
        await segment.held(segment.b, 20)
        if rollback:
            await segment.a.call("source.reclaim")
            returned = await segment.b.call("target.return_frames")
            await segment.a.call("source.reopen", returned=returned)
        await segment.guest.call("run", label="old" if rollback else "new")
        await segment.received(100)
        found = await verdict(segment)
        dropped = (await segment.a.call("source.traffic"))["dropped"]
        await segment.guest.call("stop", label="old" if rollback else "new")
    assert not found.lost and not found.duplicates and not found.damaged, found
    assert dropped == 0


async def test_the_source_going_on_forwarding_can_be_ended_when_it_is_quiet(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        await segment.boot(segment.a, "old")
        await segment.client.call("start", mac=MAC, rate=500, kinds="uubg")
        await segment.received(20)
        await migrate(segment, segment.a, segment.b, "old", "new")
        before = await segment.a.call("source.traffic")
        await segment.received(100)
        after = await segment.a.call("source.traffic")
        assert after["bytes"] == before["bytes"]
        assert after["others"] > before["others"]  # broadcasts still come to the old host; they end with release
        assert after["dropped"] == 0 and (await segment.b.call("target.traffic"))["dropped"] == 0

        async def nothing_lost_between() -> bool:
            here = (await segment.a.call("source.traffic"))["tunnelled"]
            return bool((await segment.b.call("target.traffic"))["tunnelled"] >= here > 0)

        await until(nothing_lost_between, "all frames sent into the tunnel received")
        await finish(segment, segment.a, segment.b, "old")
        assert not [link for link in segment.ip("a", "-o", "link").splitlines() if "vg" in link or "vf" in link]
        assert not [link for link in segment.ip("b", "-o", "link").splitlines() if "vg" in link]
        await segment.received(50)
        assert not (await verdict(segment)).lost
        await segment.guest.call("stop", label="new")


async def test_a_full_ring_is_counted(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        await segment.boot(segment.a, "old")
        await segment.client.call("start", mac=MAC, rate=2000, kinds="u")
        name = await segment.b.call("port", vm="new", mac=MAC, plugged=False, txqueuelen=10)
        await segment.hand_over(segment.b, "new")
        await segment.b.call("make_target", vm="new", migration="m", local="10.99.0.2", remote="10.99.0.1")
        await segment.a.call("make_source", vm="old", migration="m", local="10.99.0.1", remote="10.99.0.2")
        await segment.b.call("target.plug")
        await segment.a.call("source.close")
        assert await segment.a.call("source.settle", timeout_ms=2000)
        await segment.held(segment.b, 50)
        await segment.client.call("stop")
        await segment.guest.call("stop", label="old")
        await segment.guest.call("run", label="new", talk=False)

        async def all_accounted() -> bool:
            dropped = (await segment.b.call("target.traffic"))["dropped"]
            link = json.loads(segment.ip("b", "-json", "-s", "link", "show", "dev", name))[0]
            read = link["stats64"]["tx"]["packets"]
            return bool(dropped > 0 and dropped + read == await segment.b.call("target.held"))

        await until(all_accounted, "every frame read by the guest or counted as dropped")
        await segment.guest.call("stop", label="new")


async def test_killed_daemons_leave_nothing_that_is_not_cleaned(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        await segment.boot(segment.a, "old")
        await segment.client.call("start", mac=MAC, rate=500, kinds="u")
        await segment.received(20)
        await begin(segment, swallow=False)
        await segment.a.kill()
        await segment.b.kill()
        segment.a, segment.b = await segment.worker("a", "host"), await segment.worker("b", "host")
        assert await segment.a.call("leftovers", alive=["new", "m1"]) == []
        removed = await segment.a.call("leftovers", alive=[])
        assert len(removed) == 2 and await segment.a.call("leftovers", alive=[]) == []
        assert len(await segment.b.call("leftovers", alive=[])) == 1
        assert "vg" not in segment.ip("a", "-o", "link") + segment.ip("b", "-o", "link")
        await segment.guest.call("die", label="new")
        await segment.a.call("announce", mac=MAC)
        await segment.guest.call("run", label="old")  # the guest lives on and hears again
        await segment.received(50)
        await segment.client.call("stop")
        await segment.guest.call("stop", label="old")
        await segment.guest.call("die", label="old")
        assert await segment.a.call("names") == [] and await segment.b.call("names") == []


async def test_no_storm(tmp_path: Path) -> None:
    """Broadcasts while everything is plugged and tunnelled: each crosses every link of the switch once."""
    async with Segment(tmp_path) as segment:
        await segment.boot(segment.a, "old")
        await segment.prepare(segment.a, segment.b, "old", "new")
        await segment.b.call("target.plug")
        await segment.a.call("source.close")
        before = segment.packets("sw")
        await segment.client.call("start", mac=MAC, rate=2000, kinds="b")
        await segment.held(segment.b, 300)
        sent = await segment.client.call("stop")
        await segment.guest.call("stop", label="old")
        crossed = segment.packets("sw") - before
        assert crossed < 4 * len(sent) + 100  # in once, out to both hosts (and the switch itself), nothing more


async def test_a_prepare_that_fails_leaves_nothing(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        await segment.boot(segment.a, "old")
        ends = {"vm": "old", "local": "10.99.0.1", "remote": "10.99.0.2"}
        segment.ip("a", "link", "set", "dev", "up0", "name", "up7")  # the announcer finds no uplink
        with pytest.raises(Refused, match="net-enodev"):
            await segment.a.call("make_source", migration="m", **ends)
        with pytest.raises(Refused, match="net-enodev"):
            await segment.a.call("make_target", migration="m", **ends)
        assert "vg" not in segment.ip("a", "-o", "link")
        await segment.a.call("source.release")
        await segment.a.call("source.release")
        segment.ip("a", "link", "set", "dev", "up7", "name", "up0")
        await segment.a.call("make_source", migration="m", **ends)
        await segment.a.call("source.close")
        await segment.a.call("source.close")
        await segment.a.call("source.reopen", returned=5, timeout_s=0.05)
        await segment.a.call("source.reopen")
        await segment.a.call("source.release")
        await segment.client.call("start", mac=MAC, rate=500, kinds="ub")
        await segment.received(50)
        assert not (await verdict(segment)).lost
        await segment.guest.call("stop", label="old")


async def test_the_tunnel_over_ipv6(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        for name, number in (("a", 1), ("b", 2)):
            segment.in_ns(name, "sysctl", "-qw", "net.ipv6.conf.mig0.disable_ipv6=0")
            # The kernel does not fragment what it wraps into IPv6: the migration network must be large enough for it.
            segment.ip(name, "link", "set", "dev", "mig0", "mtu", "1600")
            segment.ip(name, "address", "add", f"fd00:99::{number}/64", "dev", "mig0", "nodad")
        # Hosts that migrate know their neighbours: their daemons talk. Unknown ones would cost the first fragments.
        for name, other, number in (("a", "b", 2), ("b", "a", 1)):
            lladdr = segment.ip(other, "-br", "link", "show", "dev", "mig0").split()[2]
            segment.ip(
                name, "neighbour", "replace", f"fd00:99::{number}", "lladdr", lladdr, "nud", "permanent", "dev", "mig0"
            )
        await segment.boot(segment.a, "old")
        await segment.client.call("start", mac=MAC, rate=500, kinds="uuubuufg")
        await segment.received(20)
        segment.addresses = ("fd00:99::1", "fd00:99::2")
        await migrate(segment, segment.a, segment.b, "old", "new")
        await finish(segment, segment.a, segment.b, "old")
        found = await verdict(segment)
        await segment.guest.call("stop", label="new")
    assert not found.lost and not found.duplicates and not found.damaged, found


async def full_ring(segment: Segment, kept: bool) -> str:
    """A guest that reads its port no more, frames coming until the port has no room; the port's name.

    `kept`: QEMU has read the one frame more that it keeps; else it will when it looks the next time.
    """
    name = await segment.a.call("port", vm="old", mac=MAC, plugged=True, txqueuelen=50)
    await segment.hand_over(segment.a, "old")
    await segment.guest.call("run", label="old")
    await segment.client.call("start", mac=MAC, rate=2000, kinds="u")
    await segment.received(20)
    await segment.prepare(segment.a, segment.b, "old", "new")
    await segment.a.call("source.arm")
    await segment.received(20)
    await segment.guest.call("halt")
    if kept:
        await until_waiting(segment)
        assert await segment.guest.call("swallow", label="old") == 1

    async def full() -> bool:
        return dropped_at(segment, name) > 20

    await until(full, "frames dropped at the port")
    await segment.b.call("target.plug")
    await segment.a.call("source.close")
    return str(name)


def dropped_at(segment: Segment, port: str) -> int:
    return int(json.loads(segment.ip("a", "-json", "-s", "link", "show", "dev", port))[0]["stats64"]["tx"]["dropped"])


@pytest.mark.parametrize("kept", [False, True])
async def test_a_full_ring_goes_to_the_target(tmp_path: Path, kept: bool) -> None:
    """A VM paused for long, or a NIC that the guest does not drive: the port has no room for the marker."""
    async with Segment(tmp_path) as segment:
        name = await full_ring(segment, kept)
        assert await drain(segment, segment.a, "old") > 30  # the kernel frees what was read of a ring in batches
        dropped = dropped_at(segment, name)
        await segment.held(segment.b, 20)
        await segment.b.call("target.listen")
        await segment.guest.call("run", label="new")
        await segment.b.call("target.announce")
        await segment.received(100)
        lost_here = (await segment.a.call("source.traffic"))["dropped"]
        found = await verdict(segment)
        await segment.guest.call("stop", label="new")
    # Those for which the old port had no room: the last before the gate was closed, and none but them.
    assert found.lost == list(range(found.lost[0], found.lost[-1] + 1)) and len(found.lost) <= dropped, found
    assert not found.duplicates and not found.damaged, found
    assert lost_here == 0


@pytest.mark.parametrize("drained", [False, True])
async def test_a_rollback_with_a_full_ring_opens_the_gate(tmp_path: Path, drained: bool) -> None:
    async with Segment(tmp_path) as segment:
        name = await full_ring(segment, kept=True)
        if drained:
            await drain(segment, segment.a, "old")
        await segment.held(segment.b, 60)
        await segment.a.call("source.reclaim")
        returned = await segment.b.call("target.return_frames")
        assert await segment.a.call("source.reopen", returned=returned) >= returned
        assert (await segment.a.call("source.traffic"))["dropped"] > 0
        assert not await segment.a.call("is_closed")
        assert "master br0" in segment.ip("a", "link", "show", "dev", name)
        await segment.guest.call("run", label="old")
        await segment.received(200)
        await segment.b.call("target.release")
        await segment.a.call("source.release", guest_stays=True)
        await segment.received(50)
        found = await verdict(segment)
        await segment.guest.call("stop", label="old")
    assert not found.duplicates and not found.damaged, found


async def test_a_gate_that_was_not_reopened_is_opened_for_a_guest_that_stays(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        await segment.boot(segment.a, "old")
        await segment.client.call("start", mac=MAC, rate=500, kinds="ub")
        await segment.prepare(segment.a, segment.b, "old", "new")
        await segment.a.call("source.close")
        await segment.a.call("source.release", guest_stays=True)
        await segment.received(50)
        await segment.client.call("stop")
        await segment.guest.call("stop", label="old")
