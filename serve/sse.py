"""Server-sent events: encoded chunks into a response that ends when its client does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Final

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from quire.serve.backend import BackendError
from quire.serve.disconnect import unless_ended
from quire.serve.errors import INTERNAL_ERROR, from_backend
from quire.serve.openai_answer import encode

logger = logging.getLogger(__name__)

DONE: Final = b"data: [DONE]\n\n"
_PING: Final = ServerSentEvent(comment="ping", sep="\n")
PING_INTERVAL: Final = 15  # seconds; proxies drop connections silent for about a minute
_SHORT: Final = 1.0  # seconds; an answer that takes no longer has no task for pings

_HEADERS: Final = {
    "Cache-Control": "no-cache, no-transform",
}

# Legal inside JSON strings, yet line ends to clients that split with str.splitlines().
_LINE_ENDS: Final = (
    ("\x85".encode(), rb"\u0085"),
    ("\u2028".encode(), rb"\u2028"),
    ("\u2029".encode(), rb"\u2029"),
)


class LastEvent(bytes):
    """What a stream ends with: it goes out in one piece with the end of the response."""


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

    Pings and what a hang-up is are sse-starlette's. Three things of it are not for this server.
    What it does around every event (a scope of cancellation for a time limit, which the connection
    has already; the event's encoding; a line for a debug log) costs a third more CPU a token than
    the events themselves (tests/serve/event_stream_benchmark.py). Its group of four tasks costs
    more than a short answer's events. And a signal does not end streams, since the server finishes
    what runs.
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
        pings = _Pings(min(PING_INTERVAL, _SHORT), lambda: self._ping(send))
        try:
            # Nobody is there to be told that the client has left.
            with contextlib.suppress(ClientDisconnect):
                await unless_ended(
                    self._listen_for_disconnect(receive), self._stream_response(send)
                )
        finally:
            self.active = False
            pings.stop()
            self._close()

    async def _stream_response(self, send: Send) -> None:
        """The events and, if they fail, the error as the last one: the status line is long gone."""
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        last = b""
        try:
            async for data in self.body_iterator:
                if isinstance(data, LastEvent):
                    last = data
                    continue
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except BackendError as error:
            last = event(from_backend(error).envelope)
        except Exception:
            logger.exception("A stream failed")
            last = event(INTERNAL_ERROR.envelope)
        async with self._send_lock:  # no ping may follow
            self.active = False
            await send({"type": "http.response.body", "body": last, "more_body": False})


class _Pings:
    """A task for pings, once a stream has lasted a while."""

    def __init__(self, delay: float, ping: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._ping = ping
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(delay, self._start)

    def _start(self) -> None:
        self._task = asyncio.create_task(self._ping())

    def stop(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
