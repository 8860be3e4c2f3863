"""POST /v1/completions, the older endpoint for raw prompts."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from quire.serve import submission
from quire.serve.answer import Answer, Collected, UsageField
from quire.serve.body_helpers import BodyHelpers, Received, RequestReader
from quire.serve.disconnect import unless_disconnected
from quire.serve.errors import invalid
from quire.serve.generation import GenerationGroup, TextDelta
from quire.serve.logprob_format import completion_logprobs
from quire.serve.openai_answer import Completion, CompletionChoice, CompletionLogprobs
from quire.serve.openai_protocol import CompletionRequest
from quire.serve.output_form import wanted_of_text
from quire.serve.prompt import encode_texts
from quire.serve.prompt_length import length_limit
from quire.serve.registry import Registry, Served
from quire.serve.request_kinds import COMPLETION
from quire.serve.served_model import ServedModel
from quire.serve.token_log import ShownToken


class Completions:
    def __init__(self, registry: Registry, bodies: BodyHelpers | None = None) -> None:
        self._registry = registry
        self._reader = RequestReader(COMPLETION, bodies)

    async def create(self, request: Request) -> Response:
        received = await self._reader.read(request)
        body = received.request
        served = await self._registry.open(request, body.model)
        info = served.backend.admit()
        prompts, grammar = await unless_disconnected(
            request, self._prepare(served, received, info.max_model_len)
        )
        group = submission.start(served, info, submission.Work(body, prompts, "prompt", grammar))
        return await CompletionAnswer(served.model, group, body).respond(request)

    async def _prepare(
        self, served: Served, received: Received[CompletionRequest], max_model_len: int
    ) -> tuple[list[list[int]], str]:
        """The prompts, and the grammar of the output."""
        prompts = await self._encode(served.model, received, max_model_len)
        return prompts, await served.check_output(wanted_of_text(received.request))

    async def _encode(
        self, model: ServedModel, received: Received[CompletionRequest], max_model_len: int
    ) -> list[list[int]]:
        body, encoder = received.request, model.encoder
        limit = None if body.truncate_prompt_tokens is not None else max_model_len
        prompts = await self._reader.texts(received, length_limit(encoder, limit), "prompt")
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        # Around a gap there is no start of a text.
        special = body.add_special_tokens is not False and not body.suffix
        encoded = iter(await encode_texts(encoder, texts, limit, add_special_tokens=special))
        found = [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]
        if not body.suffix:
            return found
        if (fill := model.fill_tokens) is None:
            raise invalid(
                "suffix", "suffix is not supported: this model has no tokens to fill gaps."
            )
        [suffix] = await encode_texts(encoder, [body.suffix], limit, add_special_tokens=False)
        return [fill.prompt(before, suffix) for before in found]


class CompletionAnswer(Answer[CompletionChoice]):
    id_prefix = "cmpl"

    def __init__(self, model: ServedModel, group: GenerationGroup, body: CompletionRequest) -> None:
        super().__init__(model, group, body)
        self._begun: set[int] = set()  # choices of which something has been streamed

    def opening(self) -> list[CompletionChoice]:
        return []

    def pieces(self, delta: TextDelta) -> list[CompletionChoice]:
        is_first = delta.index not in self._begun
        self._begun.add(delta.index)
        return [
            CompletionChoice(
                delta.index,
                delta.text,
                delta.finish_reason,
                self._logprobs(delta.tokens) if delta.tokens else None,
                self._token_ids(delta.token_ids),
                self._prompt_token_ids(delta.index) if is_first else UNSET,
            )
        ]

    def chunk(self, choices: list[CompletionChoice], usage: UsageField) -> Completion:
        return Completion(self.id, self.created, self.model.id, choices, usage)

    def whole(self, results: Sequence[Collected]) -> Completion:
        choices = [
            CompletionChoice(
                index,
                results[place].text,
                results[place].finish_reason,
                self._logprobs(results[place].tokens),
                self._token_ids(results[place].token_ids),
                self._prompt_token_ids(place),
            )
            for index, place in enumerate(self._best())
        ]
        return Completion(self.id, self.created, self.model.id, choices, self.group.usage)

    def _best(self) -> list[int]:
        """Which sequences are the answer: for each prompt the n likeliest by their mean token."""
        generations, size = self.group.generations, self.body.num_sequences
        if size == self.body.num_choices:
            return [*range(len(generations))]
        best: list[int] = []
        for first in range(0, len(generations), size):
            ranked = sorted(
                range(first, first + size),
                key=lambda place: -generations[place].mean_logprob,
            )
            best += ranked[: self.body.num_choices]
        return best

    def _prompt_token_ids(self, place: int) -> Sequence[int] | UnsetType:
        return self._token_ids(self.group.generations[place].prompt_token_ids)

    def _token_ids(self, token_ids: Sequence[int]) -> Sequence[int] | UnsetType:
        return token_ids if self.body.return_token_ids else UNSET

    def _logprobs(self, tokens: Sequence[ShownToken]) -> CompletionLogprobs | None:
        num_top = self.body.num_top_logprobs
        if num_top is None:
            return None
        return completion_logprobs(tokens, self.model.all_token_bytes, num_top)
