"""The ASGI application: routes over one backend and one model, both handed in."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.serve.backend import Backend
from quire.serve.chat import ChatCompletions
from quire.serve.completions import Completions
from quire.serve.errors import exception_handlers
from quire.serve.limits import BODY_IDLE_TIMEOUT, MAX_BODY_BYTES, AllowedHosts, BodyLimits
from quire.serve.models_routes import Models
from quire.serve.responses import json_response
from quire.serve.tokenizer import ServedModel


class Status(msgspec.Struct, frozen=True):
    status: str
    worker: str  # "ready", "starting" or "down"


class Index(msgspec.Struct, frozen=True):
    name: str
    model: str
    endpoints: list[str]


class Probes:
    """What monitors ask; all of it answers while the worker is busy, loading or gone."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def health(self, request: Request) -> Response:
        """200 while this process and its worker exist, ready or not."""
        if not self._backend.alive:
            return json_response(Status("unhealthy", "down"), 503)
        worker = "starting" if self._backend.info is None else "ready"
        return json_response(Status("ok", worker))

    async def ready(self, request: Request) -> Response:
        """200 while requests are taken."""
        if (reason := self._backend.why_unavailable()) is not None:
            raise reason
        return json_response(Status("ok", "ready"))

    async def metrics(self, request: Request) -> Response:
        body, content_type = self._backend.render_metrics(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})


def create_app(
    backend: Backend,
    model: ServedModel,
    *,
    allowed_hosts: Sequence[str] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    body_idle_timeout: float = BODY_IDLE_TIMEOUT,
) -> Starlette:
    """``allowed_hosts`` None answers to any Host header; pass LOOPBACK_HOSTS on loopback.

    ``body_idle_timeout`` is in seconds.
    """
    chat = ChatCompletions(backend, model)
    completions = Completions(backend, model)
    models = Models(backend, model)
    probes = Probes(backend)
    routes = [
        Route("/v1/chat/completions", chat.create, methods=["POST"]),
        Route("/v1/completions", completions.create, methods=["POST"]),
        Route("/v1/models", models.list, methods=["GET"]),
        Route("/v1/models/{id:path}", models.retrieve, methods=["GET"]),
        Route("/tokenize", models.tokenize, methods=["POST"]),
        Route("/detokenize", models.detokenize, methods=["POST"]),
        Route("/health", probes.health, methods=["GET"]),
        Route("/ready", probes.ready, methods=["GET"]),
        Route("/metrics", probes.metrics, methods=["GET"]),
    ]
    index = Index("quire", model.id, [route.path for route in routes])

    async def show_index(request: Request) -> Response:
        return json_response(index)

    middleware = [Middleware(BodyLimits, max_bytes=max_body_bytes, idle_timeout=body_idle_timeout)]
    if allowed_hosts is not None:
        middleware.insert(0, Middleware(AllowedHosts, hosts=allowed_hosts))
    app = Starlette(
        routes=[Route("/", show_index, methods=["GET"]), *routes],
        middleware=middleware,
        exception_handlers=exception_handlers,
    )
    # A redirect would be built from the Host header; an unknown path is a 404 instead.
    app.router.redirect_slashes = False
    return app
