"""A scripted chat server: each test says which bytes an answer is made of."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from quire.loadtest.http import BaseURL

Answer = Callable[["Request", asyncio.StreamWriter], Awaitable[None]]

SSE_HEAD = b"HTTP/1.1 200 OK\r\nServer: fake/1\r\nContent-Type: text/event-stream\r\n"
CHUNKED_HEAD = SSE_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class Served:
    base: BaseURL
    requests: list[Request] = field(default_factory=list)


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def delta(text: str | None = None, finish: str | None = None, **fields: object) -> bytes:
    content = {} if text is None else {"content": text}
    return event({"choices": [{"delta": {**content, **fields}, "finish_reason": finish}]})


def usage(prompt: int, completion: int, cached: int | None = None) -> bytes:
    block: dict[str, object] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        block["prompt_tokens_details"] = {"cached_tokens": cached}
    return event({"choices": [], "usage": block})


DONE = b"data: [DONE]\n\n"


def as_chunks(data: bytes, size: int) -> bytes:
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def respond(status: int, value: object) -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def sends(data: bytes, piece: int | None = None) -> Answer:
    """Answer with ``data``, in pieces of ``piece`` bytes that reach the client one by one."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(data), piece or len(data)):
            writer.write(data[start : start + (piece or len(data))])
            await writer.drain()
            if piece:
                await asyncio.sleep(0)

    return answer


def complete_answer(text: str = "ab") -> bytes:
    events = delta("", role="assistant") + b"".join(delta(c) for c in text)
    events += delta(finish="length") + usage(10, len(text), 4) + DONE
    return CHUNKED_HEAD + as_chunks(events, 50)


async def _read_request(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines if line)
    body = await reader.readexactly(int(fields.get("content-length", "0")))
    method, path, _ = first.split(" ")
    return Request(method, path, fields, json.loads(body) if body else {})


@asynccontextmanager
async def serving(chat: Answer, models: bytes | None = None) -> AsyncIterator[Served]:
    """Serve ``chat`` at the completions path and ``models`` at /v1/models (default: one id)."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await _read_request(reader)
        served.requests.append(request)
        if request.path == "/v1/models":
            writer.write(models or respond(200, {"data": [{"id": "fake"}]}))
        else:
            await chat(request, writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    served = Served(BaseURL("127.0.0.1", port, "", False))
    try:
        yield served
    finally:
        server.close()
