"""The probes against a real guest: what they say of a cut of known length is right."""

from __future__ import annotations

import time

from vmferry.lab.faults import Direction, Link, cut_link, restore_link
from vmferry.lab.layout import LabLayout
from vmferry.lab.probes.launch import RunningProbe, start_probe

from .rig import ADDRESS, MAC, RunningGuest

CUT_S = 0.4


def start(lab: LabLayout, kind: str, *options: str) -> RunningProbe:
    return start_probe(lab.client_namespace, kind, "--target", ADDRESS, *options)


def wait_for_more(probe: RunningProbe, count: int, within_s: float = 20.0) -> None:
    """Until the probe has received `count` more than now."""
    wanted = probe.progress().get("received", 0) + count
    deadline = time.monotonic() + within_s
    while probe.progress().get("received", 0) < wanted:
        assert time.monotonic() < deadline, f"nothing comes back: {probe.progress()}"
        time.sleep(0.02)


def cut_for_a_while(lab: LabLayout, direction: Direction = Direction.BOTH) -> float:
    """Gives how long it really was, in ms."""
    host = lab.hosts[0]
    cut_link(host, Link.LAN, direction)
    began = time.monotonic()
    time.sleep(CUT_S)  # the length of the cut, not a condition
    ended = time.monotonic()
    restore_link(host, Link.LAN)
    return (ended - began) * 1000


def test_udp_probe_measures_a_cut_of_the_requests(lab: LabLayout, guest: RunningGuest) -> None:
    with start(lab, "udp", "--rate", "500") as probe:
        wait_for_more(probe, 200)
        length_ms = cut_for_a_while(lab, Direction.IN)
        wait_for_more(probe, 200)
        report = probe.stop()
    assert length_ms - 5 <= report["longest_gap_ms"] <= length_ms + 400
    assert report["lost"] == report["lost_requests"] + report["lost_replies"]
    assert report["lost_requests"] >= length_ms / 1000 * 500 * 0.8
    assert report["lost_replies"] <= 5
    assert report["duplicates"] == 0
    assert report["lost_runs"]


def test_udp_probe_measures_a_cut_of_the_replies(lab: LabLayout, guest: RunningGuest) -> None:
    with start(lab, "udp", "--rate", "500") as probe:
        wait_for_more(probe, 200)
        length_ms = cut_for_a_while(lab, Direction.OUT)
        wait_for_more(probe, 200)
        report = probe.stop()
    assert length_ms - 5 <= report["longest_gap_ms"] <= length_ms + 400
    assert report["lost_replies"] >= length_ms / 1000 * 500 * 0.8
    assert report["lost_requests"] <= 5


def test_udp_probe_without_a_fault(lab: LabLayout, guest: RunningGuest) -> None:
    with start(lab, "udp", "--rate", "1000") as probe:
        wait_for_more(probe, 1000)
        report = probe.stop()
    assert report["lost"] == 0
    assert report["reordered_requests"] == report["reordered_replies"] == 0
    assert report["sent"] == report["received"]


def test_tcp_probe_survives_a_cut(lab: LabLayout, guest: RunningGuest) -> None:
    with start(lab, "tcp", "--rate", "200") as probe:
        wait_for_more(probe, 5000)
        length_ms = cut_for_a_while(lab)
        wait_for_more(probe, 5000)
        report = probe.stop()
    assert not report["broken"] and report["complete"]
    assert report["content_errors"] == 0
    assert length_ms - 10 <= report["longest_stall_ms"] <= length_ms + 1500
    assert report["tcp"]["retransmits"] > 0


def test_stream_from_the_guest(lab: LabLayout, guest: RunningGuest) -> None:
    with start(lab, "stream", "--direction", "down", "--bytes-per-second", "500000") as probe:
        wait_for_more(probe, 200_000)
        length_ms = cut_for_a_while(lab)
        wait_for_more(probe, 200_000)
        report = probe.stop()
    assert not report["broken"]
    assert report["content_errors"] == 0
    assert report["bytes_received"] > 400_000
    assert report["longest_stall_ms"] >= length_ms - 50


def test_stream_to_the_guest(lab: LabLayout, guest: RunningGuest) -> None:
    options = ("--direction", "up", "--bytes-per-second", "500000", "--duration", "2")
    with start(lab, "stream", *options) as probe:
        report = probe.stop_by_itself()
    assert report["complete"] and report["content_errors"] == 0
    assert report["guest"]["bytes"] == report["bytes_sent"] - len("SINK\n")


def test_frames_of_one_mac_are_counted(lab: LabLayout, guest: RunningGuest) -> None:
    counter = start_probe(lab.client_namespace, "frames", "--device", "lan0", "--mac", MAC)
    with counter, start(lab, "udp", "--rate", "200") as probe:
        wait_for_more(probe, 100)
        sent = probe.stop()
        counted = counter.stop()
    assert counted["frames"]["from"] >= sent["received"]
    assert counted["frames"]["to"] >= sent["sent"]
    assert counted["missed"] == 0


def test_a_probe_that_reaches_nobody_says_so(lab: LabLayout) -> None:
    with start_probe(lab.client_namespace, "udp", "--target", "10.77.0.99", "--duration", "0.5") as probe:
        report = probe.stop_by_itself()
    assert report["received"] == 0
    assert report["longest_gap_ms"] is None
