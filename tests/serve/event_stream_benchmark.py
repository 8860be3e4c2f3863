"""What an event costs the front end: the server's response against the least that starlette needs.

    python tests/serve/event_stream_benchmark.py --out loadtest/results/cpu-event-streams.json

Two processes serve chats from a script, whole but for the model; each answers in turn, a third
reads. The plain response sends pings and watches for clients that hang up, with nothing but
starlette and asyncio.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import platform
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fake_backend import (
    MODEL,
    FakeBackend,
    Script,
    one_model_app,
    post,
    ready,
    served_model,
)
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from quire.serve import answer
from quire.serve.disconnect import unless_disconnected
from quire.serve.http_protocol import ConnectionGuard, HttpLimits
from quire.serve.sse import PING_INTERVAL

EVENTS = 300  # of a stream
ROUNDS = 12
STREAMS = (64, 256)


class PlainStream(StreamingResponse):
    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_disconnected(Request(scope, receive), self.stream_response(send))

    async def stream_response(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        pings = asyncio.create_task(_ping(send))
        try:
            async for data in self.body_iterator:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            pings.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _ping(send: Send) -> None:
    while True:
        await asyncio.sleep(PING_INTERVAL)
        await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})


def plain_events(
    events: AsyncIterator[bytes], close: Callable[[], None], headers: Any = None
) -> Response:
    return PlainStream(events, headers=headers)


async def cpu(request: Request) -> Response:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return JSONResponse(usage.ru_utime + usage.ru_stime)


def serve(listener: socket.socket, kind: str) -> None:
    if kind == "plain":
        answer.EventStream = plain_events  # type: ignore[assignment,misc]
    model = served_model(["Hello"])
    [token] = model.encoder.tokenizer.encode("Hello").ids
    backend = FakeBackend([Script([[token]] * EVENTS)], info=ready(max_model_len=10**6))
    app = one_model_app(backend, model)
    app.routes.append(Route("/cpu", cpu))
    guard = ConnectionGuard(HttpLimits())
    config = uvicorn.Config(app, log_level="warning", http=guard.protocol(), ws="none")
    uvicorn.Server(config).run(sockets=[listener])


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    data = await reader.read(-1)
    writer.close()
    return data


async def measure(port: int, streams: int) -> dict[str, float]:
    async def cpu_seconds() -> float:
        answer = await ask(port, b"GET /cpu HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return float(answer.rpartition(b"\r\n")[2])

    messages = [{"role": "user", "content": "hi"}]
    body = {"model": MODEL, "messages": messages, "stream": True, "max_tokens": EVENTS}
    request = post("/v1/chat/completions", body).replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    before, start = await cpu_seconds(), time.perf_counter()
    answers = await asyncio.gather(*(ask(port, request) for _ in range(streams)))
    seconds, after = time.perf_counter() - start, await cpu_seconds()
    count = sum(answer.count(b'"content":"Hello"') for answer in answers)
    assert count == streams * EVENTS, count
    return {"tokens_per_s": count / seconds, "cpu_us_per_token": (after - before) / count * 1e6}


async def compare(ports: dict[str, int]) -> list[dict[str, Any]]:
    rows = []
    for streams in STREAMS:
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in ports}
        for round_number in range(ROUNDS):
            kinds = [*ports] if round_number % 2 else [*reversed(ports)]
            for kind in kinds:
                found[kind].append(await measure(ports[kind], streams))
        row: dict[str, Any] = {"streams": streams, "rounds": ROUNDS}
        for key in ("tokens_per_s", "cpu_us_per_token"):
            # Of the round that other work on the machine has disturbed least.
            best = {
                kind: (max if key == "tokens_per_s" else min)(run[key] for run in runs)
                for kind, runs in found.items()
            }
            row[key] = {kind: round(value, 2) for kind, value in best.items()}
            row[key]["ratio"] = round(best["served"] / best["plain"], 4)
        rows.append(row | {"runs": found})
        print({key: value for key, value in row.items() if key != "runs"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    with contextlib.ExitStack() as stack:
        ports = {}
        for kind in ("plain", "served"):
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            listener.listen(512)
            ports[kind] = listener.getsockname()[1]
            context = multiprocessing.get_context("fork")
            server = context.Process(target=serve, args=(listener, kind))
            server.start()
            stack.callback(server.join)
            stack.callback(server.terminate)
        rows = asyncio.run(compare(ports))
    if out is not None:
        command = f"python tests/serve/event_stream_benchmark.py --out {out}"
        machine = f"{platform.machine()}, Python {platform.python_version()}, shared by other work"
        document = {"command": command, "machine": machine, "events": EVENTS, "results": rows}
        out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
