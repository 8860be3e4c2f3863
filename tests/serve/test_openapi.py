"""/openapi.json describes what is there, and what is answered is as described."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from fake_backend import (
    MODEL,
    FakeBackend,
    Script,
    Server,
    one_model_app,
    served_model,
    serving,
)
from starlette.routing import Route

SERVED = served_model(["Hello"])
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hi"}
MORE = {"logprobs": True, "top_logprobs": 2, "n": 2, "return_token_ids": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    backend = FakeBackend([Script([SERVED.encoder.tokenizer.encode("Hello").ids])])
    with serving(one_model_app(backend, SERVED)) as running:
        yield running


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    return server.request("GET", "/openapi.json").json


def validate(document: Any, schema: Any, value: Any) -> None:
    whole = {**schema, "components": document["components"]}
    jsonschema.Draft202012Validator(whole).validate(value)


def described(document: Any, path: str, method: str, status: str, media: str) -> Any:
    return document["paths"][path][method]["responses"][status]["content"][media]


def test_every_route_is_described(server: Server, document: Any) -> None:
    app = one_model_app(FakeBackend(), SERVED)
    routes = {
        (route.path.replace(":path", ""), method.lower())
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
    found = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert found <= routes
    others = {path for path, _ in routes - found if not path.startswith("/page/")}
    assert others == {"/", "/openapi.json"}
    index = server.request("GET", "/", headers={"Accept": "application/json"}).json
    assert {path.replace(":path", "") for path in index["endpoints"]} >= set(document["paths"])


def test_the_schemas_are_valid(document: Any) -> None:
    assert len(document["components"]["schemas"]) > 40
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


CALLS: list[tuple[str, str, Any]] = [
    ("post", "/v1/chat/completions", CHAT),
    ("post", "/v1/chat/completions", CHAT | MORE),
    ("post", "/v1/completions", TEXT),
    ("post", "/v1/completions", TEXT | {"logprobs": 1, "echo": True, "return_token_ids": True}),
    ("post", "/v1/embeddings", {"model": MODEL, "input": ["hi", "there"]}),
    ("post", "/v1/embeddings", {"model": MODEL, "input": [1, 2], "encoding_format": "base64"}),
    ("post", "/v1/responses", {"model": MODEL, "input": "hi"}),
    ("post", "/v1/messages", CHAT | {"max_tokens": 5}),
    ("post", "/v1/messages/count_tokens", CHAT),
    ("get", "/v1/models", None),
    ("post", "/tokenize", TEXT),
    ("post", "/detokenize", {"tokens": [1, 2]}),
    ("post", "/apply-template", CHAT),
    ("get", "/health", None),
    ("get", "/ready", None),
]


@pytest.mark.parametrize(("method", "path", "body"), CALLS)
def test_answers_are_as_described(
    server: Server, document: Any, method: str, path: str, body: Any
) -> None:
    if body is not None:
        asked = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        validate(document, asked["schema"], body)
    reply = server.request(method.upper(), path, body)
    assert reply.status == 200, reply.body
    schema = described(document, path, method, "200", "application/json")["schema"]
    validate(document, schema, reply.json)


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", CHAT | MORE), ("/v1/completions", TEXT | {"logprobs": 2})],
)
def test_events_are_as_described(server: Server, document: Any, path: str, body: Any) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *events, done = server.events(path, body | options)
    assert done == "[DONE]"
    media = described(document, path, "post", "200", "text/event-stream")
    for event in events:
        validate(document, media["x-event"], event)


@pytest.mark.parametrize(
    ("method", "path", "body"), [(*call[:2], {"nonsense": 1}) for call in CALLS if call[2]]
)
def test_errors_are_as_described(
    server: Server, document: Any, method: str, path: str, body: Any
) -> None:
    reply = server.request(method.upper(), path, body)
    assert reply.status == 400
    schema = described(document, path, method, "4XX", "application/json")["schema"]
    validate(document, schema, json.loads(reply.body))
