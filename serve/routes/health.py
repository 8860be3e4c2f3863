"""What monitors ask: all of it answers while a worker is busy, loading or gone."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from quire.serve.metrics import Metrics
from quire.serve.registry import Registry
from quire.serve.responses import json_response


class Status(msgspec.Struct, frozen=True):
    status: str
    worker: str  # "ready", "starting" or "down"


class Health:
    def __init__(self, registry: Registry, metrics: Metrics) -> None:
        self._registry = registry
        self._metrics = metrics

    async def health(self, request: Request) -> Response:
        """200 while this process and every worker exist, ready or not."""
        backends = [served.backend for served in self._registry]
        if not all(backend.alive for backend in backends):
            return json_response(Status("unhealthy", "down"), 503)
        ready = all(backend.info is not None for backend in backends)
        return json_response(Status("ok", "ready" if ready else "starting"))

    async def ready(self, request: Request) -> Response:
        """200 while requests are taken for every model."""
        for served in self._registry:
            if (reason := served.backend.why_unavailable()) is not None:
                raise reason
        return json_response(Status("ok", "ready"))

    async def metrics(self, request: Request) -> Response:
        body, content_type = self._metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})
