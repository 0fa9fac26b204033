"""A TCP stream with segmentation offload goes through migrations: nothing of it is lost on the way."""

from __future__ import annotations

from pathlib import Path

from .segment import MAC, Segment, Worker, until


async def poured(segment: Segment, more_bytes: int) -> None:
    goal = await segment.client.call("poured.__int__") + more_bytes

    async def reached() -> bool:
        return bool(await segment.client.call("poured.__int__") >= goal)

    await until(reached, f"{more_bytes} bytes more sent", 60)


async def test_all_of_a_tcp_stream_arrives_once(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        segment.in_ns("client", "ip", "address", "add", "10.9.0.9/24", "dev", "c0")
        await segment.guest.call("make_nic", mac=MAC, address="10.9.0.50/24")
        await segment.guest.call("sink")
        await segment.a.call("port", vm="v0", mac=MAC, plugged=True)
        await segment.hand_over(segment.a, "v0")
        await segment.guest.call("relay", label="v0")
        await segment.client.call("pour", address="10.9.0.50")
        await poured(segment, 4 << 20)
        source, target = segment.a, segment.b
        for number in range(4):
            await one_migration(segment, source, target, f"v{number}", f"v{number + 1}")
            source, target = target, source
        result = await segment.client.call("stop_pouring")
        largest = await segment.guest.call("largest.__int__")
        arrived = await segment.guest.call("arrived.__int__")
        await segment.guest.call("stop", label="v4")
    print(result, arrived, largest)
    assert result["equal"]
    assert largest > 8000, "segmentation offload was not used"
    # TCP repeats what only came late or out of order, and its own account of that (D-SACK) is not complete. So count:
    # what the client sent, repetitions included, is what came out of the ports. Nothing was lost, nothing doubled.
    assert arrived == result["sent"]


async def one_migration(segment: Segment, source: Worker, target: Worker, old: str, new: str) -> None:
    await segment.prepare(source, target, old, new, f"m-{new}")
    await target.call("target.plug")
    await source.call("source.close")
    assert await source.call("source.settle", timeout_ms=5000)
    await segment.guest.call("stop", label=old)
    await source.call("source.mark")
    await segment.guest.call("swallow", label=old)
    await source.call("source.drain")
    await segment.guest.call("relay", label=new)
    await target.call("target.announce")
    await poured(segment, 4 << 20)
    counters = await target.call("target.traffic"), await source.call("source.traffic")
    assert all(counter["dropped"] == 0 for counter in counters), counters
    await source.call("source.release")
    await target.call("target.release")
    await segment.guest.call("die", label=old)
    await source.call("drop", vm=old)
