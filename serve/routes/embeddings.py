"""POST /v1/embeddings: texts to vectors, by the hidden states of the model that is served."""

from __future__ import annotations

import base64
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from quire.engine.messages import GenerateRequest, Pooling, Ready, SamplingParams, TokenOutput
from quire.serve.backend import UNNUMBERED, Backend, QueueFull, TokenStream
from quire.serve.body_helpers import BodyHelpers, Received, RequestReader
from quire.serve.disconnect import unless_disconnected
from quire.serve.embeddings_protocol import (
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
)
from quire.serve.errors import ApiError, invalid
from quire.serve.openai_answer import encode, json_response
from quire.serve.prompt import encode_texts
from quire.serve.prompt_length import PromptTooLong, length_limit
from quire.serve.registry import Registry, Served
from quire.serve.request_kinds import EMBEDDING
from quire.serve.submission import check_prompt


class Embeddings:
    def __init__(self, registry: Registry, bodies: BodyHelpers | None = None) -> None:
        self._registry = registry
        self._reader = RequestReader(EMBEDDING, bodies)

    async def create(self, request: Request) -> Response:
        received = await self._reader.read(request)
        body = received.request
        served = await self._registry.open(request, body.model)
        info = served.backend.admit()
        _check_size(body, info)
        prompts = await unless_disconnected(request, self._encode(served, received, info))
        requests = [_build(served, body, prompt) for prompt in prompts]
        data = await unless_disconnected(request, _embed(served.backend, info, body, requests))
        used = sum(map(len, prompts))
        return json_response(EmbeddingList(data, served.id, EmbeddingUsage(used, used)))

    async def _encode(
        self, served: Served, received: Received[EmbeddingRequest], info: Ready
    ) -> list[list[int]]:
        limit, encoder = info.max_model_len, served.model.encoder
        try:
            # A vector may take the whole context: no answer follows.
            most = length_limit(encoder, limit + 1)
            inputs = await self._reader.texts(received, most, "input")
            texts = [each for each in inputs if isinstance(each, str)]
            encoded = iter(await encode_texts(encoder, texts, limit + 1))
        except PromptTooLong as error:
            raise _too_long(f"at least {error.fewest}", limit) from None
        prompts = [next(encoded) if isinstance(each, str) else each for each in inputs]
        for prompt in prompts:
            check_prompt(prompt, "input", info)
            if len(prompt) > limit:
                raise _too_long(str(len(prompt)), limit)
        return prompts


def _check_size(body: EmbeddingRequest, info: Ready) -> None:
    size = info.abilities.hidden_size
    if not size:
        raise invalid(
            "model", "This model gives no vectors: its last hidden states cannot be reached."
        )
    if body.dimensions is not None and body.dimensions > size:
        raise invalid(
            "dimensions", f"dimensions is {body.dimensions}; this model's vectors have {size}."
        )


def _too_long(count: str, limit: int) -> ApiError:
    return invalid(
        "input",
        f"This model holds {limit} tokens; an input has {count}. Shorten it.",
        code="context_length_exceeded",
    )


def _build(served: Served, body: EmbeddingRequest, prompt: list[int]) -> GenerateRequest:
    return GenerateRequest(
        UNNUMBERED,
        prompt,
        max_tokens=0,
        sampling=SamplingParams(),
        cache_salt=body.cache_salt or "",
        priority=body.priority or 0,
        pooling=Pooling(served.model.pooling, body.dimensions),
    )


async def _embed(
    backend: Backend, info: Ready, body: EmbeddingRequest, requests: Sequence[GenerateRequest]
) -> list[Embedding]:
    """In their order. Only some are in the queue at a time, so that a list of any length leaves
    room for other clients.

    Raises :class:`BackendError`.
    """
    most = max(1, min(info.max_num_seqs // 2, backend.max_in_flight))
    running: deque[TokenStream] = deque()
    found: list[Embedding] = []

    async def take_first() -> None:
        output = await _last_of(running[0])
        running.popleft()
        found.append(_written(len(found), output.vector, body.encoding_format == "base64"))

    try:
        for request in requests:
            if len(running) == most:
                await take_first()
            stream = None
            while stream is None and running:
                with suppress(QueueFull):
                    stream = backend.submit(request)
                if stream is None:
                    await take_first()
            running.append(stream or backend.submit(request))
        while running:
            await take_first()
    finally:
        for stream in running:
            stream.close()
    return found


async def _last_of(stream: TokenStream) -> TokenOutput:
    outputs = [output async for output in stream]
    return outputs[-1]


def _written(index: int, vector: bytes, as_base64: bool) -> Embedding:
    """Encoded as it comes: all vectors at once would hold up other clients' streams."""
    value: list[float] | str
    if as_base64:
        value = base64.b64encode(vector).decode()
    else:
        value = list(struct.unpack(f"<{len(vector) // 4}f", vector))
    return cast(Embedding, msgspec.Raw(encode(Embedding(index, value))))
