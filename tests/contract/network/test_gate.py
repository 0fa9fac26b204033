"""The gate against the kernel: no frame lost, doubled, damaged or out of order, forward and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from .segment import MAC, Segment, Worker, verdict


async def migrate(segment: Segment, source: Worker, target: Worker, old: str, new: str, migration: str = "m1") -> int:
    """The engine's order of steps; gives back how many frames were left in the old port."""
    await segment.prepare(source, target, old, new, migration)
    await target.call("target.plug")
    await source.call("source.close")
    assert await source.call("source.settle", timeout_ms=2000)
    assert await segment.guest.call("stop", label=old) == 0
    left = await source.call("source.drain")
    await segment.held(target, 20)
    await segment.guest.call("run", label=new)
    await target.call("target.announce")
    await segment.received(100)
    return int(left)


async def finish(segment: Segment, source: Worker, target: Worker, old: str) -> None:
    await source.call("source.release")
    await target.call("target.release")
    await segment.guest.call("die", label=old)
    await source.call("drop", vm=old)


@pytest.mark.parametrize("kinds", ["u", "uuuf", "uuubuufg"])
async def test_no_frame_is_lost_there_and_back(tmp_path: Path, kinds: str) -> None:
    async with Segment(tmp_path) as segment:
        await segment.boot(segment.a, "v0")
        await segment.client.call("start", mac=MAC, rate=2000, kinds=kinds)
        await segment.received(100)
        source, target = segment.a, segment.b
        for round_number in range(20):
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
    assert len(found.disordered) <= 2 * 20


async def begin(segment: Segment, swallow: bool) -> None:
    """Up to the point where the guest is stopped and frames wait on the target."""
    await segment.prepare(segment.a, segment.b, "old", "new")
    await segment.b.call("target.plug")
    await segment.a.call("source.close")
    assert await segment.a.call("source.settle", timeout_ms=2000)
    await segment.guest.call("stop", label="old")
    await segment.a.call("source.drain")
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
