"""Signs of life in streams whose clients count events: comments do not keep them waiting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Final

from quire.serve.generation import TextDelta

INTERVAL: Final = 15.0  # seconds without an event; clients give up after minutes

# Comes in place of a batch of deltas, of which none is empty.
HEARTBEAT: Final[Sequence[TextDelta]] = ()


async def with_heartbeats(
    batches: AsyncIterator[Sequence[TextDelta]], interval: float = INTERVAL
) -> AsyncIterator[Sequence[TextDelta]]:
    """The batches, and :data:`HEARTBEAT` whenever none has come for ``interval`` seconds."""

    async def following() -> Sequence[TextDelta] | None:
        return await anext(batches, None)

    pending = asyncio.create_task(following())
    try:
        while True:
            done, _ = await asyncio.wait({pending}, timeout=interval)
            if not done:
                yield HEARTBEAT
                continue
            batch = pending.result()
            if batch is None:
                return
            pending = asyncio.create_task(following())
            yield batch
    finally:
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)
