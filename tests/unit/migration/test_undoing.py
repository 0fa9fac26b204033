"""Undoing is carried through, however often who waits for it is cancelled."""

from __future__ import annotations

import asyncio

import pytest

from vmferry.migration.undoing import to_the_end


async def test_its_result_and_its_error_come_through() -> None:
    async def work(fails: bool) -> int:
        await asyncio.sleep(0)
        if fails:
            raise KeyError("why")
        return 7

    assert await to_the_end(work(False)) == 7
    with pytest.raises(KeyError, match="why"):
        await to_the_end(work(True))


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_it_is_carried_through_when_cancelled(times: int) -> None:
    """A shield alone ends the wait at the first cancellation; whoever goes on then finds it half undone."""
    steps: list[int] = []
    goes_on = asyncio.Event()

    async def work() -> None:
        steps.append(1)
        await goes_on.wait()
        steps.append(2)

    waiting = asyncio.create_task(to_the_end(work()))
    await asyncio.sleep(0)
    for _ in range(times):
        waiting.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        assert not waiting.done()
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert steps == [1, 2]


async def test_cancelled_before_it_began() -> None:
    done: list[int] = []

    async def work() -> None:
        await asyncio.sleep(0)
        done.append(1)

    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await to_the_end(work())

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(run())
    assert done == [1]
