"""The ASGI application: routes over the models and metrics that are handed in."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.serve import openapi
from quire.serve.access import AccessControl, ForeignOrigins
from quire.serve.api_keys import Keyring
from quire.serve.body_helpers import BodyHelpers
from quire.serve.errors import exception_handlers
from quire.serve.metrics import HTTPMetricsMiddleware, Metrics
from quire.serve.middleware import BODY_IDLE_TIMEOUT, MAX_BODY_BYTES, AllowedHosts, BodyLimits
from quire.serve.openai_answer import json_response
from quire.serve.registry import Registry
from quire.serve.request_log import RequestLog
from quire.serve.routes import page
from quire.serve.routes.chat import ChatCompletions
from quire.serve.routes.completions import Completions
from quire.serve.routes.embeddings import Embeddings
from quire.serve.routes.health import Health
from quire.serve.routes.messages import Messages
from quire.serve.routes.models import Models
from quire.serve.routes.responses import Responses
from quire.serve.tracing import Tracing


class Index(msgspec.Struct, frozen=True):
    name: str
    model: str
    endpoints: list[str]


def create_app(
    registry: Registry,
    metrics: Metrics,
    *,
    allowed_hosts: Sequence[str] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    body_idle_timeout: float = BODY_IDLE_TIMEOUT,
    log_prompts: bool = False,
    keyring: Keyring | None = None,
    allowed_origins: Sequence[str] = (),
    tracing: Tracing | None = None,
    bodies: BodyHelpers | None = None,
) -> Starlette:
    """``allowed_hosts`` None answers to any Host header; pass LOOPBACK_HOSTS on loopback.

    ``body_idle_timeout`` is in seconds; without a ``keyring`` no keys are asked for;
    ``allowed_origins`` are those of web pages beside the server's own; without ``bodies``, which
    read large ones, the event loop does.
    """
    chat = ChatCompletions(registry, bodies)
    completions = Completions(registry, bodies)
    embeddings = Embeddings(registry, bodies)
    messages = Messages(registry, bodies)
    responses = Responses(registry, bodies)
    models = Models(registry, bodies)
    health = Health(registry, metrics)
    routes = [
        Route("/v1/chat/completions", chat.create, methods=["POST"]),
        Route("/v1/completions", completions.create, methods=["POST"]),
        Route("/v1/embeddings", embeddings.create, methods=["POST"]),
        Route("/v1/responses", responses.create, methods=["POST"]),
        Route("/v1/responses/{id}", responses.retrieve, methods=["GET"]),
        Route("/v1/responses/{id}", responses.delete, methods=["DELETE"]),
        Route("/v1/responses/{id}/cancel", responses.cancel, methods=["POST"]),
        Route("/v1/messages", messages.create, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
        Route("/v1/models", models.list, methods=["GET"]),
        Route("/v1/models/load", models.load, methods=["POST"]),
        Route("/v1/models/unload", models.unload, methods=["POST"]),
        Route("/v1/models/{id:path}", models.retrieve, methods=["GET"]),
        Route("/tokenize", models.tokenize, methods=["POST"]),
        Route("/detokenize", models.detokenize, methods=["POST"]),
        Route("/apply-template", models.apply_template, methods=["POST"]),
        Route("/health", health.health, methods=["GET"]),
        Route("/ready", health.ready, methods=["GET"]),
        Route("/metrics", health.metrics, methods=["GET"]),
    ]

    async def show_openapi(request: Request) -> Response:
        return Response(openapi.document(), media_type="application/json")

    routes.append(Route("/openapi.json", show_openapi, methods=["GET"]))
    # Without a key nobody learns what is served.
    index = Index(
        "quire",
        registry.first.id if keyring is None else "",
        [*dict.fromkeys(route.path_format for route in routes)],
    )

    async def show_index(request: Request) -> Response:
        return json_response(index)

    middleware = [
        Middleware(RequestLog, prompts=log_prompts, tracing=tracing),
        Middleware(HTTPMetricsMiddleware, metrics),
    ]
    if allowed_hosts is not None:
        middleware.append(Middleware(AllowedHosts, hosts=allowed_hosts))
    if allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=allowed_origins,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=("*",),
                expose_headers=("X-Request-Id", "Retry-After", "X-Quire-Ignored"),
            )
        )
    middleware.append(Middleware(ForeignOrigins, origins=allowed_origins))
    middleware.append(Middleware(AccessControl, keyring=keyring))
    middleware.append(
        Middleware(BodyLimits, max_bytes=max_body_bytes, idle_timeout=body_idle_timeout)
    )
    app = Starlette(
        routes=[*page.routes(show_index), *routes],
        middleware=middleware,
        exception_handlers=exception_handlers,
    )
    # A redirect would be built from the Host header; an unknown path is a 404 instead.
    app.router.redirect_slashes = False
    return app
