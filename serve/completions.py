"""POST /v1/completions, the older endpoint for raw prompts."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from quire.serve import submission
from quire.serve.answer import Answer, UsageField
from quire.serve.backend import Backend
from quire.serve.generation import TextDelta
from quire.serve.limits import read_json
from quire.serve.prompt import encode_texts
from quire.serve.protocol import CompletionRequest, RequestDecoder
from quire.serve.responses import Completion, CompletionChoice, FinishReason
from quire.serve.tokenizer import ServedModel


class Completions:
    def __init__(self, backend: Backend, model: ServedModel) -> None:
        self._backend = backend
        self._model = model
        self._decoder = RequestDecoder(CompletionRequest)

    async def create(self, request: Request) -> Response:
        body = self._decoder.decode(await read_json(request))
        submission.check_model(body.model, self._model)
        info = self._backend.admit()
        prompts = await self._encode(body.prompts)
        group = submission.start(self._backend, self._model, info, body, prompts, "prompt")
        return await CompletionAnswer(self._model.id, group).respond(request, body)

    async def _encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(await encode_texts(self._model.tokenizer, texts))
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]


class CompletionAnswer(Answer[CompletionChoice]):
    id_prefix = "cmpl"

    def opening(self) -> list[CompletionChoice]:
        return []

    def pieces(self, delta: TextDelta) -> list[CompletionChoice]:
        return [CompletionChoice(delta.index, delta.text, delta.finish_reason)]

    def chunk(self, choices: list[CompletionChoice], usage: UsageField) -> Completion:
        return Completion(self.id, self.created, self.model_id, choices, usage)

    def whole(self, results: Sequence[tuple[str, FinishReason]]) -> Completion:
        choices = [
            CompletionChoice(index, text, reason) for index, (text, reason) in enumerate(results)
        ]
        return Completion(self.id, self.created, self.model_id, choices, self.group.usage)
