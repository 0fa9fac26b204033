"""Everything that two hosts say to each other comes over the wire as it was."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmferry.api.codec import decode, encode
from vmferry.migration import messages as m
from vmferry.migration.records import MigrationRecord
from vmferry.model.errors import WrongInput
from vmferry.model.migration import MigrateOptions, MigrationView
from vmferry.model.receipt import Receipt

TEXT = st.text(max_size=8)
PLAIN: dict[object, st.SearchStrategy[Any]] = {
    str: TEXT,
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    NoneType: st.none(),
    object: st.one_of(TEXT, st.integers(0, 9), st.none(), st.lists(TEXT, max_size=2)),
    MigrateOptions: st.builds(
        MigrateOptions,
        max_blackout_ms=st.integers(1, 60_000),
        bandwidth_bps=st.sampled_from([0, 10**6, 10**10]),
        max_slowdown_percent=st.integers(0, 99),
        storage=st.dictionaries(TEXT, TEXT, max_size=2),
    ),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a type that the model uses."""
    if kind in PLAIN:
        return PLAIN[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return st.one_of(*(values(argument) for argument in arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*(values(argument) for argument in arguments))
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=2)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return st.sampled_from(kind)
    assert is_dataclass(kind), kind
    hints = get_type_hints(kind)
    return st.builds(kind, **{field.name: values(hints[field.name]) for field in fields(kind)})  # type: ignore[arg-type]


ALL = sorted({*m.REPLIES, *m.REPLIES.values()}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", [*ALL, MigrationRecord, MigrationView, Receipt], ids=lambda kind: kind.__name__)
def test_it_comes_back_equal(kind: type) -> None:
    @settings(max_examples=8)
    @given(values(kind))
    def check(message: object) -> None:
        assert decode(kind, json.loads(json.dumps(encode(message)))) == message

    check()


def test_the_table_of_contents_is_complete() -> None:
    assert set(get_args(m.Request)) == set(m.REPLIES)
    said = {kind for kind in vars(m).values() if is_dataclass(kind) and kind.__module__ == m.__name__}
    assert said - set(ALL) == {m.SourceFacts}


def test_every_request_that_changes_something_names_its_migration() -> None:
    asking_only = {m.CheckTarget, m.ListenForProbe, m.CollectProbe, m.Rehearse, m.EndRehearsal}
    for kind in set(m.REPLIES) - asking_only:
        assert "migration_id" in {field.name for field in fields(kind)}, kind


def test_a_message_of_another_version_is_refused() -> None:
    with pytest.raises(WrongInput):
        decode(m.Take, {"migration_id": "m-1", "generation": 2, "run": True, "new": 1})
    with pytest.raises(WrongInput):
        decode(m.Take, {"migration_id": "m-1", "generation": "2", "run": True})
