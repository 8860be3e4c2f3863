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
    ready,
    served_model,
    serving,
)
from starlette.routing import Route
from test_chat_tools import CALL, SECOND, WEATHER, says
from test_chat_tools import SERVED as TALKS

from quire.serve.backend import GenerationFailed

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


def event_schema(content: Any) -> Any:
    """Of the JSON in an event's data."""
    data = content["text/event-stream"]["schema"]["properties"]["data"]
    return data.get("anyOf", [data])[0]["contentSchema"]


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
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    for event in events:
        validate(document, event_schema(content), event)


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


# ---- the other two APIs' answers, with all kinds of items

SAID = "<think>Hm.</think>Let me see.\n" + CALL + SECOND
NAMED = {"type": "function", "name": "weather", "parameters": WEATHER["function"]["parameters"]}
BOXED = {"type": "namespace", "name": "box", "tools": [{"type": "function", "name": "clock"}]}
CUSTOM = {"type": "custom", "name": "clock"}
ASKED: list[tuple[str, Any]] = [
    ("/v1/responses", {"input": "hi", "tools": [NAMED, CUSTOM], "user": "u", "temperature": 0.5}),
    ("/v1/responses", {"input": "hi", "tools": [NAMED, BOXED], "max_output_tokens": 30}),
    ("/v1/responses", {"input": "hi", "reasoning": {"effort": "low"}, "metadata": {"a": "b"}}),
    (
        "/v1/messages",
        {
            "max_tokens": 500,
            "messages": CHAT["messages"],
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "tools": [
                {"name": "weather", "input_schema": {"type": "object"}},
                {"name": "clock", "input_schema": {"type": "object"}},
            ],
        },
    ),
    ("/v1/messages", {"max_tokens": 3, "messages": CHAT["messages"], "stop_sequences": ["me"]}),
]


@pytest.mark.parametrize(("path", "fields"), ASKED)
def test_answers_with_all_kinds_of_items_are_as_described(
    document: Any, path: str, fields: Any
) -> None:
    body = {"model": MODEL, **fields}
    info = ready(max_model_len=4096)
    with serving(one_model_app(FakeBackend([says(SAID)], info=info), TALKS)) as server:
        whole = server.request("POST", path, body)
        stream = server.request("POST", path, body | {"stream": True})
        assert (whole.status, stream.status) == (200, 200), whole.body
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        validate(document, content["application/json"]["schema"], whole.json)
        lines = stream.body.decode().splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert len(events) >= 3
        for event in events:
            validate(document, event_schema(content), event)
        if path == "/v1/responses":
            kept = f"{path}/{whole.json['id']}"
            place = path + "/{id}"
            for method in ("get", "delete"):
                schema = described(document, place, method, "200", "application/json")["schema"]
                validate(document, schema, server.request(method.upper(), kept).json)


def test_an_answer_that_fails_is_as_described(document: Any) -> None:
    failing = Script([[1], GenerationFailed("The worker died.")])
    for path, fields in ASKED[2:4]:
        body = {"model": MODEL, "stream": True, **fields}
        backend = FakeBackend([failing], info=ready(max_model_len=4096))
        with serving(one_model_app(backend, TALKS)) as server:
            stream = server.request("POST", path, body)
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        lines = stream.body.decode().splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert events[-1]["type"] in ("response.failed", "error")
        for event in events:
            validate(document, event_schema(content), event)
