"""What demo and soak call wrong: pure judgements on receipts, guests and streams; the soak's plan."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from vmferry.lab.crossing import Stall, find_stall, judge_receipt, judge_stream
from vmferry.lab.guest_client import CheckResult, DiskStatus, GuestStatus, MemoryStatus
from vmferry.lab.health import Health, judge_health, judge_status
from vmferry.lab.soak import DaemonUse, judge_growth
from vmferry.lab.soak_plan import plan_trips
from vmferry.model.migration import MigrateOptions, Mode, Outcome, Verify
from vmferry.model.receipt import Bytes, DiskDigests, Frames, MemoryDigests, NetworkProof, Receipt, Verified

RECEIPT = Receipt(
    id="m-1",
    vm="demo",
    kind=Mode.LIVE,
    source="host1",
    target="host2",
    outcome=Outcome.COMPLETED,
    started_at="2026-01-01T00:00:00.000+00:00",
    phases=(),
    total_ms=5000.0,
    blackout_ms=20.0,
    predicted=None,
    rounds=3,
    bytes=Bytes(1, 1),
    frames=Frames(held=9, forwarded=9, lost=0),
    verified=Verified(None, (DiskDigests("root", "top", "aa", "aa", True),)),
    network=NetworkProof(True, True),
    options=MigrateOptions(),
    versions={},
    generation=2,
)
DISK = DiskStatus("writing", 1 << 30, 20, 0, 100, 0, 0, 900, 1 << 20, True, "")
STATUS = GuestStatus("boot-1", 1000, 5, 0, MemoryStatus(1 << 20, 0, 10, 10, 0, ""), DISK, {"buffer_drops": 0}, {})
SECOND_NS = 10**9
BEGUN_NS = 1767225600 * SECOND_NS  # RECEIPT.started_at


def test_a_good_receipt_has_nothing_wrong() -> None:
    assert judge_receipt(RECEIPT, signature_valid=True) == ()


def test_each_fault_of_a_receipt_is_told() -> None:
    different = Verified(MemoryDigests("a", "b", False), (DiskDigests("root", "top", "a", "b", False),))
    for bad, words in (
        (replace(RECEIPT, outcome=Outcome.FAILED), "otherwise than completed"),
        (replace(RECEIPT, frames=Frames(9, 9, 1)), "1 of the VM's frames"),
        (replace(RECEIPT, verified=different), "disk root differs"),
        (replace(RECEIPT, verified=different), "memory differs"),
        (replace(RECEIPT, verified=Verified(None, ())), "no disk was compared"),
        (replace(RECEIPT, options=MigrateOptions(verify=Verify.ALL)), "memory was not compared"),
        (replace(RECEIPT, network=NetworkProof(True, None)), "no network proof"),
        (replace(RECEIPT, blackout_ms=0.0), "make no sense"),
    ):
        assert any(words in sentence for sentence in judge_receipt(bad, signature_valid=True)), words
    assert judge_receipt(RECEIPT, signature_valid=False) == ("the receipt's signature is not valid",)


def test_nothing_compared_is_right_when_nothing_was_asked_for() -> None:
    unasked = replace(RECEIPT, options=MigrateOptions(verify=Verify.NONE), verified=Verified(None, ()))
    assert judge_receipt(unasked, signature_valid=True) == ()


def test_a_guest_that_went_on_is_well() -> None:
    later = replace(STATUS, uptime_ms=9000, beats=20)
    assert judge_status(STATUS, later) == ()
    assert judge_health(STATUS, Health(later, CheckResult(256, 0, ""), CheckResult(9, 0, ""))) == ()


def test_each_fault_of_a_guest_is_told() -> None:
    for bad, words in (
        (replace(STATUS, boot_id="boot-2"), "rebooted"),
        (replace(STATUS, beats=4), "back in time"),
        (replace(STATUS, dead=1), "processes ended"),
        (replace(STATUS, memory=replace(STATUS.memory, errors=2)), "2 memory errors"),
        (replace(STATUS, disk=replace(DISK, errors=3)), "3 wrong disk records"),
        (replace(STATUS, disk=replace(DISK, io_errors=1)), "I/O errors"),
        (replace(STATUS, disk=replace(DISK, written=99)), "lost work"),
    ):
        assert any(words in sentence for sentence in judge_status(STATUS, bad)), words
    unchecked = Health(STATUS, CheckResult(0, 0, ""), CheckResult(9, 1, "slot 3"))
    told = judge_health(STATUS, unchecked)
    assert told == ("the guest checked no memory pages", "of 9 disk records the guest checked, 1 are wrong")


def test_stalls_belong_to_the_migration_in_which_they_were() -> None:
    during = {"ms": 120.0, "begin_ns": BEGUN_NS + SECOND_NS, "end_ns": BEGUN_NS + 2 * SECOND_NS}
    earlier = {"ms": 700.0, "begin_ns": BEGUN_NS - 3 * SECOND_NS, "end_ns": BEGUN_NS - 2 * SECOND_NS}
    assert find_stall({"stalls": [earlier, during]}, RECEIPT) == Stall(120.0, True)
    assert find_stall({"stalls": [earlier]}, RECEIPT) == Stall(700.0, False)
    assert find_stall({"stalls": []}, RECEIPT) is None


def test_streams() -> None:
    good = {"broken": False, "reason": "", "content_errors": 0, "bytes_received": 8}
    assert judge_stream(good) == ()
    assert judge_stream({**good, "broken": True, "reason": "reset"}) == ("the TCP connection broke: reset",)
    assert len(judge_stream({**good, "content_errors": 1, "bytes_received": 0})) == 2


def test_descriptors_that_are_not_given_back() -> None:
    before = {"host1": DaemonUse(1, 20), "host2": DaemonUse(1, 20)}
    assert judge_growth(before, {"host1": DaemonUse(9, 28), "host2": DaemonUse(1, 20)}) == ()
    assert len(judge_growth(before, {"host1": DaemonUse(1, 40), "host2": DaemonUse(1, 20)})) == 1


def test_a_seed_always_gives_the_same_trips_and_each_begins_where_the_last_ended() -> None:
    trips = list(plan_trips(20, seed=7))
    assert trips == list(plan_trips(20, seed=7)) != list(plan_trips(20, seed=8))
    assert trips[0].source == "host1"
    for earlier, later in pairwise(trips):
        assert later.source == earlier.target != later.target
