"""What the bench makes of what it saw: pauses from events, targets from runs."""

from __future__ import annotations

from bench.measure import _gap_at, _lost_at
from bench.plan import BARE, OURS, VIRSH, VIRSH_TUNED, Measured
from bench.qmp import Event
from bench.targets import judge, median_of
from bench.watch import Pause, find_pauses


def _events(*pairs: tuple[str, int]) -> list[Event]:
    return [Event(name, {}, at_us) for name, at_us in pairs]


def test_a_pause_reaches_from_the_stop_to_the_next_resume_of_any_guest() -> None:
    events = _events(("RESUME", 9_000), ("STOP", 1_000), ("MIGRATION", 2_000))
    assert find_pauses(events) == [Pause(1_000, 9_000)]
    assert Pause(1_000, 9_000).ms == 8.0


def test_a_guest_that_came_back_on_the_source_first_makes_two_pauses() -> None:
    events = _events(("STOP", 1), ("RESUME", 5), ("STOP", 20), ("STOP", 21), ("RESUME", 30))
    assert find_pauses(events) == [Pause(1, 5), Pause(20, 30)]


def test_without_a_resume_there_is_no_pause() -> None:
    assert find_pauses(_events(("RESUME", 1), ("STOP", 5))) == []


def test_only_gaps_around_the_pause_count_for_it() -> None:
    gaps = [
        {"ms": 500.0, "begin_ns": 0, "end_ns": 500_000_000},
        {"ms": 80.0, "begin_ns": 999_000_000, "end_ns": 1_079_000_000},
    ]
    pause = Pause(1_000_000, 1_050_000)
    assert _gap_at(pause, gaps) == 80.0
    assert _gap_at(pause, gaps[:1]) is None


def test_losses_are_told_apart_by_when_they_were_sent() -> None:
    runs = [
        {"first": 1, "count": 7, "at": "1970-01-01T00:00:01.010000Z"},
        {"first": 900, "count": 2, "at": "1970-01-01T00:00:09.000000Z"},
    ]
    assert _lost_at(Pause(1_000_000, 1_050_000), runs) == 7


def _run(tool: str, blackout_ms: float, total_ms: float = 8000, lost: int = 0, fault: str = "") -> Measured:
    return Measured(tool, "idle", 1, fault, blackout_ms, blackout_ms + 60, blackout_ms + 60, lost, 0, total_ms)


def test_targets_are_judged_on_medians() -> None:
    rows = [_run(OURS, 10), _run(OURS, 20), _run(OURS, 300), _run(VIRSH, 134), _run(VIRSH_TUNED, 52), _run(BARE, 130)]
    assert median_of(rows[:3], lambda row: row.blackout_ms) == 20
    assert {verdict.passed for verdict in judge(rows, "idle")} == {True}


def test_each_missed_target_is_named() -> None:
    rows = [_run(OURS, 30, total_ms=9000, lost=1, fault="broken"), _run(VIRSH, 134), _run(VIRSH_TUNED, 52)]
    missed = [verdict.target for verdict in judge(rows, "idle") if verdict.passed is False]
    assert missed == [
        "every run succeeded",
        "blackout at most 1/5 of virsh's",
        "blackout at most 1/2 of tuned virsh's",
        "no probe lost in any run",
        "total time at most virsh's",
    ]


def test_what_was_not_measured_is_neither_passed_nor_missed() -> None:
    verdicts = {verdict.target: verdict.passed for verdict in judge([_run(OURS, 10)], "idle")}
    assert verdicts["blackout at most 1/5 of virsh's"] is None
    assert verdicts["no probe lost in any run"] is True
    assert judge([_run(VIRSH, 10)], "idle") == []
