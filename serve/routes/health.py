"""What monitors ask: all of it answers while a worker is busy, loading or gone."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from quire.serve.metrics import Metrics
from quire.serve.openai_answer import json_response
from quire.serve.registry import Registry


class Status(msgspec.Struct, frozen=True):
    status: str
    worker: str  # "ready", "starting" or "down"


class Health:
    def __init__(self, registry: Registry, metrics: Metrics) -> None:
        self._registry = registry
        self._metrics = metrics

    async def health(self, request: Request) -> Response:
        """200 while this process and every worker exist, ready or not."""
        if not all(entry.alive for entry in self._registry):
            return json_response(Status("unhealthy", "down"), 503)
        ready = all(entry.why_unavailable() is None for entry in self._registry)
        return json_response(Status("ok", "ready" if ready else "starting"))

    async def ready(self, request: Request) -> Response:
        """200 while requests are taken for every model; one that is not loaded yet can be."""
        for entry in self._registry:
            if (reason := entry.why_unavailable()) is not None:
                raise reason
        return json_response(Status("ok", "ready"))

    async def metrics(self, request: Request) -> Response:
        body, content_type = self._metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})
