"""All of a VM's gates as one: what happens to one must not be at the cost of the others."""

from __future__ import annotations

from typing import Any, cast

import pytest

from vmferry.migration.gates import SourceGates
from vmferry.model.errors import Failed


class Gate:
    """Stands for a `SourceGate`; one that is broken raises at every act."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.done: list[str] = []

    async def _do(self, what: str) -> None:
        self.done.append(what)
        if self.broken:
            raise Failed(self.broken, "It does not do that.")

    async def reopen(self, _returned: int | None) -> None:
        await self._do("reopen")

    async def release(self, *, guest_stays: bool) -> None:
        await self._do(f"release {guest_stays}")


def gates_of(*gates: Gate) -> SourceGates:
    together = SourceGates(cast(Any, None), "m-1", (), (), "192.0.2.1", "192.0.2.2")
    together._gates = cast(Any, list(gates))
    return together


async def test_a_gate_that_cannot_be_opened_keeps_no_other_closed() -> None:
    gates = Gate(), Gate("first"), Gate("second"), Gate()
    with pytest.raises(Failed) as caught:
        await gates_of(*gates).reopen(3)
    assert caught.value.code == "first"
    assert [gate.done for gate in gates] == [["reopen"]] * 4


async def test_a_gate_that_cannot_be_released_keeps_no_other_in_place() -> None:
    gates = Gate("first"), Gate()
    with pytest.raises(Failed):
        await gates_of(*gates).release(guest_stays=True)
    assert [gate.done for gate in gates] == [["release True"]] * 2
