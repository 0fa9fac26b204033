"""The handoff: every cell of the decisions' tables, and both sides together through every order of events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
from two_sides import Rules, explore

from vmferry.migration.handoff import Act, Decision, GuestSeen, PeerSays, decide_source, decide_target
from vmferry.migration.records import MigrationRecord, RecordState, require_transition
from vmferry.model.errors import Conflict
from vmferry.model.migration import Role

# -- the tables, cell by cell ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", list(RecordState))
def test_the_source_acts_only_on_what_is_certain(state: RecordState) -> None:
    for peer, can_run in product(PeerSays, (True, False)):
        decision = decide_source(state, peer, can_run)
        assert decision.why
        if decision.act is Act.RUN_HERE:
            assert state is RecordState.ACTIVE
        if decision.act is Act.TAKE_BACK:
            assert state is RecordState.HANDED_OVER
            assert peer in (PeerSays.REFUSED, PeerSays.ENDED_AWAY)
        if decision.act is Act.FINISH:
            assert state is RecordState.TAKEN or peer in (PeerSays.TAKEN, PeerSays.ENDED_HERE)
        if decision.act is Act.ASK_REFUSAL:
            assert state is RecordState.HANDED_OVER
            assert peer in (PeerSays.ACTIVE, PeerSays.ABSENT)
        assert decision.act not in (Act.TAKE, Act.REFUSE)


@pytest.mark.parametrize("state", list(RecordState))
def test_the_target_takes_only_what_was_handed_over_and_is_complete(state: RecordState) -> None:
    for peer, guest in product(PeerSays, GuestSeen):
        decision = decide_target(state, peer, guest)
        assert decision.why
        if decision.act is Act.TAKE:
            assert (state, peer, guest) == (RecordState.ACTIVE, PeerSays.HANDED_OVER, GuestSeen.LOADED)
        if decision.act is Act.REFUSE:
            assert state is RecordState.ACTIVE
        if decision.act is Act.FINISH:
            assert state is RecordState.TAKEN
        assert decision.act not in (Act.RUN_HERE, Act.ASK_REFUSAL, Act.TAKE_BACK)


def test_no_pair_of_records_lets_both_sides_run() -> None:
    """Whatever each side may hear, with the records as they are: not both act towards running the guest."""
    for ours, theirs in product(RecordState, RecordState):
        if (ours, theirs) in _IMPOSSIBLE:
            continue
        source = {decide_source(ours, heard, True).act for heard in _heard_of_target(theirs)}
        target = {decide_target(theirs, heard, GuestSeen.LOADED).act for heard in _heard_of_source(ours)}
        source_runs = source & {Act.RUN_HERE, Act.TAKE_BACK}
        target_runs = target & {Act.TAKE, Act.FINISH}
        assert not (source_runs and target_runs), (ours, theirs, source, target)


# Pairs that the rules never lead to (the exploration below shows it): the target takes only after the source's record.
_IMPOSSIBLE = {(RecordState.ACTIVE, RecordState.TAKEN)}


def _heard_of_target(state: RecordState) -> tuple[PeerSays, ...]:
    says = {
        RecordState.ACTIVE: (PeerSays.ACTIVE,),
        RecordState.TAKEN: (PeerSays.TAKEN,),
        RecordState.REFUSED: (PeerSays.REFUSED,),
        RecordState.ENDED: (PeerSays.ENDED_HERE, PeerSays.ENDED_AWAY),
    }
    return (PeerSays.UNREACHABLE, *says.get(state, ()))


def _heard_of_source(state: RecordState) -> tuple[PeerSays, ...]:
    says = {
        RecordState.ACTIVE: (PeerSays.ACTIVE,),
        RecordState.HANDED_OVER: (PeerSays.HANDED_OVER,),
        RecordState.TAKEN: (PeerSays.HANDED_OVER,),
        RecordState.ENDED: (PeerSays.ENDED_HERE, PeerSays.ENDED_AWAY),
    }
    return (PeerSays.UNREACHABLE, *says.get(state, ()))


@pytest.mark.parametrize("peer", list(PeerSays))
def test_an_unanswered_handoff_waits(peer: PeerSays) -> None:
    if peer in (PeerSays.UNREACHABLE, PeerSays.HANDED_OVER):
        assert decide_source(RecordState.HANDED_OVER, peer, True).act is Act.WAIT
    assert decide_target(RecordState.ACTIVE, PeerSays.UNREACHABLE, GuestSeen.LOADED).act is Act.WAIT


ALLOWED = {
    Role.SOURCE: "active>handed-over active>ended handed-over>taken handed-over>ended taken>ended",
    Role.TARGET: "active>taken active>refused taken>ended refused>ended",
}


@pytest.mark.parametrize("role", list(Role))
def test_only_the_written_transitions_are_allowed(role: Role) -> None:
    for old, new in product(RecordState, RecordState):
        if f"{old}>{new}" in ALLOWED[role].split():
            require_transition(role, old, new)
            continue
        with pytest.raises(Conflict) as caught:
            require_transition(role, old, new)
        assert caught.value.code == "bad-transition"
        assert old in caught.value.message and new in caught.value.message


# -- both sides ------------------------------------------------------------------------------------------------------


def test_never_two_guests_and_never_none_for_ever() -> None:
    found = explore(Rules())
    print(f"{found.states} states, {found.edges} steps")
    assert found.states > 5_000
    assert found.faults == {}
    assert found.stuck == []


def _source_with(changed: Callable[[RecordState, PeerSays, bool], Act | None]) -> Rules:
    def decide(state: RecordState, peer: PeerSays, can_run: bool) -> Decision:
        act = changed(state, peer, can_run)
        return Decision(act, "wrong on purpose") if act else decide_source(state, peer, can_run)

    return Rules(source=decide)


def _handed_over(state: RecordState, peer: PeerSays, *said: PeerSays) -> bool:
    return state is RecordState.HANDED_OVER and peer in said


def _takes_after_refusal() -> Rules:
    def require(role: Role, old: RecordState, new: RecordState) -> None:
        if (role, old, new) != (Role.TARGET, RecordState.REFUSED, RecordState.TAKEN):
            require_transition(role, old, new)

    return Rules(require=require)


def _takes_what_was_not_handed_over() -> Rules:
    def decide(state: RecordState, peer: PeerSays, guest: GuestSeen) -> Decision:
        if (state, peer, guest) == (RecordState.ACTIVE, PeerSays.ACTIVE, GuestSeen.LOADED):
            return Decision(Act.TAKE, "wrong on purpose")
        return decide_target(state, peer, guest)

    return Rules(target=decide)


def _forgets_that_it_had_taken() -> Rules:
    def says(record: MigrationRecord, here: bool) -> PeerSays:
        if record.state is RecordState.ENDED:
            return PeerSays.ENDED_HERE if here else PeerSays.ENDED_AWAY
        return Rules().says(record, here)

    return Rules(says=says)


WRONG_RULES = {
    "takes after a refusal": _takes_after_refusal,
    "takes what was not handed over": _takes_what_was_not_handed_over,
    "forgets that it had taken": _forgets_that_it_had_taken,
    "tells before it has written": lambda: Rules(tell_before_writing=True),
    "runs before it has written": lambda: Rules(run_before_writing=True),
    "runs here after handed-over": lambda: _source_with(
        lambda state, _, can_run: Act.RUN_HERE if state is RecordState.HANDED_OVER and can_run else None
    ),
    "takes back from silence": lambda: _source_with(
        lambda state, peer, _: Act.TAKE_BACK if _handed_over(state, peer, PeerSays.UNREACHABLE) else None
    ),
    "takes back from a target that only has not yet": lambda: _source_with(
        lambda state, peer, _: Act.TAKE_BACK if _handed_over(state, peer, PeerSays.ACTIVE) else None
    ),
    "takes back from one that has no record": lambda: replace(
        _source_with(lambda state, peer, _: Act.TAKE_BACK if _handed_over(state, peer, PeerSays.ABSENT) else None),
        journal_may_be_lost=True,
    ),
}
ENDLESS_RULES = {
    "gives up what nobody has taken": lambda: _source_with(
        lambda state, peer, _: Act.FINISH if _handed_over(state, peer, PeerSays.ACTIVE) else None
    ),
    "does not hear a refusal": lambda: _source_with(
        lambda state, peer, _: Act.WAIT if _handed_over(state, peer, PeerSays.REFUSED, PeerSays.ENDED_AWAY) else None
    ),
}


@pytest.mark.parametrize("wrong", WRONG_RULES)
def test_the_exploration_finds_two_guests(wrong: str) -> None:
    found = explore(WRONG_RULES[wrong](), until_fault=True)
    assert found.faults, f"{found.states} states and no fault"


@pytest.mark.parametrize("wrong", ENDLESS_RULES)
def test_the_exploration_finds_a_dead_end(wrong: str) -> None:
    assert explore(ENDLESS_RULES[wrong]()).stuck


def test_a_lost_journal_never_makes_two_guests() -> None:
    """A target that knows nothing any more may still have the guest: nobody acts on its word, a person must."""
    found = explore(Rules(journal_may_be_lost=True), until_fault=True)
    assert found.faults == {}
