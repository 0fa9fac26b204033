"""The pure parts of the network: frames, names, encoding."""

from __future__ import annotations

import struct

import pytest

from vmferry.model.errors import WrongInput
from vmferry.network.announce import announcement_frames, neighbour_advert_frame, rarp_frame
from vmferry.network.broadcasts import undelivered
from vmferry.network.frames import with_vlan_tag
from vmferry.network.netlink import Request, attribute, attributes_of, nest, text, u8, u32
from vmferry.network.ports import host_side_mac, port_name
from vmferry.network.probes import new_nonce, probe_frame, probe_payload_of
from vmferry.network.redirects import frames_to
from vmferry.network.tunnel import belongs_to, tunnel_name

MAC = "52:54:00:12:34:56"


def test_attributes_are_padded_and_found_again() -> None:
    data = u32(1, 7) + text(3, "abcd") + nest(0x8000 | 5, u8(1, 2)) + attribute(9, b"")
    assert len(data) % 4 == 0
    found = attributes_of(data)
    assert found[1] == b"\7\0\0\0" and found[3] == b"abcd\0" and attributes_of(found[5])[1] == b"\2" and found[9] == b""


@pytest.mark.parametrize("data", [b"", b"\1", b"\0\0\0\0", b"\xff\xff\1\0abc"])
def test_broken_attributes_end_the_reading(data: bytes) -> None:
    assert all(len(value) <= len(data) for value in attributes_of(data).values())


def test_a_request_says_its_length_and_sequence_number() -> None:
    encoded = Request(16, 0x400, b"body", "do").encode(9)
    assert struct.unpack("=IHHII", encoded[:16]) == (20, 16, 0x401, 9, 0)


def test_names_are_stable_short_and_different() -> None:
    assert port_name("vm", 0) == port_name("vm", 0) != port_name("vm", 1)
    assert port_name("vm", 0) != port_name("vm", 0, salt="2") != port_name("vn", 0)
    assert len(port_name("x" * 100, 99)) <= 15 and len(tunnel_name("x" * 100, 99)) <= 15
    assert belongs_to(tunnel_name("m1", 3), ["m0", "m1"]) and not belongs_to(tunnel_name("m1", 3), ["m0"])


@pytest.mark.parametrize("mac", [MAC, "fe:54:00:12:34:56", "02:00:00:00:00:01"])
def test_the_hosts_side_has_another_unicast_mac(mac: str) -> None:
    other = host_side_mac(mac)
    assert other != mac and other[2:] == mac[2:] and not int(other[:2], 16) & 1


def test_the_rarp_is_qemus() -> None:
    own = bytes.fromhex("525400123456")
    expected = b"\xff" * 6 + own + bytes.fromhex("8035 0001 0800 06 04 0003") + own + bytes(4) + own + bytes(4)
    assert rarp_frame(MAC) == expected + bytes(60 - len(expected))


def test_a_neighbour_advert_has_a_right_checksum() -> None:
    frame = neighbour_advert_frame(MAC, "fd00::50")
    payload = frame[14 + 40 :]
    pseudo = frame[14 + 8 : 14 + 40] + struct.pack("!II", len(payload), 58) + payload
    total = sum(struct.unpack(f"!{len(pseudo) // 2}H", pseudo))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert total == 0xFFFF


def test_announcements_are_made_for_each_address_and_refuse_a_group_mac() -> None:
    kinds = [frame[12:14].hex() for frame in announcement_frames(MAC, ["10.0.0.1", "fd00::1"])]
    assert kinds == ["8035", "0806", "86dd"]
    with pytest.raises(WrongInput, match="unicast"):
        announcement_frames("ff:ff:ff:ff:ff:ff")


@pytest.mark.parametrize("size", [46, 100, 1500, 9000])
def test_a_probe_is_recognised_only_whole_and_by_its_nonce(size: int) -> None:
    nonce = new_nonce()
    frame = probe_frame(MAC, MAC, nonce, size)
    assert len(frame) == size + 14
    assert probe_payload_of(frame, nonce) == size
    assert probe_payload_of(frame, new_nonce()) is None
    assert probe_payload_of(frame[:-1], nonce) is None
    assert probe_payload_of(frame[:-1] + bytes([frame[-1] ^ 1]), nonce) is None
    assert probe_payload_of(b"", nonce) is None


def test_a_vlan_tag_is_put_back_and_offsets_moved() -> None:
    data = struct.pack("=BBHHHH", 1, 1, 54, 1448, 34, 16) + bytes(range(12)) + b"\x08\x00rest"
    auxiliary = struct.pack("=IIIHHHH", 0x10 | 0x40, 0, 0, 0, 0, 5, 0x8100)
    tagged = with_vlan_tag(data, [(263, 8, auxiliary)])
    assert struct.unpack_from("=BBHHHH", tagged) == (1, 1, 58, 1448, 38, 16)
    assert tagged[10:] == bytes(range(12)) + b"\x81\x00\x00\x05\x08\x00rest"
    assert with_vlan_tag(data, []) == data


def test_frames_to_a_mac_match_its_six_octets() -> None:
    (high, high_mask, at), (low, low_mask, then) = frames_to(MAC)
    assert (high, high_mask, at) == (0x5254, 0xFFFF, -16) and (low, low_mask, then) == (0x00123456, 0xFFFFFFFF, -12)


def test_only_what_was_not_delivered_is_delivered_and_as_often() -> None:
    header, other_header = bytes(10), b"\1" * 10
    group, second, unicast = b"\xff" * 6 + b"a", b"\x33" * 6 + b"b", b"\x02" * 6 + b"c"
    brought = [header + group, header + second, header + group]
    assert undelivered(brought, [other_header + group, header + unicast]) == [header + second, header + group]
    assert undelivered(brought, brought) == []
    assert undelivered([], brought) == []
