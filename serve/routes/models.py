"""GET /v1/models, and /tokenize and /detokenize: what the front end knows without the worker."""

from __future__ import annotations

from datetime import UTC, datetime

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from quire.serve import conversation
from quire.serve.middleware import read_json
from quire.serve.prompt import encode_chat, encode_texts, render_chat
from quire.serve.protocol import (
    ChatCompletionRequest,
    DetokenizeRequest,
    RequestDecoder,
    TokenizeRequest,
)
from quire.serve.registry import Registry, Served
from quire.serve.responses import (
    Detokenized,
    ModelCard,
    ModelList,
    RenderedPrompt,
    Tokenized,
    json_response,
)


def _card(served: Served) -> ModelCard:
    model, info = served.model, served.backend.info
    length = UNSET if info is None else info.max_model_len
    created_at = datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z")
    return ModelCard(model.id, model.created, created_at, model.id, length, length)


class Models:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._chat = RequestDecoder(ChatCompletionRequest)
        self._tokenize = RequestDecoder(TokenizeRequest)
        self._detokenize = RequestDecoder(DetokenizeRequest)

    async def list(self, request: Request) -> Response:
        cards = [_card(served) for served in self._registry]
        return json_response(ModelList(cards, cards[0].id, cards[-1].id))

    async def retrieve(self, request: Request) -> Response:
        return json_response(_card(self._registry.find(request.path_params["id"])))

    async def apply_template(self, request: Request) -> Response:
        """The prompt that /v1/chat/completions would make of the same body."""
        body = self._chat.decode(await read_json(request))
        served = self._registry.find(body.model)
        rendered = await conversation.render(served, body)
        return json_response(RenderedPrompt(rendered.text))

    async def tokenize(self, request: Request) -> Response:
        body = self._tokenize.decode(await read_json(request))
        served = self._registry.find_or_only(body.model)
        encoder = served.model.encoder
        if body.messages is not None:
            rendered = await render_chat(served.model.chat_template, body.messages)
            tokens = (await encode_chat(encoder, rendered)).token_ids
        else:
            add = body.add_special_tokens is not False
            [tokens] = await encode_texts(encoder, [body.prompt or ""], add_special_tokens=add)
        info = served.backend.info
        return json_response(
            Tokenized(tokens, len(tokens), None if info is None else info.max_model_len)
        )

    async def detokenize(self, request: Request) -> Response:
        body = self._detokenize.decode(await read_json(request))
        served = self._registry.find_or_only(body.model)
        text = await served.model.encoder.decode(body.tokens)
        return json_response(Detokenized(text))
