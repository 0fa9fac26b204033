"""Both hosts of one migration as a small state machine, explored through every order of acts, losses and crashes.

The decisions are the real ones (`Rules` holds them, so that a test can put a wrong one in their place); the acts
between are what the engines do, cut at every point at which a daemon can die. Messages are a set: each may be
delivered late, after its sender's death, or never; an answer that nobody waits for any more is gone. Guests outlive
their daemon, and may die alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from vmferry.host.incoming import _says
from vmferry.migration.handoff import Act, Decision, GuestSeen, PeerSays, decide_source, decide_target
from vmferry.migration.records import MigrationRecord, RecordState, require_transition
from vmferry.model.errors import Conflict
from vmferry.model.migration import Role
from vmferry.model.vm import FirmwareBoot, VmSpec

ACTIVE, HANDED_OVER = RecordState.ACTIVE, RecordState.HANDED_OVER
TAKEN, REFUSED, ENDED = RecordState.TAKEN, RecordState.REFUSED, RecordState.ENDED
_SPEC = VmSpec("v", "v", 1, 1 << 28, "q35", "max", FirmwareBoot("bios"))


class Source(NamedTuple):
    """`driver` is what the daemon is at ("down": it is not there); `owned` is the journal's word, None: no VM row."""

    record: RecordState = ACTIVE
    owned: bool | None = True
    guest: str = "running"  # running, paused, gone
    driver: str = "drive"


class Target(NamedTuple):
    """`knows`: the daemon has lived since the reservation, and knows whether the guest's state is complete."""

    record: RecordState | None = None
    owned: bool = False
    was_taken: bool = False
    guest: str = "none"  # none, incoming, loaded, running, gone
    up: bool = True
    knows: bool = True


class World(NamedTuple):
    """Everything. `elsewhere`: the target has migrated the VM on to a third host, where it runs."""

    source: Source
    target: Target
    messages: frozenset[str] = frozenset()
    elsewhere: bool = False


START = World(Source(), Target(), frozenset({"prepare"}))


@dataclass(frozen=True)
class Rules:
    """The decisions under test. The flags are wrong orders of acts, for tests of the test."""

    source: Callable[[RecordState, PeerSays, bool], Decision] = decide_source
    target: Callable[[RecordState, PeerSays, GuestSeen], Decision] = decide_target
    require: Callable[[Role, RecordState, RecordState], None] = require_transition
    says: Callable[[MigrationRecord, bool], PeerSays] = _says
    tell_before_writing: bool = False
    run_before_writing: bool = False
    journal_may_be_lost: bool = False


@dataclass(frozen=True)
class Edge:
    """One step: what happened, where it leads, and whether it is a fault (which nobody may count on)."""

    name: str
    world: World
    fault: bool = False


@cache
def _record(role: Role, state: RecordState, was_taken: bool) -> MigrationRecord:
    return MigrationRecord("m", role, "v", "v", "peer", 2, state, _SPEC, was_taken=was_taken)


class Model:
    """All steps from a world."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    def edges(self, world: World) -> Iterator[Edge]:
        yield from self._faults(world)
        if world.source.driver == "down":
            yield Edge("source restarts", self._restart_source(world))
        else:
            yield from self._source(world)
        if world.target.up:
            yield from self._target(world)
        else:
            target = world.target._replace(up=True, knows=False)
            yield Edge("target restarts", world._replace(target=target))

    # -- faults ------------------------------------------------------------------------------------------------------

    def _faults(self, world: World) -> Iterator[Edge]:
        source, target, messages, _ = world
        for message in messages:
            yield Edge(f"lost: {message}", _without(world, message), True)
        if source.driver != "down":
            crashed = world._replace(source=source._replace(driver="down"), messages=_requests(messages, "s:"))
            yield Edge("source crashes", crashed, True)
        if target.up:
            crashed = world._replace(target=target._replace(up=False), messages=_requests(messages, "t:"))
            yield Edge("target crashes", crashed, True)
        if source.guest != "gone":
            yield Edge("source guest dies", world._replace(source=source._replace(guest="gone")), True)
        if target.guest in ("incoming", "loaded", "running"):
            yield Edge("target guest dies", world._replace(target=target._replace(guest="gone")), True)
        if self.rules.journal_may_be_lost and not target.up and target.record is not None:
            lost = target._replace(record=None, owned=False, was_taken=False)
            yield Edge("target journal lost", world._replace(target=lost), True)

    # -- the source --------------------------------------------------------------------------------------------------

    def _move_source(self, source: Source, new: RecordState) -> Source:
        """`Journal.move` for the source."""
        self.rules.require(Role.SOURCE, source.record, new)
        owned = source.owned
        if new is HANDED_OVER:
            owned = False
        elif new is ENDED and source.record is HANDED_OVER:
            owned = True
        elif new is TAKEN:
            owned = None
        return source._replace(record=new, owned=owned)

    def _restart_source(self, world: World) -> World:
        source = world.source
        act = self.rules.source(source.record, PeerSays.UNREACHABLE, source.guest != "gone").act
        return world._replace(source=source._replace(driver=_AFTER[act]))

    def _source(self, world: World) -> Iterator[Edge]:
        source, messages = world.source, world.messages
        match source.driver:
            case "drive" | "ready":
                yield Edge("source gives up", world._replace(source=source._replace(driver="undo")))
                yield from self._drive(world)
            case "written":
                yield Edge("take sent", _send(world._replace(source=source._replace(driver="asking")), "take"))
            case "asking":
                yield Edge("no answer", world._replace(source=source._replace(driver="settle")))
                if "s:taken" in messages:
                    yield Edge("taken heard", self._act(_without(world, "s:taken"), Act.FINISH))
            case "undo":
                yield self._undo(world)
            case "settle":
                yield Edge("source asks", _send(world, "ask"))
                yield self._hear(world, PeerSays.UNREACHABLE)
                for message in messages:
                    if message.startswith("s:says "):
                        yield self._hear(_without(world, message), PeerSays(message.removeprefix("s:says ")))
            case "finish":
                if source.record is TAKEN:
                    gone = self._move_source(source._replace(guest="gone"), ENDED)._replace(driver="done")
                    yield Edge("source finishes", _send(world._replace(source=gone), "finish"))
            case "done":
                if source.owned and source.record is ENDED and source.guest != "running":
                    yield Edge("source runs it", world._replace(source=source._replace(guest="running")))
        if "inquire" in messages:
            says = self.rules.says(_record(Role.SOURCE, source.record, False), source.owned is not None)
            yield Edge("source answers", _send(_without(world, "inquire"), f"t:says {says.value}"))

    def _drive(self, world: World) -> Iterator[Edge]:
        source, target, messages, _ = world
        if source.guest == "running" and target.guest == "incoming" and target.up and source.driver == "drive":
            moved = world._replace(source=source._replace(guest="paused"), target=target._replace(guest="loaded"))
            yield Edge("state sent", _send(moved, "s:loaded"))
        if source.driver == "drive" and "s:loaded" in messages:
            ready = _without(world, "s:loaded")._replace(source=source._replace(driver="ready"))
            yield Edge("loaded heard", ready)
        if source.driver == "ready":
            if self.rules.tell_before_writing and "take" not in messages:
                yield Edge("take sent too early", _send(world, "take"))
            written = self._move_source(source, HANDED_OVER)._replace(driver="written")
            yield Edge("handoff written", world._replace(source=written))

    def _undo(self, world: World) -> Edge:
        """The guest first, then the word to the target, then the record: as the engine does."""
        source = world.source
        if source.guest == "paused":
            return Edge("source lets it run", world._replace(source=source._replace(guest="running")))
        if source.record is not ENDED:
            ended = self._move_source(source, ENDED)._replace(driver="done")
            return Edge("undo recorded", _send(world._replace(source=ended), "abort"))
        return Edge("undone", world._replace(source=source._replace(driver="done")))

    def _hear(self, world: World, says: PeerSays) -> Edge:
        source = world.source
        act = self.rules.source(source.record, says, source.guest != "gone").act
        return Edge(f"source hears {says}: {act}", self._act(world, act))

    def _act(self, world: World, act: Act) -> World:
        source = world.source
        match act:
            case Act.FINISH:
                if source.record is HANDED_OVER:
                    source = self._move_source(source, TAKEN)
                return world._replace(source=source._replace(driver="finish"))
            case Act.TAKE_BACK:
                return world._replace(source=self._move_source(source, ENDED)._replace(driver="undo"))
            case Act.RUN_HERE:
                return world._replace(source=source._replace(driver="undo"))
            case Act.ASK_REFUSAL:
                return _send(world, "ask-refusal")
            case _:
                return world

    # -- the target --------------------------------------------------------------------------------------------------

    def _move_target(self, target: Target, new: RecordState) -> Target:
        """`Journal.move` for the target."""
        assert target.record is not None
        self.rules.require(Role.TARGET, target.record, new)
        if new is TAKEN:
            return target._replace(record=new, owned=True, was_taken=True)
        return target._replace(record=new)

    def _target(self, world: World) -> Iterator[Edge]:
        target, messages = world.target, world.messages
        for message in messages:
            if message in ("prepare", "take", "abort", "ask", "ask-refusal", "finish"):
                yield self._receive(_without(world, message), message)
            elif message.startswith("t:says "):
                yield self._decide(_without(world, message), PeerSays(message.removeprefix("t:says ")))
        match target.record:
            case RecordState.ACTIVE:
                yield from self._reserved(world)
            case RecordState.TAKEN:
                yield from self._taken(world)
            case RecordState.REFUSED:
                cleared = self._move_target(target._replace(guest="none"), ENDED)
                yield Edge("target cleared", world._replace(target=cleared))
            case RecordState.ENDED if target.owned:
                if target.guest != "running":
                    yield Edge("target starts it", world._replace(target=target._replace(guest="running")))
                else:
                    moved = target._replace(owned=False, guest="gone")
                    yield Edge("moved on", world._replace(target=moved, elsewhere=True))

    def _reserved(self, world: World) -> Iterator[Edge]:
        target = world.target
        if target.guest == "loaded" and self.rules.run_before_writing and "take" in world.messages:
            yield Edge("run too early", world._replace(target=target._replace(guest="running")))
        if target.guest == "loaded":
            yield Edge("target asks", _send(world, "inquire"))
        else:
            yield self._decide(world, PeerSays.UNREACHABLE)
        if not target.knows:  # what the daemon does at its start today: whatever is there, it refuses
            yield Edge("refused at start", self._refuse(world))

    def _taken(self, world: World) -> Iterator[Edge]:
        target = world.target
        if target.guest == "loaded":
            yield Edge("target runs it", _send(world._replace(target=target._replace(guest="running")), "s:taken"))
        elif target.guest == "gone":
            yield Edge("target starts it", world._replace(target=target._replace(guest="running")))
        else:  # after a restart, or when the source has been silent for long
            yield Edge("target ends alone", world._replace(target=self._move_target(target, ENDED)))

    def _receive(self, world: World, message: str) -> Edge:
        target = world.target
        match message:
            case "prepare" if target.record is None:
                world = world._replace(target=target._replace(record=ACTIVE, guest="incoming"))
            case "take":
                world = self._asked_to_take(world)
            case "abort" if target.record is ACTIVE:
                world = self._refuse(world)
            case "ask" | "ask-refusal":
                world = self._asked(world, message == "ask-refusal")
            case "finish" if target.record is TAKEN and target.guest == "running":
                world = world._replace(target=self._move_target(target, ENDED))
        return Edge(f"target receives {message}", world)

    def _asked_to_take(self, world: World) -> World:
        target = world.target
        if target.record is TAKEN and target.guest == "running":
            return _send(world, "s:taken")
        if target.knows and target.guest == "loaded" and target.record not in (None, TAKEN):
            try:
                return world._replace(target=self._move_target(target, TAKEN))
            except Conflict:
                return world
        return world

    def _asked(self, world: World, refuse: bool) -> World:
        """`Incoming.answer_inquiry`."""
        target = world.target
        if target.record is None:
            says = PeerSays.ABSENT
        elif target.record is ACTIVE and refuse:
            world, says = self._refuse(world), PeerSays.REFUSED
        else:
            record = _record(Role.TARGET, target.record, target.was_taken)
            says = self.rules.says(record, target.owned)
        return _send(world, f"s:says {says.value}")

    def _refuse(self, world: World) -> World:
        return world._replace(target=self._move_target(world.target, REFUSED))

    def _decide(self, world: World, says: PeerSays) -> Edge:
        target = world.target
        if target.record is None:
            return Edge("nobody to hear", world)
        act = self.rules.target(target.record, says, _SEEN[target.guest]).act
        if act is Act.TAKE:
            world = world._replace(target=self._move_target(target, TAKEN))
        elif act is Act.REFUSE:
            world = self._refuse(world)
        return Edge(f"target hears {says}: {act}", world)


_SEEN = {
    "none": GuestSeen.GONE,
    "gone": GuestSeen.GONE,
    "incoming": GuestSeen.INCOMING,
    "loaded": GuestSeen.LOADED,
    "running": GuestSeen.RUNNING,
}
_AFTER = {
    Act.RUN_HERE: "undo",
    Act.WAIT: "settle",
    Act.ASK_REFUSAL: "settle",
    Act.TAKE_BACK: "settle",
    Act.FINISH: "finish",
    Act.CLEAN_UP: "done",
}


def _send(world: World, message: str) -> World:
    kept = world.messages
    if " " in message:  # an answer: to the latest question only
        kept = frozenset(other for other in kept if other[:6] != message[:6])
    return world._replace(messages=kept | {message})


def _tidy(world: World) -> World:
    """Without what nobody will ever look at: worlds that differ only in that are the same."""
    source, target, messages, _ = world
    if messages:
        kept = frozenset(message for message in messages if _is_awaited(message, source, target))
        if len(kept) != len(messages):
            return world._replace(messages=kept)
    return world


def _is_awaited(message: str, source: Source, target: Target) -> bool:
    if message[:2] == "s:":
        return _LISTENING.get(source.driver) == message[:6]
    if message[:2] == "t:":
        return target.up and target.record is ACTIVE
    if message == "prepare":
        return target.record is None
    if message == "inquire":
        return target.record is ACTIVE
    if message == "abort":
        return target.record is ACTIVE
    return message != "take" or target.record is not ENDED


_LISTENING = {"drive": "s:load", "asking": "s:take", "settle": "s:says"}


def _without(world: World, message: str) -> World:
    return world._replace(messages=world.messages - {message})


def _requests(messages: frozenset[str], receiver: str) -> frozenset[str]:
    """Without the answers to one side: they die with the connection that its daemon held."""
    return frozenset(message for message in messages if not message.startswith(receiver))


def fault_in(world: World) -> str:
    """What is wrong with a world, or ""."""
    source, target, _, elsewhere = world
    if (source.guest == "running") + (target.guest == "running") + elsewhere > 1:
        return "two guests run"
    if bool(source.owned) + target.owned + elsewhere > 1:
        return "two hosts own the VM"
    if source.guest == "running" and not source.owned:
        return "the source runs what it does not own"
    return ""


def is_settled(world: World) -> bool:
    """One guest runs, and neither side waits for anything."""
    source, target, _, elsewhere = world
    runs = source.guest == "running" or target.guest == "running" or elsewhere
    return runs and source.record is ENDED and target.record in (None, ENDED)


@dataclass
class Explored:
    """`faults`: the shortest way to each kind of bad world. `stuck`: worlds from which no settled one is reached."""

    states: int = 0
    edges: int = 0
    faults: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stuck: list[tuple[World, tuple[str, ...]]] = field(default_factory=list)


def explore(rules: Rules, until_fault: bool = False) -> Explored:
    """Breadth first through everything that can happen; a bad world is not gone on from.

    `until_fault`: ends at the first bad world, and does not look for those that are stuck.
    """
    model, found = Model(rules), Explored()
    parents: dict[World, tuple[World, str] | None] = {START: None}
    backwards: dict[World, list[World]] = {}
    queue, bad = deque([START]), set()
    while queue:
        world = queue.popleft()
        if fault := fault_in(world):
            found.faults.setdefault(fault, _way(parents, world))
            bad.add(world)
            if until_fault:
                break
            continue
        for edge in model.edges(world):
            found.edges += 1
            following = _tidy(edge.world)
            if following not in parents:
                parents[following] = (world, edge.name)
                queue.append(following)
            if not edge.fault:
                backwards.setdefault(following, []).append(world)
    found.states = len(parents)
    if until_fault:
        return found
    alive = _reaching(backwards, [world for world in parents if world not in bad and is_settled(world)])
    found.stuck = [(world, _way(parents, world)) for world in parents if world not in alive and world not in bad]
    return found


def _reaching(backwards: dict[World, list[World]], goals: list[World]) -> set[World]:
    reached, queue = set(goals), deque(goals)
    while queue:
        for before in backwards.get(queue.popleft(), ()):
            if before not in reached:
                reached.add(before)
                queue.append(before)
    return reached


def _way(parents: dict[World, tuple[World, str] | None], world: World) -> tuple[str, ...]:
    names: list[str] = []
    while (parent := parents[world]) is not None:
        world, name = parent
        names.append(name)
    return tuple(reversed(names))
