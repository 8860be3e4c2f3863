"""A small HTTP/1.1 and server-sent-events reader.

The client shares the machine with the server it measures, so it does no more than needed: one
connection per request, one read per wake-up, and parsers that are fed bytes.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple
from urllib.parse import urlsplit

_READ_SIZE = 1 << 16
_MAX_LINE = 1 << 20
_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;.*)?")


class ProtocolError(Exception):
    """The bytes received are not HTTP."""


class Truncated(Exception):
    """The connection ended before the message did."""


class BaseURL(NamedTuple):
    host: str
    port: int
    prefix: str  # path in front of every request path, without a trailing slash
    tls: bool

    @classmethod
    def parse(cls, url: str) -> BaseURL:
        """Split ``http[s]://host[:port][/prefix]``; a trailing ``/v1`` is dropped.

        Raises ValueError for anything else.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--url must look like http://host:port, not {url!r}")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, parts.port or (443 if tls else 80), prefix, tls)

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class ChunkedDecoder:
    """The chunked transfer coding (RFC 9112, section 7.1), fed in pieces of any size."""

    def __init__(self) -> None:
        self._pending = b""  # an unfinished line
        self._remaining = 0  # bytes still missing from the current chunk
        self._after_data = False
        self._in_trailers = False
        self.complete = False

    def feed(self, data: bytes) -> bytes:
        """Return the content in ``data``. Raises ProtocolError for a malformed chunk."""
        out = []
        data = self._pending + data
        while not self.complete:
            if self._remaining:
                part, data = data[: self._remaining], data[self._remaining :]
                out.append(part)
                self._remaining -= len(part)
            if self._remaining:
                break
            line, separator, rest = data.partition(b"\r\n")
            if not separator:
                if len(data) > _MAX_LINE:
                    raise ProtocolError("a chunk header is too long")
                break
            data = rest
            self._line(line)
        self._pending = data
        return b"".join(out)

    def _line(self, line: bytes) -> None:
        if self._after_data:
            if line:
                raise ProtocolError("a chunk is longer than it says")
            self._after_data = False
        elif self._in_trailers:
            self.complete = not line
        else:
            match = _CHUNK_SIZE.fullmatch(line)
            if match is None:
                raise ProtocolError(f"bad chunk size {line[:40]!r}")
            self._remaining = int(match[1], 16)
            self._after_data = self._remaining > 0
            self._in_trailers = self._remaining == 0


class EventParser:
    """Server-sent events to their data. Comments and other fields are dropped.

    Lines end in LF or CRLF; the lone CR that the specification also allows is not recognised.
    """

    def __init__(self) -> None:
        self._pending = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._pending = (self._pending + data).split(b"\n")
        if len(self._pending) > _MAX_LINE:
            raise ProtocolError("an event line is too long")
        events = []
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events


class Response:
    """Status, lower-case headers, and the body as an asynchronous iterator of bytes."""

    def __init__(self, status: int, headers: dict[str, str], reader: asyncio.StreamReader) -> None:
        self.status = status
        self.headers = headers
        self._reader = reader

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Raises :class:`Truncated` if the connection ends before the body is complete."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            decoder = ChunkedDecoder()
            while not decoder.complete:
                if content := decoder.feed(await self._read(must=True)):
                    yield content
        elif "content-length" in self.headers:
            left = _content_length(self.headers["content-length"])
            while left > 0:
                data = (await self._read(must=True))[:left]
                left -= len(data)
                yield data
        else:  # HTTP/1.0: the end of the connection is the end of the body
            while data := await self._read(must=False):
                yield data

    async def read(self) -> bytes:
        return b"".join([data async for data in self])

    async def _read(self, must: bool) -> bytes:
        try:
            data = await self._reader.read(_READ_SIZE)
        except OSError as error:
            raise Truncated(f"the connection broke: {error}") from error
        if must and not data:
            raise Truncated("the connection ended inside the body")
        return data


def _content_length(value: str) -> int:
    if not value.isdecimal():
        raise ProtocolError(f"bad Content-Length {value[:40]!r}")
    return int(value)


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise ProtocolError("the response head is too long") from None
    except (asyncio.IncompleteReadError, OSError) as error:
        raise Truncated("the connection ended before a response") from error
    status_line, *lines = head.decode("latin-1").split("\r\n")
    match = re.match(r"HTTP/1\.[01] ([1-5]\d\d)(?: |$)", status_line)
    if match is None:
        raise ProtocolError(f"not an HTTP/1 response: {status_line[:60]!r}")
    fields = (line.partition(":") for line in lines if line)
    return int(match[1]), {name.strip().lower(): value.strip() for name, _, value in fields}


@asynccontextmanager
async def send(
    base: BaseURL,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> AsyncIterator[Response]:
    """Send one request on a connection of its own, closed when the block is left.

    Raises OSError where no connection can be opened, and :class:`Truncated` or
    :class:`ProtocolError` where the answer is not whole or not HTTP.
    """
    tls = ssl.create_default_context() if base.tls else None
    reader, writer = await asyncio.open_connection(base.host, base.port, ssl=tls)
    try:
        fields = {
            "Host": base.host_header,
            "Connection": "close",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"{method} {base.prefix}{path} HTTP/1.1\r\n{lines}\r\n".encode() + body)
        status, received = await _read_head(reader)
        while status < 200:  # interim responses such as 103
            status, received = await _read_head(reader)
        yield Response(status, received, reader)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
