"""Parts of one work end together, and the check's are such parts."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmferry.migration import preflight
from vmferry.migration.together import together
from vmferry.model.errors import Failed, Unreachable


class Part:
    """A work of that many turns of the loop, that needs as many to end once it is cancelled."""

    def __init__(self, turns: int, error: Exception | None = None, ending: Exception | None = None) -> None:
        self.turns, self.error, self.ending = turns, error, ending
        self.result: Any = turns
        self.over = False

    async def run(self) -> Any:
        try:
            await self._turns()
            if self.error is not None:
                raise self.error
            return self.result
        except asyncio.CancelledError:
            await self._turns()
            if self.ending is not None:
                raise self.ending from None
            raise
        finally:
            self.over = True

    async def _turns(self) -> None:
        for _ in range(self.turns):
            await asyncio.sleep(0)


async def test_results_come_in_order() -> None:
    assert await together(Part(5).run(), Part(1).run()) == (5, 1)


async def test_the_first_error_is_raised_when_all_are_over() -> None:
    cause = KeyError("why")
    error = Failed("first", "It went wrong.")
    error.__cause__ = cause
    parts = Part(9), Part(2, error), Part(7, ending=Failed("later", "So did the clean-up.")), Part(1)
    with pytest.raises(Failed) as caught:
        await together(*(part.run() for part in parts))
    assert caught.value is error and error.__cause__ is cause
    assert all(part.over for part in parts)


async def test_when_cancelled_all_are_waited_for() -> None:
    parts = Part(9), Part(5)
    task = asyncio.create_task(together(*(part.run() for part in parts)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # an impatient user
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(part.over for part in parts)


@pytest.mark.parametrize("breaks", ["estimate_dirty_rate", "rehearse", "_find_there", "_facts"])
async def test_a_check_that_broke_off_does_nothing_more(monkeypatch: pytest.MonkeyPatch, breaks: str) -> None:
    """Else the engine is told that it may prepare when its migration has failed, and nobody undoes that."""
    parts = {name: Part(3) for name in ("_facts", "_find_here", "_find_there", "_find_paths")}
    parts |= {"rehearse": Part(20), "estimate_dirty_rate": Part(4)}
    parts[breaks].error = Unreachable("link-lost", "It is gone.")
    for name, part in parts.items():
        part.result = []
        monkeypatch.setattr(preflight, name, lambda *_, part=part: part.run())
    told: list[int] = []
    link = SimpleNamespace(measure_rate=Part(2).run)
    guest = SimpleNamespace(spec=None, monitor=None)
    with pytest.raises(Unreachable):
        await preflight.check(
            cast(Any, None), cast(Any, guest), cast(Any, link), cast(Any, None), lambda: told.append(1)
        )
    before = len(told)
    running = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert running == []
    await asyncio.sleep(0.01)
    assert len(told) == before
