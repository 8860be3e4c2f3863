"""GET /v1/models, and /tokenize and /detokenize: what the front end knows without the worker."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from msgspec import UNSET, Struct
from starlette.requests import Request
from starlette.responses import Response

from quire.serve import conversation
from quire.serve.body_helpers import BodyHelpers, RequestReader
from quire.serve.errors import invalid
from quire.serve.middleware import read_json
from quire.serve.openai_answer import (
    Detokenized,
    ModelCard,
    ModelList,
    RenderedPrompt,
    Tokenized,
    json_response,
)
from quire.serve.openai_protocol import DetokenizeRequest
from quire.serve.prompt import encode_texts
from quire.serve.prompt_length import length_limit
from quire.serve.registry import Entry, Registry
from quire.serve.request_decoder import RequestDecoder
from quire.serve.request_kinds import CHAT, TOKENIZE


def _card(entry: Entry, name: str) -> ModelCard:
    served = entry.served
    info = None if served is None else served.backend.info
    length = UNSET if info is None else info.max_model_len
    created_at = datetime.fromtimestamp(entry.created, UTC).isoformat().replace("+00:00", "Z")
    switches = UNSET if served is None else served.model.switches
    return ModelCard(name, entry.created, created_at, name, length, length, switches)


class LoadRequest(Struct, forbid_unknown_fields=True):
    model: str


class ModelState(Struct, frozen=True):
    id: str
    state: Literal["loaded", "unloaded"]


class Models:
    def __init__(self, registry: Registry, bodies: BodyHelpers | None = None) -> None:
        self._registry = registry
        self._chat = RequestReader(CHAT, bodies)
        self._load = RequestDecoder(LoadRequest)
        self._tokenize = RequestReader(TOKENIZE, bodies)
        self._detokenize = RequestDecoder(DetokenizeRequest)

    async def list(self, request: Request) -> Response:
        cards = [_card(entry, name) for entry in self._registry for name in entry.names]
        return json_response(ModelList(cards, cards[0].id, cards[-1].id))

    async def retrieve(self, request: Request) -> Response:
        name = request.path_params["id"]
        entry = self._registry.find(name)
        return json_response(_card(entry, name if name in entry.names else entry.id))

    async def apply_template(self, request: Request) -> Response:
        """The prompt that /v1/chat/completions would make of the same body."""
        received = await self._chat.read(request)
        body = received.request
        served = await self._registry.open(request, body.model)
        rendered = await conversation.render(served, body, received.messages)
        return json_response(RenderedPrompt(rendered.text))

    async def load(self, request: Request) -> Response:
        """Returns once the model takes requests."""
        body = self._load.decode((await read_json(request)).whole())
        served = await self._registry.open(request, body.model)
        return json_response(ModelState(served.model.id, "loaded"))

    async def unload(self, request: Request) -> Response:
        """Returns once its memory has been given back."""
        body = self._load.decode((await read_json(request)).whole())
        entry = self._registry.find(body.model)
        await entry.unload()
        return json_response(ModelState(entry.id, "unloaded"))

    async def tokenize(self, request: Request) -> Response:
        received = await self._tokenize.read(request)
        body = received.request
        served = await self._registry.open_or_only(request, body.model)
        encoder = served.model.encoder
        if (chat := body.chat(served.model.id)) is not None:
            prompt = await conversation.encode_conversation(
                served, chat, None, large=received.messages
            )
            tokens = prompt.token_ids
        else:
            add = body.add_special_tokens is not False
            limit = length_limit(encoder, None)
            [text] = await self._tokenize.texts(received, limit, "prompt")
            assert isinstance(text, str)
            [tokens] = await encode_texts(encoder, [text], add_special_tokens=add)
        info = served.backend.info
        return json_response(
            Tokenized(tokens, len(tokens), None if info is None else info.max_model_len)
        )

    async def detokenize(self, request: Request) -> Response:
        body = self._detokenize.decode((await read_json(request)).whole())
        served = await self._registry.open_or_only(request, body.model)
        info = served.backend.info
        if info is not None and max(body.tokens, default=0) >= info.vocab_size:
            raise invalid(
                "tokens",
                f"tokens holds the token id {max(body.tokens)}; the model has {info.vocab_size}.",
            )
        text = await served.model.encoder.decode(body.tokens)
        return json_response(Detokenized(text))
