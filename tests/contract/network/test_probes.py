"""Probes and announcements against the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from .segment import MAC, Segment, run, until


@pytest.mark.parametrize("mtu", [1500, 9000])
async def test_probes_of_both_sizes_get_across(tmp_path: Path, mtu: int) -> None:
    async with Segment(tmp_path, mtu=mtu) as segment:
        mac = await segment.b.call("listen", mtu=mtu)
        nonce = await segment.a.call("probe", mac=mac, sizes=[46, mtu])
        assert await segment.b.call("heard", nonce=nonce, sizes=[46, mtu], seconds=5) == [46, mtu]
        assert "vp" not in segment.ip("a", "-o", "link") + segment.ip("b", "-o", "link")


async def test_a_path_with_a_smaller_mtu_passes_only_the_small_probe(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        segment.ip("sw", "link", "set", "dev", "p-b", "mtu", "1400")
        mac = await segment.b.call("listen", mtu=1500)
        nonce = await segment.a.call("probe", mac=mac, sizes=[1500, 46])
        assert await segment.b.call("heard", nonce=nonce, sizes=[46], seconds=5) == [46]


async def test_a_cut_path_is_seen(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        mac = await segment.b.call("listen", mtu=1500)
        segment.ip("sw", "link", "set", "dev", "p-b", "down")
        nonce = await segment.a.call("probe", mac=mac, sizes=[46, 1500])
        assert await segment.b.call("heard", nonce=nonce, sizes=[46, 1500], seconds=0.3) == []


async def test_a_probe_with_another_nonce_does_not_count(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        mac = await segment.b.call("listen", mtu=1500)
        await segment.a.call("probe", mac=mac, sizes=[46])
        assert await segment.b.call("heard", nonce="00" * 16, sizes=[46], seconds=0.3) == []


async def test_announcements_teach_switches_and_neighbours(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        segment.in_ns("client", "sysctl", "-qw", "net.ipv6.conf.c0.disable_ipv6=0")
        segment.ip("client", "address", "add", "10.9.0.9/24", "dev", "c0")
        segment.ip("client", "address", "add", "fd00::9/64", "dev", "c0", "nodad")
        for address in ("10.9.0.50", "fd00::50"):
            segment.ip(
                "client", "neighbour", "add", address, "lladdr", "02:02:02:02:02:02", "nud", "stale", "dev", "c0"
            )
        await segment.a.call("announce", mac=MAC, addresses=["10.9.0.50", "fd00::50"])

        async def learnt() -> bool:
            return segment.ip("client", "neighbour").count(MAC) == 2

        await until(learnt, "the client's neighbour table corrected")
        assert f"{MAC} dev p-a" in run("bridge", "-n", segment.ns("sw"), "fdb")
        assert await segment.b.call("sighting", mac=MAC, expected=[]) == [None, "up0"]
