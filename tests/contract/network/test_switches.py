"""Switches and ports against the kernel: made when missing, checked when there, never changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from .segment import MAC, Refused, Segment


async def refusal(segment: Segment, **arguments: object) -> str:
    with pytest.raises(Refused) as caught:
        await segment.a.call("switch", **arguments)
    return str(caught.value.args[0])


async def test_a_missing_switch_is_made_with_its_uplink(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        state = await segment.a.call("switch")
        assert state["exists"] and state["up"] and not state["stp"] and state["mtu"] == 1500
        uplink = {"name": "up0", "exists": True, "enslaved": True, "up": True, "carrier": True, "mtu": 1500}
        assert state["uplinks"] == [uplink] and state["ports"] == []
        await segment.a.call("port", vm="v", mac=MAC, plugged=True)
        assert (await segment.a.call("look"))["ports"] == await segment.a.call("names")
        assert not (await segment.a.call("look", device="br7"))["exists"]


async def test_a_wrong_setting_is_refused_and_not_changed(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        before = segment.ip("a", "-o", "link")
        assert await refusal(segment, uplinks=["up9"]) == "switch-uplink-missing"
        assert await refusal(segment, mtu=9000) == "switch-uplink-mtu"
        assert await refusal(segment, mtu=9000, uplinks=[]) == "switch-mtu"
        assert await refusal(segment, device="mig0") == "switch-not-a-bridge"
        assert await refusal(segment, device="br1") == "switch-uplink-taken"
        assert await refusal(segment, uplinks=["up0", "mig0"]) == "switch-uplink-not-in-bridge"
        assert await refusal(segment, kind="ovs") == "switch-kind"
        assert await refusal(segment, device="a-name-that-is-too-long") == "switch-device"
        assert await refusal(segment, vlan_filtering=True) == "switch-vlan-filtering"
        assert segment.ip("a", "-o", "link") == before
        segment.ip("a", "link", "set", "dev", "br0", "down")
        assert await refusal(segment) == "switch-down"


async def test_a_switch_without_uplinks(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        assert (await segment.a.call("switch", device="alone", uplinks=[]))["up"]


async def test_a_port_is_silent_and_goes_with_its_descriptor(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        segment.in_ns("a", "sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=0")
        name = await segment.a.call("port", vm="v", mac=MAC, plugged=False, mtu=1400)
        shown = segment.ip("a", "-d", "link", "show", "dev", name)
        assert "fe:54:00:aa:00:01" in shown and "mtu 1400" in shown and "qlen 10000" in shown and "master" not in shown
        assert "inet6" not in segment.ip("a", "address", "show", "dev", name)
        assert await segment.a.call("names") == [name]
        with pytest.raises(Refused, match="port-exists"):
            await segment.b.call("port", vm="v", mac=MAC, plugged=False)
            await segment.b.call("port", vm="v", mac=MAC, plugged=False)
        with pytest.raises(Refused, match="bad-mac"):
            await segment.a.call("port", vm="w", mac="53:54:00:aa:00:01", plugged=False)
        await segment.a.call("drop", vm="v")
        assert await segment.a.call("names") == []


async def test_a_port_is_plugged_unplugged_adopted_and_removed(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        name = await segment.a.call("port", vm="v", mac=MAC, plugged=False)
        for _ in range(2):
            await segment.a.call("plugged", vm="v", is_plugged=True)
        assert (await segment.a.call("adopt", vm="v", interface=name))["switch"] == "br0"
        assert await segment.a.call("sighting", mac=MAC, expected=[]) == [name, None]
        assert await segment.a.call("sighting", mac=MAC, expected=[name]) == [None, None]
        for _ in range(2):
            await segment.a.call("plugged", vm="v", is_plugged=False)
        assert (await segment.a.call("adopt", vm="v", interface=name))["switch"] == ""
        with pytest.raises(Refused, match="port-other"):
            await segment.a.call("adopt", vm="v", interface="vfsomething0")
        for _ in range(2):
            await segment.a.call("remove", interface=name)
        assert await segment.a.call("names") == []
        await segment.a.call("plugged", vm="v", is_plugged=False)


async def test_a_missing_switch_leaves_no_port(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        segment.ip("a", "link", "delete", "dev", "br0")
        with pytest.raises(Refused, match="switch-missing"):
            await segment.a.call("port", vm="v", mac=MAC, plugged=True)
        assert await segment.a.call("names") == []


async def test_a_cancelled_creation_leaves_no_port(tmp_path: Path) -> None:
    async with Segment(tmp_path) as segment:
        assert await segment.a.call("cancelled_port", vm="v", mac=MAC)
        assert await segment.a.call("names") == []
