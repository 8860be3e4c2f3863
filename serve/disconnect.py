"""Work that stops when the client it is for has left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

T = TypeVar("T")


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled if the client leaves first.

    ASGI servers do not cancel a handler whose client is gone; they only say so to whoever asks.
    The body must have been read. Raises :class:`ClientDisconnect`.
    """
    return await unless_ended(wait_for_disconnect(request.receive), work)


async def unless_ended(gone: Coroutine[Any, Any, None], work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled if ``gone`` ends first.

    The work runs in the caller's own task: a token's way to its client is one task, not three.
    Raises :class:`ClientDisconnect`.
    """
    task = asyncio.current_task()
    assert task is not None
    cancelled_before = task.cancelling()
    is_working, has_left = True, False

    def leave(watch: asyncio.Task[None]) -> None:
        nonlocal has_left
        if is_working and not watch.cancelled():
            watch.exception()  # whatever it was, nobody can be answered
            has_left = True
            task.cancel()

    watch = asyncio.create_task(gone)
    watch.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left:
            has_left = False
            if task.uncancel() <= cancelled_before:
                raise ClientDisconnect from None
        raise
    finally:
        is_working = False
        watch.cancel()
        if has_left:  # the work has ended all the same
            task.uncancel()


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
