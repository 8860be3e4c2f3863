"""GET /openapi.json: the endpoints as the code reads and writes them, after OpenAPI 3.1."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec
from msgspec import Struct

from quire.serve.embeddings_protocol import EmbeddingList, EmbeddingRequest
from quire.serve.errors import ErrorEnvelope
from quire.serve.messages_answer import MessageAnswer, MessageEvent, TokenCount
from quire.serve.messages_protocol import CountTokensRequest, MessagesRequest
from quire.serve.openai_answer import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Detokenized,
    ModelCard,
    ModelList,
    RenderedPrompt,
    Tokenized,
)
from quire.serve.openai_protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from quire.serve.responses_answer import DeletedResponse, ResponseAnswer, ResponseEvent
from quire.serve.responses_protocol import ResponsesRequest
from quire.serve.routes.health import Status
from quire.serve.routes.models import LoadRequest, ModelState

Schema = dict[str, Any]


class Operation(Struct, frozen=True):
    """What one endpoint takes and gives, as types."""

    method: str
    path: str
    summary: str
    body: Any = None
    answer: Any = None
    events: Any = None  # of a stream; None: there is none
    media: str = "application/json"


OPERATIONS: Final[Sequence[Operation]] = (
    Operation(
        "post",
        "/v1/chat/completions",
        "Answer a conversation",
        ChatCompletionRequest,
        ChatCompletion,
        ChatCompletionChunk,
    ),
    Operation(
        "post", "/v1/completions", "Continue a text", CompletionRequest, Completion, Completion
    ),
    Operation("post", "/v1/embeddings", "Texts to vectors", EmbeddingRequest, EmbeddingList),
    Operation(
        "post",
        "/v1/responses",
        "Answer in OpenAI's newer form",
        ResponsesRequest,
        ResponseAnswer,
        ResponseEvent,
    ),
    Operation("get", "/v1/responses/{id}", "An answer that is kept", None, ResponseAnswer),
    Operation("delete", "/v1/responses/{id}", "Forget an answer", None, DeletedResponse),
    Operation(
        "post",
        "/v1/responses/{id}/cancel",
        "End an answer that is being generated",
        None,
        ResponseAnswer,
    ),
    Operation(
        "post",
        "/v1/messages",
        "Answer in Anthropic's form",
        MessagesRequest,
        MessageAnswer,
        MessageEvent,
    ),
    Operation(
        "post",
        "/v1/messages/count_tokens",
        "Count a prompt's tokens",
        CountTokensRequest,
        TokenCount,
    ),
    Operation("get", "/v1/models", "What is served", None, ModelList),
    Operation("get", "/v1/models/{id}", "One model", None, ModelCard),
    Operation("post", "/v1/models/load", "Load a model (admin key)", LoadRequest, ModelState),
    Operation("post", "/v1/models/unload", "Unload a model (admin key)", LoadRequest, ModelState),
    Operation("post", "/tokenize", "Text or messages to token ids", TokenizeRequest, Tokenized),
    Operation("post", "/detokenize", "Token ids to text", DetokenizeRequest, Detokenized),
    Operation(
        "post",
        "/apply-template",
        "The prompt that a conversation makes",
        ChatCompletionRequest,
        RenderedPrompt,
    ),
    Operation("get", "/health", "Whether the processes exist", None, Status),
    Operation("get", "/ready", "Whether requests are taken", None, Status),
    Operation("get", "/metrics", "Prometheus metrics", media="text/plain"),
)


@functools.cache
def document() -> bytes:
    """JSON, in UTF-8."""
    kinds = [
        kind
        for operation in OPERATIONS
        for kind in (operation.body, operation.answer, operation.events)
        if kind is not None
    ]
    kinds = [*dict.fromkeys([*kinds, ErrorEnvelope])]
    schemas, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    by_kind = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, by_kind)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "Quire", "version": version("quire")},
            "paths": paths,
            "components": {"schemas": components},
        }
    )


def _operation(operation: Operation, by_kind: dict[Any, Schema]) -> Schema:
    content: Schema = {operation.media: {"schema": {"type": "string"}}}
    if operation.media == "application/json":
        content = {operation.media: {"schema": by_kind[operation.answer]}}
    if operation.events is not None:
        content["text/event-stream"] = {"schema": _event_schema(operation, by_kind)}
    error = {
        "description": "Refused; `param` names the field, if one is to blame.",
        "content": {"application/json": {"schema": _error_schema(operation, by_kind)}},
    }
    described: Schema = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "4XX": error,
            "5XX": {**error, "description": "Failed, or not available now."},
        },
    }
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": by_kind[operation.body]}},
        }
    if "{id}" in operation.path:
        described["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return described


def _event_schema(operation: Operation, by_kind: dict[Any, Schema]) -> Schema:
    """Of one event; OpenAPI 3.2 calls it itemSchema."""

    def text(content: Schema) -> Schema:
        return {"type": "string", "contentMediaType": "application/json", "contentSchema": content}

    data = text(by_kind[operation.events])
    if operation.path in ("/v1/chat/completions", "/v1/completions"):
        # The stream ends with an error or with this word.
        data = {"anyOf": [data, text(by_kind[ErrorEnvelope]), {"const": "[DONE]"}]}
    return {
        "type": "object",
        "description": "One event.",
        "required": ["data"],
        "properties": {"event": {"type": "string"}, "data": data},
    }


def _error_schema(operation: Operation, by_kind: dict[Any, Schema]) -> Schema:
    if not operation.path.startswith("/v1/messages"):
        return by_kind[ErrorEnvelope]
    detail = {"type": "object", "required": ["type", "message"]}
    return {
        "type": "object",
        "required": ["type", "error", "request_id"],
        "properties": {"type": {"const": "error"}, "error": detail},
    }
