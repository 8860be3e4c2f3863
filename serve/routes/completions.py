"""POST /v1/completions, the older endpoint for raw prompts."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from quire.serve import submission
from quire.serve.answer import Answer, Collected, UsageField
from quire.serve.disconnect import unless_disconnected
from quire.serve.generation import TextDelta
from quire.serve.middleware import read_json
from quire.serve.output_form import wanted_of_text
from quire.serve.prompt import encode_texts
from quire.serve.protocol import CompletionRequest, RequestDecoder
from quire.serve.registry import Registry
from quire.serve.responses import Completion, CompletionChoice
from quire.serve.served_model import ServedModel


class Completions:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._decoder = RequestDecoder(CompletionRequest)

    async def create(self, request: Request) -> Response:
        body = self._decoder.decode(await read_json(request))
        served = self._registry.find(body.model)
        info = served.backend.admit()
        prompts = await unless_disconnected(
            request, _encode(served.model, body.prompts, info.max_model_len)
        )
        grammar = await unless_disconnected(request, served.check_output(wanted_of_text(body)))
        group = submission.start(served, info, body, prompts, "prompt", grammar=grammar)
        return await CompletionAnswer(served.model.id, group).respond(request, body)


async def _encode(
    model: ServedModel, prompts: Sequence[str | list[int]], max_model_len: int
) -> list[list[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(await encode_texts(model.encoder, texts, max_model_len))
    return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]


class CompletionAnswer(Answer[CompletionChoice]):
    id_prefix = "cmpl"

    def opening(self) -> list[CompletionChoice]:
        return []

    def pieces(self, delta: TextDelta) -> list[CompletionChoice]:
        return [CompletionChoice(delta.index, delta.text, delta.finish_reason)]

    def chunk(self, choices: list[CompletionChoice], usage: UsageField) -> Completion:
        return Completion(self.id, self.created, self.model_id, choices, usage)

    def whole(self, results: Sequence[Collected]) -> Completion:
        choices = [
            CompletionChoice(index, result.text, result.finish_reason)
            for index, result in enumerate(results)
        ]
        return Completion(self.id, self.created, self.model_id, choices, self.group.usage)
