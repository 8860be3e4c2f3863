"""GET /v1/models, and /tokenize and /detokenize: what the front end knows without the worker."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from quire.serve import submission
from quire.serve.backend import Backend
from quire.serve.limits import read_json
from quire.serve.prompt import encode_chat, encode_texts
from quire.serve.protocol import DetokenizeRequest, RequestDecoder, TokenizeRequest
from quire.serve.responses import Detokenized, ModelCard, ModelList, Tokenized, json_response
from quire.serve.tokenizer import ServedModel


class Models:
    def __init__(self, backend: Backend, model: ServedModel) -> None:
        self._backend = backend
        self._model = model
        self._card = ModelCard(model.id, model.created)
        self._tokenize = RequestDecoder(TokenizeRequest)
        self._detokenize = RequestDecoder(DetokenizeRequest)

    async def list(self, request: Request) -> Response:
        return json_response(ModelList([self._card]))

    async def retrieve(self, request: Request) -> Response:
        submission.check_model(request.path_params["id"], self._model)
        return json_response(self._card)

    async def tokenize(self, request: Request) -> Response:
        body = self._tokenize.decode(await read_json(request))
        if body.model is not None:
            submission.check_model(body.model, self._model)
        tokenizer = self._model.tokenizer
        if body.messages is not None:
            tokens = await encode_chat(tokenizer, self._model.chat_template, body.messages)
        else:
            add = body.add_special_tokens is not False
            [tokens] = await encode_texts(tokenizer, [body.prompt or ""], add_special_tokens=add)
        info = self._backend.info
        return json_response(
            Tokenized(tokens, len(tokens), None if info is None else info.max_model_len)
        )

    async def detokenize(self, request: Request) -> Response:
        body = self._detokenize.decode(await read_json(request))
        if body.model is not None:
            submission.check_model(body.model, self._model)
        text = self._model.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return json_response(Detokenized(text))
