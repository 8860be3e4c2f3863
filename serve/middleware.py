"""What a request may ask of the server before anything looks at its meaning.

Plain ASGI middleware: which Host a request may name, how large its body may be and how slowly it
may arrive. Decisions use ``scope["path"]`` and the raw headers, never ``request.url``, which a
forged Host header can bend.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.serve import request_record
from quire.serve.errors import ApiError, response_to
from quire.serve.process_memory import return_freed_memory
from quire.serve.raw_body import RawBody

MAX_BODY_BYTES: Final = 32 * 2**20
BODY_IDLE_TIMEOUT: Final = 10.0  # seconds
MIN_BODY_RATE: Final = 1024  # bytes a second

LOOPBACK_HOSTS: Final = ("localhost", "*.localhost", "127.0.0.1", "[::1]")

_LARGE_BODY: Final = 2**20  # bytes
_TRIM_AFTER: Final = 1.0  # seconds

# Part of the body is still unread, so the connection cannot be used again.
_CLOSE: Final = {"Connection": "close"}


async def read_json(request: Request) -> RawBody:
    """The body. Raises :class:`ApiError` (415) where it does not claim to be JSON.

    A page of another site can make a browser post text/plain here, but not application/json.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Send the body as JSON, with Content-Type: application/json.")
    body = RawBody([piece async for piece in request.stream() if piece])
    if (record := request_record.current()) is not None:
        record.body = body.start(request_record.MAX_BODY)
    return body


class AllowedHosts:
    """Answers 403 to a Host header that names none of ``hosts``.

    This is the guard against DNS rebinding, by which a web page reaches a server on the loopback
    interface under the page's own name. ``*.example`` stands for every name below example.
    Requests without a Host header, which only HTTP/1.0 allows, pass: browsers always send one.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._names = {host.lower() for host in hosts if not host.startswith("*")}
        self._suffixes = tuple(host[1:].lower() for host in hosts if host.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for host in Headers(scope=scope).getlist("host"):
                name = _host_name(host)
                if name not in self._names and not name.endswith(self._suffixes):
                    message = (
                        f"This server does not answer to the host {name[:200]!r}. If that is one "
                        "of its names, start it with --allowed-hosts and the name."
                    )
                    error = ApiError(403, message, code="host_not_allowed", headers=_CLOSE)
                    await response_to(scope, error)(scope, receive, send)
                    return
        await self._app(scope, receive, send)


_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@?#\[\]]+)(:[0-9]*)?")


def _host_name(header: str) -> str:
    """The Host header without port and trailing dot, in lower case; empty if it is no host."""
    match = _HOST.fullmatch(header.strip().lower())
    return match[1].removesuffix(".") if match else ""


class BodyLimits:
    """Answers 413 to a body over ``max_bytes`` and 408 to one that stops arriving or drips.

    ``idle_timeout`` is in seconds, from one piece of the body to the next, and also what a body may
    take beyond the time that ``min_rate``, in bytes a second, allows it. The errors are raised from
    ``receive``, so the application inside must turn :class:`ApiError` into a response.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int = MAX_BODY_BYTES,
        idle_timeout: float = BODY_IDLE_TIMEOUT,
        min_rate: float = MIN_BODY_RATE,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._idle_timeout = idle_timeout
        self._min_rate = min_rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            await response_to(scope, self._too_large())(scope, receive, send)
            return
        received = 0
        complete = False
        began = time.monotonic()

        async def limited_receive() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            late = began + self._idle_timeout + received / self._min_rate - time.monotonic()
            try:
                async with asyncio.timeout(min(self._idle_timeout, late)):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow() from None
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._too_large()
            complete = not message.get("more_body", False)
            return message

        try:
            await self._app(scope, limited_receive, send)
        finally:
            if received >= _LARGE_BODY:
                # Once nothing refers to the body any more.
                asyncio.get_running_loop().call_later(_TRIM_AFTER, return_freed_memory)

    def _too_slow(self) -> ApiError:
        return ApiError(
            408,
            f"The body is not complete: no data for {self._idle_timeout:g} s, "
            f"or less than {self._min_rate:g} bytes a second.",
            headers=_CLOSE,
        )

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"The body is over this server's {self._max_bytes} bytes.", headers=_CLOSE
        )
