"""Server-sent events: encoded chunks into a response that ends when its client does."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from quire.serve.backend import BackendError
from quire.serve.errors import INTERNAL_ERROR, from_backend
from quire.serve.responses import encode

logger = logging.getLogger(__name__)

DONE: Final = b"data: [DONE]\n\n"
_PING: Final = ServerSentEvent(comment="ping", sep="\n")
PING_INTERVAL: Final = 15  # seconds; proxies drop connections silent for about a minute

_HEADERS: Final = {
    "Cache-Control": "no-cache, no-transform",
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


class EventStream(EventSourceResponse):
    """Sends ``events``, and calls ``close`` once nobody can be sent any more.

    That is at the end, when the client leaves, and also when it left before the first event.

    Pings, hang-ups and the last word on the connection are sse-starlette's. Two things of it are
    not for this server. What it does around every event (a scope of cancellation for a time limit,
    which the connection has already; the event's encoding; a line for a debug log) costs a third
    more CPU a token than the events themselves (tests/serve/event_stream_benchmark.py). And a
    signal does not end streams, since the server finishes what runs.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            events,
            headers={**_HEADERS, **(headers or {})},
            ping=PING_INTERVAL,
            ping_message_factory=lambda: _PING,
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()

    async def _stream_response(self, send: Send) -> None:
        """The events and, if they fail, the error as the last one: the status line is long gone."""
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        last = b""
        try:
            async for data in self.body_iterator:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except BackendError as error:
            last = event(from_backend(error).envelope)
        except Exception:
            logger.exception("A stream failed")
            last = event(INTERNAL_ERROR.envelope)
        async with self._send_lock:  # no ping may follow
            self.active = False
            await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _listen_for_exit_signal_with_grace(self) -> None:
        await anyio.sleep_forever()
