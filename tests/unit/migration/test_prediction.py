"""What is predicted before anything moves, held against simulated copies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_guest import Guest, copy

from vmferry.migration.convergence import Goal, Step
from vmferry.migration.prediction import Measured, predict
from vmferry.model.migration import MigrateOptions, PostCopy, Verify

MIB = 1 << 20
LINK = 110 * MIB


def measured(memory: int = 512, dirty: float = 1, disk: int = 0, link: int = LINK) -> Measured:
    return Measured(memory * MIB, disk * MIB, int(dirty * MIB), link)


def test_an_idle_guest() -> None:
    expected = predict(measured(), MigrateOptions())
    assert expected.feasible and not expected.reason
    assert expected.total_ms.low < 512 / 110 * 1000 + 1200 < expected.total_ms.high
    assert expected.blackout_ms.low < 15 < expected.blackout_ms.high < 100
    assert expected.rounds <= 4


def test_disks_and_bandwidth_count() -> None:
    free = predict(measured(), MigrateOptions())
    with_disk = predict(measured(disk=1100), MigrateOptions())
    assert with_disk.total_ms.low - free.total_ms.low == pytest.approx(0.7 * 10_000, rel=0.01)
    halved = predict(measured(disk=1100), MigrateOptions(bandwidth_bps=LINK * 4))
    assert halved.total_ms.high > with_disk.total_ms.high * 1.8
    assert halved.link_bytes_per_s == LINK
    assert predict(measured(), MigrateOptions(bandwidth_bps=LINK * 80)) == free


def test_what_the_link_cannot_carry_is_refused_with_the_numbers() -> None:
    expected = predict(measured(dirty=1000), MigrateOptions())
    assert not expected.feasible
    assert "8.39 Gbit/s" in expected.reason and "923 Mbit/s" in expected.reason and "300.0 ms" in expected.reason


def test_a_throttle_that_helps_shows_in_the_prediction() -> None:
    expected = predict(measured(dirty=150), MigrateOptions())
    assert expected.feasible
    assert expected.blackout_ms.low <= 300
    assert expected.total_ms.low > predict(measured(dirty=50), MigrateOptions()).total_ms.high
    assert not predict(measured(dirty=150), MigrateOptions(max_slowdown_percent=0)).feasible


def test_post_copy_makes_it_possible() -> None:
    expected = predict(measured(dirty=1000), MigrateOptions(post_copy=PostCopy.ALLOW))
    assert expected.feasible
    assert expected.blackout_ms.high < 1000
    kept = predict(measured(), MigrateOptions(post_copy=PostCopy.ALLOW))
    assert kept == predict(measured(), MigrateOptions())


def test_comparing_the_memory_is_counted() -> None:
    plain, proven = (
        predict(measured(memory=2048), MigrateOptions(verify=verify)) for verify in (Verify.DISKS, Verify.ALL)
    )
    assert proven.blackout_ms.high > plain.blackout_ms.high + 500 and proven.feasible


def test_a_deadline_that_cannot_be_met_is_refused() -> None:
    expected = predict(measured(disk=11_000), MigrateOptions(deadline_ms=20_000))
    assert not expected.feasible
    assert "20.0 s" in expected.reason
    assert predict(measured(disk=11_000), MigrateOptions(deadline_ms=200_000)).feasible


def test_a_goal_below_the_fixed_part_is_tried() -> None:
    assert predict(measured(), MigrateOptions(max_blackout_ms=1)).feasible


@pytest.mark.parametrize("dirty", [0.2, 1, 5, 20, 40, 60])
@pytest.mark.parametrize("memory", [128, 512, 2048])
def test_simulated_copies_are_within_the_predicted_ranges(memory: int, dirty: float) -> None:
    guest = Guest(memory * MIB, memory * MIB, int(dirty * MIB))
    ended = copy(guest, LINK, Goal(300, 50, False, dirty_rate=guest.dirty_rate))
    expected = predict(measured(memory, dirty), MigrateOptions())
    assert ended.advice.step is Step.SWITCH
    assert expected.feasible
    assert expected.total_ms.low <= ended.at_ms + 1200 <= expected.total_ms.high
    # It may go better: the switch waits for a good moment.
    assert ended.blackout_ms <= expected.blackout_ms.high


@given(
    memory=st.integers(0, 1 << 44),
    disk=st.integers(0, 1 << 50),
    dirty=st.integers(0, 1 << 40),
    link=st.integers(0, 1 << 40),
    max_blackout=st.integers(1, 60_000),
    slowdown=st.integers(0, 99),
    deadline=st.one_of(st.just(0), st.integers(1, 10**9)),
    post_copy=st.sampled_from(PostCopy),
)
def test_rules_for_any_figures(
    memory: int, disk: int, dirty: int, link: int, max_blackout: int, slowdown: int, deadline: int, post_copy: PostCopy
) -> None:
    options = MigrateOptions(
        max_blackout_ms=max_blackout, max_slowdown_percent=slowdown, deadline_ms=deadline, post_copy=post_copy
    )
    expected = predict(Measured(memory, disk, dirty, link), options)
    assert 0 < expected.total_ms.low <= expected.total_ms.high
    assert 0 < expected.blackout_ms.low <= expected.blackout_ms.high
    assert expected.rounds >= 1
    assert expected.feasible == (not expected.reason)
    if expected.feasible and post_copy is PostCopy.NEVER:
        assert expected.blackout_ms.low <= max(max_blackout, 14)
    if not expected.feasible and post_copy is PostCopy.ALLOW:
        assert deadline
