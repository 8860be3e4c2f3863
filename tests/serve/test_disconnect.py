"""Work ends with its client, and nothing else does."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from quire.serve.disconnect import unless_ended


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


@in_a_loop
async def test_work_is_cancelled_when_its_client_leaves() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("work")

    with pytest.raises(ClientDisconnect):
        await unless_ended(asyncio.sleep(0), work())
    assert ended == ["work"]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)  # no cancellation is left over


@in_a_loop
async def test_a_watch_that_fails_is_a_client_that_left() -> None:
    async def fail() -> None:
        raise OSError("the connection is gone")

    with pytest.raises(ClientDisconnect):
        await unless_ended(fail(), asyncio.sleep(60))


@in_a_loop
async def test_work_that_ends_all_the_same_leaves_no_cancellation() -> None:
    async def stubborn() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "saved"
        return "slept"

    assert await unless_ended(asyncio.sleep(0), stubborn()) == "saved"
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@pytest.mark.parametrize("turns", range(5))
@in_a_loop
async def test_a_client_that_leaves_as_the_work_ends_cancels_nothing_else(turns: int) -> None:
    """Whichever comes first, what the caller does next goes on."""

    async def in_turns(count: int) -> str:
        for _ in range(count):
            await asyncio.sleep(0)
        return "done"

    async def leave() -> None:
        await in_turns(turns)

    try:
        assert await unless_ended(leave(), in_turns(2)) == "done"
    except ClientDisconnect:
        assert turns <= 2
    for _ in range(5):
        await asyncio.sleep(0)


@in_a_loop
async def test_cancelling_the_caller_is_no_disconnect() -> None:
    watching = asyncio.Event()

    async def watch() -> None:
        watching.set()
        await asyncio.sleep(60)

    caller = asyncio.create_task(unless_ended(watch(), asyncio.sleep(60)))
    await watching.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller


@in_a_loop
async def test_both_at_once_are_a_cancellation() -> None:
    async def leave() -> None:
        caller.cancel()

    caller = asyncio.create_task(unless_ended(leave(), asyncio.sleep(60)))
    with pytest.raises(asyncio.CancelledError):
        await caller
