"""Server-sent events: encoded chunks into a response that ends when its client does."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from typing import Final

from msgspec import Struct
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Message, Receive, Scope, Send

from quire.serve.backend import BackendError
from quire.serve.errors import INTERNAL_ERROR, from_backend
from quire.serve.responses import encode

logger = logging.getLogger(__name__)

DONE: Final = b"data: [DONE]\n\n"
PING_INTERVAL: Final = 15  # seconds; proxies drop connections silent for about a minute

# Legal inside JSON strings, yet line ends to clients that split with str.splitlines().
_LINE_ENDS: Final = (
    ("\x85".encode(), rb"\u0085"),
    ("\u2028".encode(), rb"\u2028"),
    ("\u2029".encode(), rb"\u2029"),
)


def event(payload: Struct) -> bytes:
    data = encode(payload)
    for raw, escaped in _LINE_ENDS:
        data = data.replace(raw, escaped)
    return b"data: " + data + b"\n\n"


async def with_errors(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The events and, if they fail, the error as the last one: the status line is long gone."""
    try:
        async for data in events:
            yield data
    except BackendError as error:
        yield event(from_backend(error).envelope)
    except Exception:
        logger.exception("A stream failed")
        yield event(INTERNAL_ERROR.envelope)


class EventStream(EventSourceResponse):
    """Sends ``events``, and calls ``close`` once nobody can be sent any more.

    That is at the end, when the client leaves, and also when it left before the first event.
    """

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(
            with_errors(events),
            headers={"Cache-Control": "no-cache, no-transform"},
            ping=PING_INTERVAL,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            sep="\n",
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        # No send timeout is set, so the base class's timer around every chunk buys nothing.
        await send(message)
