"""GET /v1/models, and /tokenize and /detokenize: what the front end knows without the worker."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from quire.serve.middleware import read_json
from quire.serve.prompt import encode_chat, encode_texts
from quire.serve.protocol import DetokenizeRequest, RequestDecoder, TokenizeRequest
from quire.serve.registry import Registry
from quire.serve.responses import Detokenized, ModelCard, ModelList, Tokenized, json_response


class Models:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._cards = {
            served.model.id: ModelCard(served.model.id, served.model.created) for served in registry
        }
        self._tokenize = RequestDecoder(TokenizeRequest)
        self._detokenize = RequestDecoder(DetokenizeRequest)

    async def list(self, request: Request) -> Response:
        return json_response(ModelList([*self._cards.values()]))

    async def retrieve(self, request: Request) -> Response:
        served = self._registry.find(request.path_params["id"])
        return json_response(self._cards[served.model.id])

    async def tokenize(self, request: Request) -> Response:
        body = self._tokenize.decode(await read_json(request))
        served = self._registry.find_or_only(body.model)
        encoder = served.model.encoder
        if body.messages is not None:
            prompt = await encode_chat(encoder, served.model.chat_template, body.messages)
            tokens = prompt.token_ids
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
