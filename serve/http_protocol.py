"""What a connection may cost before a request exists: sizes, times and the number of connections.

uvicorn's parser takes heads of any size and waits for them for ever. Here each of those has a limit
(:class:`HttpLimits`), and what is refused gets the same JSON envelope as any other error:

    400   malformed HTTP; no Host header, or several
    408   the head does not arrive in time
    414   the URL is too long
    431   the headers are too many or too large
    503   all connections are in use

A client that reads nothing of its answer is disconnected, which ends its request. A connection
without a request is closed after a while, or as soon as another one needs its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from quire.serve.errors import ApiError

# Chunks of one byte are the least that a chunked body can be cut into: five bytes around each.
_FRAMING_PER_BYTE: Final = 8
_SECOND_LOOK: Final = 1.0  # seconds
_LINGER: Final = 2.0  # seconds that a refused client gets to read why
_LINGER_BYTES: Final = 16 * 2**20  # that it may still send meanwhile
_DESCRIPTORS: Final = 8192  # the soft limit asked for
_OTHER_DESCRIPTORS: Final = 128  # for the worker's pipes and sockets, model files and the log


@dataclass(frozen=True)
class HttpLimits:
    """Sizes are in bytes, times in seconds."""

    max_connections: int = 1024
    max_url: int = 8 * 1024
    max_headers: int = 100
    max_header_size: int = 32 * 1024  # of all headers together, names and values
    head_timeout: float = 10.0  # from a head's first byte to its last
    # Clients pool connections; one that we close first fails the request that just reuses it.
    idle_timeout: float = 75.0
    # In which a client must read all of what waits for it, or so many bytes of it.
    write_timeout: float = 30.0
    least_read: int = 4096


def raise_descriptor_limit() -> int:
    """Raise this process's limit of open files as far as may be needed; returns the limit.

    A shell on a Mac gives 256, fewer than a busy server's connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    with contextlib.suppress(OSError, ValueError):  # macOS may allow less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def connections_within(descriptors: int) -> int:
    """How many connections leave enough of ``descriptors`` for everything else."""
    return max(16, min(4096, descriptors - _OTHER_DESCRIPTORS))


class ConnectionGuard:
    """The limits of one server and its connections without a request, longest idle first.

    ``on_refusal`` is told of every request that no application saw, with the client's address.
    """

    def __init__(
        self,
        limits: HttpLimits,
        on_refusal: Callable[[ApiError, str], None] = lambda error, client: None,
    ) -> None:
        self.limits = limits
        self.on_refusal = on_refusal
        self.idle: dict[LimitedProtocol, None] = {}

    def protocol(self) -> type[LimitedProtocol]:
        """The class to give to ``uvicorn.Config(http=...)``."""
        return type("GuardedProtocol", (LimitedProtocol,), {"guard": self})


class LimitedProtocol(HttpToolsProtocol):
    """One connection. Made by :meth:`ConnectionGuard.protocol`."""

    guard: ConnectionGuard

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refused = False
        self._in_head = False
        self._is_resuming = False  # a parser is told of a head that another one has read
        self._began_now = False  # whether a head has begun in the data being parsed
        self._raw_bytes = 0  # of this request, without the data in which it began
        self._head_bytes = 0
        self._body_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes that waited for the client when its time began

    # ---- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        guard = self.guard
        if len(self.connections) > guard.limits.max_connections:
            if not guard.idle:
                message = "All connections are in use. Try again in a moment."
                self._refuse(ApiError(503, message, code="busy", headers={"Retry-After": "1"}))
                return
            longest_idle = next(iter(guard.idle))
            del guard.idle[longest_idle]
            longest_idle.transport.close()
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.idle.pop(self, None)
        self._unset_keepalive_if_required()
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.parser is None:
            self._raw_bytes += len(data)
            if self._raw_bytes > _LINGER_BYTES:
                self.transport.abort()
            return
        self._began_now = False
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self._refuse(ApiError(400, "This is not valid HTTP."))
        if not self._refused:
            self._count(len(data))

    def _parse(self, data: bytes) -> None:
        """No other protocol is spoken here: requests that ask for one, as Java's client does by
        itself, are answered as they are. The parser takes what follows their heads for that
        protocol's, so another one goes on there."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self._refused or self.parser.get_method() == b"CONNECT":
                    return
                data = data[upgrade.args[0] :]
                framing = self._body_framing
                self.parser = httptools.HttpRequestParser(self)
                if framing:
                    self._is_resuming = True
                    self.parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n")
                    self._is_resuming = False

    def _count(self, num_bytes: int) -> None:
        """What the parser keeps to itself, and how long it may."""
        if not self._began_now:
            self._raw_bytes += num_bytes
        limit = self.guard.limits.max_header_size
        if self._in_head:
            if self._raw_bytes > limit + self.guard.limits.max_url:
                self._refuse(self._too_large())
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(
                    self.guard.limits.head_timeout, self._on_head_timeout
                )
        elif self._raw_bytes > limit + _FRAMING_PER_BYTE * self._body_bytes:
            self._refuse(ApiError(400, "The body is nearly all framing."))

    def _wait_for_request(self) -> None:
        self.guard.idle[self] = None
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.guard.limits.idle_timeout, self.timeout_keep_alive_handler
        )

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # closing would wait for a client that does not read
        else:
            super().timeout_keep_alive_handler()

    # ---- one request

    @property
    def _body_framing(self) -> bytes:
        """The headers that say how long the request's body is; empty if it has none."""
        if self.parser.get_method() == b"CONNECT":  # what follows is nobody's
            return b""
        return b"".join(
            name + b": " + value + b"\r\n"
            for name, value in self.headers
            if name == b"transfer-encoding" or (name == b"content-length" and int(value))
        )

    def on_message_begin(self) -> None:
        if self._is_resuming:
            return
        super().on_message_begin()
        self._in_head = self._began_now = True
        self._raw_bytes = self._head_bytes = self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        if self._is_resuming:
            return
        if len(self.url) + len(url) <= self.guard.limits.max_url:
            super().on_url(url)
        elif not self._refused:
            limit = self.guard.limits.max_url
            self._refuse(ApiError(414, f"The URL is longer than {limit} bytes."))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_resuming:
            return
        self._head_bytes += len(name) + len(value)
        limits = self.guard.limits
        if self._refused:
            return
        if len(self.headers) >= limits.max_headers or self._head_bytes > limits.max_header_size:
            self._refuse(self._too_large())
        elif self._in_head:  # what follows a body is read and dropped
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_resuming:
            return
        self._in_head = False
        self._stop_head_timer()
        self._unset_keepalive_if_required()
        self.guard.idle.pop(self, None)
        if self._refused:
            return
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            self._refuse(ApiError(400, "A request needs a Host header, and one only."))
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._refused or (self.parser.should_upgrade() and self._body_framing):
            return  # of the latter the body is to come
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.cycle.response_complete:
            self._wait_for_request()

    # ---- clients that are too slow

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if not self._is_answering():
            seconds = self.guard.limits.head_timeout
            self._refuse(ApiError(408, f"The request's head was not complete after {seconds:g} s."))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def _watch_reader(self) -> None:
        self._unread = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(
            self.guard.limits.write_timeout, self._on_write_timeout
        )

    def _on_write_timeout(self, *, is_last: bool = False) -> None:
        limits = self.guard.limits
        read = self._unread - self.transport.get_write_buffer_size()
        if read >= limits.least_read:
            self._watch_reader()
            return
        if not is_last:
            # Where this process itself was held up, the loop has not yet sent what it could.
            last = partial(self._on_write_timeout, is_last=True)
            self._write_timer = self.loop.call_later(_SECOND_LOOK, last)
            return
        message = f"The client read {read} bytes of its answer in {limits.write_timeout:g} s."
        error = ApiError(408, message)
        self.guard.on_refusal(error, self._client_name())
        self.transport.abort()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # ---- refusals

    def _too_large(self) -> ApiError:
        limits = self.guard.limits
        return ApiError(
            431,
            f"The headers are over this server's {limits.max_header_size} bytes "
            f"or {limits.max_headers} lines.",
        )

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: ApiError) -> None:
        """Answer with ``error`` and close, without the application."""
        self._refused = True
        self._stop_head_timer()
        self._unset_keepalive_if_required()
        self.guard.idle.pop(self, None)
        self.guard.on_refusal(error, self._client_name())
        if self._is_answering():
            if self.pipeline or self.cycle.response_started:
                # A second answer in the middle of the first would belong to neither.
                self.transport.close()
                return
            # The application, which waits for the body, is told that the client has left.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write(_as_bytes(error))
        # Closing at once would reset the connection, and the answer with it, if data is unread.
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.loop.call_later(_LINGER, self.transport.abort)
        else:
            self.transport.close()

    def _client_name(self) -> str:
        return f"{self.client[0]}:{self.client[1]}" if self.client else "unknown"


def _as_bytes(error: ApiError) -> bytes:
    """A whole HTTP/1.1 response that ends its connection."""
    response = error.response
    head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n".encode()]
    head += [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
    return b"".join([*head, b"connection: close\r\n\r\n", bytes(response.body)])
