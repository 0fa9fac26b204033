"""Parts of one work at the same time, of which none outlives it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, overload

from vmferry.migration.undoing import to_the_end

A = TypeVar("A")
B = TypeVar("B")


@overload
async def together(first: Coroutine[Any, Any, A], second: Coroutine[Any, Any, B], /) -> tuple[A, B]: ...
@overload
async def together(*works: Coroutine[Any, Any, A]) -> tuple[A, ...]: ...


async def together(*works: Coroutine[Any, Any, Any]) -> tuple[Any, ...]:
    """All results. At the first error, or when cancelled, all parts are cancelled and waited for.

    Raises the first error itself, where `asyncio.TaskGroup` would raise a group, and `asyncio.gather` would leave the
    other parts running with nobody waiting for them.
    """
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await to_the_end(_all_over(tasks))
    for task in tasks:  # what another one raised as it was cancelled came later
        if task in done and not task.cancelled() and (error := task.exception()) is not None:
            raise error
    return tuple(task.result() for task in tasks)


async def _all_over(tasks: list[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
