"""The page in front of a scripted API: it answers with the chunks that a test wants to see."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from quire.serve.routes import page

MODEL = "test/model"
METRICS = """\
quire_model_ready 1.0
quire_requests_running{model="a"} 3.0
quire_requests_running{model="b"} 4.0
quire_requests_waiting 2.0
quire_generated_tokens_total 100.0
quire_prefix_cache_query_tokens_total 200.0
quire_prefix_cache_hit_tokens_total 50.0
quire_kv_blocks{state="used"} 10.0
quire_kv_blocks{state="cached"} 20.0
quire_kv_blocks{state="free"} 70.0
quire_memory_bytes{kind="weights"} 2147483648.0
quire_memory_bytes{kind="kv_cache"} 1073741824.0
quire_memory_bytes{kind="active"} 3758096384.0
quire_memory_bytes{kind="cache"} 0.0
quire_memory_bytes{kind="peak"} 4294967296.0
"""


def text(content: str) -> dict[str, Any]:
    return {"content": content}


def call(index: int, arguments: str, name: str | None = None) -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": name} if name else {})
    first = {"id": f"call_{index}", "type": "function"} if name else {}
    return {"tool_calls": [{"index": index, "function": function, **first}]}


@dataclass
class ScriptedApi:
    """``script`` is a list of deltas; "hang" waits until the client leaves, "wait" for ``go``.

    A float is a pause in seconds, an int a number of tokens that come without a chunk.
    """

    script: list[dict[str, Any] | str | float] = field(default_factory=list)
    finish: str | None = "stop"
    failure: tuple[int, str] | None = None  # status and message instead of a stream
    key: str | None = None
    switches: list[str] | None = None  # what the model's card says of its template
    bodies: list[dict[str, Any]] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)  # the client went early
    url: str = ""

    def app(self) -> Starlette:
        async def index(request: Request) -> Response:
            return JSONResponse({"name": "quire"})

        async def models(request: Request) -> Response:
            known = {} if self.switches is None else {"chat_template_kwargs": self.switches}
            return self._refusal(request) or JSONResponse({"data": [{"id": MODEL, **known}]})

        async def metrics(request: Request) -> Response:
            return self._refusal(request) or Response(METRICS)

        routes = [
            *page.routes(index),
            Route("/v1/models", models),
            Route("/metrics", metrics),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    def _refusal(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "This server wants an API key."}}, 401)

    async def _chat(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        self.bodies.append(await request.json())
        if self.failure is not None:
            return JSONResponse({"error": {"message": self.failure[1]}}, self.failure[0])
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        tokens = 0
        try:
            for delta in self.script:
                if delta == "hang":
                    await asyncio.sleep(600)
                if delta == "wait":
                    await asyncio.to_thread(self.go.wait, 30)
                    continue
                if isinstance(delta, float):
                    await asyncio.sleep(delta)
                    continue
                if isinstance(delta, int):
                    tokens += delta
                    continue
                tokens += 1
                usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 0}
                choice = {"index": 0, "delta": delta, "finish_reason": None}
                yield f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\n"
            if self.finish == "error":
                yield f"data: {json.dumps({'error': {'message': 'The worker died.'}})}\n\n"
            elif self.finish is not None:
                last = {"index": 0, "delta": {}, "finish_reason": self.finish}
                usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 0}
                yield f"data: {json.dumps({'choices': [last], 'usage': usage})}\n\n"
                yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left.set()
            raise


@contextlib.contextmanager
def scripted_page() -> Iterator[ScriptedApi]:
    api = ScriptedApi()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        api.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server = uvicorn.Server(
            uvicorn.Config(api.app(), log_level="warning", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 10
            while not server.started:
                assert thread.is_alive()
                assert time.monotonic() < deadline
                time.sleep(0.005)
            yield api
        finally:
            server.should_exit = True
            thread.join()
