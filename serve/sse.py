"""Server-sent events: encoded chunks into a response that ends when its client does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from quire.serve.backend import BackendError
from quire.serve.disconnect import unless_disconnected
from quire.serve.errors import INTERNAL_ERROR, from_backend
from quire.serve.responses import encode

logger = logging.getLogger(__name__)

DONE: Final = b"data: [DONE]\n\n"
PING: Final = b": ping\n\n"
PING_INTERVAL: Final = 15  # seconds; proxies drop connections silent for about a minute

_HEADERS: Final = {
    "Cache-Control": "no-cache, no-transform",
    "Connection": "keep-alive",
    "X-Accel-Buffering": "no",
}

# Legal inside JSON strings, yet line ends to clients that split with str.splitlines().
_LINE_ENDS: Final = (
    ("\x85".encode(), rb"\u0085"),
    ("\u2028".encode(), rb"\u2028"),
    ("\u2029".encode(), rb"\u2029"),
)


def named_event(name: str, payload: object) -> bytes:
    return b"event: " + name.encode() + b"\n" + event(payload)


def event(payload: object) -> bytes:
    data = encode(payload)
    if not data.isascii():
        for raw, escaped in _LINE_ENDS:
            data = data.replace(raw, escaped)
    return b"data: " + data + b"\n\n"


class EventStream(StreamingResponse):
    """Sends ``events``, and calls ``close`` once nobody can be sent any more.

    That is at the end, when the client leaves, and also when it left before the first event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(events, headers={**_HEADERS, **(headers or {})})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # Nobody is there to be told that the client has left.
            with contextlib.suppress(ClientDisconnect):
                await unless_disconnected(Request(scope, receive), self.stream_response(send))
        finally:
            self._close()

    async def stream_response(self, send: Send) -> None:
        """The events and, if they fail, the error as the last one: the status line is long gone."""
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        pings = asyncio.create_task(_ping(send))
        last = b""
        try:
            async for data in self.body_iterator:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except BackendError as error:
            last = event(from_backend(error).envelope)
        except Exception:
            logger.exception("A stream failed")
            last = event(INTERNAL_ERROR.envelope)
        finally:
            pings.cancel()
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def _ping(send: Send) -> None:
    while True:
        await asyncio.sleep(PING_INTERVAL)
        await send({"type": "http.response.body", "body": PING, "more_body": True})
